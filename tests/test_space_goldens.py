"""KnOTS, Core Space and Compress-then-Merge, against what their authors' code gives (scripts/make_space_golden.py).

Whatever that code does otherwise has a test that shows both, and what makes them agree.
"""

import functools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.spaces import Factors
from tests.helpers import delta64, relative_error

GOLDENS = Path(__file__).parent / "goldens" / "spaces"
# The worst of them is 5e-6; of KnOTS and Core Space 3e-6, and 2e-7 in float64.
TOLERANCE = 2e-5
# Iso-CTS of the code takes small residuals apart in float32. Subspaces of rank 2 are found to 3e-4 where a step more or
# less is taken.
LOOSER = {("ctm", "full_iso_cts"): 1e-4, ("ctm", "ties_rank_2"): 1e-3}

KNOTS = {"space": "knots", "density_scope": "model"}
CORE = {"space": "core"}
CTM = {"space": "ctm", "rank": 3, "own_norm": 0.25}
FULL = {"space": "full", "rank": 12}
ISO = {"stages": ["isotropize"]}
AGREE = {
    "knots": {
        "ta": {"method": "linear", "space": "knots"},
        "ta_unequal": {"method": "linear", "space": "knots"},
        "mean": {"method": "linear", "space": "knots", "weights": None},
        "magnitude_30": {"method": "magnitude_prune", **KNOTS},
        **{f"ties_{name}": {"method": "ties", **KNOTS} for name in ("10", "30", "70", "100", "two", "four")},
        **{f"ties_{name}": {"method": "ties", **KNOTS} for name in ("unequal", "crowded", "sharing", "unbalanced")},
        "ties_sum": {"method": "ties", "divisor": "none", **KNOTS},
        "ties_frequency": {"method": "ties", "majority_sign_method": "frequency", **KNOTS},
        "full_ties": {"method": "ties", "density_scope": "model", **FULL},
    },
    "core": {
        "ta": {"method": "linear", **CORE},
        "ta_unequal": {"method": "linear", **CORE},
        "ta_scaled": {"method": "linear", "weights": [0.4] * 3, **CORE},
        **{f"ties_{name}": {"method": "ties", **CORE} for name in ("10", "30", "70", "100", "two")},
        **{f"ties_{name}": {"method": "ties", **CORE} for name in ("unequal", "crowded", "unbalanced", "balanced")},
        "tsv": {"method": "tsv", **CORE},
        "tsv_four": {"method": "tsv", **CORE},
        "cart": {"method": "cart", "rank_share": 0.04, "strength": 0.1, **CORE},
        "cart_wide": {"method": "cart", "rank_share": 0.32, "strength": 0.7, **CORE},
        "cart_unequal": {"method": "cart", "rank_share": 0.3, **CORE},
        "cart_crowded": {"method": "cart", "rank_share": 0.3, **CORE},
        **{name: {"method": "iso_c", **CORE} for name in ("iso", "iso_unequal", "iso_crowded")},
        "ties_iso_70": {"method": "ties", **CORE, **ISO},
        "tsv_iso": {"method": "tsv", **CORE, **ISO},
        "cart_iso": {"method": "cart", "rank_share": 0.32, "strength": 0.7, **CORE, **ISO},
        "full_ties": {"method": "ties", **FULL},
    },
    "ctm": {
        "ta": {"method": "linear", **CTM},
        "ta_dense": {"method": "linear", **CTM},
        **{name: {"method": "ties", **CTM} for name in ("ties", "ties_60", "ties_dense")},
        "ties_beta_0": {"method": "ties", **CTM, "own_norm": 0.0},
        "ties_beta_75": {"method": "ties", **CTM, "own_norm": 0.75},
        "ties_beta_100": {"method": "ties", **CTM, "own_norm": 1.0},
        "ties_rank_2": {"method": "ties", **CTM, "rank": 2},
        "ties_unequal": {"method": "ties", **CTM, "rank": 4},
        "ties_scaled": {"method": "ties", "weights": [0.75] * 3, **CTM},
        "cart": {"method": "cart", "rank_share": 0.34, "strength": 0.7, **CTM},
        "iso": {"method": "iso_c", **CTM},
        "ties_iso": {"method": "ties", **CTM, **ISO},
        "iso_cts": {"method": "iso_cts", "common_share": 0.25, **CTM, "rank": 4},
        "core_ties_cut": {"method": "ties", **CORE, "rank": 3},
        "core_iso": {"method": "iso_c", **CORE},
        "full_ties_cut": {"method": "ties", **FULL, "rank": 3},
        "full_iso": {"method": "iso_c", "space": "full"},
        "full_tsv": {"method": "tsv", "space": "full"},
        "full_iso_cts": {"method": "iso_cts", "common_share": 6 / 9, "space": "full"},
        "lego": {"method": "lego", "space": "factors", "rank": 4},
    },
}
DIFFER = {
    "knots": {"ties_scaled", "ties_even", "ties_small", "dare_ties", "dare_ties_trimmed"},
    "core": {
        "ties_sharing", "tsv_unequal", "tsv_crowded", "iso_sharing", "ties_iso", "dare_ties", "dare_ties_trimmed",
        "full_tsv", "full_iso", "knots_ties",
    },
    "ctm": {"ta_generic", "pcb", "pcb_unclipped", "core_pcb_unclipped", "tsv"},
}  # fmt: skip


@functools.cache
def golden(file):
    """What is said about its cases, and its arrays."""
    with np.load(GOLDENS / f"{file}.npz") as loaded:
        arrays = dict(loaded)
    return json.loads(str(arrays.pop("about")))["cases"], arrays


def parts(file, start, end=""):
    """The arrays called ``start/…/end``, by what is between."""
    _, arrays = golden(file)
    names = [name for name in arrays if name.startswith(f"{start}/") and name.endswith(end)]
    return {name.removeprefix(f"{start}/").removesuffix(end): arrays[name] for name in names}


def sources_of(file, case, scale=1.0):
    factors = parts(file, golden(file)[0][case]["cohort"])
    modules = list(dict.fromkeys(name.split("/")[0] for name in factors))
    return [
        jm.Adapter({m: jm.LoRA(factors[f"{m}/a{i}"], factors[f"{m}/b{i}"], scale) for m in modules})
        for i in range(len(factors) // (2 * len(modules)))
    ]


def theirs_of(file, case):
    return parts(file, case, "/merged")


def entries(sources, space, rank, scope):
    """Of how many entries the code takes its fraction."""
    total = {m: sum(source.modules[m].rank for source in sources) for m in sources[0].modules}
    sizes = {}
    for module, lora in sources[0].modules.items():
        out, in_ = lora.features
        rows, columns = min(total[module], out), min(total[module], in_)
        sizes[module] = {"knots": rows * in_, "core": rows * columns, "ctm": (rank or 0) ** 2, "full": out * in_}[space]
    if scope == "model":
        return sum(sizes.values())
    (size,) = set(sizes.values())
    return size


def density_of(file, case, method, space, rank=None, scope="module"):
    """What keeps just as many: the code keeps one more than the fraction says, and PCB leaves out a fraction."""
    fraction = golden(file)[0][case]["config"]["topK"] / 100
    size = entries(sources_of(file, case), space, rank, scope)
    kept = size - int(size * fraction) if method == "pcb" else int(size * fraction) + 1
    return 1.0 if fraction == 1 else (kept + 0.5) / size


def ours_of(file, case, sources=None, **arguments):
    """The products B·A that jaxmerge gives, in float64."""
    sources = sources_of(file, case) if sources is None else sources
    weights = arguments.pop("weights", [1.0] * len(sources))
    if arguments["method"] in ("ties", "magnitude_prune", "pcb") and "density" not in arguments:
        scope = arguments.get("density_scope", "module")
        rank = arguments.get("rank")
        arguments["density"] = density_of(file, case, arguments["method"], arguments["space"], rank, scope)
    merged = jm.merge(sources, weights, **arguments)
    return {module: delta64(lora) for module, lora in merged.modules.items()}


def ones(tasks):
    return np.ones(len(tasks), np.float32)


def apart(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(relative_error(ours[module], theirs[module]) for module in theirs)


@pytest.mark.parametrize(("file", "case"), [(file, case) for file, cases in AGREE.items() for case in cases])
def test_as_the_authors_code_has_it(file, case):
    ours, theirs = ours_of(file, case, **AGREE[file][case]), theirs_of(file, case)
    assert apart(ours, theirs) < LOOSER.get((file, case), TOLERANCE)


@pytest.mark.parametrize("file", AGREE)
def test_every_case_is_looked_at(file):
    assert golden(file)[0].keys() == AGREE[file].keys() | DIFFER[file]
    assert not AGREE[file].keys() & DIFFER[file]


@pytest.mark.parametrize("space", ["full", "knots", "core"])
@pytest.mark.parametrize(("file", "case"), [("knots", "ta"), ("knots", "ta_unequal"), ("core", "ta")])
def test_task_arithmetic_is_the_same_in_every_lossless_space(file, case, space):
    assert apart(ours_of(file, case, method="linear", space=space), theirs_of(file, case)) < TOLERANCE


@pytest.mark.parametrize(
    ("file", "case", "stage"),
    [("core", "iso", "core"), ("core", "iso_crowded", "core"), ("ctm", "iso", "ctm"), ("ctm", "full_iso", "full")],
)
def test_the_stage_isotropize_after_a_sum_is_iso_c(file, case, stage):
    space = CTM if stage == "ctm" else {"space": stage}
    assert apart(ours_of(file, case, method="linear", **ISO, **space), theirs_of(file, case)) < TOLERANCE


# Densities


@pytest.mark.parametrize(
    ("file", "case", "arguments"), [("knots", "ties_30", KNOTS), ("core", "ties_30", CORE), ("ctm", "ties", CTM)]
)
def test_their_topk_keeps_one_entry_more(file, case, arguments):
    """They keep what is at least as large as the (d − k)-th smallest, which is k + 1 entries; PEFT and we keep k."""
    given, theirs = {"method": "ties", **arguments}, theirs_of(file, case)
    assert apart(ours_of(file, case, density=0.3, **given), theirs) > 1e-3
    assert apart(ours_of(file, case, **given), theirs) < TOLERANCE


def test_knots_trims_the_whole_model():
    case, theirs = {"method": "ties", "space": "knots", "density": 0.3}, theirs_of("knots", "ties_30")
    assert apart(ours_of("knots", "ties_30", **case), theirs) > 0.1  # Module by module, which is the default.


def test_their_densities_count_rows_and_columns_that_no_task_reaches():
    """Of two tasks with one A, a core of 9 × 9 has 9 × 6 entries that can be anything."""
    theirs = theirs_of("core", "ties_sharing")
    assert apart(ours_of("core", "ties_sharing", method="ties", **CORE), theirs) > 0.1
    kept = int(0.3 * 81) + 1
    same = ours_of("core", "ties_sharing", method="ties", density=(kept + 0.5) / 54, **CORE)
    assert apart(same, theirs) < TOLERANCE


def test_magnitudes_at_the_threshold():
    """They keep all of them, and PEFT and we as many as the density says."""
    for name in ("equal", "equal_negative"):
        own = parts("core", name)
        tasks = own["tasks"]
        size = tasks.shape[1]
        threshold = np.sort(np.abs(tasks))[:, size - int(0.3 * size) - 1]
        kept = np.where(np.abs(tasks) >= threshold[:, None], tasks, 0)
        assert ((kept != 0).sum(1) > int(0.3 * size) + 1).all()
        assert ((kept != 0).sum(1) < size).all()
        assert relative_error(jm.ties(tasks, ones(tasks), (int(0.3 * size) + 1.5) / size), own["merged"]) > 0.1
        # Where the vote is even they elect the sign that most entries have, and PEFT and we +.
        sign = 1 if name == "equal" else -1
        np.testing.assert_allclose(sign * np.asarray(jm.ties(sign * kept, ones(tasks), 1.0)), own["merged"], atol=1e-7)
        even = (kept.sum(0) == 0) & (kept != 0).any(0)
        assert even.any()
        assert (np.asarray(jm.ties(kept, ones(tasks), 1.0))[even] > 0).all()
        assert (np.sign(own["merged"][even]) == sign).all()


# Scales, weights and how changes are split


@pytest.mark.parametrize(
    ("file", "case", "arguments"), [("knots", "ties_30", KNOTS), ("core", "ties_30", CORE), ("ctm", "ties", CTM)]
)
def test_the_codes_do_not_look_at_alpha(file, case, arguments):
    """They merge B·A; with an alpha of 2r, what adapters add is twice that."""
    ours = ours_of(file, case, sources=sources_of(file, case, scale=2.0), method="ties", **arguments)
    assert apart(ours, {module: 2 * merged for module, merged in theirs_of(file, case).items()}) < TOLERANCE


def test_knots_scales_all_tasks_by_the_first_coefficient():
    theirs = theirs_of("knots", "ties_scaled")
    assert golden("knots")[0]["ties_scaled"]["scaling"] == [0.5, 2.0, 1.0]
    assert apart(ours_of("knots", "ties_scaled", method="ties", weights=[0.5, 2.0, 1.0], **KNOTS), theirs) > 0.1
    assert apart(ours_of("knots", "ties_scaled", method="ties", weights=[0.5] * 3, **KNOTS), theirs) < TOLERANCE


def test_core_space_goes_by_how_changes_are_split():
    """The same three changes: the code has two results for them; ours are the same, or do not see the split."""
    split, even = (theirs_of("core", f"ties_{name}") for name in ("unbalanced", "balanced"))
    assert apart(split, even) > 0.1
    for case in ("ties_unbalanced", "ties_balanced"):
        assert apart(ours_of("core", case, method="ties", basis="balanced", **CORE), even) < TOLERANCE


def test_knots_does_not_go_by_how_changes_are_split():
    theirs = theirs_of("knots", "ties_unbalanced")
    one = [jm.Adapter({"q": source.modules["q"]}) for source in sources_of("knots", "ties_30")]
    assert apart(ours_of("knots", "ties_unbalanced", sources=one, method="ties", **KNOTS), theirs) < TOLERANCE


# What is cut off, and null directions


def test_knots_cuts_off_at_an_absolute_size():
    """Of singular values from 5e-5 to 4e-6 it drops those up to 1e-5; we drop what is rounding, whatever the size."""
    case, theirs = "ties_small", theirs_of("knots", "ties_small")
    ours = ours_of("knots", case, method="ties", **KNOTS)
    assert apart(ours, theirs) > 0.05
    deltas = [delta64(source.modules["q"]) for source in sources_of("knots", case)]
    u, s, _ = np.linalg.svd(np.concatenate(deltas, axis=1))
    assert 3 <= (s > 1e-5).sum() < 9
    held = u[:, : (s > 1e-5).sum()]
    assert relative_error(held @ held.T @ ours["q"], theirs["q"]) < TOLERANCE


def without_null_directions(theirs, ours):
    """What the code gives within the directions that the merge has."""
    u, s, vt = np.linalg.svd(ours, full_matrices=False)
    there = s > 1e-5 * s[0]
    u, vt = u[:, there], vt[there]
    return u @ (u.T @ theirs @ vt.T) @ vt, int(there.sum())


@pytest.mark.parametrize(
    ("case", "module", "arguments", "rank", "counted"),
    [
        ("iso_sharing", "q", {"method": "iso_c", **CORE}, 6, 9),
        ("ties_iso", "v", {"method": "ties", **CORE, **ISO}, 8, 9),
        ("full_iso", "q", {"method": "iso_c", "space": "full"}, 9, 12),
    ],
)
def test_null_directions_of_isotropize(case, module, arguments, rank, counted):
    """Core Space has them in the mean, and gives it to them; we, as Compress-then-Merge, leave them alone."""
    ours, theirs = ours_of("core", case, **arguments)[module], theirs_of("core", case)[module]
    assert relative_error(ours, theirs) > 0.3
    within, found = without_null_directions(theirs, ours)
    assert found == rank
    assert relative_error(ours * rank / counted, within) < TOLERANCE
    assert np.linalg.matrix_rank(theirs, tol=1e-4) == counted


def test_isotropize_after_ties_agrees_where_there_is_no_null_direction():
    assert relative_error(
        ours_of("core", "ties_iso", method="ties", **CORE, **ISO)["q"], theirs_of("core", "ties_iso")["q"]
    ) < TOLERANCE  # fmt: skip


@pytest.mark.parametrize(
    ("case", "space", "taken"),
    [("full_tsv", "full", 4), ("tsv_unequal", "core", 3), ("tsv_crowded", "core", 2)],
)
def test_how_many_directions_tsv_takes(case, space, taken):
    """The code takes the same number of every task, which need not be the task's rank.

    Where it is more, the rest are null directions, as the SVD returns them, that push the others aside: it could be
    anything. Where it is less, it is ours of the adapters cut to that rank.
    """
    sources, theirs = sources_of("core", case), theirs_of("core", case)
    assert apart(ours_of("core", case, method="tsv", space=space), theirs) > 0.1
    if all(lora.rank >= taken for source in sources for lora in source.modules.values()):
        cut = [jm.resize(source, rank=taken) for source in sources]
        assert apart(ours_of("core", case, sources=cut, method="tsv", space=space), theirs) < TOLERANCE


# Within a space, where a merge does not take what the code was given or drew


def laid_out(space, sources, module, rank=None):
    """The task matrices of a space, its bases, and what makes a product B·A of a merged matrix."""
    loras = [source.modules[module] for source in sources]
    form = jm.SPACES[space].load(jm.METHODS["ties"])
    rank = rank or min(sum(lora.rank for lora in loras), *loras[0].features)
    factors = Factors([jnp.asarray(x.a) for x in loras], [jnp.asarray(x.b) for x in loras], jnp.ones(len(loras)))
    (tasks,), frame = form.project(factors, rank)

    def product(merged):
        lifted = form.lift([jnp.asarray(merged)], frame, rank)
        return np.asarray(lifted.b, np.float64) @ np.asarray(lifted.a, np.float64)

    return np.asarray(tasks), frame, product


def test_even_votes_hang_on_the_sign_of_a_direction():
    """Of as many tasks of either sign the code takes the negative ones, and we the positive ones.

    The directions may have either sign: with the signs that the code had them with, turned round, the votes agree.
    """
    case, theirs = "ties_even", theirs_of("knots", "ties_even")["q"]
    given = {"majority_sign_method": "frequency", "density": density_of("knots", case, "ties", "knots")}
    tasks, frame, product = laid_out("knots", sources_of("knots", case), "q")
    assert relative_error(product(jm.ties(tasks, ones(tasks), **given)), theirs) > 0.1
    kept = np.stack([jm.prune(task, given["density"], "magnitude") for task in tasks])
    even = (np.sign(kept).sum(0) == 0) & (kept != 0).any(0)
    inside = np.asarray(frame.u).T @ theirs
    signs = np.where(np.where(even, inside, 0).sum(1, keepdims=True) < 0, -1, 1).astype(np.float32)
    assert (np.where(even, signs * inside, 1) > 0).all()  # One for each direction.
    ours = signs * np.asarray(jm.ties(signs * tasks, ones(tasks), **given))
    assert relative_error(product(ours), theirs) < TOLERANCE


@pytest.mark.parametrize(("file", "space"), [("knots", "knots"), ("core", "core")])
@pytest.mark.parametrize("case", ["dare_ties", "dare_ties_trimmed"])
def test_dare_ties_of_their_draws(file, space, case):
    """What is left is divided by 1 − p, and then trimmed, zeros and all."""
    config = golden(file)[0][case]["config"]
    masks, density = parts(file, case, "/masks"), density_of(file, case, "ties", space)
    for module, theirs in theirs_of(file, case).items():
        assert 0.6 < masks[module].mean() < 0.8

        tasks, _, product = laid_out(space, sources_of(file, case), module)
        dropped = np.where(masks[module], tasks, 0) / np.float32(1 - config["dare_pruning_coeffs"])
        assert relative_error(product(jm.ties(dropped, ones(tasks), density)), theirs) < TOLERANCE


def test_later_codes_merge_the_directions_of_knots_without_their_sizes():
    """KnOTS trims and elects S·V, and so do we; the codes of Core Space and of CtM do so with V, and S comes after."""
    case, density = "knots_ties", density_of("core", "knots_ties", "ties", "knots")
    sources, theirs = sources_of("core", case), theirs_of("core", case)
    assert apart(ours_of("core", case, method="ties", space="knots"), theirs) > 0.1
    tasks, _, product = laid_out("knots", sources, "q")
    sizes = np.linalg.norm(tasks, axis=(0, 2))[:, None]  # The rows of all V are of length 1.
    merged = sizes * np.asarray(jm.ties(tasks / sizes, ones(tasks), density))
    assert relative_error(product(merged), theirs["q"]) < TOLERANCE


def test_tsv_takes_a_share_of_the_directions_that_compressed_tasks_have():
    """The code takes r // n = 1 of them of each task, and we all r."""
    theirs = theirs_of("ctm", "tsv")
    assert apart(ours_of("ctm", "tsv", method="tsv", **CTM), theirs) > 0.1
    for module, merged in theirs.items():
        tasks, _, product = laid_out("ctm", sources_of("ctm", "tsv"), module, rank=3)
        u, s, vt = np.linalg.svd(tasks)
        leading = s[:, :1, None] * u[:, :, :1] @ vt[:, :1]
        ours = jm.METHODS["tsv"].load()(leading, ones(tasks), ranks=(1, 1, 1))
        assert relative_error(product(ours), merged) < TOLERANCE


# Compress-then-Merge


@pytest.mark.parametrize(("case", "space", "rank"), [("pcb_unclipped", "ctm", 3), ("core_pcb_unclipped", "core", None)])
def test_pcb_without_its_clipping(case, space, rank):
    """The lowest score that a task keeps becomes 0 there; where no task scores higher, it still counts here."""
    density = density_of("ctm", case, "pcb", space, rank)
    for module, theirs in theirs_of("ctm", case).items():
        tasks, frame, product = laid_out(space, sources_of("ctm", case), module, rank)
        ours = np.asarray(jm.METHODS["pcb"].load()(tasks, ones(tasks), density))
        merged = np.asarray(frame.u).T @ theirs @ np.asarray(frame.v)
        kept = np.abs(merged) > 1e-5 * np.abs(merged).max()
        more = np.argwhere((ours != 0) & ~kept)
        assert len(more) <= len(tasks)
        for entry in map(tuple, more):
            there = tasks[(slice(None), *entry)]
            assert there.min() < ours[entry] * (1 + 1e-6) <= there.max() * (1 + 2e-6)
        assert relative_error(product(np.where(kept, ours, 0)), theirs) < TOLERANCE
        whole = ours_of("ctm", case, method="pcb", **(CTM if space == "ctm" else CORE))
        assert relative_error(product(ours), whole[module]) < TOLERANCE


def test_pcb_clips_no_magnitudes():
    """The code clips at the 0.01 % quantiles, but each task's largest entry always: of 9, much of what there is."""
    theirs = theirs_of("ctm", "pcb")
    assert apart(ours_of("ctm", "pcb", method="pcb", **CTM), theirs) > 0.1
    assert apart(theirs_of("ctm", "pcb_unclipped"), theirs) > 0.1


def test_subspaces_that_have_not_quite_converged():
    """Both stop when not much is gained any more, not after as many steps: where tasks have little in common."""
    assert 1e-5 < apart(ours_of("ctm", "ta_generic", method="linear", **CTM), theirs_of("ctm", "ta_generic")) < 2e-3


def test_compressed_tasks_keep_their_norms():
    """Norms are brought together to find the subspaces; what is merged in them are the tasks as they are."""
    theirs = theirs_of("ctm", "ta")
    sources = sources_of("ctm", "ta")
    for module, merged in theirs.items():
        deltas = np.stack([delta64(source.modules[module]) for source in sources])
        norms = np.linalg.norm(deltas, axis=(1, 2), keepdims=True)
        alike = (deltas * (0.25 * norms + 0.75 * norms.mean()) / norms).sum(0)
        u, _, vt = np.linalg.svd(merged, full_matrices=False)
        inside = u[:, :3] @ u[:, :3].T @ alike @ vt[:3].T @ vt[:3]
        assert relative_error(inside, merged) > 0.1
