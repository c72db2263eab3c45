"""Dense deltas merged a few rows at a time, against the same formed whole; and the truncated SVD of what results."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge import dense
from jaxmerge.lowrank import Matrix, truncated_svd
from jaxmerge.selection import search
from jaxmerge.sparsify import AtRandom, Between, ByRank, Largest


def factors(p, q, r=3, n=3):
    """Of small integers: products are exact, however they are summed, and full of ties."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(-3, 4, (n, r, q)), rng.integers(-3, 4, (n, p, r))
    return jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), jnp.asarray([1.0, 0.5, 2.0])[:n]


# How large blocks may be: the matrix is one block, of few or many entries; some, the last one in part; many; or blocks
# that it fills, of rows longer than that.
CUTS = [((7, 5), [64]), ((100, 30), [64, 2000]), ((257, 190), [2000, 2**18]), ((64, 1000), [64])]


@pytest.mark.parametrize("method", [name for name, row in jm.METHODS.items() if row.combine])
@pytest.mark.parametrize(("shape", "sizes"), CUTS, ids=["×".join(map(str, shape)) for shape, _ in CUTS])
def test_blocks_give_what_whole_deltas_give(method, shape, sizes):
    row = jm.METHODS[method]
    n = row.most or 3
    a, b, scales = factors(*shape, n=n)
    weights, size = jnp.asarray([1.0, -0.5, 2.0])[:n], shape[0] * shape[1]
    keys = jax.random.split(jax.random.key(0), n)
    deltas = scales[:, None, None] * (b @ a)
    numbers = {"density": 0.3, "gamma": 0.1, "epsilon": 0.2, "threshold": 0.4, "t": 0.5}
    options = {h.name: numbers.get(h.name, h.default) for h in row.hyperparameters}
    expected = row.load()(deltas, weights, **options, **({"key": keys} if row.random else {}))
    density, gamma, epsilon = (options.pop(name, None) for name in ("density", "gamma", "epsilon"))
    for entries in sizes:

        @jax.jit
        def merged(a, b, epsilon, entries=entries):
            passes = dense.delta_passes(a, b, scales, dense.cut_rows(shape, entries))

            def cut(count):
                count = jnp.full((n,), count, jnp.int32)
                return search(passes, count, passes.guess(count))

            pruning = {
                "": lambda: None,
                "magnitude": lambda: Largest(cut(int(density * size))),
                "outliers": lambda: Between(cut(int(gamma * size)), cut(int(gamma * size) + int(density * size))),
                "random": lambda: AtRandom(jnp.float32(density), jnp.asarray(True), keys),
                "rank": lambda: ByRank(jnp.float32(density), epsilon, keys),
            }[row.pruning]()
            return dense.merge_entries(
                passes, weights, pruning, functools.partial(row.load_combine(), **options)
            ).whole()

        np.testing.assert_array_equal(merged(a, b, jnp.float32(epsilon or 0)), expected)


def spectrum(kind, p, q):
    rng = np.random.default_rng(0)
    if kind == "noise":
        return rng.normal(size=(p, q))
    if kind == "ties":
        x = rng.normal(size=(p, 8)) @ rng.normal(size=(8, q))
        return np.where(np.abs(x) > 3, x, 0)
    values = {"flat": np.ones(40), "steep": 0.5 ** np.arange(60.0), "rank 3": np.array([3.0, 2.0, 1.0])}[kind]
    u, v = (np.linalg.qr(rng.normal(size=(size, values.size)))[0] for size in (p, q))
    return (u * values) @ v.T


@jax.jit
def leading(matrix):
    return truncated_svd(Matrix(matrix), 16)


@pytest.mark.parametrize("unit", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize("kind", ["noise", "ties", "flat", "steep", "rank 3"])
def test_the_leading_part_is_within_its_bound(kind, unit):
    matrix = spectrum(kind, 512, 400).astype(np.float32) * np.float32(unit)
    u, s, vt, energy = leading(matrix)
    exact = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    best, total = (exact[:16] ** 2).sum(), (exact**2).sum()
    product = np.asarray(u, np.float64) * np.asarray(s, np.float64) @ np.asarray(vt, np.float64)
    lost = ((matrix.astype(np.float64) - product) ** 2).sum()
    assert lost <= total - best + 1e-3 * best
    assert lost <= total - best + float(energy.missed) + 2e-6 * total
    assert float(energy.missed) <= 1e-3 * best
    np.testing.assert_allclose(float(energy.total), total, rtol=1e-5)
    np.testing.assert_allclose(float(energy.lost), lost, atol=1e-5 * total)
    for basis in (np.asarray(u).T, np.asarray(vt)):
        np.testing.assert_allclose(basis @ basis.T, np.eye(16), atol=2e-5)


def test_a_zero_matrix_has_a_zero_part():
    _, s, _, energy = leading(jnp.zeros((512, 400)))
    assert not s.any()
    assert float(energy.total) == float(energy.lost) == float(energy.missed) == 0
