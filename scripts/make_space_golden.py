"""Makes tests/goldens/spaces with the authors' code of KnOTS, Core Space and Compress-then-Merge.

Run it where torch (on the CPU), einops, tqdm, scipy, scikit-learn and tensorly 0.9 are installed (jaxmerge is not
needed), with checkouts of the three repositories:
`python scripts/make_space_golden.py KnOTS core-space-merging compress-then-merge`. It writes a file for each of them:

* ``about``: JSON: repository, commit, versions, and for each case its cohort, the repository's merger that runs it and
  its configuration and scaling coefficients as that takes them, and a note where it does what one would not expect.
* ``COHORT/MODULE/aT``, ``COHORT/MODULE/bT``: ``[r, in]`` and ``[out, r]``, float32, the factors of task T. alpha is r:
  none of the repositories looks at it.
* ``CASE/MODULE/merged``: ``[out, in]``, float32, what is added to the base weight.
* ``CASE/MODULE/masks``: ``[n, p, q]``, where it draws: what stayed.
* ``CASE/tasks``, ``CASE/merged``: ``[n, d]`` and ``[d]``, float32, where the repository's TIES is run on arrays.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ["TQDM_DISABLE"] = "1"

import numpy as np
import torch

GOLDEN = Path(__file__).parents[1] / "tests" / "goldens" / "spaces"
LENGTHS = (1.0, 0.6, 1.7, 1.2)
SHAPES = {"q": (16, 12), "v": (14, 10)}
CROWDED = {"q": (10, 8)}
# What the repositories import at the top and do not use to merge.
UNUSED = ("clip", "transformers", "peft", "peft.utils", "models", "models.huggingface_clip")
OWN = ("task_merger", "utils", "masking_ops", "merging_functions", "ft_handlers")


def cohort(ranks, seed, shapes=SHAPES, common=0.7):
    """Tasks ``{module: (a, b)}`` of different lengths, whose factors have a part in common."""
    rng = np.random.default_rng(seed)
    widest = max(ranks)
    shared = {m: (rng.normal(size=(widest, in_)), rng.normal(size=(out, widest))) for m, (out, in_) in shapes.items()}
    tasks = []
    for length, rank in zip(LENGTHS, ranks, strict=False):
        task = {}
        for module, (a, b) in shared.items():
            own_a = common * a[:rank] + rng.normal(size=(rank, a.shape[1]))
            own_b = common * b[:, :rank] + rng.normal(size=(b.shape[0], rank))
            task[module] = 0.3 * own_a, 0.3 * length * own_b
        tasks.append(task)
    return tasks


def alike(ranks, seed, noise=0.05):
    """Tasks in nearly the same subspaces, which are then found in a few iterations to the last digit."""
    rng = np.random.default_rng(seed)
    rank = max(ranks)
    tasks = []
    bases = {m: (rng.normal(size=(rank, in_)), rng.normal(size=(out, rank))) for m, (out, in_) in SHAPES.items()}
    for length, own in zip(LENGTHS, ranks, strict=False):
        task = {}
        for module, (a, b) in bases.items():
            mix_a, mix_b = rng.normal(size=(own, rank)), rng.normal(size=(rank, own))
            beside_a, beside_b = noise * rng.normal(size=(own, a.shape[1])), noise * rng.normal(size=(b.shape[0], own))
            task[module] = 0.3 * (mix_a @ a + beside_a), 0.3 * length * (b @ mix_b + beside_b)
        tasks.append(task)
    return tasks


def clustered(seed):
    """Tasks whose rank-one units are near to those of the first task, in another order, but for one each."""
    rng = np.random.default_rng(seed)
    (first,) = cohort([4], seed, {"q": SHAPES["q"]}, common=0)
    a, b = first["q"]
    tasks = [{"q": (a, b)}]
    for order in ((2, 0, 3, 1), (1, 3, 0, 2)):
        near_a, near_b = (x[list(order)] + 0.05 * rng.normal(size=x.shape) for x in (a, b.T))
        tasks.append({"q": (near_a, near_b.T)})
    return tasks


def split_otherwise(tasks, seed):
    """The same changes, of which more or less is in B, in another basis."""
    rng = np.random.default_rng(seed)
    found = []
    for task, size in zip(tasks, (6.0, 0.2, 1.5), strict=True):
        rank = task["q"][0].shape[0]
        gauge = size * (np.eye(rank) + 0.4 * rng.normal(size=(rank, rank)))
        found.append({m: (np.linalg.solve(gauge, a), b @ gauge) for m, (a, b) in task.items()})
    return found


def split_evenly(tasks):
    """The same changes ``U S Vᵀ`` as factors ``√S Vᵀ`` and ``U √S``."""
    found = []
    for task in tasks:
        halves = {}
        for module, (a, b) in task.items():
            u, s, vt = np.linalg.svd(b @ a, full_matrices=False)
            root = np.sqrt(s[: a.shape[0]])
            halves[module] = root[:, None] * vt[: a.shape[0]], u[:, : a.shape[0]] * root
        found.append(halves)
    return found


def of(module, tasks):
    """One module of a cohort."""
    return [{module: task[module]} for task in tasks]


def sharing(tasks):
    """The second task has the A of the first, as adapters with one frozen initialisation have."""
    return [tasks[0], {m: (tasks[0][m][0], b) for m, (_, b) in tasks[1].items()}, *tasks[2:]]


def scaled(tasks, size):
    """All changes times ``size²``."""
    return [{m: (size * a, size * b) for m, (a, b) in task.items()} for task in tasks]


THREE = cohort([3, 3, 3], 1)
COHORTS = {
    "three": THREE,
    "one": of("q", THREE),
    "two": of("q", cohort([4, 4], 2)),
    "four": of("q", cohort([2, 2, 2, 2], 3)),
    "unequal": cohort([2, 4, 3], 4),
    "crowded": cohort([3, 3, 3, 3], 5, CROWDED),
    "unbalanced": split_otherwise(of("q", THREE), 6),
    "balanced": split_evenly(of("q", THREE)),
    "sharing": of("q", sharing(THREE)),
    "small": of("q", scaled(THREE, 12e-6**0.5)),
    "alike": alike([3, 3, 3], 7),
    "alike_unequal": of("q", alike([2, 4, 3], 8)),
    "clustered": clustered(9),
}
COHORTS = {
    name: [{m: tuple(np.float32(x) for x in pair) for m, pair in task.items()} for task in tasks]
    for name, tasks in COHORTS.items()
}


def case(cohort, config, merger="matrix_per_layer", scaling=1.0, clipped=True, note=None):
    """One merge to record; clipped: with the clipping of magnitudes that PCB has."""
    return {
        "cohort": cohort, "config": config, "merger": merger, "scaling": scaling, "clipped": clipped, "note": note,
    }  # fmt: skip


def multiples(seed):
    """Tasks of few different magnitudes, in which signs are often even and + is the more frequent."""
    return np.random.default_rng(seed).integers(-4, 6, size=(4, 60)).astype(np.float32) / 8


TIES = {"merge_method": "ties", "merging_type": "mean", "sign_resolve_mode": "sum_of_values"}
ONE_MORE = "keeps int(topK / 100 · d) + 1 of d entries"


def knots_cases():
    """KnOTS is its merger "svd-vector"; "vector" is the space of the changes themselves. Both trim the whole model."""
    svd = "svd-vector"
    dare = {**TIES, "dare": True, "dare_pruning_coeffs": 0.3, "dare_seed": 0}
    return {
        "ta": case("three", {"merge_method": "tv", "merging_type": "sum"}, svd),
        "ta_unequal": case("unequal", {"merge_method": "tv", "merging_type": "sum"}, svd),
        "mean": case("three", {"merge_method": "tv", "merging_type": "mean"}, svd),
        "magnitude_30": case("three", {"merge_method": "tv", "merging_type": "sum", "topK": 30}, svd, note=ONE_MORE),
        "ties_10": case("three", {**TIES, "topK": 10}, svd, note=ONE_MORE),
        "ties_30": case("three", {**TIES, "topK": 30}, svd, note=ONE_MORE),
        "ties_70": case("three", {**TIES, "topK": 70}, svd, note=ONE_MORE),
        "ties_100": case("three", {**TIES, "topK": 100}, svd),
        "ties_two": case("two", {**TIES, "topK": 40}, svd, note=ONE_MORE),
        "ties_four": case("four", {**TIES, "topK": 40}, svd, note=ONE_MORE),
        "ties_unequal": case("unequal", {**TIES, "topK": 30}, svd, note=ONE_MORE),
        "ties_crowded": case("crowded", {**TIES, "topK": 30}, svd, note=ONE_MORE),
        "ties_sharing": case("sharing", {**TIES, "topK": 30}, svd, note=ONE_MORE),
        "ties_unbalanced": case("unbalanced", {**TIES, "topK": 30}, svd, note=ONE_MORE),
        "ties_sum": case("three", {**TIES, "topK": 30, "merging_type": "sum"}, svd, note=ONE_MORE),
        "ties_scaled": case(
            "three", {**TIES, "topK": 30}, svd, [0.5, 2.0, 1.0], "all tasks are scaled by the first coefficient"
        ),
        "ties_frequency": case("three", {**TIES, "topK": 100, "sign_resolve_mode": "sum_of_signs"}, svd),
        "ties_even": case(
            "one",
            {**TIES, "topK": 50, "sign_resolve_mode": "sum_of_signs"},
            svd,
            note="of as many tasks of either sign, those on the negative side of the basis are taken",
        ),
        "ties_small": case("small", {**TIES, "topK": 100}, svd, note="singular values up to 1e-5 are cut off"),
        "dare_ties": case("two", {**dare, "topK": 100}, svd),
        "dare_ties_trimmed": case("two", {**dare, "topK": 40}, svd, note="trims after it drops, zeros and all"),
        "full_ties": case("three", {**TIES, "topK": 30}, "vector", note=ONE_MORE),
    }


def core_cases():
    """All of one merger, module by module."""
    ties = {"merge_space": "core", "merge_method": "ties", "topK": 30}
    cart = {"merge_space": "core", "merge_method": "cart"}
    total, tsv = ({"merge_space": "core", "merge_method": method} for method in ("tv", "tsv"))
    iso, dare = {"isotropize": True}, {"merge_method": "dare-ties", "dare_pruning_coeffs": 0.3}
    null = "the mean counts null directions, and gives them a size"
    return {
        "ta": case("three", total),
        "ta_unequal": case("unequal", total),
        "ta_scaled": case("three", total, scaling=0.4),
        "ties_10": case("three", {**ties, "topK": 10}, note=ONE_MORE),
        "ties_30": case("three", ties, note=ONE_MORE),
        "ties_70": case("three", {**ties, "topK": 70}, note=ONE_MORE),
        "ties_100": case("three", {**ties, "topK": 100}),
        "ties_two": case("two", ties, note=ONE_MORE),
        "ties_unequal": case("unequal", ties, note=ONE_MORE),
        "ties_crowded": case("crowded", ties, note=ONE_MORE),
        "ties_sharing": case("sharing", ties, note="d counts the rows and columns that no task reaches"),
        "ties_unbalanced": case("unbalanced", ties, note="the bases go by how changes are split into B and A"),
        "ties_balanced": case("balanced", ties, note=ONE_MORE),
        "tsv": case("three", tsv),
        "tsv_four": case("four", tsv),
        "tsv_unequal": case("unequal", tsv, note="takes int(R / n) directions of each task, whatever its rank"),
        "tsv_crowded": case("crowded", tsv, note="takes int(min(out, in) / n) directions of each task"),
        "cart": case("three", {**cart, "cart_pruning_rank": 0.04, "cart_scaling_coeffs": 0.1}),
        "cart_wide": case("three", {**cart, "cart_pruning_rank": 0.32, "cart_scaling_coeffs": 0.7}),
        "cart_unequal": case("unequal", {**cart, "cart_pruning_rank": 0.3, "cart_scaling_coeffs": 1.0}),
        "cart_crowded": case("crowded", {**cart, "cart_pruning_rank": 0.3, "cart_scaling_coeffs": 1.0}),
        "iso": case("three", {**total, **iso}),
        "iso_unequal": case("unequal", {**total, **iso}),
        "iso_crowded": case("crowded", {**total, **iso}),
        "iso_sharing": case("sharing", {**total, **iso}, note=null),
        "ties_iso": case("three", {**ties, **iso}, note=null),
        "ties_iso_70": case("three", {**ties, **iso, "topK": 70}, note=ONE_MORE),
        "tsv_iso": case("three", {**tsv, **iso}),
        "cart_iso": case("three", {**cart, "cart_pruning_rank": 0.32, "cart_scaling_coeffs": 0.7, **iso}),
        "dare_ties": case("three", {**ties, **dare, "topK": 100}),
        "dare_ties_trimmed": case("three", {**ties, **dare}, note="trims after it drops"),
        "full_ties": case("one", {**ties, "merge_space": "full"}, note=ONE_MORE),
        "full_tsv": case("one", {**tsv, "merge_space": "full"}, note="fills up with arbitrary null directions"),
        "full_iso": case("one", {**total, **iso, "merge_space": "full"}, note=null),
        "knots_ties": case("one", {**ties, "merge_space": "knots"}, note="trims and elects V, not S·V as KnOTS does"),
    }


def ctm_cases():
    """Compress-then-Merge is the space "low_rank_core"; "low_rank" is the same of the changes themselves."""
    ctm = {"merge_space": "low_rank_core", "low_rank": True, "lora_rank": 3, "beta": 0.25}
    dense, iso, total = {**ctm, "merge_space": "low_rank"}, {"isotropize": True}, {"merge_method": "sum"}
    ties, pcb = {"merge_method": "ties", "topK": 30}, {"merge_method": "pcb", "topK": 40}
    cart = {"merge_method": "cart", "cart_pruning_rank": 0.34, "cart_scaling_coeffs": 0.7}
    core, full = {"merge_space": "core"}, {"merge_space": "full"}
    cut = {"low_rank": True, "lora_rank": 3}
    clipped = "clips each task's largest magnitude to its second largest; keeps 1 - topK / 100 of the entries"
    return {
        "ta": case("alike", {**ctm, **total}),
        "ta_generic": case("three", {**ctm, **total}, note="stops when the error changes by less than 1e-6"),
        "ta_dense": case("alike", {**dense, **total}),
        "ties": case("alike", {**ctm, **ties}, note=ONE_MORE),
        "ties_beta_0": case("alike", {**ctm, **ties, "beta": 0.0}, note=ONE_MORE),
        "ties_beta_75": case("alike", {**ctm, **ties, "beta": 0.75}, note=ONE_MORE),
        "ties_beta_100": case("alike", {**ctm, **ties, "beta": 1.0}, note=ONE_MORE),
        "ties_60": case("alike", {**ctm, **ties, "topK": 60}, note=ONE_MORE),
        "ties_dense": case("alike", {**dense, **ties}, note=ONE_MORE),
        "ties_rank_2": case("alike", {**ctm, **ties, "lora_rank": 2}, note=ONE_MORE),
        "ties_unequal": case("alike_unequal", {**ctm, **ties, "lora_rank": 4}, note=ONE_MORE),
        "ties_scaled": case("alike", {**ctm, **ties}, scaling=0.75, note=ONE_MORE),
        "pcb": case("alike", {**ctm, **pcb}, note=clipped),
        "pcb_unclipped": case("alike", {**ctm, **pcb}, clipped=False),
        "cart": case("alike", {**ctm, **cart}),
        "iso": case("alike", {**ctm, **total, **iso}),
        "ties_iso": case("alike", {**ctm, **ties, **iso}, note=ONE_MORE),
        "tsv": case("alike", {**ctm, "merge_method": "tsv"}, note="takes int(r / n) directions of each task"),
        "iso_cts": case("alike_unequal", {**ctm, "merge_method": "iso-cts", "lora_rank": 4}),
        "core_ties_cut": case("three", {**core, **cut, **ties}, note=ONE_MORE),
        "core_pcb_unclipped": case("three", {**core, **pcb}, clipped=False),
        "core_iso": case("sharing", {**core, **total, **iso}),
        "full_ties_cut": case("one", {**full, **cut, **ties}, note=ONE_MORE),
        "full_iso": case("three", {**full, **total, **iso}),
        "full_tsv": case("three", {**full, "merge_method": "tsv_low_rank_svd", "lora_rank": 3}),
        "full_iso_cts": case("three", {**full, "merge_method": "iso-cts", "lora_rank": 9}),
        "lego": case("clustered", {"merge_space": "lego", "merge_method": "lego", "lora_rank": 4}),
    }


@contextlib.contextmanager
def imported(checkout):
    """The modules of a checkout, as its scripts see them."""
    for name in UNUSED:
        sys.modules[name] = mock.MagicMock()
    with mock.patch.object(sys, "path", [str(checkout), *sys.path]):
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in OWN})
    for name in OWN:  # The next checkout has modules of the same names.
        del sys.modules[name]


def model(task, shapes, dtype=torch.float32):
    """Zero base weights, with the factors of a task beside them as PEFT has them."""
    root = torch.nn.Module()
    root.device = torch.device("cpu")
    for module, (out, in_) in shapes.items():
        layer = torch.nn.Linear(in_, out, bias=False, dtype=dtype)
        layer.weight.data.zero_()
        for name, factor in zip(("lora_A", "lora_B"), task[module] if task else (), strict=False):
            below = torch.nn.Linear(factor.shape[1], factor.shape[0], bias=False)
            below.weight.data = torch.from_numpy(factor.copy())
            setattr(layer, name, torch.nn.ModuleDict({"default": below}))
        setattr(root, module, layer)
    return root.requires_grad_(False)


@contextlib.contextmanager
def clipping(code, clipped):
    """Without it, the clamp of PCB does nothing where it is asked to cut off the largest magnitudes."""
    if clipped:
        yield
        return
    clamp = code.merging_functions.clamp

    def clamp_scores(x, min_ratio=0, max_ratio=0):
        return clamp(x, min_ratio, max_ratio) if max_ratio == 0 else x

    with mock.patch.object(code.merging_functions, "clamp", clamp_scores):
        yield


@contextlib.contextmanager
def draws_kept(merger, found):
    """Notes what a merger draws, without another way to learn it."""
    draw = merger.randbin

    def noted(*arguments):
        found.append(draw(*arguments))
        return found[-1]

    with mock.patch.object(merger, "randbin", noted):
        yield


def merged(code, given):
    """The arrays of one case: what each module's base weight becomes."""
    tasks = COHORTS[given["cohort"]]
    shapes = {module: (b.shape[0], a.shape[1]) for module, (a, b) in tasks[0].items()}
    of_modules = given["merger"] != "matrix_per_layer"
    # A base in double precision rounds nothing of what comes in it. KnOTS wants the factors in the base, too.
    zero = {m: tuple(np.zeros_like(x) for x in pair) for m, pair in tasks[0].items()}
    base = model(zero, shapes) if of_modules else model(None, shapes, torch.float64)
    sources = [model(task, shapes) for task in tasks]
    if not of_modules:
        sources = [source.state_dict() for source in sources]
    torch.manual_seed(0)
    np.random.seed(0)
    draws = []
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad(), clipping(code, given["clipped"]):
        merger = code.task_merger.get_merge_handler(given["merger"])(sources, base, code.ft_handlers.LoRAHandler, "cpu")
        merger.transform(given["config"])
        merger.set_scaling_coeffs(given["scaling"])
        with draws_kept(merger, draws):
            weights = merger.merge(given["config"]).state_dict()
    arrays = {f"{module}/merged": weights[f"{module}.weight"].numpy().astype(np.float32) for module in shapes}
    for index, module in enumerate(shapes if draws else ()):
        own = draws[index * len(tasks) : (index + 1) * len(tasks)]
        arrays[f"{module}/masks"] = np.stack(own).astype(bool)
    return arrays


def trimmed(code, tasks):
    """The arrays of TIES on tasks as they are, of which it keeps the largest 30 %."""
    found, _, _ = code.merging_functions.ties_merging([torch.from_numpy(task.copy()) for task in tasks], topK=30)
    return {"tasks": tasks, "merged": found.numpy()}


FILES = {
    "knots": ("gstoica27/KnOTS", knots_cases, ("torch", "numpy")),
    "core": ("apanariello4/core-space-merging", core_cases, ("torch", "numpy")),
    "ctm": ("ZhengbaoHe/compress-then-merge", ctm_cases, ("torch", "numpy", "tensorly", "scikit-learn")),
}
# Of Core Space's TIES: magnitudes at the threshold, and signs that are even.
ARRAYS = {"equal": multiples(10), "equal_negative": -multiples(10)}


def made(name, checkout):
    """The arrays of one file."""
    repository, cases, packages = FILES[name]
    cases = cases()
    commit = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    about = {
        "repository": f"https://github.com/{repository}",
        "commit": commit.stdout.strip(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "made_by": "scripts/make_space_golden.py, with the repository's own code",
        "cases": cases,
    }
    arrays = {"about": np.array(json.dumps(about))}
    for cohort in sorted({given["cohort"] for given in cases.values()}):
        for number, task in enumerate(COHORTS[cohort]):
            for module, (a, b) in task.items():
                arrays |= {f"{cohort}/{module}/a{number}": a, f"{cohort}/{module}/b{number}": b}
    with imported(checkout) as code:
        for key, given in cases.items():
            arrays |= {f"{key}/{part}": value for part, value in merged(code, given).items()}
        for key, tasks in ARRAYS.items() if name == "core" else ():
            arrays |= {f"{key}/{part}": value for part, value in trimmed(code, tasks).items()}
    return arrays


def main() -> int:
    """Makes the golden."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    for name, (repository, _, _) in FILES.items():
        parser.add_argument(name, type=Path, help=f"checkout of {repository}")
    parser.add_argument("-o", "--output", type=Path, default=GOLDEN)
    options = parser.parse_args()
    folder = options.output.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    good = True
    for name in FILES:
        arrays = made(name, getattr(options, name).resolve())
        good &= all(np.isfinite(value).all() for value in arrays.values() if value.dtype.kind == "f")
        np.savez_compressed(folder / f"{name}.npz", **arrays)
        print(f"{name}: {len(arrays)} arrays, {(folder / f'{name}.npz').stat().st_size / 1000:.0f} kB")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
