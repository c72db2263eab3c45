"""What results show of themselves, in a notebook and in a line; and what `inspect` and `convert` give in Python."""

import dataclasses
import html.parser
import json
import re

import jax
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge import tables
from jaxmerge.cli import main
from tests import recipes

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "&lt;b&gt; 'a' & b", "a\x1b[31m\x00b"]
ALLOWED = {"div", "b", "table", "thead", "tbody", "tr", "th", "td"}


class Reader(html.parser.HTMLParser):
    """Reads what a notebook would show, and refuses what it would run."""

    def __init__(self, markup):
        super().__init__()
        self.words, self.open = [], []
        self.feed(markup)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert tag in ALLOWED
        for name, value in attrs:
            assert name == "style"
            # What is light or dark is the notebook's.
            assert re.fullmatch(r"text-align:(left|right);font-variant-numeric:tabular-nums", value)
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data.strip())

    def rows(self):
        """The texts, for rows of a table to be looked for in."""
        return " | ".join(word for word in self.words if word)


def shown(result):
    return Reader(result._repr_html_()).rows()


def _called(name):
    return jm.Metadata(name=name, base_model="llama", provenance=json.dumps({"path": name}))


@pytest.fixture(scope="module")
def adapters():
    first = jm.Adapter({path: recipes.factors(path, 3, 0) for path in recipes.PATHS})
    second = jm.Adapter({path: recipes.factors(path, 2, 1) for path in recipes.PATHS[3:]})
    return [
        dataclasses.replace(adapter, metadata=_called(name)) for adapter, name in ((first, "math"), (second, "code"))
    ]


@pytest.fixture(scope="module")
def merged(adapters):
    queries = [
        dataclasses.replace(a, modules={path: lora for path, lora in a.modules.items() if path.endswith("q_proj")})
        for a in adapters
    ]
    return jm.merge(queries, [1.0, -0.5], method="cart", rank=2, stages=[("scale", {"factor": 2.0})])


def test_an_adapter(adapters):
    text = shown(adapters[0])
    # 4 layers of 3·(10+8), 3·(6+8) and 3·(12+8) numbers.
    assert text.startswith("math | peft, 12 modules, 624 parameters, base model llama | ")
    assert "module | dtype | out×in | rank | count | " in text
    assert "model.layers.*.self_attn.q_proj | float32 | 10×8 | 3 | 4 | " in text
    assert "energy" not in text


def test_a_merged_adapter_says_how_it_was_made(merged):
    text = shown(merged)
    assert "base model llama | method cart, space full, rank_share 0.08, strength 1, then scale factor 2 | " in text
    assert "merged from | weight | 1 | math | 1 | 2 | code | -0.5" in text
    kept = [float(energy.kept) for energy in merged.energy.values()]
    low, high = (f"{100 * end:.1f} %" for end in (min(kept), max(kept)))
    assert low != high
    assert f"model.layers.*.self_attn.q_proj | float32 | 10×8 | 2 | 4 | {low} … {high}" in text
    assert text.endswith(f"energy kept: {100 * float(jm.energy_kept(merged)):.1f} %")
    small = jm.resize(merged, energy=0.7)
    assert "resized: energy 0.7" in shown(small)
    assert {lora.rank for lora in small.modules.values()} == {1, 2}
    assert "10×8 | 1 … 2 | 4" in shown(small)


def test_what_merged_adapters_were_merged_from(adapters, merged):
    nameless = dataclasses.replace(adapters[0], metadata=jm.Metadata())
    again = jm.merge([merged, adapters[0], nameless], [1, 2, 0.3])
    assert "merged from | weight | 1 | a result | 1 | 2 | math | 2 | 3 | adapter 3 | 0.3 | module" in shown(again)


def test_factors(adapters):
    lora = adapters[0].modules["model.layers.1.self_attn.q_proj"]
    shapes = "shape | dtype | A | 3×8 | float32 | B | 10×3 | float32"
    assert shown(lora) == f"LoRA | 10×8, rank 3, scale 0.5 | {shapes}"
    scanned = jm.LoRA(np.zeros((5, 2, 8), np.float32), np.zeros((5, 4, 2), np.float32), bias=np.zeros((5, 4)))
    shapes = "shape | dtype | A | 5×2×8 | float32 | B | 5×4×2 | float32 | bias | 5×4 | float64"
    assert shown(scanned) == f"LoRA | 5×4×8, rank 2, scale 1 | {shapes}"


def test_no_values_are_wanted(adapters, merged):
    """Shapes will do; and JAX makes adapters of anything."""
    of_shapes = jax.eval_shape(lambda x: x, adapters[0])
    assert shown(of_shapes) == shown(jax.tree.map(lambda x: x, adapters[0]))  # Which orders modules by name.
    assert "scale" not in shown(of_shapes.modules[recipes.PATHS[0]])
    assert "energy" not in shown(jax.eval_shape(lambda x: x, merged))
    traced = []
    jax.jit(lambda x: traced.append((shown(x), repr(x), shown(x.modules[recipes.PATHS[0]]))))(merged)
    assert "10×8" in traced[0][0]
    for leaf in (1.0, "text", None, np.float32(2)):
        strange = jax.tree.map(lambda _, leaf=leaf: leaf, adapters[0])
        assert repr(strange) == "Adapter(12 modules, peft, math)"
        assert "0 parameters" in shown(strange)
        assert shown(jax.tree.map(lambda _, leaf=leaf: leaf, adapters[0].modules[recipes.PATHS[0]]))


def results(adapters):
    """One of everything that is shown."""
    merged = jm.merge(adapters, [1.0, 0.5])
    yield from (adapters[0], merged, next(iter(merged.modules.values())), jm.compare(adapters))
    yield jm.sweep(adapters, jm.scores(adapters), {"scale": [0.5, 1.0], "weights": [[1.0, 2.0]]}, space="core")
    yield from (jm.preview(adapters), jm.inspect(adapters[0]), jm.contributions(merged, adapters))
    yield from (jm.METHODS, jm.SPACES, jm.COMBINATION_TYPES)


def test_a_line_is_enough(adapters):
    adapter, merged, lora, comparison, sweep, preview, inspection, contributions, *rows = results(adapters)
    assert repr(adapter) == "Adapter(12 modules, rank 3, peft, math)"
    assert repr(merged) == "Adapter(12 modules, rank 3 … 5, peft)"
    assert repr(lora) == "LoRA(10×8, rank 3, float32)"
    cosine = comparison.total.pairs[0].cosine
    assert repr(comparison) == f"Comparison(2 adapters, 12 modules, cosines {cosine:.2g})"
    assert repr(sweep) == "Sweep(2 settings of scale, weights, energy_kept, norm, worst_cosine)"
    assert repr(preview) == "Preview(2 adapters, linear in full, 12 modules, rank 3 … 5)"
    assert repr(inspection) == "Inspection(math, peft, 12 modules, rank 3)"
    assert repr(contributions) == "Contributions(2 adapters, 12 modules, fit 1 0.5)"
    assert repr(jm.report(None, adapters)) == "Report(math + code)"
    assert repr(rows[0]).splitlines()[1].split(maxsplit=1) == ["ties", str(jm.METHODS["ties"])]
    assert len(repr(rows[1]).splitlines()) == len(jm.SPACES)
    assert "ties_svd             ties in full" in repr(rows[2])


def test_tables_of_results(adapters):
    _, _, _, comparison, sweep, preview, inspection, contributions, methods, *_ = map(shown, results(adapters))
    found = jm.compare(adapters)
    assert "Comparison | 2 adapters, 12 modules" in comparison
    assert f"1 | math | 0.5 | 12 | 3 | {found.total.norms[0]:.4g}" in comparison
    assert f"1, 2 | {found.total.pairs[0].cosine:.3f}" in comparison
    assert "model.layers.*.mlp.up_proj" in comparison
    assert found.advice[0].what in comparison
    assert found.advice[0].what.startswith("Start with --method linear")
    assert "scale | weights | energy kept | norm | worst cosine | 0.5 | 1, 2 | 1 | " in sweep
    assert "model.layers.*.self_attn.q_proj | 10×8 | 3 | 1 | 3 | float32 | 1" in preview
    assert "code lacks 3 modules" in preview
    assert "12×8 | 3 | 0.5 | 4 | " in inspection
    assert "1 | math | 1 | " in contributions
    assert f"ties | {jm.METHODS['ties']}" in methods


def hostile(name):
    module = jm.LoRA(np.ones((2, 4), np.float32), np.ones((4, 2), np.float32))
    other = dataclasses.replace(module, a=np.arange(8, dtype=np.float32).reshape(2, 4))
    metadata = jm.Metadata(name=name, base_model=name)
    extras = {name: np.zeros(2, np.float32)}
    return [
        jm.Adapter({f"{name}.q": module}, extras=extras, metadata=metadata),
        jm.Adapter({f"{name}.q": other}, metadata=dataclasses.replace(metadata, name="b")),
    ]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_only_names(name):
    adapters = hostile(name)
    told = re.sub(r"[\x00-\x1f]", "\ufffd", name)
    alone = [jm.Adapter(a.modules, metadata=a.metadata) for a in adapters]
    named = jm.Adapter | jm.Comparison | jm.Preview | jm.Inspection | jm.Contributions
    for result in [adapters[0], jm.inspect(adapters[0]), *results(alone)]:
        assert (told in shown(result)) == isinstance(result, named), type(result)
    assert f"not LoRA factors: {told}" in shown(adapters[0])
    assert f"{told}.q" in shown(adapters[0])
    setting = jm.Sweep([{name: 0.5}], {name: np.array([2.0])})
    assert f"{told} | {told} | 0.5 | 2" in shown(setting).replace("_", " ")


def test_long_tables_end():
    rows = [(i,) for i in range(100)]
    text = Reader(tables.html("t", [], tables.Table(tables.columns([], ["i"]), rows))).rows()
    assert "39 | and 60 more" in text
    assert "| 40 |" not in text
    whole = Reader(tables.html("t", [], tables.Table(tables.columns([], ["i"]), rows[:40]))).rows()
    assert whole.endswith("39")
    # What is empty is left out.
    nothing = tables.Table(tables.columns(["x"], []), [])
    assert tables.html("t", ["", "a"], "", nothing) == "<div><div><b>t</b> a</div></div>"


@pytest.mark.parametrize("scores", [np.array([1.0, 2.0]), {"a": np.array([1.0, 2.0]), "b": np.zeros((2, 3))}, [(1, 2)]])
def test_scores_of_any_kind(scores):
    sweep = jm.Sweep([{"density": 0.5}, {"density": np.float32(0.25)}], scores)
    assert repr(sweep).startswith("Sweep(2 settings of density")
    assert "density" in shown(sweep)
    assert "0.25" in shown(sweep)
    told = json.loads(json.dumps(sweep.to_json()))
    assert told["settings"] == [{"density": 0.5}, {"density": 0.25}]
    assert jax.tree.leaves(told["scores"]) == [float(x) for leaf in jax.tree.leaves(scores) for x in np.ravel(leaf)]
    assert repr(jm.Sweep([], {})) == "Sweep(0 settings)"


def test_inspect_is_what_the_command_prints(tmp_path, capsys):
    recipes.write(tmp_path / "a")
    found = jm.inspect(tmp_path / "a")
    assert main(["inspect", str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adapters"] == [found.to_json()]
    path = recipes.PATHS[0]
    lora = recipes.factors(path)
    norm = np.linalg.norm(0.5 * lora.b.astype(np.float64) @ lora.a.astype(np.float64))
    assert dataclasses.replace(found.modules[path], norm=None) == type(found.modules[path])(
        "linear", (10, 8), (), 3, 0.5, "float32", False, None
    )
    assert found.modules[path].norm == pytest.approx(norm, rel=1e-6)
    assert (found.parameters, found.tensors, found.cannot_be_merged) == (624, 24, ())
    in_memory = jm.inspect(jm.load(tmp_path / "a"))
    assert in_memory.modules == found.modules
    assert in_memory.sha256 == found.sha256
    of_shapes = jm.inspect(jm.peek(tmp_path / "a"))
    assert {m.norm for m in of_shapes.modules.values()} == {None}
    assert "unknown" in shown(of_shapes)


def test_inspect_says_why_not(tmp_path):
    lora = jm.LoRA(np.full((1, 4), np.nan, np.float32), np.ones((4, 1), np.float32))
    found = jm.inspect(jm.Adapter({"x.0": lora, "x.1": dataclasses.replace(lora, a=np.ones((1, 4), np.float32))}))
    assert found.cannot_be_merged == ("module x.0 holds NaN or inf",)
    assert found.modules["x.0"].norm is None
    assert found.modules["x.1"].norm == pytest.approx(4)
    assert "problem: module x.0 holds NaN or inf" in shown(found)
    assert ", 1 problem)" in repr(found)
    assert json.dumps(found.to_json(), allow_nan=False)
    with pytest.raises(ValueError, match="nowhere: there is no such folder"):
        jm.inspect(tmp_path / "nowhere")


def test_convert_writes_and_tells(tmp_path):
    lora = jm.LoRA(np.ones((2, 8), np.float32), np.ones((16, 2), np.float32), scale=0.5)
    paths = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    jm.save(jm.Adapter(dict.fromkeys(paths, lora)), tmp_path / "peft")
    done = jm.convert(tmp_path / "peft", tmp_path / "tunix", format="tunix", layout="llama3", head_dim=8)
    assert (done.format, done.layout, done.head_dim, done.layers) == ("tunix", "llama3", 8, None)
    assert (done.modules_read, done.ranks_read, len(done.modules)) == (2, (2,), 2)
    assert repr(done).endswith("tunix, format tunix, layout llama3, head_dim 8, 2 modules, rank 2)")
    assert "2 modules of rank 2 read, 2 written, exact" in shown(done)
    assert json.dumps(done.to_json())
    back = jm.convert(tmp_path / "tunix", tmp_path / "back", format="peft", layout="llama3", alpha=2.0, tree="qwix")
    assert set(back.modules) == set(paths)
    for path in paths:
        assert np.array_equal(jm.delta(jm.load(tmp_path / "back").modules[path]), np.full((16, 8), 1.0))
    with pytest.raises(ValueError, match="already exists"):
        jm.convert(tmp_path / "peft", tmp_path / "tunix", format="tunix", layout="llama3", head_dim=8)
    jm.convert(tmp_path / "peft", tmp_path / "tunix", format="tunix", layout="llama3", head_dim=8, force=True)
    with pytest.raises(ValueError, match="would be overwritten"):
        jm.convert(tmp_path / "peft", tmp_path / "peft", format="peft", force=True)
