"""The array functions give the same bits however their inputs are sharded."""

import json
import os
import subprocess
import sys

import pytest

DTYPES = ["float32", "bfloat16"]
FUNCTIONS = [
    "prune_magnitude",
    "prune_random",
    "majority_total",
    "majority_frequency",
    "disjoint_merge",
    "task_arithmetic",
    "task_arithmetic_integer",
    "task_arithmetic_minus_zeros",
    "magnitude_prune",
    "ties_total",
    "ties_frequency",
    "dare_linear",
    "dare_ties",
]

# Runs with eight devices of its own; prints, as JSON, function -> sharding -> entries that differ.
SCRIPT = r"""
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jaxmerge as jm

jax.config.update("jax_numpy_dtype_promotion", "strict")
assert len(jax.devices()) == 8

KEY = jax.random.key(5)
WEIGHTS = [0.3, -0.7, 1.1, 0.0, -2.9, 0.013, 1.7, 0.5]
INTEGERS = [1, -2, 3, 0, 5, -7, 1, 2]
MASK = jnp.asarray(np.random.default_rng(1).random((8, 8, 16)) < 0.5)
FUNCTIONS = {
    "prune_magnitude": lambda t, mask: jm.prune(t, 0.29, "magnitude"),
    "prune_random": lambda t, mask: jm.prune(t, 0.29, "random", True, key=KEY),
    "majority_total": lambda t, mask: jm.calculate_majority_sign_mask(t),
    "majority_frequency": lambda t, mask: jm.calculate_majority_sign_mask(t, "frequency"),
    "disjoint_merge": lambda t, mask: jm.disjoint_merge(t, mask),
    "task_arithmetic": lambda t, mask: jm.task_arithmetic(t, WEIGHTS),
    "task_arithmetic_integer": lambda t, mask: jm.task_arithmetic(t, INTEGERS),
    "task_arithmetic_minus_zeros": lambda t, mask: jm.task_arithmetic(-0.0 * jnp.abs(t), [1] * 8),
    "magnitude_prune": lambda t, mask: jm.magnitude_prune(t, WEIGHTS, 0.29),
    "ties_total": lambda t, mask: jm.ties(t, WEIGHTS, 0.58),
    "ties_frequency": lambda t, mask: jm.ties(t, WEIGHTS, 0.58, "frequency"),
    "dare_linear": lambda t, mask: jm.dare_linear(t, WEIGHTS, 0.58, key=KEY),
    "dare_ties": lambda t, mask: jm.dare_ties(t, WEIGHTS, 0.58, key=KEY),
}
line = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
grid = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
SHARDINGS = {
    "replicated": NamedSharding(line, P()),
    "tasks": NamedSharding(line, P("d")),
    "rows": NamedSharding(line, P(None, "d")),
    "columns": NamedSharding(line, P(None, None, "d")),
    "grid of tasks and rows": NamedSharding(grid, P("x", "y")),
    "grid of rows and columns": NamedSharding(grid, P(None, "x", "y")),
}
EAGER = {
    "float32": [where for where in SHARDINGS if where != "grid of tasks and rows"],
    "bfloat16": ["tasks", "grid of rows and columns"],
}


def bits(array):
    array = np.asarray(array)
    return array if array.dtype == bool else array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


rng = np.random.default_rng(0)
tasks = rng.normal(size=(8, 8, 16)).astype(np.float32)
tasks[:, :, :4] = rng.integers(-2, 3, size=(8, 8, 4))  # ties, even votes
outcomes = {}
dtype = sys.argv[1]
plain = jnp.asarray(tasks).astype(dtype)
for name, function in FUNCTIONS.items():
    expected = function(plain, MASK)
    outcomes[name] = {}
    for where in EAGER[dtype]:
        got = function(jax.device_put(plain, SHARDINGS[where]), MASK)
        assert got.dtype == expected.dtype and got.shape == expected.shape
        outcomes[name][where] = int(np.sum(bits(got) != bits(expected)))
if dtype == "float32":
    # Several in one program, sharded the one way that is left.
    TOGETHER = ["task_arithmetic", "prune_magnitude", "ties_total", "dare_ties"]
    together = jax.jit(lambda t, mask: [FUNCTIONS[name](t, mask) for name in TOGETHER])
    plain_results = together(plain, MASK)
    sharded_results = together(jax.device_put(plain, SHARDINGS["grid of tasks and rows"]), MASK)
    for name, expected, got in zip(TOGETHER, plain_results, sharded_results, strict=True):
        outcomes[name]["under jit"] = int(np.sum(bits(got) != bits(expected)))
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def outcomes():
    """What the script found, per dtype; run once, both at a time."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    running = {}
    try:
        for dtype in DTYPES:
            running[dtype] = subprocess.Popen(
                [sys.executable, "-W", "error", "-c", SCRIPT, dtype],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        found = {}
        for dtype, process in running.items():
            out, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors[-3000:]
            found[dtype] = json.loads(out.splitlines()[-1])
        return found
    finally:
        for process in running.values():
            process.kill()
            process.communicate()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_sharding_does_not_change_a_bit(outcomes, function, dtype):
    entries_that_differ = outcomes[dtype][function]
    assert entries_that_differ == dict.fromkeys(entries_that_differ, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_function_was_tried(outcomes, dtype):
    assert list(outcomes[dtype]) == FUNCTIONS
    assert {len(tried) for tried in outcomes[dtype].values()} == ({5, 6} if dtype == "float32" else {2})
