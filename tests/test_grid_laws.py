"""Laws that every method keeps in every space. A new row in either table comes under all of them."""

import itertools
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import jaxmerge as jm
from tests.helpers import delta64, relative_error

KEY = jax.random.key(7)
GRID = list(itertools.product(jm.METHODS, jm.SPACES))
grid = pytest.mark.parametrize(("method", "space"), GRID, ids=[f"{m}-{s}" for m, s in GRID])
# One shape, so that each law compiles one program a cell; TWO_SHAPES where buckets matter.
SHAPES = {"layers.0.q": (20, 16), "layers.1.q": (20, 16), "layers.10.q": (20, 16)}
TWO_SHAPES = {**SHAPES, "head": (16, 24)}


def arguments(method, space, density=0.4):
    """What a method needs to run, from its row alone; at full rank, where no truncation blurs a law."""
    row = jm.METHODS[method]
    rank = None if jm.SPACES[space].load(row).capacity([4], 20, 16) == 4 else 16
    values = {h.name: density if h.kind == "density" else h.default for h in row.hyperparameters}
    return {"method": method, "space": space, "rank": rank, **({"key": KEY} if row.random else {}), **values}


def random_adapter(seed, rank=4, dtype=np.float32, scale=0.5, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return jm.Adapter(
        {
            path: jm.LoRA(rng.normal(size=(rank, in_)).astype(dtype), rng.normal(size=(out, rank)).astype(dtype), scale)
            for path, (out, in_) in shapes.items()
        }
    )


@pytest.fixture(scope="module")
def adapters():
    return [random_adapter(seed) for seed in range(3)]


def deltas(adapter):
    return {path: delta64(lora) for path, lora in adapter.modules.items()}


def bits(adapter):
    return {
        path: (np.asarray(lora.a).tobytes(), np.asarray(lora.b).tobytes()) for path, lora in adapter.modules.items()
    }


def assert_close(one, other, tolerance=1e-5):
    assert one.keys() == other.keys()
    for path in one:
        assert relative_error(one[path], other[path]) < tolerance


@grid
def test_one_adapter_kept_whole_is_itself(method, space, adapters):
    merged = jm.merge(adapters[:1], [1.0], **{**arguments(method, space, density=1.0), "rank": 4})
    assert_close(deltas(merged), deltas(adapters[0]))
    assert all(lora.scale == 1 for lora in merged.modules.values())


@grid
def test_negative_weights_negate(method, space, adapters):
    weights = np.array([1.0, 0.5, 2.0])
    plus = jm.merge(adapters, weights, **arguments(method, space))
    minus = jm.merge(adapters, -weights, **arguments(method, space))
    assert_close(deltas(minus), {path: -delta for path, delta in deltas(plus).items()})


@grid
def test_homogeneous_in_the_scale(method, space, adapters):
    doubled = [random_adapter(seed, scale=1.0) for seed in range(3)]
    once = jm.merge(adapters, [1, 0.5, -2], **arguments(method, space))
    twice = jm.merge(doubled, [1, 0.5, -2], **arguments(method, space))
    assert_close(deltas(twice), {path: 2 * delta for path, delta in deltas(once).items()})


@grid
def test_an_adapter_of_zeros_changes_nothing(method, space, adapters):
    zeros = jax.tree.map(np.zeros_like, adapters[0])
    merged = jm.merge(adapters, [1, 0.5, -2], **arguments(method, space))
    more = jm.merge([*adapters, zeros], [1, 0.5, -2, 3], **arguments(method, space))
    assert_close(deltas(more), deltas(merged))


@grid
def test_the_order_of_adapters_does_not_matter_unless_drawn(method, space, adapters):
    row = jm.METHODS[method]
    merged = jm.merge(adapters, [1, 0.5, -2], **arguments(method, space))
    turned = jm.merge(adapters[::-1], [-2, 0.5, 1], **arguments(method, space))
    if row.random:  # Each position draws for itself.
        assert relative_error(deltas(turned)["layers.1.q"], deltas(merged)["layers.1.q"]) > 1e-2
    else:
        assert_close(deltas(turned), deltas(merged))


@grid
def test_the_same_bits_whatever_else_is_merged(method, space):
    adapters = [random_adapter(seed, shapes=TWO_SHAPES) for seed in range(3)]
    whole = bits(jm.merge(adapters, [1, 0.5, -2], **arguments(method, space)))
    backwards = [jm.Adapter(dict(reversed(adapter.modules.items()))) for adapter in adapters]
    assert bits(jm.merge(backwards, [1, 0.5, -2], **arguments(method, space))) == whole
    for path in ("layers.10.q", "head"):
        alone = [jm.Adapter({path: adapter.modules[path]}) for adapter in adapters]
        assert bits(jm.merge(alone, [1, 0.5, -2], **arguments(method, space))) == {path: whole[path]}


@grid
def test_drawn_from_the_key_alone(method, space, adapters):
    first = jm.merge(adapters, **arguments(method, space))
    again = jm.merge(adapters, **arguments(method, space))
    assert bits(first) == bits(again)
    if jm.METHODS[method].random:
        other = jm.merge(adapters, **{**arguments(method, space), "key": jax.random.key(8)})
        assert bits(first) != bits(other)
        with pytest.raises(ValueError, match="key"):
            jm.merge(adapters, **{**arguments(method, space), "key": None})


@grid
def test_modules_of_equal_shape_draw_apart(method, space):
    same = [random_adapter(seed, shapes={"m": (20, 16)}).modules["m"] for seed in range(2)]
    adapters = [jm.Adapter({"x": lora, "y": lora}) for lora in same]
    merged = deltas(jm.merge(adapters, [1, 1], **arguments(method, space)))
    if jm.METHODS[method].random:
        assert relative_error(merged["x"], merged["y"]) > 1e-2
    else:
        assert np.array_equal(merged["x"], merged["y"])


@grid
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_sources_keep_their_dtype(method, space, dtype):
    adapters = [random_adapter(seed, dtype=jax.numpy.dtype(dtype)) for seed in range(2)]
    wide = [jax.tree.map(lambda x: np.asarray(x, np.float32), adapter) for adapter in adapters]
    merged = jm.merge(adapters, **arguments(method, space))
    assert {str(leaf.dtype) for lora in merged.modules.values() for leaf in (lora.a, lora.b)} == {dtype}
    tolerance = {"bfloat16": 2e-2, "float16": 2e-3}[dtype]
    assert_close(deltas(merged), deltas(jm.merge(wide, **arguments(method, space))), tolerance)


@grid
def test_jit_gives_what_eager_gives(method, space, adapters):
    weights = np.array([1, 0.5, -2], np.float32)
    eager = jm.merge(adapters, weights, **arguments(method, space))
    jitted = jax.jit(lambda adapters, weights: jm.merge(adapters, weights, **arguments(method, space)))
    assert_close(deltas(jitted(adapters, weights)), deltas(eager))


@grid
def test_energy_adds_up(method, space, adapters):
    whole = jm.merge(adapters, **arguments(method, space))
    cut = jm.merge(adapters, **{**arguments(method, space), "rank": 2})
    for path, energy in cut.energy.items():
        kept = np.linalg.norm(deltas(cut)[path]) ** 2
        assert float(energy.total - energy.lost) == pytest.approx(kept, rel=1e-4)
        assert float(energy.total) == pytest.approx(float(whole.energy[path].total), rel=1e-4)
        assert whole.energy[path].kept == pytest.approx(1)
        assert 0 <= energy.kept <= 1


def test_the_same_bits_on_eight_devices():
    program = """
import jax
import jaxmerge as jm
from tests.test_grid_laws import GRID, arguments, bits, random_adapter
adapters = [random_adapter(seed, shapes={f"m.{i}": (20, 16) for i in range(11)}) for seed in range(3)]
for method, space in GRID:
    plain = bits(jm.merge(adapters, [1, 0.5, -2], **arguments(method, space)))
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spread = jm.merge(adapters, [1, 0.5, -2], mesh=mesh, **arguments(method, space))
    assert bits(spread) == plain, (method, space)
print("compared", len(GRID))
"""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.stdout == f"compared {len(GRID)}\n", done.stderr
