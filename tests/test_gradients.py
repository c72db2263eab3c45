"""Merges have gradients, also where singular values are equal or 0; against differences of merges in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm

SHAPE, STEP = (24, 32), 1e-5
WEIGHTS = np.array([0.7, 0.3, 0.2])


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def sources(b=None):
    rng = np.random.default_rng(0)
    made = [jm.LoRA(rng.normal(size=(4, SHAPE[1])), rng.normal(size=(SHAPE[0], 4)), 1.0) for _ in range(3)]
    if b is not None:
        made[0] = jm.LoRA(made[0].a, b, 1.0)
    return [jm.Adapter({"q": lora}) for lora in made]


def score(adapters, weights, arguments):
    """A number that hangs on every entry of the merge in another way."""
    unlike = np.random.default_rng(1).normal(size=SHAPE)
    return jnp.sum(jm.delta(jm.merge(adapters, weights, **arguments).modules["q"]) * unlike)


@pytest.mark.parametrize("arguments", [
    *({"method": name} for name in (
        "linear", "tsv", "iso_c", "iso_cts", "star", "subspace_boosting", "cart", "pico", "swudi", "karcher"
    )),
    {"rank": 5},
    {"method": "tsv", "rank": 5},
    {"method": "norm_equalized", "space": "knots"},
    {"method": "multislerp", "space": "core"},
    *({"stages": [stage]} for stage in (
        "isotropize", "calibrate", "norm_restore", ("truncate", {"rank": 5}), ("truncate", {"energy": 0.9})
    )),
], ids=str)  # fmt: skip
def test_gradients_are_those_of_differences(arguments):
    gradient = jax.grad(lambda weights: score(sources(), weights, arguments))(jnp.asarray(WEIGHTS))
    steps = STEP * np.eye(3)
    close(gradient, [_slope(lambda t, e=e: score(sources(), WEIGHTS + t * e, arguments)) for e in steps / STEP])
    adapters = sources()
    b, direction = adapters[0].modules["q"].b, np.random.default_rng(2).normal(size=(SHAPE[0], 4))
    of_b = jax.grad(lambda b: score(sources(b), WEIGHTS, arguments))(jnp.asarray(b))
    close(jnp.sum(of_b * direction), _slope(lambda t: score(sources(b + t * direction), WEIGHTS, arguments)))


def _slope(function):
    return (float(function(STEP)) - float(function(-STEP))) / (2 * STEP)


def close(value, expected):
    np.testing.assert_allclose(np.asarray(value), expected, atol=1e-6 * np.abs(expected).max(), rtol=1e-6)
