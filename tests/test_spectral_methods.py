"""The spectral methods against their papers' formulas, in float64 NumPy on the dense weight changes."""

import math
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.methods import interference, orthogonal, singular_values
from jaxmerge.methods.units import lego
from tests.helpers import delta64, relative_error

OUT, IN = 40, 30
RANKS = (3, 3, 3)
WEIGHTS = [1.0, 0.5, -2.0]


def svd(matrix):
    """The SVD without null directions."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    rank = np.linalg.matrix_rank(matrix, tol=1e-9 * max(s[0], 1e-300)) if s[0] > 0 else 0
    return u[:, :rank], s[:rank], vt[:rank]


def polar(matrix):
    u, _, vt = svd(matrix)
    return u @ vt


def tsv_reference(tasks):
    u, s, vt = zip(*map(svd, tasks), strict=True)
    return polar(np.hstack(u)) @ np.diag(np.concatenate(s)) @ polar(np.vstack(vt))


def iso_c_reference(tasks):
    u, s, vt = svd(sum(tasks))
    return s.mean() * u @ vt


def iso_cts_reference(tasks, common_share):
    u, s, vt = svd(sum(tasks))
    rank = len(s)
    each = round((rank - int(rank * common_share + 1e-9)) / len(tasks))
    common = rank - each * len(tasks)
    left, sizes, right = [u[:, :common]], [s[:common]], [vt[:common]]
    for task in tasks:
        own_u, own_s, own_vt = svd(task - left[0] @ left[0].T @ task)
        left.append(own_u[:, :each])
        sizes.append(own_s[:each])
        right.append(own_vt[:each])
    return np.concatenate(sizes).mean() * polar(np.hstack(left)) @ polar(np.vstack(right))


def cart_reference(tasks, rank_share, strength):
    mean = sum(tasks) / len(tasks)
    total = np.zeros_like(mean)
    for task in tasks:
        u, s, vt = svd(task - mean)
        k = math.ceil(rank_share * len(s) - 1e-9)
        total += u[:, :k] @ np.diag(s[:k]) @ vt[:k]
    return mean + strength * total


def star_reference(tasks, eta):
    total = np.zeros_like(tasks[0])
    for task in tasks:
        u, s, vt = svd(task)
        k = min(np.searchsorted(np.cumsum(s), eta * s.sum()) + 1, len(s))
        total += u[:, :k] @ np.diag(s[:k] * s.sum() / s[:k].sum()) @ vt[:k]
    return total


def subspace_boosting_reference(tasks, beta):
    u, s, vt = svd(sum(tasks))
    reached = np.flatnonzero(np.cumsum(s) / s.sum() >= beta - 1e-12)
    return u @ np.diag(np.maximum(s, s[reached[0]])) @ vt


def pico_reference(tasks, b=None):
    """With factors B for the calibration: the paper's own form. Without, from the weight changes."""
    u, s, _ = np.linalg.svd(np.hstack(tasks if b is None else b), full_matrices=False)
    shares = s**2 / np.sum(s**2)
    damping = 1 / (1 + (len(tasks) - 1) * shares)
    calibrate = np.eye(len(u)) + u @ np.diag(damping - 1) @ u.T
    merged = sum(calibrate @ task for task in tasks)
    return np.mean([np.linalg.norm(task) for task in tasks]) / np.linalg.norm(merged) * merged


def swudi_reference(tasks, tau, count=None):
    c = sum(t.T @ t / np.sum(t**2) for t in tasks)
    d = sum(t @ t.T @ t / np.sum(t**2) for t in tasks)
    values, vectors = np.linalg.eigh(c)
    values, vectors = values[::-1], vectors[:, ::-1]
    k = math.ceil(values.sum() ** 2 / np.sum(values**2)) if count is None else count
    start = sum(tasks)
    way = np.diag((1 - np.exp(-tau * values[:k])) / values[:k])
    return start + (d - start @ c) @ vectors[:, :k] @ way @ vectors[:, :k].T


# Name: function, reference, hyperparameters that are not the defaults.
CASES = {
    "tsv": (orthogonal.tsv, tsv_reference, {}),
    "iso_c": (singular_values.iso_c, iso_c_reference, {}),
    "iso_cts": (orthogonal.iso_cts, iso_cts_reference, {"common_share": 0.6}),
    "cart": (singular_values.cart, cart_reference, {"rank_share": 0.3, "strength": 0.7}),
    "star": (singular_values.star, star_reference, {"eta": 0.6}),
    "subspace_boosting": (singular_values.subspace_boosting, subspace_boosting_reference, {"beta": 0.5}),
    "pico": (interference.pico, pico_reference, {}),
    "swudi": (interference.swudi, swudi_reference, {"tau": 30.0}),
}
# Of directions that are nearly dependent, as those of Iso-CTS here (by a hundredth), float32 has fewer digits.
TOLERANCE = {name: 1e-4 if name == "iso_cts" else 1e-5 for name in CASES}
case = pytest.mark.parametrize("name", CASES)
ranked = pytest.mark.parametrize("name", [name for name in CASES if jm.METHODS[name].ranked])


def factors(seed, rank=3, out=OUT, in_=IN, dtype=np.float32):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(rank, in_)), rng.normal(size=(out, rank))
    return jm.LoRA(a.astype(dtype), b.astype(dtype), 0.5 + seed)


def adapters_of(*loras):
    return [jm.Adapter({"m": lora}) for lora in loras]


def merged_product(loras, weights, **arguments):
    merged = jm.merge(adapters_of(*loras), weights, space="full", **arguments)
    return delta64(merged.modules["m"])


@pytest.fixture(scope="module")
def loras():
    return [factors(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def deltas(loras):
    return np.stack([delta64(lora) for lora in loras])


def weighted(deltas, weights=WEIGHTS):
    return [weight * delta for weight, delta in zip(weights, deltas, strict=True)]


@case
@pytest.mark.parametrize("defaults", [True, False])
def test_a_merge_of_factors_is_the_papers_on_dense_changes(name, defaults, loras, deltas):
    _, reference, values = CASES[name]
    values = {h.name: h.default for h in jm.METHODS[name].hyperparameters} if defaults else values
    product = merged_product(loras, WEIGHTS, method=name, **values)
    assert relative_error(product, reference(weighted(deltas), **values)) < TOLERANCE[name]


@case
def test_arrays(name, deltas):
    function, reference, values = CASES[name]
    expected = reference(weighted(deltas), **values)
    tasks = deltas.astype(np.float32)
    assert relative_error(function(tasks, WEIGHTS, **values), expected) < TOLERANCE[name]
    assert relative_error(function(list(tasks), WEIGHTS, **values), expected) < TOLERANCE[name]
    assert function(tasks, WEIGHTS, **values).dtype == jnp.float32


@ranked
def test_known_ranks_are_the_ranks_that_are_found(name, deltas):
    function, reference, values = CASES[name]
    expected = reference(weighted(deltas), **values)
    assert (
        relative_error(function(deltas.astype(np.float32), WEIGHTS, ranks=RANKS, **values), expected) < TOLERANCE[name]
    )


@ranked
def test_known_ranks_keep_noise_out(name, deltas):
    """Dense changes may hold more than rounding errors in every direction, which only their ranks tell apart."""
    function, reference, values = CASES[name]
    noise = np.random.default_rng(4).normal(size=deltas.shape)
    noisy = (deltas + 3e-5 * noise * np.abs(deltas).max(axis=(1, 2), keepdims=True)).astype(np.float32)
    expected = reference(weighted(deltas), **values)
    assert relative_error(function(noisy, WEIGHTS, ranks=RANKS, **values), expected) < 0.05
    if name in ("iso_c", "subspace_boosting"):
        assert relative_error(function(noisy, WEIGHTS, **values), expected) > 0.5


@case
def test_float64(name, loras, deltas):
    function, reference, values = CASES[name]
    expected = reference(weighted(deltas), **values)
    with jax.enable_x64(True):
        merged = function(jnp.asarray(deltas), jnp.asarray(WEIGHTS), **values)
    assert merged.dtype == np.float64
    assert relative_error(merged, expected) < 1e-12
    wide = [jm.LoRA(lora.a.astype(np.float64), lora.b.astype(np.float64), lora.scale) for lora in loras]
    assert relative_error(merged_product(wide, WEIGHTS, method=name, **values), expected) < 1e-12


@case
def test_half_types_are_merged_in_float32(name, deltas):
    function, _, values = CASES[name]
    half = jnp.asarray(deltas, jnp.bfloat16)
    merged = function(half, WEIGHTS, **values)
    assert merged.dtype == jnp.float32
    np.testing.assert_array_equal(merged, function(half.astype(jnp.float32), WEIGHTS, **values))


@case
def test_ranks_may_differ(name):
    _, reference, values = CASES[name]
    loras = [factors(seed, rank) for seed, rank in enumerate((2, 4, 3))]
    tasks = weighted([delta64(lora) for lora in loras])
    product = merged_product(loras, WEIGHTS, method=name, **values)
    assert relative_error(product, reference(tasks, **values)) < TOLERANCE[name]


@case
def test_more_directions_than_features(name):
    """R of 9 where 8×6 holds 6."""
    _, reference, values = CASES[name]
    loras = [factors(seed, out=8, in_=6) for seed in range(3)]
    tasks = weighted([delta64(lora) for lora in loras])
    product = merged_product(loras, WEIGHTS, method=name, **values)
    assert relative_error(product, reference(tasks, **values)) < 1e-4


@case
def test_an_adapter_of_larger_rank_than_its_features(name):
    _, reference, values = CASES[name]
    loras = [factors(seed, rank=7, out=5, in_=6) for seed in range(2)]
    tasks = weighted([delta64(lora) for lora in loras], [1.0, 0.5])
    product = merged_product(loras, [1.0, 0.5], method=name, **values)
    assert relative_error(product, reference(tasks, **values)) < 1e-4


@case
def test_traced_weights_and_hyperparameters_compile_once(name, loras, deltas):
    function, reference, values = CASES[name]
    traces = []

    @jax.jit
    def jitted(tasks, weights, values):
        traces.append(1)
        return function(tasks, weights, **values)

    tasks = deltas.astype(np.float32)
    for weights in (WEIGHTS, [0.3, 1.0, 1.0]):
        expected = reference(weighted(deltas, weights), **values)
        assert relative_error(jitted(tasks, np.float32(weights), values), expected) < TOLERANCE[name]
    assert len(traces) == 1
    merge = jax.jit(lambda adapters, weights, values: jm.merge(adapters, weights, method=name, **values))
    merged = merge(adapters_of(*loras), np.float32(WEIGHTS), values)
    assert relative_error(delta64(merged.modules["m"]), reference(weighted(deltas), **values)) < TOLERANCE[name]


@case
def test_the_same_function_in_other_factors(name, loras):
    """(B G, G⁻¹ A) gives the same merge, with a scale moved from one factor to the other as well."""
    rng = np.random.default_rng(5)
    turned = []
    for i, lora in enumerate(loras):
        g = (np.linalg.qr(rng.normal(size=(3, 3)))[0] @ np.diag([1, 2, 3])) * 10.0**i
        turned.append(
            jm.LoRA(
                (np.linalg.inv(g) @ np.asarray(lora.a, np.float64)).astype(np.float32),
                (np.asarray(lora.b, np.float64) @ g).astype(np.float32),
                lora.scale,
            )
        )
    values = CASES[name][2]
    one, other = (merged_product(each, WEIGHTS, method=name, **values) for each in (loras, turned))
    assert relative_error(other, one) < TOLERANCE[name]


@case
@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_cutoffs_are_relative(name, size, loras):
    """Very small or large adapters lose no direction, and no number leaves float32's range."""
    values = CASES[name][2]
    scaled = [jm.LoRA(lora.a, lora.b, lora.scale * size) for lora in loras]
    one, other = (merged_product(each, WEIGHTS, method=name, **values) for each in (loras, scaled))
    assert relative_error(other / size, one) < TOLERANCE[name]


@case
def test_an_absent_task_is_one_of_zeros_or_of_weight_zero(name, deltas):
    function, reference, values = CASES[name]
    tasks = deltas.astype(np.float32)
    expected = reference(weighted(deltas[:2], WEIGHTS[:2]), **values)
    zeros = np.stack([*tasks[:2], np.zeros_like(tasks[0])])
    assert relative_error(function(zeros, WEIGHTS, **values), expected) < TOLERANCE[name]
    assert relative_error(function(tasks, [*WEIGHTS[:2], 0.0], **values), expected) < TOLERANCE[name]


@case
def test_one_task(name, deltas):
    function, reference, values = CASES[name]
    expected = reference(weighted(deltas[:1], [-2.0]), **values)
    merged = function(deltas[:1].astype(np.float32), [-2.0], **values)
    assert relative_error(merged, expected) < TOLERANCE[name]
    comes_back = relative_error(merged, -2 * deltas[0]) < TOLERANCE[name]
    assert comes_back == ("single" not in jm.METHODS[name].breaks)


@case
def test_equal_tasks(name, loras, deltas):
    """Null directions of equal tasks beside each other are not filled with anything."""
    _, reference, values = CASES[name]
    twice = [loras[0], loras[0], loras[1]]
    tasks = [deltas[0], deltas[0], deltas[1]]
    product = merged_product(twice, [1, 1, 1], method=name, **values)
    assert relative_error(product, reference(tasks, **values)) < TOLERANCE[name]


def test_tsv_of_equal_tasks_is_one_of_them(deltas):
    merged = orthogonal.tsv(np.float32([deltas[0]] * 3), [1.0, 1.0, 1.0])
    assert relative_error(merged, deltas[0]) < 1e-5


@case
def test_nothing_comes_of_nothing(name, deltas):
    function, _, values = CASES[name]
    zeros = np.zeros((3, 8, 6), np.float32)
    np.testing.assert_array_equal(function(zeros, [1.0, 1.0, 1.0], **values), zeros[0])
    np.testing.assert_array_equal(function(deltas.astype(np.float32), [0.0] * 3, **values), np.zeros((OUT, IN)))


@pytest.mark.parametrize("name", ["iso_c", "subspace_boosting", "pico", "cart", "star", "swudi"])
def test_rounding_errors_of_tasks_that_cancel_are_not_blown_up(name, loras, deltas):
    """For methods of the sum; TSV and Iso-CTS take directions of each task, and those are there."""
    row = jm.METHODS[name]
    values = {h.name: h.default for h in row.hyperparameters}
    if name == "cart":
        values["strength"] = 0.0
    product = merged_product([loras[0], loras[1], loras[0]], [1.0, 0.0, -1.0], method=name, **values)
    assert np.linalg.norm(product) < 1e-5 * np.linalg.norm(deltas[0])


@case
def test_default_weights(name, loras, deltas):
    """1 each for those that have the papers' scale by themselves, and the mean for those that sum."""
    _, reference, values = CASES[name]
    each = {"star": 1 / 3, "subspace_boosting": 1 / 3}.get(name, 1)
    product = merged_product(loras, None, method=name, **values)
    assert relative_error(product, reference(weighted(deltas, [each] * 3), **values)) < TOLERANCE[name]


@case
def test_mapped_over_modules(name, deltas):
    function, reference, values = CASES[name]
    stack = np.stack([deltas, 2 * deltas]).astype(np.float32)
    weights = np.float32(WEIGHTS)
    merged = jax.jit(partial(jax.lax.map, lambda tasks: function(tasks, weights, **values)))(stack)
    expected = reference(weighted(deltas), **values)
    assert relative_error(merged, np.stack([expected, 2 * expected])) < TOLERANCE[name]


@case
def test_refusals(name, deltas):
    function, _, _ = CASES[name]
    with pytest.raises(ValueError, match=r"expected task matrices \[n, p, q\], got shape \(3, 40\)"):
        function(deltas[:, :, 0].astype(np.float32), WEIGHTS)
    with pytest.raises(ValueError, match="expected 3 weights"):
        function(deltas.astype(np.float32), [1.0, 1.0])
    if jm.METHODS[name].ranked:
        with pytest.raises(ValueError, match="expected 3 ranks, one per task, got 2"):
            function(deltas.astype(np.float32), WEIGHTS, ranks=(3, 3))


def test_one_jitted_merge_of_each_method_returns():
    """On jaxlib 0.10.2, some programs with several QRs and an SVD never do."""
    program = f"""
import jax, numpy as np
import jaxmerge as jm
rng = np.random.default_rng(0)
shapes = [(512, 256)] * 6 + [(48, 256)] * 2
adapters = [jm.Adapter({{f"m.{{i}}": jm.LoRA(rng.normal(size=(16, n)).astype(np.float32),
                                           rng.normal(size=(m, 16)).astype(np.float32))
                       for i, (m, n) in enumerate(shapes)}}) for _ in range(4)]
for method in {list(CASES)}:
    jax.block_until_ready(jax.jit(lambda adapters: jm.merge(adapters, method=method))(adapters))
    print(method)
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(CASES)


# Where the reference code differs, for what it does with the null directions of a LoRA's weight change.


def official_tsv(tasks):
    """The reference code's TSV-M: min(p, q)/n directions of each task, and full-rank polar factors."""
    k = min(tasks[0].shape) // len(tasks)
    parts = [np.linalg.svd(task, full_matrices=False) for task in tasks]
    u = np.hstack([u[:, :k] for u, _, _ in parts])
    s = np.concatenate([s[:k] for _, s, _ in parts])
    vt = np.vstack([vt[:k] for _, _, vt in parts])
    full_polar = [x @ y for x, _, y in (np.linalg.svd(m, full_matrices=False) for m in (u, vt))]
    return full_polar[0] @ np.diag(s) @ full_polar[1]


def official_iso_c(tasks):
    u, s, vt = np.linalg.svd(sum(tasks), full_matrices=False)
    return s.mean() * u @ vt


def cores(deltas):
    """The common core of the changes, and the frame that brings it back."""
    q_b, _, _ = svd(np.hstack(deltas))
    _, _, q_a = svd(np.vstack(deltas))
    return [q_b.T @ delta @ q_a.T for delta in deltas], lambda core: q_b @ core @ q_a


@pytest.mark.parametrize(("name", "official"), [("tsv", official_tsv), ("iso_c", official_iso_c)])
def test_reference_code_on_the_core_is_ours(name, official, deltas):
    function, _, _ = CASES[name]
    on_core, back = cores(deltas)
    merged = function(deltas.astype(np.float32), [1.0] * 3)
    assert relative_error(merged, back(official(on_core))) < 1e-5


def test_reference_tsv_takes_null_directions_of_dense_changes(deltas):
    """It takes 10 directions of each task of rank 3: the 7 others, which are arbitrary, change the result."""
    assert relative_error(official_tsv(list(deltas)), tsv_reference(list(deltas))) > 0.1


def test_reference_iso_c_shares_the_mean_with_null_directions(deltas):
    """Over 30 directions and not 9, it is 9/30 as large in those that are there, and as large in the 21 others."""
    official, own = official_iso_c(list(deltas)), iso_c_reference(list(deltas))
    u, _, vt = svd(sum(deltas))
    np.testing.assert_allclose(u.T @ official @ vt.T, 9 / 30 * (u.T @ own @ vt.T), atol=1e-9)
    beside = official - u @ u.T @ official @ vt.T @ vt
    assert np.sum(beside**2) / np.sum(official**2) == pytest.approx(21 / 30)


def test_reference_subspace_boosting_raises_null_directions(deltas):
    u, s, vt = np.linalg.svd(sum(deltas), full_matrices=False)
    official = u @ np.diag(np.maximum(s, s[0])) @ vt
    merged = np.asarray(singular_values.subspace_boosting(deltas.astype(np.float32), [1.0] * 3), np.float64)
    assert np.linalg.matrix_rank(merged, tol=1e-4 * s[0]) == 9
    np.testing.assert_allclose(u[:, :9].T @ official @ vt[:9].T, u[:, :9].T @ merged @ vt[:9].T, atol=1e-4 * s[0])
    assert np.linalg.matrix_rank(official) == 30


def test_reference_cart_takes_its_share_of_all_features(deltas):
    """0.08 of 30 are 3 directions, of the 9 that there are it is 1."""
    own = cart_reference(list(deltas), 0.08, 1.0)
    mean = deltas.mean(axis=0)
    parts = [svd(delta - mean) for delta in deltas]
    official = mean + sum(u[:, :3] @ np.diag(s[:3]) @ vt[:3] for u, s, vt in parts)
    assert relative_error(singular_values.cart(deltas.astype(np.float32), [1.0] * 3), own) < 1e-5
    assert relative_error(official, own) > 0.1


def test_cart_at_the_ends_of_the_share_is_the_mean(deltas):
    for share in (0.0, 1.0):
        merged = singular_values.cart(deltas.astype(np.float32), [1.0] * 3, rank_share=share)
        assert relative_error(merged, deltas.mean(axis=0)) < 1e-5


@pytest.mark.parametrize(("share", "least", "most"), [(0.29, 29, 29), (0.8, 80, 80), (0.08, 8, 8), (0.085, 9, 8)])
def test_a_share_is_what_it_says_in_float32(share, least, most):
    from jaxmerge.spectrum import at_least, at_most

    assert at_least(share, jnp.float32(100)) == least
    assert at_most(share, jnp.float32(100)) == most


def test_star_keeps_eta_of_the_nuclear_norm_and_restores_the_rest():
    task = np.diag([4.0, 3.0, 2.0, 1.0]).astype(np.float32)
    np.testing.assert_allclose(singular_values.star([task], [1.0]), np.diag([10.0, 0, 0, 0]), atol=1e-5)
    expected = np.diag([40 / 7, 30 / 7, 0, 0])
    np.testing.assert_allclose(singular_values.star([task], [1.0], eta=0.5), expected, atol=1e-5)
    np.testing.assert_allclose(singular_values.star([task], [1.0], eta=1.0), task, atol=1e-5)


def test_iso_c_has_a_flat_spectrum_of_the_sums_rank(deltas):
    merged = singular_values.iso_c(deltas.astype(np.float32), [1.0] * 3)
    s = np.linalg.svd(np.asarray(merged, np.float64), compute_uv=False)
    np.testing.assert_allclose(s[:9], svd(sum(deltas))[1].mean(), rtol=1e-5)
    assert s[9] < 1e-5 * s[0]


def test_iso_cts_without_task_directions_is_iso_c(deltas):
    tasks = deltas.astype(np.float32)
    merged = orthogonal.iso_cts(tasks, [1.0] * 3, common_share=1.0)
    assert relative_error(merged, iso_c_reference(list(deltas))) < 1e-5


def test_subspace_boosting_by_hand():
    task = np.diag([4.0, 3.0, 2.0, 1.0, 0.0]).astype(np.float32)
    for beta, expected in [(0.01, [4, 4, 4, 4, 0]), (0.5, [4, 3, 3, 3, 0]), (1.0, [4, 3, 2, 1, 0])]:
        merged = singular_values.subspace_boosting([task], [1.0], beta=beta)
        np.testing.assert_allclose(merged, np.diag(expected), atol=1e-5)


def test_pico_is_the_papers_where_the_rows_of_a_are_orthonormal(loras):
    """There, B and the weight changes have the same directions and energies."""
    rng = np.random.default_rng(0)
    a = [np.linalg.qr(rng.normal(size=(IN, 3)))[0].T for _ in range(3)]
    b = [np.asarray(lora.b, np.float64) for lora in loras]
    tasks = [y @ x for x, y in zip(a, b, strict=True)]
    merged = interference.pico(np.float32(tasks), [1.0] * 3)
    assert relative_error(merged, pico_reference(tasks, b)) < 1e-5


def test_the_papers_pico_hangs_on_how_a_change_is_factored(loras, deltas):
    b = [np.asarray(lora.b, np.float64) for lora in loras]
    moved = [10 * b[0], *b[1:]]
    assert relative_error(pico_reference(list(deltas), moved), pico_reference(list(deltas), b)) > 0.02


def test_pico_has_the_mean_norm_of_the_tasks(deltas):
    merged = interference.pico(deltas.astype(np.float32), WEIGHTS)
    norms = [np.linalg.norm(task) for task in weighted(deltas)]
    assert np.linalg.norm(np.asarray(merged, np.float64)) == pytest.approx(np.mean(norms), rel=1e-5)


def test_swudi_is_where_gradient_descent_gets(deltas):
    """Without the cut to K directions, which here are all: the tasks' rows are orthonormal and of one size."""
    rng = np.random.default_rng(1)
    rows = np.linalg.qr(rng.normal(size=(IN, 4)))[0].T
    tasks = [rng.normal(size=(OUT, OUT))[:, :2] @ rows[i : i + 2] for i in (0, 1, 2)]

    def interfering(merge):
        return sum(np.sum(((merge - t) @ t.T) ** 2) / np.sum(t**2) for t in tasks)

    merge, steps, tau = sum(tasks), 20_000, 8.0
    for _ in range(steps):
        merge = merge - tau / steps * sum((merge - t) @ t.T @ t / np.sum(t**2) for t in tasks)
    found = swudi_reference(tasks, tau, count=4)
    assert relative_error(merge, found) < 1e-4
    assert interfering(found) < interfering(sum(tasks))
    ours = interference.swudi(np.float32(tasks), [1.0] * 3, tau=tau)
    k = math.ceil(interference_participation(tasks))
    assert relative_error(ours, swudi_reference(tasks, tau, count=k)) < 1e-5


def interference_participation(tasks):
    values = np.linalg.eigvalsh(sum(t.T @ t / np.sum(t**2) for t in tasks))
    return values.sum() ** 2 / np.sum(values**2)


def test_swudi_of_tasks_that_do_not_interfere_is_their_sum(deltas):
    tasks = np.zeros((2, 8, 6))
    tasks[0, :, :3], tasks[1, :, 3:] = deltas[0, :8, :3], deltas[1, :8, :3]
    assert relative_error(interference.swudi(tasks.astype(np.float32), [1.0, 1.0]), tasks.sum(axis=0)) < 1e-5


# LoRA-LEGO


def lego_reference(units, rank, iterations=20):
    """k-means with distances and centroids as such, and the reference code's scales."""
    apart = ((units[:, None] - units[None]) ** 2).sum(-1)
    chosen, near = [], np.full(len(units), np.inf)
    for _ in range(rank):
        chosen.append(int(np.argmin(np.minimum(near, apart).sum(axis=1))))
        near = np.minimum(near, apart[chosen[-1]])
    centroids = units[chosen]
    for _ in range(iterations):
        labels = ((units[:, None] - centroids) ** 2).sum(-1).argmin(axis=1)
        centroids = np.stack(
            [units[labels == c].mean(axis=0) if (labels == c).any() else centroids[c] for c in range(rank)]
        )
    labels = ((units[:, None] - centroids) ** 2).sum(-1).argmin(axis=1)
    merged = np.zeros_like(centroids)
    for c in range(rank):
        if (labels == c).any():
            members = units[labels == c]
            mean = members.mean(axis=0)
            merged[c] = mean * np.abs(members).max(axis=1).mean() / np.abs(mean).max()
    return merged * np.sqrt(np.sqrt(len(units) / rank))


def units_of(loras):
    return np.stack([np.hstack([np.asarray(lora.a), np.asarray(lora.b).T]) for lora in loras])


def product(units):
    """The weight change that units make, whatever their order."""
    units = np.asarray(units, np.float64)
    return units[:, IN:].T @ units[:, :IN]


@pytest.mark.parametrize("rank", [1, 3, 5, 9])
def test_lego(rank, loras):
    units = units_of(loras)
    expected = lego_reference(units.reshape(9, -1).astype(np.float64), rank)
    merged = lego(units, [1.0] * 3, rank=rank)
    assert merged.shape == (rank, IN + OUT)
    assert relative_error(merged, expected) < 1e-5
    with jax.enable_x64(True):
        wide = lego(jnp.asarray(units, jnp.float64), jnp.ones(3), rank=rank)
    assert wide.dtype == np.float64
    assert relative_error(wide, expected) < 1e-12


def test_lego_finds_clusters_that_are_there():
    rng = np.random.default_rng(3)
    kinds = 10 * rng.normal(size=(4, IN + OUT))
    noise = rng.normal(size=(3, 4, IN + OUT))
    units = np.stack([kinds[rng.permutation(4)] for _ in range(3)]) + 0.1 * noise
    merged = np.asarray(lego(units.astype(np.float32), [1.0] * 3, rank=4), np.float64) / (12 / 4) ** 0.25
    for kind in kinds:
        assert min(relative_error(unit, kind) for unit in merged) < 0.02


def test_lego_of_one_adapter_at_its_rank_is_the_adapter(loras):
    units = units_of(loras[:1])
    assert relative_error(product(lego(units, [1.0], rank=3)), product(units[0])) < 1e-5


def test_lego_of_equal_adapters(loras):
    """The clusters are the adapter's units; the scale √(6/3) makes the product as much larger, not twice as large."""
    units = units_of([loras[0]] * 2)
    assert relative_error(product(lego(units, [1.0] * 2, rank=3)), np.sqrt(2) * product(units[0])) < 1e-5


def test_lego_does_not_see_the_order(loras):
    units = units_of(loras)
    merged = product(lego(units, [1.0] * 3, rank=4))
    assert relative_error(product(lego(units[::-1, ::-1], [1.0] * 3, rank=4)), merged) < 1e-5


def test_lego_leaves_units_of_zeros_out(loras):
    units = units_of(loras)
    padded = np.concatenate([units, np.zeros_like(units[:, :1])], axis=1)
    padded = np.concatenate([padded, np.zeros_like(padded[:1])])
    merged = lego(units, [1.0] * 3, rank=4)
    assert relative_error(product(lego(padded, [1.0] * 4, rank=4)), product(merged)) < 1e-5
    without = lego(units[:2], [1.0] * 2, rank=4)
    assert relative_error(product(lego(units, [1.0, 1.0, 0.0], rank=4)), product(without)) < 1e-5


def test_lego_with_fewer_kinds_of_units_than_the_rank(loras):
    units = units_of([loras[0]] * 3)
    merged = np.asarray(lego(units, [1.0] * 3, rank=5))
    assert (np.abs(merged).max(axis=1) > 0).sum() == 3
    assert relative_error(product(merged), np.sqrt(9 / 5) * product(units[0])) < 1e-5
    np.testing.assert_array_equal(lego(np.zeros_like(units), [1.0] * 3, rank=2), 0)


def test_lego_weighs_units_and_grows_with_them(loras):
    units = units_of(loras)
    weighed = lego(units, [0.5, 1.0, 2.0], rank=4)
    scaled = units * np.float32([0.5, 1.0, 2.0])[:, None, None]
    np.testing.assert_array_equal(weighed, lego(scaled, [1.0] * 3, rank=4))
    assert relative_error(lego(units, [3.0] * 3, rank=4), 3 * lego(units, [1.0] * 3, rank=4)) < 1e-5


def test_lego_under_jit(loras):
    units = units_of(loras)
    jitted = jax.jit(lambda units, weights: lego(units, weights, rank=4))
    assert relative_error(jitted(units, np.ones(3, np.float32)), lego(units, [1.0] * 3, rank=4)) < 1e-6


@pytest.mark.parametrize("rank", [0, 10])
def test_lego_refuses_a_rank_beyond_its_units(rank, loras):
    with pytest.raises(ValueError, match=f"expected a rank from 1 to 9, the number of units, got {rank}"):
        lego(units_of(loras), [1.0] * 3, rank=rank)
