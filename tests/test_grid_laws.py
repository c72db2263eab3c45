"""Laws that every method keeps in every space where it makes sense. A new row in either table comes under all of them.

A row that breaks a law says so, with its reason; that it does break it is checked too.
"""

import dataclasses
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.spaces import Factors
from tests.helpers import delta64, relative_error

KEY = jax.random.key(7)
EVERY = [(method, space) for method, row in jm.METHODS.items() for space in row.spaces]


def form(method, space):
    """What computes the cell."""
    return jm.SPACES[space].load(jm.METHODS[method])


# Cells that are the method's own one by another name: what commutes with rotations sees no bases.
SAME = [(m, s) for m, s in EVERY if s != jm.METHODS[m].space and form(m, s) is form(m, jm.METHODS[m].space)]
GRID = [cell for cell in EVERY if cell not in SAME]
# Every space with a method of each kind: for laws of the pipe, each of which compiles anew.
KINDS = [(m, s) for m, s in GRID if m in ("linear", "ties", "dare_linear", "tsv", "lego")]
# Every space with one method, and one of each kind of method: for what the same code does, module by module.
SPREAD = [(m, s) for m, s in KINDS if m == "ties" or s == jm.METHODS[m].space]
# Every method in its own space, too.
PIPE = [(m, s) for m, s in GRID if s == jm.METHODS[m].space or (m, s) in KINDS]


def cells(pairs):
    return pytest.mark.parametrize(("method", "space"), pairs, ids=[f"{m}-{s}" for m, s in pairs])


grid, pipe, kinds, spread = cells(GRID), cells(PIPE), cells(KINDS), cells(SPREAD)
# One shape, so that each law compiles one program a cell; TWO_SHAPES where buckets matter.
SHAPES = {"layers.0.q": (20, 16), "layers.1.q": (20, 16)}
TWO_SHAPES = {**SHAPES, "layers.10.q": (20, 16), "head": (16, 24)}
WEIGHTS = {2: [1.0, 0.5], 3: [1.0, 0.5, 2.0]}


def arguments(method, space, density=0.4):
    """What a method needs to run, from its row alone; at full rank, where no truncation blurs a law."""
    row = jm.METHODS[method]
    basis = form(method, space)
    rank = 16 if basis.dense else 8 if basis.full_rank else None
    values = {
        h.name: density if h.kind == "density" else h.default
        for h in (*row.hyperparameters, *jm.SPACES[space].taken(row))
    }
    # A number that there is no default for: what matters is that it is one.
    values = {name: 0.5 if value is None else value for name, value in values.items()}
    return {"method": method, "space": space, "rank": rank, **({"key": KEY} if row.random else {}), **values}


def breaks(method, space, law):
    return law in jm.METHODS[method].breaks or law in jm.SPACES[space].breaks


def random_adapter(seed, rank=4, dtype=np.float32, scale=0.5, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return jm.Adapter(
        {
            path: jm.LoRA(rng.normal(size=(rank, in_)).astype(dtype), rng.normal(size=(out, rank)).astype(dtype), scale)
            for path, (out, in_) in shapes.items()
        }
    )


def cohort(method, **options):
    """As many adapters as the method takes, up to three, and weights for them."""
    count = min(3, jm.METHODS[method].most or 3)
    return [random_adapter(seed, **options) for seed in range(count)], WEIGHTS[count]


def deltas(adapter):
    return {path: delta64(lora) for path, lora in adapter.modules.items()}


def bits(adapter):
    return {
        path: (np.asarray(lora.a).tobytes(), np.asarray(lora.b).tobytes()) for path, lora in adapter.modules.items()
    }


def distance(one, other):
    assert one.keys() == other.keys()
    return max(relative_error(one[path], other[path]) for path in one)


def test_cells_that_are_one():
    assert {space for _, space in SAME} == {"knots", "core"}
    for method, space in SAME:
        assert jm.METHODS[method].equivariant
        assert not jm.SPACES[space].taken(jm.METHODS[method])
    adapters, weights = cohort("tsv")
    own = bits(jm.merge(adapters, weights, **arguments("tsv", "full")))
    assert bits(jm.merge(adapters, weights, **arguments("tsv", "knots"))) == own
    assert bits(jm.merge(adapters, weights, **arguments("tsv", "core"))) == own


@pipe
def test_one_adapter_kept_whole_is_itself(method, space):
    if jm.METHODS[method].least > 1:
        with pytest.raises(ValueError, match=rf"method {method} takes"):
            jm.merge([random_adapter(0)], [1.0], **arguments(method, space))
        return
    given = [random_adapter(0)]
    merged = jm.merge(given, [1.0], **{**arguments(method, space, density=1.0), "rank": 4})
    apart = distance(deltas(merged), deltas(given[0]))
    assert apart > 1e-3 if breaks(method, space, "single") else apart < 1e-5
    assert all(lora.scale == 1 for lora in merged.modules.values())


@grid
def test_signs_scales_order_zeros_and_draws(method, space):
    """What one program shows of a cell.

    Negative weights negate, doubled scales double, the order of adapters does not matter, zeros stay zeros, and a
    module's result hangs on itself and its name alone.
    """
    adapters, weights = cohort(method)
    doubled, _ = cohort(method, scale=1.0)
    options = arguments(method, space)
    merged = deltas(jm.merge(adapters, weights, **options))
    minus = {path: -delta for path, delta in merged.items()}
    if jm.METHODS[method].on_units:
        with pytest.raises(ValueError, match="0 or more"):
            jm.merge(adapters, [-weight for weight in weights], **options)
    else:
        negated = distance(deltas(jm.merge(adapters, [-weight for weight in weights], **options)), minus)
        assert negated > 1e-3 if breaks(method, space, "negation") else negated < 1e-5
    twice = distance(deltas(jm.merge(doubled, weights, **options)), {path: 2 * delta for path, delta in merged.items()})
    assert twice > 1e-3 if breaks(method, space, "homogeneity") else twice < 1e-5
    turned = distance(deltas(jm.merge(adapters[::-1], weights[::-1], **options)), merged)
    if jm.METHODS[method].random or breaks(method, space, "order"):  # Each position draws for itself.
        assert turned > 1e-3
    # How often ctm improves its subspaces hangs on rounding: it is held to this as users compile it, below.
    elif space != "ctm" or not os.environ["XLA_FLAGS"]:
        assert turned < 1e-4

    zeros = [jax.tree.map(np.zeros_like, adapter) for adapter in adapters]
    for delta in deltas(jm.merge(zeros, weights, **options)).values():
        np.testing.assert_array_equal(delta, np.zeros_like(delta))

    same = [jm.Adapter(dict.fromkeys(("x", "y"), adapter.modules["layers.0.q"])) for adapter in adapters]
    both = jm.merge(same, weights, **options)
    apart = relative_error(delta64(both.modules["x"]), delta64(both.modules["y"]))
    assert apart > 1e-2 if jm.METHODS[method].random else apart == 0
    alone = jm.merge([jm.Adapter({"y": adapter.modules["y"]}) for adapter in same], weights, **options)
    assert bits(alone)["y"] == bits(both)["y"]
    backwards = [jm.Adapter(dict(reversed(adapter.modules.items()))) for adapter in same]
    assert bits(jm.merge(backwards, weights, **options)) == bits(both)


def test_the_order_of_adapters_in_ctm():
    command = [sys.executable, "-m", "pytest", __file__, "-k", "test_signs_scales_order_zeros_and_draws and ctm"]
    done = subprocess.run(command, env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout


@pipe
def test_an_adapter_of_zeros_changes_nothing(method, space):
    adapters, weights = cohort(method)
    if len(adapters) < 3:  # It takes no third.
        with pytest.raises(ValueError, match=rf"method {method} takes"):
            jm.merge([*adapters, adapters[0]], [1.0] * 3, **arguments(method, space))
        return
    zeros, options = jax.tree.map(np.zeros_like, adapters[0]), arguments(method, space)
    two = jm.merge(adapters[:2], weights[:2], **options)
    more = jm.merge([*adapters[:2], zeros], weights, **options)
    apart = distance(deltas(more), deltas(two))
    # What is drawn hangs on places in matrices that are wider by a rank.
    drawn = jm.METHODS[method].random and space == "core"
    assert apart > 1e-3 if drawn or breaks(method, space, "zeros") else apart < 1e-4


@kinds
def test_the_same_bits_whatever_else_is_merged(method, space):
    adapters, weights = cohort(method, shapes=TWO_SHAPES)
    whole = bits(jm.merge(adapters, weights, **arguments(method, space)))
    for path in ("layers.10.q", "head"):
        alone = [jm.Adapter({path: adapter.modules[path]}) for adapter in adapters]
        assert bits(jm.merge(alone, weights, **arguments(method, space))) == {path: whole[path]}


@pytest.mark.parametrize("method", [name for name, row in jm.METHODS.items() if row.random])
def test_drawn_from_the_key_alone(method):
    adapters, _ = cohort(method)
    options = arguments(method, jm.METHODS[method].space)
    first = bits(jm.merge(adapters, **options))
    assert first == bits(jm.merge(adapters, **options))
    assert first != bits(jm.merge(adapters, **{**options, "key": jax.random.key(8)}))
    with pytest.raises(ValueError, match="key"):
        jm.merge(adapters, **{**options, "key": None})


@pytest.mark.parametrize(
    ("method", "space", "dtype"),
    [(*cell, "bfloat16") for cell in KINDS] + [(*cell, "float16") for cell in SPREAD],
    ids="-".join,
)
def test_half_sources_keep_their_dtype(method, space, dtype):
    adapters, weights = cohort(method, dtype=jax.numpy.dtype(dtype))
    wide = [jax.tree.map(lambda x: np.asarray(x, np.float32), adapter) for adapter in adapters]
    merged = jm.merge(adapters, weights, **arguments(method, space))
    assert {str(leaf.dtype) for lora in merged.modules.values() for leaf in (lora.a, lora.b)} == {dtype}
    tolerance = {"bfloat16": 2e-2, "float16": 2e-3}[dtype]
    assert distance(deltas(merged), deltas(jm.merge(wide, weights, **arguments(method, space)))) < tolerance


@spread
def test_jit_gives_what_eager_gives(method, space):
    adapters, weights = cohort(method)
    eager = jm.merge(adapters, weights, **arguments(method, space))
    jitted = jax.jit(lambda adapters, weights: jm.merge(adapters, weights, **arguments(method, space)))
    assert distance(deltas(jitted(adapters, np.asarray(weights, np.float32))), deltas(eager)) < 1e-5


@kinds
def test_energy_adds_up(method, space):
    adapters, weights = cohort(method)
    options = arguments(method, space)
    whole = jm.merge(adapters, weights, **options)
    cut = jm.merge(adapters, weights, **{**options, "rank": 2})
    for path, energy in cut.energy.items():
        kept = np.linalg.norm(deltas(cut)[path]) ** 2
        assert float(energy.total - energy.lost) == pytest.approx(kept, rel=1e-4)
        assert 0 <= energy.kept <= 1 + 1e-5
        # A merge that is made at its rank has no other to be a part of.
        if not jm.METHODS[method].on_units and space != "ctm":
            assert float(energy.total) == pytest.approx(float(whole.energy[path].total), rel=1e-4)
            assert whole.energy[path].kept == pytest.approx(1)


@pytest.mark.parametrize("space", ["knots", "core"])
@pytest.mark.parametrize("method", [name for name, row in jm.METHODS.items() if row.equivariant])
def test_what_commutes_with_rotations_is_the_same_in_the_spaces_own_bases(method, space):
    """Such methods are computed on the core; the space's own tasks give the same."""
    if space not in jm.METHODS[method].spaces:
        pytest.fail("a method that commutes with rotations makes sense in lossless spaces")
    adapters, weights = cohort(method)
    row = jm.METHODS[method]
    own = dataclasses.replace(row, equivariant=False)  # In the space's form for other methods.
    form = jm.SPACES[space].load(own)

    @jax.jit
    def by_the_space(factors):
        (tasks,), frame = form.project(factors, 12)
        ranks = {"ranks": (4,) * len(adapters)} if row.ranked else {}
        result = row.load()(tasks, np.asarray(weights, np.float32), **ranks)
        return form.lift([result], frame, min(12, 4 * len(adapters)))

    merged = jm.merge(adapters, weights, method=method)
    for path, lora in merged.modules.items():
        loras = [adapter.modules[path] for adapter in adapters]
        lifted = by_the_space(Factors([x.a for x in loras], [x.b for x in loras], np.full(len(loras), 0.5, np.float32)))
        assert relative_error(np.asarray(lifted.b, np.float64) @ np.asarray(lifted.a, np.float64), delta64(lora)) < 1e-4


def test_the_same_bits_on_eight_devices():
    program = """
import jax
import jaxmerge as jm
from tests.test_grid_laws import SPREAD, arguments, bits, cohort
for method, space in SPREAD:
    adapters, weights = cohort(method, shapes={f"m.{i}": (20, 16) for i in range(11)})
    plain = bits(jm.merge(adapters, weights, **arguments(method, space)))
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spread = jm.merge(adapters, weights, mesh=mesh, **arguments(method, space))
    assert bits(spread) == plain, (method, space)
print("compared", len(SPREAD))
"""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.stdout == f"compared {len(SPREAD)}\n", done.stderr
