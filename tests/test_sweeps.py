"""A sweep gives what merges one by one give, and its scores are what they say."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.cli import main
from jaxmerge.merging.stacks import Bucket, Inputs, Program, bind_numbers
from jaxmerge.merging.stacks.kernel import Pace, merge_unbatched
from tests.helpers import compilations, delta64, relative_error

ADAPTERS = Path(__file__).parent / "adapters"
SHAPES = {"q": (24, 32), "k": (16, 32), "o": (32, 24)}


def adapters(n=3, rank=4, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)

    def factor(*shape):
        return rng.normal(size=shape).astype(dtype)

    return [
        jm.Adapter({name: jm.LoRA(factor(rank, i), factor(o, rank), 0.5) for name, (o, i) in SHAPES.items()})
        for _ in range(n)
    ]


GRIDS = {
    "linear": ({"weights": [[1, 1, 1], [1, 0.5, -0.3]], "scale": [1.0, 0.5]}, {"method": "linear"}),
    "truncated": ({"weights": [[1, 1, 1], [1, 0.5, -0.3]]}, {"method": "linear", "rank": 4}),
    "ties": ({"scale": [1.0, 2.0], "density": [0.1, 0.5, 1.0]}, {"method": "ties"}),
    "ties in factors": ({"density": [0.2, 0.7]}, {"combination_type": "ties"}),
    "dare": ({"density": [0.5, 0.9], "seed": [0, 1, 7]}, {"method": "dare_ties"}),
    "defaults of the space": ({"density": [0.2, 0.7]}, {"method": "ties", "space": "ctm"}),
    "densities of each adapter": ({"density": [[0.2, 0.5, 0.9], 0.7]}, {"method": "ties", "space": "core"}),
    "dare in factors": ({"seed": [3, 4]}, {"method": "dare_linear", "space": "factors", "density": 0.5}),
    # What is neither in the grid nor given has its default, of the method or of the space.
    "defaults": ({"density": [0.5, 0.9]}, {"method": "della_linear", "space": "ctm", "key": jax.random.key(0)}),
}


def one_by_one(sources, setting, fixed):
    given = {name: value for name, value in setting.items() if name not in ("scale", "seed", "weights")}
    if "seed" in setting:
        given["key"] = jax.random.key(setting["seed"])
    return jm.merge(sources, setting.get("weights"), **fixed, **given)


@pytest.mark.parametrize("case", GRIDS)
def test_a_sweep_is_merges_one_by_one(case):
    grid, fixed = GRIDS[case]
    sources = adapters()
    found = jm.sweep(sources, lambda merged: {"q": jm.delta(merged.modules["q"])}, grid, keep=True, **fixed)
    assert len(found.settings) == np.prod([len(values) for values in grid.values()])
    assert list(found.settings[0]) == list(grid)
    for setting, delta, kept in zip(found.settings, found.scores["q"], found.adapters, strict=True):
        expected = one_by_one(sources, setting, fixed)
        scale = setting.get("scale", 1.0)
        for name in SHAPES:
            wanted = scale * delta64(expected.modules[name])
            assert relative_error(delta64(kept.modules[name]), wanted) < 1e-5
        assert relative_error(delta, scale * delta64(expected.modules["q"])) < 1e-5
        energy = sum(float(e.lost) for e in expected.energy.values()) * scale**2
        np.testing.assert_allclose(sum(float(e.lost) for e in kept.energy.values()), energy, rtol=1e-4, atol=1e-4)


def test_memory_and_tracing_change_nothing():
    grid, fixed = GRIDS["ties"]
    sources = adapters()
    evaluate = jm.scores(sources)
    found = jm.sweep(sources, evaluate, grid, **fixed)
    for other in ({"memory": 100_000}, {"traced": False}):
        again = jm.sweep(sources, evaluate, grid, **fixed, **other)
        for name in found.scores:
            np.testing.assert_allclose(again.scores[name], found.scores[name], rtol=1e-5)


def test_scores_are_what_they_say():
    sources = adapters()
    merged = jm.merge(sources, [1, 0.5, -0.3], rank=5)
    found = jm.scores(sources)(merged)

    def flat(adapter):
        return np.concatenate([delta64(lora).ravel() for lora in adapter.modules.values()])

    whole = flat(merged)
    cosines = [flat(source) @ whole / np.linalg.norm(flat(source)) / np.linalg.norm(whole) for source in sources]
    np.testing.assert_allclose(found["worst_cosine"], min(cosines), rtol=1e-5)
    np.testing.assert_allclose(found["norm"], np.linalg.norm(whole), rtol=1e-5)
    np.testing.assert_allclose(found["energy_kept"], jm.energy_kept(merged), rtol=1e-6)


def test_modules_that_some_adapters_lack_and_layers_in_one_array():
    rng = np.random.default_rng(0)
    lora = jm.LoRA(rng.normal(size=(3, 4, 8)).astype(np.float32), rng.normal(size=(3, 6, 4)).astype(np.float32))
    sources = [jm.Adapter({"a": lora, "b": lora}), jm.Adapter({"a": lora})]
    found = jm.sweep(sources, jm.scores(sources), {"density": [0.5, 1.0]}, method="ties")
    assert found.scores["norm"].shape == (2,)
    np.testing.assert_allclose(found.scores["norm"][1], np.sqrt(2 * (jm.delta(lora) ** 2).sum()), rtol=1e-5)


def test_nothing_is_compiled_twice():
    sources = adapters()
    evaluate = jm.scores(sources)
    jm.sweep(sources, evaluate, {"density": [0.2, 0.4], "scale": [1.0, 2.0]}, method="ties")
    again = {"density": [0.3, 0.9], "scale": [0.5, 3.0]}
    assert compilations(lambda: jm.sweep(sources, evaluate, again, method="ties")) == []
    others = adapters(seed=1)  # What they are scored by is an argument too, and not a constant of the program.
    assert compilations(lambda: jm.sweep(others, jm.scores(others), again, method="ties")) == []


@pytest.mark.parametrize(
    ("grid", "fixed", "words"),
    [
        ({"density": []}, {"method": "ties"}, "no values for density"),
        ({"scale": 1.0}, {}, "the grid's scale should be a list of values, got 1.0"),
        ({"densities": [0.1]}, {"method": "ties"}, "unknown name 'densities'"),
        ({"density": [0.1]}, {"method": "ties", "density": 0.5}, "both in the grid"),
        ({"density": [0.1, -1]}, {"method": "ties"}, "-1"),
        ({"density": [0.1]}, {"method": "linear"}, "no hyperparameter density"),
        ({"weights": [[1, 1, 1], [1, 1]]}, {}, "2 weights for 3"),
        ({"scale": [np.inf]}, {}, "not a finite number"),
        ({"scale": [1.0]}, {"method": "dare_linear", "density": 0.5}, "key"),
        ({"seed": [0, 1]}, {"method": "ties", "density": 0.5}, "method ties draws nothing: all seeds of the grid"),
    ],
)
def test_grids_that_do_not_fit(grid, fixed, words):
    with pytest.raises(ValueError, match=words):
        jm.sweep(adapters(), lambda merged: jnp.zeros(()), grid, **fixed)


def test_what_is_no_function_scores_nothing():
    with pytest.raises(ValueError, match="evaluate should be a function of a merged adapter, got 3"):
        jm.sweep(adapters(), 3, {"scale": [1.0]})  # type: ignore[arg-type]


def test_the_command_shows_a_table_and_draws_a_plot(capsys, tmp_path):
    sources = [str(ADAPTERS / name) for name in ("sms", "movie")]
    options = ["--method", "ties", "--space", "factors", "--density", "0.2", "0.5", "--scale", "0.5", "1"]
    assert main(["sweep", *sources, *options, "--plot", str(tmp_path / "plot.png")]) == 0
    shown = capsys.readouterr().out
    assert "worst cosine" in shown
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["sweep", *sources, *options, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["settings"]
    loaded = [jm.load(source) for source in sources]
    for row in rows:
        merged = jm.merge(loaded, method="ties", space="factors", density=row["density"])
        expected = jm.scores(loaded)(merged)
        np.testing.assert_allclose(row["worst_cosine"], expected["worst_cosine"], rtol=1e-4)
        np.testing.assert_allclose(row["norm"], row["scale"] * expected["norm"], rtol=1e-4)


def test_the_command_tells_what_is_wrong(capsys, tmp_path):
    sources = [str(ADAPTERS / name) for name in ("sms", "movie")]
    assert main(["sweep", *sources, "--plot", str(tmp_path / "plot.gif")]) == 1
    assert ".png" in capsys.readouterr().err
    assert main(["sweep", *sources, "--weights", "1"]) == 1
    assert "1 weights for 2 adapters" in capsys.readouterr().err


def test_settings_at_a_time_are_settings_in_turn():
    sources = adapters()
    grid = {"density": [0.2, 0.4, 0.7], "weights": [[1, 1, 1], [1, 0.5, -0.3]]}
    settings = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    choices = tuple((h.name, h.default) for h in jm.METHODS["ties"].hyperparameters if not h.traceable)
    program = Program("ties", "factors", choices, sweeps=True)
    bucket = Bucket((24, 32), (4, 4, 4), (), ("float32",) * 6, 4, "float32")
    loras = [source.modules["q"] for source in sources]
    one = Inputs(
        a=tuple(jnp.asarray(lora.a) for lora in loras),
        b=tuple(jnp.asarray(lora.b) for lora in loras),
        scales=jnp.full(3, 0.5),
        weights=jnp.asarray([setting["weights"] for setting in settings], jnp.float32),
    )
    for space in ("factors", "full"):
        program = dataclasses.replace(program, space=space)
        numbers = bind_numbers(program, bucket, [{"density": setting["density"]} for setting in settings])
        in_turn, together = (
            jax.jit(functools.partial(merge_unbatched, program, bucket, pace=Pace(100, count)))(one, numbers)
            for count in (1, 4)
        )
        delta, other = (lifted.b @ lifted.a for lifted in (in_turn, together))
        np.testing.assert_allclose(delta, other, rtol=1e-5, atol=1e-5)


def test_scores_are_made_for_adapters():
    with pytest.raises(ValueError, match=r"what jm\.scores\(adapters\) gives, not jm\.scores itself"):
        jm.sweep(adapters(), jm.scores, {"scale": [1.0]})
