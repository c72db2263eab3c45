"""Methods against what their published codes gave (scripts/make_method_golden.py); and where those differ on purpose.

The codes of Pico and SWUDI could not be found: their references are the papers' formulas, in test_spectral_methods.py,
and for SWUDI gradient descent on the loss of WUDI's code as well.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge import stages
from jaxmerge.methods.units import lego
from jaxmerge.spaces import Factors
from tests.helpers import delta64, relative_error

GOLDENS = Path(__file__).parent / "goldens" / "methods"
TOLERANCE = 1e-5
# What the codes do differently. Each has a test that shows both.
DIFFERENT = {
    "tsv": ("dense", "dense_noisy"),
    "iso_c": ("dense",),
    "iso_cts": ("dense",),
    "cart": ("dense",),
    "subspace_boosting": ("dense",),
    "wudi": ("adam", "adam_large", "authors"),
    "pcb": ("uneven", "clipped"),
    "consensus": ("too_many",),
    "lego": ("no_clusters", "no_clusters_again"),
    "calibrate": ("zeros", "tiny"),
}
NAMES = {
    method: json.loads(str(np.load(GOLDENS / f"{method}.npz")["about"]))["cases"]
    for method in (
        "tsv", "iso_c", "iso_cts", "cart", "star", "subspace_boosting", "wudi", "pcb", "consensus", "lego", "calibrate",
    )
}  # fmt: skip
# Gradient descent in steps is not a flow; directions of Iso-CTS can be nearly dependent, and scores of PCB nearly 0.
LOOSER = {("wudi", "flow"): 3e-5, ("wudi", "low_rank_flow"): 3e-5, ("iso_cts", "core_signed"): 1e-4} | {
    ("pcb", name): 5e-5 for name in NAMES["pcb"]
}


def cases(*methods, low_rank=False):
    """The cases in which the codes do what jaxmerge does; those of factors only, if low rank."""
    found = []
    for method in methods:
        with np.load(GOLDENS / f"{method}.npz") as file:
            for name in NAMES[method]:
                if name not in DIFFERENT.get(method, ()) and (not low_rank or f"{name}/a" in file):
                    found.append((method, name))
    return pytest.mark.parametrize(("method", "name"), found)


def golden(method, name):
    """A case: its parameters, weights and arrays, the tasks among them in float64."""
    about = NAMES[method][name]
    with np.load(GOLDENS / f"{method}.npz") as file:
        own = {key.removeprefix(f"{name}/"): file[key] for key in file.files if key.startswith(f"{name}/")}
    tasks = own["tasks"] if "tasks" in own else own["b"].astype(np.float64) @ own["a"].astype(np.float64)
    own["tasks"] = tasks.astype(np.float64)
    return about["parameters"], np.float32(about["weights"] or [1.0] * len(tasks)), own


def settings(method, name, parameters, tasks):
    """What a case's parameters are to jaxmerge's function."""
    if method == "tsv" and name.startswith("reduced"):
        return {"ranks": (min(tasks.shape[1:]) // len(tasks),) * len(tasks)}
    if method == "wudi":
        return {"tau": 2 * parameters["steps"] * parameters["step"]}
    return {key: value for key, value in parameters.items() if key not in ("known_rank", "clipped", "base")}


def merged_arrays(method, name, **changed):
    """jaxmerge's merge of a case, in float32."""
    parameters, weights, own = golden(method, name)
    function = jm.METHODS["swudi" if method == "wudi" else method].load()
    given = settings(method, name, parameters, own["tasks"]) | changed
    return np.asarray(function(own["tasks"].astype(np.float32), weights, **given), np.float64)


def adapters_of(own):
    return [jm.Adapter({"m": jm.LoRA(a, b, 1.0)}) for a, b in zip(own["a"], own["b"], strict=True)]


def within(matrix, rank):
    """Projectors onto the leading singular directions."""
    u, _, vt = np.linalg.svd(matrix)
    return u[:, :rank] @ u[:, :rank].T, vt[:rank].T @ vt[:rank]


# What agrees


@cases("tsv", "iso_c", "iso_cts", "cart", "star", "subspace_boosting", "wudi", "consensus")
def test_arrays(method, name):
    _, _, own = golden(method, name)
    assert relative_error(merged_arrays(method, name), own["merged"]) < LOOSER.get((method, name), TOLERANCE)


@cases("tsv", "iso_c", "iso_cts", "cart", "star", "subspace_boosting", "wudi", low_rank=True)
@pytest.mark.parametrize("space", ["full", "core", "knots"])
def test_adapters(method, name, space):
    parameters, weights, own = golden(method, name)
    given = settings(method, name, parameters, own["tasks"])
    adapters = adapters_of(own)
    merged = jm.merge(adapters, weights, method="swudi" if method == "wudi" else method, space=space, **given)
    assert relative_error(delta64(merged.modules["m"]), own["merged"]) < LOOSER.get((method, name), TOLERANCE)


@pytest.mark.parametrize(("method", "name"), [("tsv", "core"), ("iso_c", "core"), ("wudi", "low_rank_converged")])
def test_default_weights_are_the_papers_lambda_of_one(method, name):
    """As in the codes, before they tune λ on data."""
    parameters, _, own = golden(method, name)
    given = settings(method, name, parameters, own["tasks"])
    merged = jm.merge(adapters_of(own), method="swudi" if method == "wudi" else method, **given)
    assert relative_error(delta64(merged.modules["m"]), own["merged"]) < TOLERANCE


def test_the_default_weights_of_star_are_the_papers_mean():
    _, _, own = golden("star", "low_rank")
    assert relative_error(delta64(jm.merge(adapters_of(own), method="star").modules["m"]), own["merged"]) < TOLERANCE


def test_cart_has_the_papers_defaults_and_not_those_of_core_space():
    parameters, _, own = golden("cart", "own_defaults")
    assert (parameters["rank_share"], parameters["strength"]) == (0.04, 0.1)
    assert relative_error(merged_arrays("cart", "own_defaults", rank_share=0.08, strength=1.0), own["merged"]) > 0.1


def test_consensus_of_adapters_in_full_space():
    parameters, weights, own = golden("consensus", "low_rank")
    given = settings("consensus", "low_rank", parameters, own["tasks"])
    merged = jm.merge(adapters_of(own), weights, method="consensus", rank=10, **given)
    assert relative_error(delta64(merged.modules["m"]), own["merged"]) < TOLERANCE


@cases("iso_c", low_rank=True)
def test_the_stage_isotropize(method, name):
    _, weights, own = golden(method, name)
    merged = jm.merge(adapters_of(own), weights, stages=["isotropize"])
    assert relative_error(delta64(merged.modules["m"]), own["merged"]) < TOLERANCE


# TSV and Iso: null directions


def test_tsv_takes_no_null_directions():
    """The code takes min(p, q) // n = 3 directions of tasks of rank 2, and the third is whatever the SVD returns.

    Noise of 1e-9 turns it, and with it the merge; here it is not there.
    """
    (_, _, own), (_, _, noisy) = golden("tsv", "dense"), golden("tsv", "dense_noisy")
    assert relative_error(noisy["tasks"], own["tasks"]) < 1e-7
    assert relative_error(noisy["merged"], own["merged"]) > 0.1
    one = merged_arrays("tsv", "dense", ranks=(2, 2, 2))
    assert relative_error(merged_arrays("tsv", "dense_noisy", ranks=(2, 2, 2)), one) < TOLERANCE
    assert relative_error(one, golden("tsv", "core")[2]["merged"]) < TOLERANCE
    assert relative_error(one, own["merged"]) > 0.1


def test_iso_c_has_its_mean_over_the_rank():
    """The code has it over min(p, q) = 10 directions of which 6 are there; the 4 null ones are 4 / 10 of the energy."""
    _, _, own = golden("iso_c", "dense")
    ours, theirs = merged_arrays("iso_c", "dense"), own["merged"]
    left, right = within(own["tasks"].sum(axis=0), 6)
    assert relative_error(left @ theirs @ right, 6 / 10 * ours) < TOLERANCE
    outside = np.sum((theirs - left @ theirs @ right) ** 2) / np.sum(theirs**2)
    assert outside == pytest.approx(0.4, rel=1e-6)
    assert np.linalg.matrix_rank(ours, 1e-5) == 6


def test_iso_cts_has_its_shares_of_the_rank():
    _, _, own = golden("iso_cts", "dense")
    ours, theirs = merged_arrays("iso_cts", "dense"), own["merged"]
    assert (np.linalg.matrix_rank(ours, 1e-5), np.linalg.matrix_rank(theirs)) == (6, 10)
    assert relative_error(ours, golden("iso_cts", "core")[2]["merged"]) < TOLERANCE
    assert relative_error(ours, theirs) > 0.5


def test_cart_has_its_share_of_the_rank():
    """In the code 0.4 is of min(p, q) = 10, here of rank 6, unless given as 4 / 6."""
    _, _, own = golden("cart", "dense")
    assert relative_error(merged_arrays("cart", "dense", rank_share=4 / 6), own["merged"]) < TOLERANCE
    assert relative_error(merged_arrays("cart", "dense"), own["merged"]) > 0.1
    assert relative_error(merged_arrays("cart", "dense"), golden("cart", "core")[2]["merged"]) < TOLERANCE


def test_subspace_boosting_raises_no_null_directions():
    _, _, own = golden("subspace_boosting", "dense")
    left, right = within(own["tasks"].sum(axis=0), 6)
    inside = left @ own["merged"] @ right
    assert relative_error(merged_arrays("subspace_boosting", "dense"), inside) < TOLERANCE
    assert np.sum((own["merged"] - inside) ** 2) > 0.2 * np.sum(own["merged"] ** 2)


# SWUDI: gradient descent on WUDI's loss goes where it is, and where it stands at any time; WUDI's Adam does not.


def interference(merged, tasks):
    return sum(np.sum(((merged - task) @ task.T) ** 2) / np.sum(task**2) for task in tasks)


def test_swudi_is_where_interference_is_least_and_adam_is_not_there_yet():
    _, _, own = golden("wudi", "adam")
    ours = merged_arrays("wudi", "converged")
    np.testing.assert_array_equal(golden("wudi", "converged")[2]["tasks"], own["tasks"])
    least, start = (interference(merged, own["tasks"]) for merged in (ours, own["tasks"].sum(axis=0)))
    assert least < interference(own["merged"], own["tasks"]) < start


def test_adam_steps_do_not_grow_with_the_tasks():
    """300 steps of 1e-5, whatever the tasks: of 100 times larger ones the merge is another, and nearly their sum."""
    (_, _, small), (_, _, large) = golden("wudi", "adam"), golden("wudi", "adam_large")
    assert relative_error(large["tasks"], 100 * small["tasks"]) < 1e-6
    assert relative_error(large["merged"], 100 * small["merged"]) > 0.01
    assert np.abs(large["merged"] - large["tasks"].sum(axis=0)).max() < 300 * 1.1e-5
    function = jm.METHODS["swudi"].load()
    ours = [function(own["tasks"].astype(np.float32), [1.0] * 3) for own in (small, large)]
    assert relative_error(ours[1], 100 * np.asarray(ours[0])) < TOLERANCE


def test_the_authors_of_wudi_divide_by_norms_and_their_paper_by_squares():
    """The code for vision has the norm of a task where the paper, and other codes, have its square."""
    parameters, _, own = golden("wudi", "authors")
    ours = merged_arrays("wudi", "authors")
    assert relative_error(ours, own["merged"]) > 0.1
    assert interference(ours, own["tasks"]) < 0.9 * interference(own["merged"], own["tasks"])
    assert relative_error(ours, golden("wudi", "converged")[2]["merged"]) < TOLERANCE
    assert parameters == {"steps": 500, "step": 0.3}


# PCB


@cases("pcb")
def test_pcb_without_its_clipping(method, name):
    """What the lowest score that is kept makes 0 there, is the value of the only task that keeps it here."""
    _, _, own = golden(method, name)
    ours, theirs = merged_arrays(method, name), own["merged"]
    kept = theirs != 0
    assert relative_error(ours[kept], theirs[kept]) < LOOSER[method, name]
    more = np.argwhere((ours != 0) & ~kept)
    assert len(more) <= len(own["tasks"])
    for entry in map(tuple, more):
        assert np.isclose(own["tasks"][(slice(None), *entry)], ours[entry]).any()


def test_pcb_of_adapters_in_full_space():
    parameters, weights, own = golden("pcb", "low_rank")
    merged = jm.merge(adapters_of(own), weights, method="pcb", rank=10, density=parameters["density"])
    assert relative_error(delta64(merged.modules["m"]), merged_arrays("pcb", "low_rank")) < TOLERANCE


def test_pcb_keeps_whole_entries():
    """The code leaves out int(0.77 · 120) = 92 and keeps 28; here a density keeps int(0.23 · 120) = 27."""
    _, _, own = golden("pcb", "uneven")
    kept = own["merged"] != 0
    more = merged_arrays("pcb", "uneven", density=28.01 / 120)
    assert relative_error(more[kept], own["merged"][kept]) < LOOSER["pcb", "uneven"]
    assert relative_error(merged_arrays("pcb", "uneven")[kept], own["merged"][kept]) > 1e-3


def test_pcb_clips_no_magnitudes():
    """The code clips at the 0.01 % quantiles, but the largest entry of any task always: of small ones, much of them."""
    _, _, own = golden("pcb", "clipped")
    clipped = own["tasks"].copy()
    for task in clipped:
        second = np.sort(np.abs(task), axis=None)[-2]
        np.clip(task, -second, second, out=task)
    assert np.abs(own["merged"]).max() <= np.abs(clipped).max() * (1 + 1e-6)
    kept = own["merged"] != 0
    assert relative_error(merged_arrays("pcb", "clipped")[kept], own["merged"][kept]) > 0.1


def test_pcb_maps_scores_of_each_module():
    """The code takes a model as one vector: two modules beside each other. Here each is scored and cut on its own."""
    parameters, weights, own = golden("pcb", "model")
    function = jm.METHODS["pcb"].load()
    halves = [function(own["tasks"][:, rows].astype(np.float32), weights, 0.2) for rows in np.split(np.arange(24), 2)]
    assert parameters["density"] == 0.2
    assert relative_error(np.concatenate(halves), own["merged"]) > 0.1
    # Where one module is small next to another, all of what the model keeps is of the other.
    assert np.mean(own["merged"][12:] != 0) < 0.05 < np.mean(np.asarray(halves[1]) != 0)


# Consensus


def test_consensus_asks_for_no_more_tasks_than_there_are():
    _, _, own = golden("consensus", "too_many")
    assert not own["merged"].any()
    ours = merged_arrays("consensus", "too_many")
    assert ours.any()
    np.testing.assert_array_equal(ours, merged_arrays("consensus", "too_many", agreeing=2))


# LoRA-LEGO


def product_of_units(own, rank):
    units = np.concatenate([own["a"], own["b"].transpose(0, 2, 1)], axis=2)
    merged = np.asarray(lego(units, [1.0] * len(units), rank=rank), np.float64)
    a, b = np.split(merged, [own["a"].shape[2]], axis=1)
    return b.T @ a


@cases("lego")
def test_lego(method, name):
    parameters, _, own = golden(method, name)
    assert relative_error(product_of_units(own, parameters["rank"]), own["merged"]) < TOLERANCE
    merged = jm.merge(adapters_of(own), method="lego", rank=parameters["rank"])
    assert relative_error(delta64(merged.modules["m"]), own["merged"]) < TOLERANCE


def test_lego_of_units_without_clusters_goes_by_where_k_means_starts():
    """The code draws its starts, and with other draws gives another merge; here there is one."""
    (parameters, _, one), (_, _, again) = golden("lego", "no_clusters"), golden("lego", "no_clusters_again")
    np.testing.assert_array_equal(one["a"], again["a"])
    ours = product_of_units(one, parameters["rank"])
    for x, y in ((one["merged"], again["merged"]), (ours, one["merged"]), (ours, again["merged"])):
        assert relative_error(x, y) > 0.1


# Singular value calibration


def calibrated(name, scale=1.0):
    """Matrices of full rank are their own factors B, beside A = 1."""
    parameters, _, own = golden("calibrate", name)
    eye = jnp.eye(own["tasks"].shape[2], dtype=jnp.float32)
    tasks = scale * own["tasks"]
    sources = Factors([eye] * len(tasks), list(jnp.asarray(tasks, jnp.float32)), jnp.ones(len(tasks)))
    merged = eye, jnp.asarray(parameters["factor"] * tasks.sum(axis=0), jnp.float32)
    a, b = stages.calibrate(merged, sources, parameters["floor"])
    return np.asarray(b, np.float64) @ np.asarray(a, np.float64)


@cases("calibrate")
def test_calibrate(method, name):
    _, _, own = golden(method, name)
    assert relative_error(calibrated(name), own["merged"]) < TOLERANCE


@cases("calibrate", low_rank=True)
def test_the_stage_calibrate(method, name):
    parameters, _, own = golden(method, name)
    weights = [parameters["factor"]] * len(own["tasks"])
    merged = jm.merge(adapters_of(own), weights, stages=[("calibrate", {"floor": parameters["floor"]})])
    assert relative_error(delta64(merged.modules["m"]), own["merged"]) < TOLERANCE


def test_calibrate_does_not_count_a_task_of_zeros():
    """In the code it counts with the floor, and strengthens what other tasks have."""
    parameters, _, own = golden("calibrate", "zeros")
    u, s, vt = np.linalg.svd(own["tasks"].sum(axis=0), full_matrices=False)
    ours, theirs = (np.diag(u.T @ merged @ vt.T) for merged in (calibrated("zeros"), own["merged"]))
    counts = 2 * s / ours  # The sum over the two other tasks.
    np.testing.assert_allclose(3 * s / (counts + parameters["floor"]), theirs, rtol=1e-4)
    assert (theirs > ours).all()


def test_calibrate_does_not_see_the_size_of_adapters():
    """The fast code takes squared norms below 1e-12 for 1e-12, so that small tasks do not count."""
    _, _, tiny = golden("calibrate", "tiny")
    _, _, own = golden("calibrate", "accelerated")
    assert relative_error(1e6 * tiny["tasks"], own["tasks"]) < 1e-6
    assert relative_error(1e6 * calibrated("tiny"), own["merged"]) < TOLERANCE
    assert relative_error(1e6 * tiny["merged"], own["merged"]) > 0.1
