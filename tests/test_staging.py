"""Stages on top of merges: applied in order, before the cut, and for all modules together where they say so."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.cli import main
from tests.helpers import delta64, relative_error

SHAPES = {"model.layers.0.q": (20, 16), "model.layers.1.q": (20, 16), "model.layers.2.o": (14, 18)}
WEIGHTS = [1.0, 0.5, -0.7]


def adapters(scale=0.5, batch=(), rank=3):
    rng = np.random.default_rng(0)

    def factor(*shape):
        return rng.normal(size=(*batch, *shape)).astype(np.float32)

    return [
        jm.Adapter({name: jm.LoRA(factor(rank, i), factor(o, rank), scale) for name, (o, i) in SHAPES.items()})
        for _ in range(3)
    ]


def deltas(adapter):
    return {path: delta64(lora) for path, lora in adapter.modules.items()}


def isotropic(matrix, rank):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return s[:rank].mean() * u[:, :rank] @ vt[:rank]


def cut(matrix, rank):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@pytest.mark.parametrize("rank", [None, 3])
def test_stages_come_before_the_cut_in_the_order_given(rank):
    sources = adapters()
    merged = jm.merge(sources, WEIGHTS, rank=rank, stages=["isotropize", ("scale", {"factor": -2.0})])
    for path, delta in deltas(jm.merge(sources, WEIGHTS)).items():
        expected = -2 * isotropic(delta, 9)
        if rank is None:
            assert relative_error(delta64(merged.modules[path]), expected) < 1e-5
            continue
        # All singular values are equal: any three directions are as good, and keep a third of the energy.
        assert float(merged.energy[path].kept) == pytest.approx(1 / 3, rel=1e-3)
        np.testing.assert_allclose(np.linalg.norm(delta64(merged.modules[path])), 2 * isotropic_norm(delta), rtol=1e-4)


def isotropic_norm(delta):
    return np.linalg.svd(delta, compute_uv=False)[:9].mean() * np.sqrt(3)


def test_norms_are_restored_module_by_module_or_for_the_whole():
    sources = adapters()
    plain, norms = deltas(jm.merge(sources, WEIGHTS)), [deltas(source) for source in sources]
    shares = np.abs(WEIGHTS) / np.abs(WEIGHTS).sum()
    by_module = deltas(jm.merge(sources, WEIGHTS, stages=["norm_restore"]))
    for path, delta in plain.items():
        wanted = shares @ [np.linalg.norm(own[path]) for own in norms]
        assert relative_error(by_module[path], delta * wanted / np.linalg.norm(delta)) < 1e-5
    whole = deltas(
        jm.merge(sources, WEIGHTS, stages=[("norm_restore", {"scope": "whole"}), ("scale", {"factor": 0.5})])
    )

    def total(adapter):
        return np.sqrt(sum(np.linalg.norm(delta) ** 2 for delta in adapter.values()))

    factor = 0.5 * (shares @ [total(own) for own in norms]) / total(plain)
    for path, delta in plain.items():
        assert relative_error(whole[path], factor * delta) < 1e-5


def restored(delta, sources, path):
    """The delta at the norm that the adapters have by their weights."""
    shares = np.abs(WEIGHTS) / np.abs(WEIGHTS).sum()
    wanted = shares @ [np.linalg.norm(delta64(source.modules[path])) for source in sources]
    return delta * wanted / np.linalg.norm(delta)


def test_truncation_has_its_place_in_the_order():
    sources = adapters()
    truncate = ("truncate", {"rank": 2})
    before = jm.merge(sources, WEIGHTS, stages=[truncate, "norm_restore"])
    after = jm.merge(sources, WEIGHTS, stages=["norm_restore", truncate])
    twice = jm.merge(sources, WEIGHTS, stages=["isotropize", truncate, "isotropize", ("truncate", {"energy": 0.4})])
    for path, delta in deltas(jm.merge(sources, WEIGHTS)).items():
        first, then = restored(cut(delta, 2), sources, path), cut(restored(delta, sources, path), 2)
        assert relative_error(delta64(before.modules[path]), first) < 1e-5
        assert relative_error(delta64(after.modules[path]), then) < 1e-5
        assert relative_error(first, then) > 0.05
        assert before.modules[path].rank == after.modules[path].rank == 2
        # The shares that the cuts keep of what comes to them: of two equal directions one is enough for 0.4.
        share = (np.linalg.norm(cut(delta, 2)) / np.linalg.norm(delta)) ** 2
        for merged, kept, rank in ((before, share, 2), (after, share, 2), (twice, 2 / 9 * 1 / 2, 1)):
            assert float(merged.energy[path].kept) == pytest.approx(kept, rel=1e-4)
            held = merged.energy[path].total - merged.energy[path].lost
            assert float(held) == pytest.approx(np.linalg.norm(delta64(merged.modules[path])) ** 2, rel=1e-4)
            assert merged.modules[path].rank == rank


@pytest.mark.parametrize("rule", [{"rank": 4}, {"energy": 0.8}, {"sv_ratio": 2.0}, {"sv_fro": 0.9},
                                  {"sv_cumulative": 0.7}], ids=lambda rule: next(iter(rule)))  # fmt: skip
@pytest.mark.parametrize(("method", "space", "more"), [("linear", "full", {}), ("ties", "core", {"density": 0.5})])
def test_truncation_at_the_end_is_that_of_resize(method, space, more, rule):
    sources = adapters()
    merged = jm.merge(sources, WEIGHTS, method=method, space=space, stages=[("truncate", rule)], **more)
    expected = jm.resize(jm.merge(sources, WEIGHTS, method=method, space=space, **more), **rule)
    for path, lora in expected.modules.items():
        assert merged.modules[path].rank == lora.rank
        assert relative_error(delta64(merged.modules[path]), delta64(lora)) < 1e-5
        assert float(merged.energy[path].kept) == pytest.approx(float(expected.energy[path].kept), rel=1e-4)


@pytest.mark.parametrize("rank", [2, 5, 8])
def test_truncation_and_a_rank_leave_the_smaller(rank):
    """Of a cut to a larger rank nothing is left but zeros, which go."""
    sources = adapters()
    merged = jm.merge(sources, WEIGHTS, rank=rank, stages=[("truncate", {"rank": 5})])
    for path, delta in deltas(jm.merge(sources, WEIGHTS)).items():
        assert merged.modules[path].rank == min(5, rank)
        assert relative_error(delta64(merged.modules[path]), cut(delta, min(5, rank))) < 1e-5


def test_truncation_of_what_has_been_cut():
    """Entrywise methods in the space of whole changes are cut first, to the sources' rank."""
    sources = adapters()
    plain = jm.merge(sources, WEIGHTS, method="ties", density=0.5)
    merged = jm.merge(sources, WEIGHTS, method="ties", density=0.5, stages=[("truncate", {"rank": 2})])
    for path, delta in deltas(plain).items():
        assert merged.modules[path].rank == 2
        assert relative_error(delta64(merged.modules[path]), cut(delta, 2)) < 1e-5
        share = (np.linalg.norm(cut(delta, 2)) / np.linalg.norm(delta)) ** 2 * float(plain.energy[path].kept)
        assert float(merged.energy[path].kept) == pytest.approx(share, rel=1e-4)


def test_layers_that_are_stacked_share_the_rank_of_the_largest():
    sources = adapters(batch=(2,))
    merged = jm.merge(sources, WEIGHTS, stages=[("truncate", {"energy": 0.6})])
    for path, lora in merged.modules.items():
        ranks = []
        for layer in range(2):
            alone = [
                jm.Adapter({path: jm.LoRA(x.a[layer], x.b[layer], x.scale)})
                for x in (source.modules[path] for source in sources)
            ]
            one = jm.merge(alone, WEIGHTS, stages=[("truncate", {"energy": 0.6})]).modules[path]
            ranks.append(one.rank)
            assert relative_error(jm.delta(lora)[layer], delta64(one)) < 1e-5
        assert lora.rank == max(ranks)


def test_truncation_under_jit_leaves_zeros():
    sources = adapters()

    @jax.jit
    def merged(rank):
        return jm.merge(sources, WEIGHTS, stages=[("truncate", {"rank": rank}), "norm_restore"])

    for rank in (2, 6):
        expected = jm.merge(sources, WEIGHTS, stages=[("truncate", {"rank": rank}), "norm_restore"])
        for path, lora in merged(rank).modules.items():
            assert lora.rank == 9
            assert relative_error(delta64(lora), delta64(expected.modules[path])) < 1e-5
            assert not np.asarray(lora.a)[rank:].any()
            assert not np.asarray(lora.b)[:, rank:].any()


def test_truncation_of_what_is_spread_over_a_mesh():
    program = """
import jax, numpy as np
import jaxmerge as jm
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tests.test_staging import WEIGHTS, adapters

def spread(adapter, mesh, a, b):
    put = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))
    return jm.Adapter({path: jm.LoRA(put(x.a, a), put(x.b, b), x.scale) for path, x in adapter.modules.items()})

count = 0
sources = adapters(rank=4)
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
    along_features, along_rank = (P(None, "x"), P("x", None)), (P("x", None), P(None, "x"))
    for rank in (3, 4):
        options = {"stages": [("truncate", {"rank": rank}), "norm_restore"]}
        plain = jm.merge(sources, WEIGHTS, **options)
        merges = [jm.merge(sources, WEIGHTS, mesh=mesh, **options)]
        for specs in (along_features, along_rank):
            merges.append(jm.merge([spread(source, mesh, *specs) for source in sources], WEIGHTS, **options))
        for merged in merges:
            for path, lora in plain.modules.items():
                np.testing.assert_array_equal(merged.modules[path].a, lora.a)
                np.testing.assert_array_equal(merged.modules[path].b, lora.b)
                count += 1
print("compared", count)
"""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.stdout == "compared 36\n", done.stderr


def test_truncation_of_nothing_keeps_a_rank_of_one():
    sources = [jax.tree.map(np.zeros_like, adapter) for adapter in adapters()]
    merged = jm.merge(sources, stages=[("truncate", {"energy": 0.9}), "norm_restore"])
    for path, lora in merged.modules.items():
        assert lora.rank == 1
        assert not delta64(lora).any()
        assert merged.energy[path].kept == 1


def test_truncation_of_modules_each_by_its_own_rank():
    sources, ranks = adapters(), dict(zip(SHAPES, (1, 2, 5), strict=True))
    merged = jm.merge(sources, WEIGHTS, stages=[("truncate", {"rank": ranks})])
    assert {path: lora.rank for path, lora in merged.modules.items()} == ranks


def test_lines_scale_by_depth():
    sources = adapters()
    plain = deltas(jm.merge(sources, WEIGHTS))
    merged = deltas(jm.merge(sources, WEIGHTS, stages=[("lines", {"alpha": 0.5, "beta": 1.0})]))
    for path, factor in zip(SHAPES, (0.5, 1.0, 1.5), strict=True):
        assert relative_error(merged[path], factor * plain[path]) < 1e-5


@pytest.mark.parametrize(
    ("method", "space", "more"),
    [("ties", "full", {"density": 0.5, "rank": 5}), ("ties", "core", {"density": 0.5}), ("tsv", "full", {}),
     ("ties", "factors", {"density": 0.5}), ("linear", "ctm", {})],
)  # fmt: skip
def test_scaling_commutes_with_every_kind_of_merge(method, space, more):
    sources = adapters()
    plain = jm.merge(sources, WEIGHTS, method=method, space=space, **more)
    merged = jm.merge(sources, WEIGHTS, method=method, space=space, stages=[("scale", {"factor": 3.0})], **more)
    for path, lora in plain.modules.items():
        assert merged.modules[path].rank == lora.rank
        assert relative_error(delta64(merged.modules[path]), 3 * delta64(lora)) < 1e-5
        np.testing.assert_allclose(float(merged.energy[path].kept), float(plain.energy[path].kept), atol=1e-5)


def test_numbers_of_stages_may_be_traced_and_layers_may_be_stacked():
    sources = adapters(batch=(2,))

    @jax.jit
    def merged(floor, factor):
        return jm.merge(sources, stages=[("calibrate", {"floor": floor}), ("scale", {"factor": factor})])

    found = merged(jnp.float32(0.1), jnp.float32(2.0))
    expected = jm.merge(sources, stages=["calibrate", ("scale", {"factor": 2.0})])
    for path, lora in expected.modules.items():
        assert lora.batch == (2,)
        np.testing.assert_allclose(jm.delta(found.modules[path]), jm.delta(lora), rtol=1e-3, atol=1e-4)
    for layer in range(2):
        alone = [
            jm.Adapter({p: jm.LoRA(x.a[layer], x.b[layer], x.scale) for p, x in source.modules.items()})
            for source in sources
        ]
        one = jm.merge(alone, stages=["calibrate", ("scale", {"factor": 2.0})])
        for path, lora in expected.modules.items():
            assert relative_error(jm.delta(lora)[layer], jm.delta(one.modules[path])) < 1e-4


def test_one_program_whatever_the_numbers():
    from tests.helpers import compilations

    sources = adapters()
    jm.merge(sources, stages=[("lines", {"alpha": 0.5}), ("scale", {"factor": 2.0})])
    assert not compilations(lambda: jm.merge(sources, stages=[("lines", {"alpha": 0.7}), ("scale", {"factor": 3.0})]))
    jm.merge(sources, stages=[("truncate", {"rank": 2}), "norm_restore"])
    assert not compilations(lambda: jm.merge(sources, stages=[("truncate", {"rank": 5}), "norm_restore"]))


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (["nonsense"], "unknown stage 'nonsense': there are isotropize"),
        (["scale"], "stage scale needs factor"),
        ([("scale", {"factor": float("nan")})], "stage scale: factor should be a finite number"),
        ([("calibrate", {"floor": -1.0})], "floor should be above 0"),
        ([("isotropize", {"floor": 1.0})], "stage isotropize has no floor: it takes nothing"),
        ([("norm_restore", {"scope": "half"})], "scope 'half' is not one of module, whole"),
        (["truncate"], "stage truncate takes one of rank, energy, sv_ratio, sv_fro, sv_cumulative: none was given"),
        ([("truncate", {"rank": 3, "energy": 0.5})], "stage truncate takes one of .*: rank and energy were given"),
        ([("truncate", {"rank": 2.5})], "rank should be a whole number, got 2.5"),
        ([("truncate", {"rank": 0})], "rank should be at least 1, got 0"),
        ([("truncate", {"energy": 1.5})], "energy should be at most 1 and above 0, got 1.5"),
        ([("truncate", {"max_rank": 3})], "stage truncate has no max_rank: it takes rank"),
        ([("norm_restore", {"scope": "whole"}), "isotropize"], "isotropize comes after norm_restore over the whole"),
    ],
)
def test_stages_are_checked(stages, words):
    with pytest.raises(ValueError, match=words):
        jm.merge(adapters(), stages=stages)


def test_the_depth_of_stacked_layers_is_not_guessed():
    with pytest.raises(ValueError, match=r"stage lines cannot tell the depth of .*model.layers.0.q"):
        jm.merge(adapters(batch=(2,)), stages=["lines"])


def test_units_take_no_negative_weights():
    with pytest.raises(ValueError, match=r"lego takes weights of 0 or more, not -0.7"):
        jm.merge(adapters(), WEIGHTS, method="lego")
    merged = jm.merge(adapters(), method="lego")
    assert {lora.rank for lora in merged.modules.values()} == {3}
    alone = jm.merge(adapters()[:1], method="lego")
    for path, delta in deltas(adapters()[0]).items():
        assert relative_error(delta64(alone.modules[path]), delta) < 1e-5
    assert {lora.rank for lora in jm.merge(adapters(), method="lego", rank=7).modules.values()} == {7}


ADAPTERS = [f"tests/adapters/{name}" for name in ("sms", "movie", "names")]


def test_the_command_line_stages_and_cuts_as_python_does(tmp_path, capsys):
    stages = ["--stage", "calibrate", "--stage", "norm_restore:whole", "--stage", "scale:factor=0.8"]
    rule = ["--energy", "0.9", "--max-rank", "12"]
    merge = ["merge", *ADAPTERS, "-o", str(tmp_path / "out"), "--space", "core", "--method", "ties", "--density", "0.4"]
    assert main([*merge, *stages, *rule, "--basis", "balanced", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["stages"] == [
        ["calibrate", {"floor": 0.1}],
        ["norm_restore", {"scope": "whole"}],
        ["scale", {"factor": 0.8}],
    ]
    whole = jm.merge(
        [jm.load(path) for path in ADAPTERS],
        method="ties",
        space="core",
        basis="balanced",
        density=0.4,
        stages=["calibrate", ("norm_restore", {"scope": "whole"}), ("scale", {"factor": 0.8})],
    )
    expected, found = jm.resize(whole, energy=0.9, max_rank=12), jm.load(tmp_path / "out")
    for path, lora in expected.modules.items():
        assert found.modules[path].rank == lora.rank <= 12
        assert relative_error(delta64(found.modules[path]), delta64(lora)) < 1e-2  # Sources of half precision.
        assert summary["modules"][path]["energy_kept"] == pytest.approx(float(expected.energy[path].kept), abs=1e-3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "then calibrate floor 0.1, then norm_restore scope whole, then scale factor 0.8, "
        "then cut energy 0.9 max_rank 12" in card
    )
    record = json.loads((tmp_path / "out" / "jaxmerge.json").read_text())
    assert record["truncated"] == {"energy": 0.9, "max_rank": 12}


def test_the_command_line_truncates_in_the_order_given(tmp_path, capsys):
    command = ["merge", *ADAPTERS, "-o", str(tmp_path / "out"), "--stage", "truncate:rank=5", "--stage", "norm_restore"]
    assert main([*command, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["stages"] == [["truncate", {"rank": 5}], ["norm_restore", {"scope": "module"}]]
    sources, found = [jm.load(path) for path in ADAPTERS], jm.load(tmp_path / "out")
    cut_to_five = jm.merge(sources, rank=5)
    for path, lora in cut_to_five.modules.items():
        wanted = np.mean([np.linalg.norm(delta64(source.modules[path])) for source in sources])
        delta = delta64(lora) * wanted / np.linalg.norm(delta64(lora))
        assert found.modules[path].rank == 5
        assert relative_error(delta64(found.modules[path]), delta) < 1e-2  # Sources of half precision.
        kept = float(cut_to_five.energy[path].kept)
        assert summary["modules"][path]["energy_kept"] == pytest.approx(kept, abs=1e-3)
    assert "then truncate rank 5, then norm_restore scope module" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--stage", "nonsense"], 2, "there is no stage nonsense"),
        (["--stage", "lines:1,2"], 2, "stage lines is given as lines:alpha=,beta="),
        (["--stage", "truncate:8"], 2, "stage truncate is given as truncate:rank=|energy=|sv_ratio=|sv_fro=|sv_"),
        (["--stage", "truncate:rank=8,energy=0.9"], 1, "stage truncate takes one of"),
        (["--stage", "truncate"], 1, "none was given"),
        (["--stage", "calibrate:much"], 1, "floor should be a number, got 'much'"),
        (["--stage", "scale"], 1, "stage scale needs factor"),
        (["--energy", "2"], 1, "energy should be at most 1 and above 0, got 2"),
        (["--energy", "0.5", "--rank", "3"], 1, "rank and energy are given"),
        (["--max-rank", "3"], 1, "give rank alone, or one of these"),
    ],
)
def test_the_command_line_checks_stages_and_rules(tmp_path, capsys, options, code, words):
    command = ["merge", *ADAPTERS, "-o", str(tmp_path / "out"), *options]
    if code == 2:
        with pytest.raises(SystemExit) as end:
            main(command)
        assert end.value.code == 2
    else:
        assert main(command) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_recipe_truncates_by_depth_and_by_one_rule(tmp_path):
    sources = adapters()
    for name, source in zip("abc", sources, strict=True):
        jm.save(source, tmp_path / name)

    def merged(stages):
        (tmp_path / "recipe.yaml").write_text(f"adapters: [a, b, c]\nstages: {stages}\n")
        return jm.merge_recipe(tmp_path / "recipe.yaml")

    # Ranks on a gradient are whole numbers.
    ranks = dict(zip(SHAPES, (4, 2, 1), strict=True))
    found = merged("[{truncate: {rank: [4, 1]}}, norm_restore]")
    assert {path: lora.rank for path, lora in found.modules.items()} == ranks
    expected = jm.merge(sources, stages=[("truncate", {"rank": ranks}), "norm_restore"])
    for path, lora in expected.modules.items():
        assert relative_error(delta64(found.modules[path]), delta64(lora)) < 1e-5
    for stage, words in (
        ("truncate", "none was given"),
        ("{truncate: {rank: 2, energy: 0.5}}", "rank and energy were"),
    ):
        with pytest.raises(ValueError, match=f"recipe.yaml:2: stage truncate takes one of rank, energy, .*: {words}"):
            merged(f"[{stage}]")
    with pytest.raises(ValueError, match=r"recipe.yaml:2: stage truncate: rank should be a whole number, got 1.5"):
        merged("[{truncate: {rank: 1.5}}]")


def test_a_sweep_takes_stages_of_modules():
    sources = adapters()
    stages = ["isotropize", ("scale", {"factor": 2.0})]
    found = jm.sweep(
        sources, lambda merged: jm.delta(merged.modules["model.layers.0.q"]), {"weights": [[1, 1, 1], [1, 0, 2]]},
        stages=stages,
    )  # fmt: skip
    for setting, delta in zip(found.settings, found.scores, strict=True):
        alone = jm.merge(sources, setting["weights"], stages=stages)
        assert relative_error(delta, delta64(alone.modules["model.layers.0.q"])) < 1e-5
    with pytest.raises(ValueError, match="norm_restore over the whole model cannot be part"):
        jm.sweep(sources, jm.scores(sources), {"scale": [1.0]}, stages=[("norm_restore", {"scope": "whole"})])
