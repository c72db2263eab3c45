"""Spaces that share bases, against float64 NumPy on the dense changes, as the papers define them."""

import numpy as np
import pytest

import jaxmerge as jm
from tests.helpers import delta64, relative_error

OUT, IN = 40, 30
SCALES = (0.5, 2.0, 1.0)


def adapters(ranks=(3, 4, 2), scales=SCALES, shape=(OUT, IN), seed=0):
    rng = np.random.default_rng(seed)
    out, in_ = shape
    return [
        jm.Adapter(
            {
                "m": jm.LoRA(
                    rng.normal(size=(r, in_)).astype(np.float32), rng.normal(size=(out, r)).astype(np.float32), s
                )
            }
        )
        for r, s in zip(ranks, scales, strict=True)
    ]


def dense(sources):
    return np.stack([delta64(source.modules["m"]) for source in sources])


def ties64(tasks, weights, density, election="total"):
    """TIES as PEFT has it, in float64: tasks [n, p, q]."""
    trimmed = np.zeros_like(tasks)
    for task, kept in zip(tasks, trimmed, strict=True):
        order = np.argsort(-np.abs(task), axis=None, kind="stable")[: int(density * task.size)]
        kept.flat[order] = task.flat[order]
    votes = trimmed if election == "total" else np.sign(trimmed)
    sign = np.where(votes.sum(0) >= 0, 1, -1)
    agree = np.sign(trimmed) == sign
    weighted = np.einsum("n,npq->npq", weights, trimmed)
    return (weighted * agree).sum(0) / np.maximum(agree.sum(0), 1)


def knots64(deltas):
    """Left basis and tasks S·Vᵢ of the changes side by side."""
    n, _, in_ = deltas.shape
    u, s, vt = np.linalg.svd(np.concatenate(list(deltas), axis=1), full_matrices=False)
    held = s > 1e-9 * s[0]
    tasks = (s[:, None] * vt)[held].reshape(-1, n, in_).transpose(1, 0, 2)
    return u[:, held], tasks


def core64(sources, basis):
    """Singular bases of all B and of all A, and the tasks in them."""
    loras = [source.modules["m"] for source in sources]
    deltas = dense(sources)
    b, a = [np.asarray(lora.b, np.float64) for lora in loras], [np.asarray(lora.a, np.float64) for lora in loras]
    if basis != "reference":
        power = 0.5 if basis == "balanced" else 1.0
        parts = [np.linalg.svd(delta, full_matrices=False) for delta in deltas]
        b = [(u * s**power)[:, : lora.rank] for (u, s, _), lora in zip(parts, loras, strict=True)]
        a = [(s[:, None] ** power * vt)[: lora.rank] for (_, s, vt), lora in zip(parts, loras, strict=True)]
    u, _, _ = np.linalg.svd(np.concatenate(b, axis=1), full_matrices=False)
    _, _, vt = np.linalg.svd(np.concatenate(a, axis=0), full_matrices=False)
    return u, vt, u.T @ deltas @ vt.T


WEIGHTS = [1.0, 0.5, -2.0]


@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT), (8, IN), (OUT, 7)])
def test_knots_is_the_papers(density, shape):
    sources = adapters(shape=shape)
    u, tasks = knots64(dense(sources))
    expected = u @ ties64(tasks, WEIGHTS, density)
    merged = jm.merge(sources, WEIGHTS, method="ties", space="knots", density=density)
    assert relative_error(delta64(merged.modules["m"]), expected) < 2e-5
    cut = jm.merge(sources, WEIGHTS, method="ties", space="knots", density=density, rank=2)
    left, s, right = np.linalg.svd(expected)
    assert relative_error(delta64(cut.modules["m"]), (left[:, :2] * s[:2]) @ right[:2]) < 2e-5


@pytest.mark.parametrize("basis", ["reference", "balanced", "hosvd"])
@pytest.mark.parametrize("shape", [(OUT, IN), (8, IN), (OUT, 7)])
def test_core_is_the_papers(basis, shape):
    sources = adapters(shape=shape)
    u, vt, tasks = core64(sources, basis)
    expected = u @ ties64(tasks, WEIGHTS, 0.5) @ vt
    merged = jm.merge(sources, WEIGHTS, method="ties", space="core", density=0.5, basis=basis)
    assert relative_error(delta64(merged.modules["m"]), expected) < 2e-5


def signs_of(columns):
    """What makes the largest entry of each column positive."""
    return np.sign(columns[np.abs(columns).argmax(0), np.arange(columns.shape[1])])


@pytest.mark.parametrize("space", ["knots", "core"])
def test_even_votes_do_not_hang_on_the_signs_that_a_routine_gives(space):
    sources, weights = adapters(ranks=(3, 4), scales=(0.5, 2.0)), [1.0, 0.5]
    if space == "knots":
        u, tasks = knots64(dense(sources))
        vt, right = np.eye(IN), 1
    else:
        u, vt, tasks = core64(sources, "reference")
        right = signs_of(vt.T)
    tasks = signs_of(u)[:, None] * tasks * right
    assert (np.sign(tasks).sum(0) == 0).mean() > 0.2
    expected = (u * signs_of(u)) @ ties64(tasks, weights, 1.0, "frequency") @ (np.reshape(right, (-1, 1)) * vt)
    merged = jm.merge(sources, weights, method="ties", space=space, density=1.0, majority_sign_method="frequency")
    assert relative_error(delta64(merged.modules["m"]), expected) < 2e-5


def regauged(source, seed):
    """The same change, split otherwise into B and A."""
    lora = source.modules["m"]
    gauge = np.random.default_rng(seed).normal(size=(lora.rank, lora.rank))
    a = np.linalg.solve(gauge, np.asarray(lora.a, np.float64)) * 7
    b = np.asarray(lora.b, np.float64) @ gauge / 7
    return jm.Adapter({"m": jm.LoRA(a, b, lora.scale)})


@pytest.mark.parametrize(
    ("space", "options", "sees"),
    [
        ("knots", {}, False),
        ("ctm", {}, False),
        ("core", {"basis": "balanced"}, False),
        ("core", {"basis": "hosvd"}, False),
        ("core", {"basis": "reference"}, True),
        ("full", {}, False),
        ("factors", {}, True),
    ],
)
def test_which_spaces_see_how_a_change_is_split(space, options, sees):
    sources = adapters(ranks=(3, 3, 3))
    others = [regauged(source, seed) for seed, source in enumerate(sources)]
    one, other = (
        jm.merge(each, WEIGHTS, method="ties", space=space, density=0.5, **options) for each in (sources, others)
    )
    error = relative_error(delta64(other.modules["m"]), delta64(one.modules["m"]))
    assert (error > 0.1) if sees else (error < 1e-4)


@pytest.mark.parametrize("space", ["knots", "core"])
def test_lossless_spaces_lose_nothing(space):
    sources = adapters()
    expected = np.einsum("n,npq->pq", WEIGHTS, dense(sources))
    # Kept whole, every entry takes part: the weighted sum, by way of the space's own bases.
    merged = jm.merge(sources, WEIGHTS, method="magnitude_prune", space=space, density=1.0)
    assert relative_error(delta64(merged.modules["m"]), expected) < 1e-5
    assert float(merged.energy["m"].lost) < 1e-6 * float(merged.energy["m"].total)


@pytest.mark.parametrize("space", ["knots", "core", "ctm"])
def test_adapters_that_share_directions_or_hold_none(space):
    first, second, third = adapters(ranks=(3, 3, 3))
    zero = jm.Adapter({"m": jm.LoRA(np.zeros((3, IN), np.float32), np.zeros((OUT, 3), np.float32))})
    for sources in ([first, first, second], [first, zero, zero], [zero, zero, zero], [first, second, third, zero]):
        weights = [1.0, 1.0, 0.5, 2.0][: len(sources)]
        merged = jm.merge(sources, weights, method="magnitude_prune", space=space, density=1.0)
        delta = delta64(merged.modules["m"])
        assert np.isfinite(delta).all()
        if space != "ctm":
            expected = np.einsum("n,npq->pq", weights, dense(sources))
            np.testing.assert_allclose(delta, expected, atol=1e-4 * (1 + np.abs(expected).max()))


def test_density_in_knots_is_of_the_rows_that_hold_something():
    first, second, _ = adapters(ranks=(3, 3, 3), scales=(1.0, 1.0, 1.0))
    sources = [first, first, second]  # Rank 6 of 9.
    u, tasks = knots64(dense(sources))
    assert tasks.shape[1] == 6
    expected = u @ ties64(tasks, WEIGHTS, 0.3)
    merged = jm.merge(sources, WEIGHTS, method="ties", space="knots", density=0.3)
    assert relative_error(delta64(merged.modules["m"]), expected) < 2e-5


def ctm64(deltas, rank, own_norm):
    """Tucker-2 bases of the tasks, brought nearer to their mean norm, by dense higher-order orthogonal iteration."""
    norms = np.linalg.norm(deltas, axis=(1, 2))
    deltas = deltas * ((own_norm * norms + (1 - own_norm) * norms.mean()) / norms)[:, None, None]
    n, p, q = deltas.shape
    u = np.linalg.svd(deltas.transpose(1, 0, 2).reshape(p, n * q), full_matrices=False)[0][:, :rank]
    v = np.linalg.svd(deltas.reshape(n * p, q), full_matrices=False)[2][:rank].T
    for _ in range(500):
        u = np.linalg.svd((deltas @ v).transpose(1, 0, 2).reshape(p, -1), full_matrices=False)[0][:, :rank]
        v = np.linalg.svd((u.T @ deltas).reshape(-1, q), full_matrices=False)[2][:rank].T
    return u, v


@pytest.mark.parametrize("own_norm", [0.0, 0.25, 1.0])
def test_ctm_holds_what_the_dense_decomposition_holds(own_norm):
    sources = adapters(ranks=(4, 4, 4))
    tasks = dense(sources)
    u, v = ctm64(tasks, 4, own_norm)
    compressed = u.T @ tasks @ v  # Of the tasks as they are.
    held = (compressed**2).sum() / (tasks**2).sum()
    expected = u @ np.einsum("n,npq->pq", WEIGHTS, compressed) @ v.T
    # Signs of the bases are free and cancel; linear is the same in any bases of the subspaces.
    merged = jm.merge(sources, WEIGHTS, method="linear", space="ctm", own_norm=own_norm)
    assert merged.modules["m"].rank == 4
    np.testing.assert_allclose(float(merged.energy["m"].kept), held, atol=2e-3)
    assert relative_error(delta64(merged.modules["m"]), expected) < 0.05
    # It does what it is made for: it holds more than the merge's own truncation does of the tasks.
    assert held > 0.4


def test_ctm_of_full_rank_is_full():
    sources = adapters(ranks=(3, 4, 2))
    merged = jm.merge(sources, WEIGHTS, method="linear", space="ctm", own_norm=1.0, rank=9)
    assert relative_error(delta64(merged.modules["m"]), np.einsum("n,npq->pq", WEIGHTS, dense(sources))) < 1e-5
    assert float(merged.energy["m"].kept) == pytest.approx(1, abs=1e-5)


def test_a_sweep_over_what_a_space_takes():
    sources = adapters(ranks=(3, 3, 3))
    found = jm.sweep(
        sources, lambda merged: jm.delta(merged.modules["m"]), {"own_norm": [0.0, 1.0], "density": [0.3, 0.8]},
        method="ties", space="ctm",
    )  # fmt: skip
    for setting, delta in zip(found.settings, found.scores, strict=True):
        alone = jm.merge(sources, method="ties", space="ctm", **setting)
        assert relative_error(delta, delta64(alone.modules["m"])) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"space": "ctm", "own_norm": 1.5}, "own_norm should be at least 0 and at most 1"),
        ({"space": "core", "method": "ties", "density": 0.5, "basis": "other"}, "basis 'other' is not one of"),
        ({"space": "core", "basis": "hosvd"}, "method linear in space core has no hyperparameter basis"),
        ({"space": "knots", "method": "ties", "density": 0.5, "basis": "hosvd"}, "has no hyperparameter basis"),
    ],
)
def test_options_of_spaces_are_checked(arguments, words):
    with pytest.raises(ValueError, match=words):
        jm.merge(adapters(), **arguments)


MODULES = {"q": (20, 16), "k": (12, 16), "o": (16, 24)}


def cohort():
    rng = np.random.default_rng(1)
    return [
        jm.Adapter(
            {
                name: jm.LoRA(
                    rng.normal(size=(3, i)).astype(np.float32) * size, rng.normal(size=(o, 3)).astype(np.float32), 0.5
                )
                for size, (name, (o, i)) in enumerate(MODULES.items(), 1)
                if not (missing and name == "k")
            }
        )
        for missing in (False, False, True)
    ]


def tasks64(source, space):
    """What is trimmed of one adapter, module by module."""
    loras = {name: (np.asarray(x.a, np.float64), np.asarray(x.b, np.float64)) for name, x in source.modules.items()}
    return {name: [a, b] if space == "factors" else [0.5 * b @ a] for name, (a, b) in loras.items()}


def assert_sum_of(merged, left, weights, space):
    """A merge is the weighted sum of what is left of each adapter's tasks, module by module."""
    for name in MODULES:
        there = [(w, parts[name]) for w, parts in zip(weights, left, strict=True) if name in parts]
        if space == "full":
            expected = sum(weight * parts[0] for weight, parts in there)
        else:
            root = [np.sqrt(0.5 * weight) for weight, _ in there]
            a, b = (sum(r * parts[i] for r, (_, parts) in zip(root, there, strict=True)) for i in range(2))
            expected = b @ a
        assert relative_error(delta64(merged.modules[name]), expected) < 1e-5


@pytest.mark.parametrize("space", ["full", "factors"])
@pytest.mark.parametrize("density", [0.25, 0.45, 1.0])
def test_a_density_of_the_whole_model(space, density):
    sources = cohort()
    rank = 16 if space == "full" else None  # Nothing is cut.
    arguments = {"method": "magnitude_prune", "space": space, "density": density, "rank": rank}
    merged = jm.merge(sources, [1.0, 0.5, 2.0], density_scope="model", **arguments)
    by_module = jm.merge(sources, [1.0, 0.5, 2.0], **arguments)
    kept = []
    for source in sources:
        tasks = tasks64(source, space)
        entries = np.sort(np.abs(np.concatenate([x.ravel() for parts in tasks.values() for x in parts])))[::-1]
        threshold = entries[int(density * entries.size) - 1] * (1 - 1e-6)
        kept.append({name: [np.where(np.abs(x) >= threshold, x, 0) for x in parts] for name, parts in tasks.items()})
    assert_sum_of(merged, kept, [1.0, 0.5, 2.0], space)
    apart = relative_error(delta64(by_module.modules["q"]), delta64(merged.modules["q"]))
    assert (apart < 1e-5) if density == 1 else (apart > 0.05)


def crumbs_of_the_whole(source, space, density, gamma):
    """What is left of an adapter behind its outliers, ranked over all its entries."""
    tasks = tasks64(source, space)
    entries = np.concatenate([x.ravel() for parts in tasks.values() for x in parts])
    kept, size = int(density * entries.size), entries.size
    outliers = min(int(gamma * size), size - kept)
    left = np.zeros(size)
    survivors = np.argsort(-np.abs(entries), kind="stable")[outliers : outliers + kept]
    left[survivors] = entries[survivors]
    ends = np.cumsum([x.size for parts in tasks.values() for x in parts])
    pieces = iter(np.split(left, ends[:-1]))
    return {name: [next(pieces).reshape(x.shape) for x in parts] for name, parts in tasks.items()}


@pytest.mark.parametrize("space", ["full", "factors"])
@pytest.mark.parametrize(
    ("density", "gamma"),
    [(0.5, 0.1), (0.3, 0.0), (0.97, 0.2), (1.0, 0.3), (0.4, [0.0, 0.05, 0.3]), ([0.2, 0.9, 1.0], 0.2)],
)
def test_outliers_of_the_whole_model(space, density, gamma):
    sources, weights = cohort(), [1.0, 0.5, 2.0]
    arguments = {"method": "breadcrumbs", "space": space, "density": density, "gamma": gamma}
    arguments["rank"] = 16 if space == "full" else None  # Nothing is cut.
    merged = jm.merge(sources, weights, density_scope="model", **arguments)
    by_module = jm.merge(sources, weights, **arguments)
    fractions = zip(sources, np.broadcast_to(density, 3), np.broadcast_to(gamma, 3), strict=True)
    left = [crumbs_of_the_whole(source, space, *own) for source, *own in fractions]
    assert_sum_of(merged, left, weights, space)
    apart = relative_error(delta64(by_module.modules["q"]), delta64(merged.modules["q"]))
    assert (apart < 1e-5) if density == 1 else (apart > 0.05)


def test_outliers_of_the_whole_model_in_a_mean_of_signs():
    sources = cohort()
    arguments = {"method": "breadcrumbs_ties", "density": 0.5, "gamma": 0.1, "rank": 16, "density_scope": "model"}
    merged = jm.merge(sources, [1.0, 0.5, 2.0], **arguments)
    left = [crumbs_of_the_whole(source, "full", 0.5, 0.1) for source in sources]
    for name in MODULES:
        there = [(w, parts[name][0]) for w, parts in zip([1.0, 0.5, 2.0], left, strict=True) if name in parts]
        signs = np.where(sum(task for _, task in there) >= 0, 1, -1)
        agrees = [np.sign(task) == signs for _, task in there]
        total = sum(w * np.where(mask, task, 0) for mask, (w, task) in zip(agrees, there, strict=True))
        expected = total / np.maximum(sum(mask.astype(int) for mask in agrees), 1)
        assert relative_error(delta64(merged.modules[name]), expected) < 1e-5


@pytest.mark.parametrize(("large", "stays"), [(10, 0), (7, 0), (11, 11), (60, 60)])
def test_outliers_that_are_equal_go_together_or_stay(large, stays):
    """Of 100 entries 10 are to go: up to ten that are equal do, and none of more than that."""
    row = np.concatenate([np.full(large, 4.0), np.arange(100 - large) / 100 + 1]).astype(np.float32)[None]
    sources = [jm.Adapter({"q": jm.LoRA(row, np.ones((1, 1), np.float32))})]
    merged = jm.merge(sources, [1.0], method="breadcrumbs", density=0.8, gamma=0.1, density_scope="model")
    delta = delta64(merged.modules["q"])[0]
    assert np.count_nonzero(np.isclose(delta, 4)) == stays


@pytest.mark.parametrize("method", ["ties", "breadcrumbs"])
@pytest.mark.parametrize("space", ["knots", "core"])
def test_a_density_of_the_whole_model_is_of_what_the_tasks_reach(space, method):
    """Adapters with one B span fewer directions than their ranks sum up to: the others are no entries."""
    one, *others = cohort()[:2]
    shared = [jm.Adapter({"q": jm.LoRA(x.modules["q"].a, one.modules["q"].b, 0.5)}) for x in (one, *others)]
    whole, own = (
        jm.merge(shared, method=method, space=space, density=0.3, density_scope=s) for s in ("model", "module")
    )
    assert relative_error(delta64(whole.modules["q"]), delta64(own.modules["q"])) < 1e-5


@pytest.mark.parametrize(
    ("space", "method"), [("knots", "ties"), ("core", "ties"), ("core", "breadcrumbs_ties"), ("ctm", "magnitude_prune")]
)
def test_a_density_of_the_whole_model_in_shared_bases(space, method):
    sources = cohort()
    one = jm.merge(sources, method=method, space=space, density=0.3, density_scope="model")
    assert all(np.isfinite(delta64(lora)).all() for lora in one.modules.values())
    # Of a model of one module it is the same as of the module.
    alone = [jm.Adapter({"q": source.modules["q"]}) for source in sources]
    whole, own = (
        jm.merge(alone, method=method, space=space, density=0.3, density_scope=s) for s in ("model", "module")
    )
    assert relative_error(delta64(whole.modules["q"]), delta64(own.modules["q"])) < 1e-5


@pytest.mark.parametrize("method", ["ties", "breadcrumbs"])
def test_stacked_layers_count_as_modules(method):
    sources = [adapter_of_layers(seed) for seed in range(2)]
    apart = [
        jm.Adapter({f"m{i}": jm.LoRA(x.a[i], x.b[i], x.scale) for i in range(2)})
        for x in (source.modules["m"] for source in sources)
    ]
    arguments = {"method": method, "density": 0.3, "rank": 6, "density_scope": "model"}
    stacked, unstacked = jm.merge(sources, **arguments), jm.merge(apart, **arguments)
    for i in range(2):
        assert relative_error(jm.delta(stacked.modules["m"])[i], jm.delta(unstacked.modules[f"m{i}"])) < 1e-5


def adapter_of_layers(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, 3, 16)).astype(np.float32), rng.normal(size=(2, 20, 3)).astype(np.float32)
    return jm.Adapter({"m": jm.LoRA(a, b, 0.5)})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "ties", "density": 0.3, "density_scope": "all"}, "density_scope 'all' is not one of"),
        ({"method": "linear", "density_scope": "model"}, "method linear does not cut at a magnitude"),
        (
            {"method": "breadcrumbs", "density": 0.3, "gamma": dict.fromkeys(MODULES, 0.1), "density_scope": "model"},
            "density_scope model takes one gamma for all modules",
        ),
    ],
)
def test_scopes_are_checked(arguments, words):
    with pytest.raises(ValueError, match=words):
        jm.merge(cohort(), **arguments)
