"""Conversions with tables of one's own, the command line, and what is refused. The tables of real models are compared
with those models in test_tunix.py and test_maxtext.py."""

import json

import numpy as np
import pytest
import safetensors.numpy

import jaxmerge as jm
from jaxmerge.cli import main
from jaxmerge.layouts import LAYOUTS, fill, match, placeholders
from tests.helpers import delta64, relative_error

HEADS, HEAD_DIM, EMBED = 3, 4, 10


def factors(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def table(folder, *rows):
    (folder / "table.json").write_text(json.dumps(rows))
    return str(folder / "table.json")


def peft_folder(path, shapes, rank=2, alpha=6, **config):
    """A LoRA as PEFT saves it; shapes are (out, in) by module."""
    path.mkdir()
    tensors = {}
    for seed, (module, (out, in_)) in enumerate(shapes.items()):
        a, b = factors(seed, (rank, in_), (out, rank))
        tensors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    safetensors.numpy.save_file(tensors, path / "adapter_model.safetensors")
    modules = sorted({module.rpartition(".")[2] for module in shapes})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": modules, **config}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


QUERY = {"peft": "model.{layer}.q", "tree": "block_{layer}.query", "inputs": "embed", "outputs": "heads head_dim"}
# Of the same weight (embed, heads, head_dim) each format cuts its own way: Keras the last axis off, OpenPI every head
# for itself, qwix the embedding off.
CUTS = {
    "keras": ({"a": "heads embed", "b": "head_dim"}, {"shapes": [(HEADS, EMBED, 2), (2, HEAD_DIM)], "rank": HEADS * 2}),
    "openpi": (
        {"tree": "block_{layer}.q_einsum", "a": "heads embed", "b": "heads head_dim"},
        {"shapes": [(HEADS, EMBED, 2), (HEADS, 2, HEAD_DIM)], "rank": HEADS * 2},
    ),
    "qwix": ({"parameter": "w"}, {"shapes": [(EMBED, 2), (2, HEADS, HEAD_DIM)], "rank": 2}),
}
NAMES = {
    "keras": "query/lora_kernel_{}",
    "openpi": "q_einsum/lora_{}",
    "qwix": "query/w_lora_{}",
}
EINSUMS = {"keras": "ndr,rh->nhd", "openpi": "ndr,nrh->nhd", "qwix": "dr,rnh->nhd"}


@pytest.mark.parametrize("form", CUTS)
def test_what_is_low_rank_in_one_cut_needs_more_rank_in_another(tmp_path, form):
    """The dense change of each form's own einsum, and the rank that PEFT's cut of it needs."""
    changes, expected = CUTS[form]
    leaves = {layer: factors(layer, *expected["shapes"]) for layer in range(2)}
    tree = {}
    for layer, pair in leaves.items():
        for factor, leaf in zip("ab", pair, strict=True):
            module, name = NAMES[form].format(factor).split("/")
            tree.setdefault(f"block_{layer}", {}).setdefault(module, {})[name] = leaf
    adapter = jm.from_state(tree, alpha=6.0, layout=form)
    layout = table(tmp_path, {**QUERY, **changes})
    jm.save(adapter, tmp_path / "peft", format="peft", layout=layout)
    back = jm.load(tmp_path / "peft")
    for layer, (a, b) in leaves.items():
        dense = 3 * np.einsum(EINSUMS[form], a.astype(np.float64), b).reshape(HEADS * HEAD_DIM, EMBED)
        assert np.linalg.matrix_rank(dense) == expected["rank"]
        assert back.modules[f"model.{layer}.q"].rank == expected["rank"]
        assert relative_error(delta64(back.modules[f"model.{layer}.q"]), dense) < 1e-6


@pytest.mark.parametrize("form", CUTS)
def test_and_the_other_way(tmp_path, form):
    changes, _ = CUTS[form]
    source = jm.load(peft_folder(tmp_path / "peft", {f"model.{i}.q": (HEADS * HEAD_DIM, EMBED) for i in range(2)}))
    layout = table(tmp_path, {**QUERY, **changes})
    jm.save(source, tmp_path / "tree", format=form, layout=layout, head_dim=HEAD_DIM)
    again = jm.load(tmp_path / "tree")
    assert {lora.rank for lora in again.modules.values()} == {{"keras": HEAD_DIM, "openpi": 2, "qwix": 2}[form]}
    state = jm.to_state(again)
    for layer in range(2):
        node = state["params"] if form == "openpi" else state["trainable_variables"] if form == "keras" else state
        node = node[f"block_{layer}"]
        module, name = NAMES[form].split("/")
        a, b = (np.asarray(leaf["value"] if isinstance(leaf, dict) else leaf, np.float64) for leaf in
                (node[module][name.format(factor)] for factor in "ab"))  # fmt: skip
        dense = np.einsum(EINSUMS[form], a, b).reshape(HEADS * HEAD_DIM, EMBED)
        assert relative_error(dense, delta64(source.modules[f"model.{layer}.q"])) < 1e-6
    jm.save(again, tmp_path / "back", format="peft", layout=layout)
    for path, lora in jm.load(tmp_path / "back").modules.items():
        assert relative_error(delta64(lora), delta64(source.modules[path])) < 1e-6


def test_openpis_output_sums_its_heads(tmp_path):
    row = {"peft": "model.{layer}.o", "tree": "{layer}.attn_vec_einsum", "inputs": "heads head_dim", "outputs": "embed"}
    source = jm.load(peft_folder(tmp_path / "peft", {"model.0.o": (EMBED, HEADS * HEAD_DIM)}))
    jm.save(source, tmp_path / "pi", format="openpi", layout=table(tmp_path, row), head_dim=HEAD_DIM)
    leaf = jm.to_state(jm.load(tmp_path / "pi"))["params"]["0"]["attn_vec_einsum"]
    a, b = (np.asarray(leaf[f"lora_{factor}"]["value"], np.float64) for factor in "ab")
    assert a.shape == (HEADS, HEAD_DIM, 2)
    assert b.shape == (HEADS, 2, EMBED)
    dense = np.einsum("nhr,mrd->dnh", a, b).reshape(EMBED, -1)
    assert relative_error(dense, delta64(source.modules["model.0.o"])) < 1e-6


def test_experts_that_share_a_factor(tmp_path):
    """qwix gives all experts of an einsum one B: from PEFT that takes the sum of their ranks."""
    row = {"peft": "experts.{e}.up", "tree": "experts", "parameter": "w", "a": "e in", "b": "out"}
    layout = table(tmp_path, row)
    a, b = factors(0, (3, 8, 2), (2, 6))
    shared = jm.from_state({"experts": {"w_lora_a": a, "w_lora_b": b}}, alpha=2.0)
    jm.save(shared, tmp_path / "peft", format="peft", layout=layout)
    apart = jm.load(tmp_path / "peft")
    assert {lora.rank for lora in apart.modules.values()} == {2}
    for expert in range(3):
        assert relative_error(delta64(apart.modules[f"experts.{expert}.up"]), (a[expert].astype(float) @ b).T) < 1e-6
    jm.save(apart, tmp_path / "again", format="qwix", layout=layout)
    assert jm.load(tmp_path / "again").modules["experts"].rank == 2  # They still share theirs.
    own = jm.load(peft_folder(tmp_path / "own", {f"experts.{e}.up": (6, 16) for e in range(2)}))
    jm.save(own, tmp_path / "joined", format="qwix", layout=layout)
    joined = jm.load(tmp_path / "joined").modules["experts"]
    assert joined.rank == 4
    dense = delta64(joined).reshape(6, 2, 16)
    for expert in range(2):
        assert relative_error(dense[:, expert], delta64(own.modules[f"experts.{expert}.up"])) < 1e-6


def test_merged_and_converted_on_the_command_line(tmp_path, capsys):
    kinds = {"self_attn.q_proj": (24, 16), "self_attn.v_proj": (12, 16), "mlp.down_proj": (16, 20)}
    shapes = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in kinds.items()}
    names = [str(peft_folder(tmp_path / name, shapes, rank)) for name, rank in (("a", 2), ("b", 3))]
    options = ["--layout", "gemma3", "--head-dim", "6"]
    arguments = ["merge", *names, "-o", str(tmp_path / "out"), "--format", "tunix", *options, "--weights", "1", "-1"]
    assert main(arguments) == 0
    assert "written as tunix: 6 modules of rank 5" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "back"), "--format", "peft", *options, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["modules"]["model.layers.1.self_attn.v_proj"]["rank"] == 5
    expected = jm.merge([jm.load(name) for name in names], [1, -1])
    back = jm.load(tmp_path / "back")
    assert back.modules.keys() == expected.modules.keys()
    for path, lora in expected.modules.items():
        assert relative_error(delta64(back.modules[path]), delta64(lora)) < 1e-6
    assert main(["inspect", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    capsys.readouterr()
    assert main(["merge", *names, "-o", str(tmp_path / "out"), "--force"]) == 1
    assert "is an Orbax checkpoint, which --force does not replace by a PEFT folder" in capsys.readouterr().err
    record = json.loads((tmp_path / "back" / "jaxmerge.json").read_text())
    assert record["converted"] == {"format": "peft", "layout": "gemma3", "head_dim": 6}


def refused(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 1
    return capsys.readouterr().err


def test_what_cannot_be_converted_is_told_before_any_work(tmp_path, capsys):
    def convert(source, *options):
        told = refused(capsys, "convert", source, tmp_path / "out", *options)
        assert "Traceback" not in told
        assert not (tmp_path / "out").exists()
        return told

    layers = {f"model.layers.{i}.self_attn.q_proj": (24, 16) for i in (0, 2)}
    some = peft_folder(tmp_path / "some", layers)
    tunix = ["--format", "tunix"]
    assert "give a layout" in convert(some, *tunix)
    assert "unknown layout 'bert'" in convert(some, *tunix, "--layout", "bert")
    assert "give head_dim" in convert(some, *tunix, "--layout", "llama3")
    assert convert(some, *tunix, "--layout", "llama3", "--head-dim", 7).splitlines() == [
        "jaxmerge: module model.layers.*.self_attn.q_proj: its 24 features are no whole number of heads of 7 "
        "(2 such modules)"
    ]
    assert "whole numbers from 1" in convert(some, *tunix, "--layout", "llama3", "--head-dim", 0)
    scanned = ["--format", "maxtext", "--layout", "llama3", "--head-dim", 6]
    assert "give layers" in convert(some, *scanned)
    assert "there is a layer 2" in convert(some, *scanned, "--layers", 2)
    strange = peft_folder(tmp_path / "strange", {"model.layers.0.experts.0": (4, 4), "model.layers.0.router": (4, 4)})
    assert "modules model.layers.0.experts.0, model.layers.0.router are not in the layout's table" in convert(
        strange, *tunix, "--layout", "llama3"
    )
    assert "no table for gemma" in convert(some, "--format", "gemma", "--layout", "llama3")
    biased = peft_folder(tmp_path / "biased", layers, bias="all")
    tensors = safetensors.numpy.load_file(biased / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] = np.ones((4, 4), np.float32)
    safetensors.numpy.save_file(tensors, biased / "adapter_model.safetensors")
    assert "lm_head.weight is no LoRA factor" in convert(biased, *tunix, "--layout", "llama3", "--head-dim", 6)


def test_tables_of_ones_own_are_checked(tmp_path):
    adapter = jm.load(peft_folder(tmp_path / "peft", {"q": (8, 8)}))

    def told(content):
        path = tmp_path / "table.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(ValueError, match=r"table\.json") as caught:
            jm.save(adapter, tmp_path / "out", format="qwix", layout=str(path))
        return str(caught.value)

    assert "cannot be read" in told("[")
    assert "not a list of rows" in told({})
    assert "fields peft and tree" in told([{"peft": "q"}])
    assert "has a field tre" in told([{"peft": "q", "tree": "q", "tre": 1}])
    assert "must be of type int" in told([{"peft": "q", "tree": "q", "scan_axis": "1"}])
    assert "in tree and not in peft" in told([{"peft": "q", "tree": "{i}.q"}])
    assert "must be an axis" in told([{"peft": "{i}.q", "tree": "q"}])
    assert "other axes" in told([{"peft": "q", "tree": "q", "a": "embed"}])
    with pytest.raises(ValueError, match="cannot be read"):
        jm.save(adapter, tmp_path / "out", format="qwix", layout=str(tmp_path / "absent.json"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_lead_there_and_back(layout):
    for form, made in LAYOUTS[layout].items():
        for row in made(26) if callable(made) else made:
            sizes = {name: len(choices) or 3 for name, choices in placeholders(row.peft).items()}
            values = {name: size - 1 for name, size in sizes.items()}
            assert match(row.peft, fill(row.peft, values)) == values, (form, row)
            kept = {name: value for name, value in values.items() if name not in row.unrolled}
            assert match(row.tree, fill(row.tree, values)) == kept, (form, row)
            assert set(row.unrolled) <= {*row.a_axes, *row.b_axes}


def test_what_a_format_cannot_hold_is_told(tmp_path):
    adapter = jm.load(peft_folder(tmp_path / "peft", {"m.0.q": (12, 10), "m.0.k": (12, 10)}))

    def told(form, *rows):
        with pytest.raises(ValueError, match=r".") as caught:
            jm.save(adapter, tmp_path / "out", format=form, layout=table(tmp_path, *rows), head_dim=4)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    q, k = ({"peft": f"m.{{l}}.{name}", "tree": f"b.{{l}}.{name}"} for name in "qk")
    assert "module b.0.q: format keras has no parameter called w" in told(
        "keras", q | {"parameter": "w"}, k | {"parameter": "w"}
    )
    openpi = {"tree": "{l}.q_einsum", "inputs": "in", "outputs": "heads head_dim"}
    assert "its A must have the axes *batch in rank" in told("openpi", q | openpi, k)
    assert "has the module and parameter of a row before it" in told("qwix", q, k | {"tree": "b.{l}.q"})
    # Two parameters of one module are two modules.
    rows = [q | {"tree": "b.{l}", "parameter": "q"}, k | {"tree": "b.{l}", "parameter": "k"}]
    jm.save(adapter, tmp_path / "both", format="qwix", layout=table(tmp_path, *rows))
    both = jm.load(tmp_path / "both")
    for name in "qk":
        assert relative_error(delta64(both.modules[f"b.0.{name}"]), delta64(adapter.modules[f"m.0.{name}"])) < 1e-6


@pytest.mark.parametrize(
    "row",
    [
        {"peft": "m.{l}.{l}", "tree": "b.{l}"},
        {"peft": "m.{1}.q", "tree": "b.{1}"},
        {"peft": "m.{l*0}.q", "tree": "b.{l}"},
        {"peft": "m.{x=q|k}", "tree": "b.{x=q}"},
        {"peft": "m.{x=q|q}", "tree": "b.{x}"},
        {"peft": "m.{l", "tree": "b"},
        {"peft": "m", "tree": ""},
        {"peft": "m", "tree": "b", "parameter": "a/b"},
        {"peft": "m", "tree": "b", "scan_axis": -1},
    ],
)
def test_rows_that_mean_nothing_are_refused(tmp_path, row):
    adapter = jm.load(peft_folder(tmp_path / "peft", {"m": (8, 8)}))
    with pytest.raises(ValueError, match=r"table\.json: row 1"):
        jm.save(adapter, tmp_path / "out", format="qwix", layout=table(tmp_path, row))
