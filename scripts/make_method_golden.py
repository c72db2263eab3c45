"""Makes tests/goldens/methods with the published codes of the methods: what they give for small random tasks.

Run it where torch and scikit-learn are installed (jaxmerge is not needed), with clones of the repositories in
`COMMITS`, bare or not: ``python scripts/make_method_golden.py IBM/STAR=path/to/STAR ...``. Files are read at the
commits given there, and of those only the functions, so that nothing else they import has to be there. Everything runs
in float64, where the code does not change to float32 itself. It writes one file per method, ``METHOD.npz``:

* ``about``: JSON: versions, and for each case the code, its parameters, and a note where it does what one would not
  expect. Weights, where there are any, scaled the tasks before they were given to the code.
* ``CASE/tasks``: ``[n, p, q]``, float32; or ``CASE/a``, ``CASE/b``: ``[n, r, q]`` and ``[n, p, r]``, float32, of which
  the tasks are the products in float64.
* ``CASE/base``: ``[p, q]``, where the code has a base model, unless it is zero.
* ``CASE/merged``: ``[p, q]``, float64, without the base. In the cases whose code has a frame, the code ran on the
  cores of Core Space, in the bases of its code, and this is what they were mapped back to.
"""

import argparse
import ast
import contextlib
import copy
import functools
import importlib.metadata
import io
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from goldens import emptied, save_cases

GOLDEN = Path(__file__).parents[1] / "tests" / "goldens" / "methods"
COMMITS = {
    "AntoAndGar/task_singular_vectors": "a6c97188f7aa0bb20753de4f2939be89dd64f1c3",
    "danielm1405/iso-merging": "d34010af8ba129ef4d17a91ca9943b413fe06f8c",
    "apanariello4/core-space-merging": "85176fab749578b0b54a027ea89495846e79757d",
    "ZhengbaoHe/compress-then-merge": "6017d1e5fc293717aacc215d0e42b9f3d75eda86",
    "IBM/STAR": "e6bfcf70e6f9133141881dc427f81d3f50e463bc",
    "duguodong7/pcb-merging": "5897888b5d24adfcd33e124793d113746e00f3ff",
    "nik-dim/tall_masks": "d10af8b21383322367fb35474bd9cd0f9ebe9ecf",
    "nathanielyvo/WUDI-Merging": "dc3cd1204a68d1930a32da11c5cddb0cbd7410bb",
    "tanganke/fusion_bench": "54c9e8c9d9621620c720452cd8533332a32d3689",
    # On a branch; the authors' own repository could not be had.
    "tanganke/fusion_bench (subspace boosting)": "11cb767413bda51c96db8533310ca63621703919",
}
CODES = {
    "tsv": ("AntoAndGar/task_singular_vectors", "src/utils/TSVM_utils.py", "compute_and_sum_svd_mem_reduction"),
    "tsv_lossless": (
        "AntoAndGar/task_singular_vectors", "src/utils/TSVM_utils.py", "compute_and_sum_svd_mem_reduction_lossless",
    ),
    "core_tsv": ("apanariello4/core-space-merging", "task_merger.py", "get_tsv_delta_w"),
    "iso_c": ("danielm1405/iso-merging", "src/utils/iso.py", "iso_c"),
    "iso_cts": ("danielm1405/iso-merging", "src/utils/iso.py", "iso_cts"),
    "isotropize": ("ZhengbaoHe/compress-then-merge", "task_merger.py", "isotropize_matrix"),
    "cart": ("apanariello4/core-space-merging", "task_merger.py", "get_cart_delta_w"),
    "core": ("apanariello4/core-space-merging", "task_merger.py", "get_core_matrices"),
    "star": ("IBM/STAR", "merger/STAR.py", "star"),
    "subspace_boosting": (
        "tanganke/fusion_bench (subspace boosting)",
        "fusion_bench/method/subspace_boosting/subspace_boosting_utils.py",
        "subspace_boosting_single_matrix",
    ),
    "wudi": ("tanganke/fusion_bench", "fusion_bench/method/wudi/wudi.py", "wudi_merging"),
    "wudi_authors": ("nathanielyvo/WUDI-Merging", "vit/coef.py", "get_redundant_task_vector"),
    "pcb": ("duguodong7/pcb-merging", "pcb-merging.py", "PCB_merge"),
    "consensus": ("nik-dim/tall_masks", "src/utils/tallmask_utils.py", "construct_consensus_mask"),
    "lego": ("ZhengbaoHe/compress-then-merge", "task_merger.py", "merge_MSUs"),
    "calibrate": (
        "tanganke/fusion_bench", "fusion_bench/method/singular_value_calibration/utils.py",
        "subspace_consistency_spectral_calibration",
    ),
    "calibrate_accelerated": (
        "tanganke/fusion_bench", "fusion_bench/method/singular_value_calibration/utils.py",
        "subspace_consistency_spectral_calibration_accelerated",
    ),
}  # fmt: skip
PATHS: dict[str, Path] = {}


@functools.cache
def functions_of(code, **names):
    """All functions and methods of a code's file, in a namespace of their own with a few names more."""
    repository, path, _ = CODES[code]
    folder = PATHS[repository.partition(" ")[0]]
    shown = ["git", "-C", str(folder), "show", f"{COMMITS[repository]}:{path}"]
    tree = ast.parse(subprocess.run(shown, check=True, capture_output=True, text=True).stdout)
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    # Annotations name types of libraries that are not there.
    future = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)
    module = ast.fix_missing_locations(ast.Module([future, *found], []))
    modules = {"torch": torch, "math": math, "np": np, "copy": copy}
    namespace = {**modules, "tqdm": mock.MagicMock(side_effect=lambda steps, **_: steps), **names}
    exec(compile(module, path, "exec"), namespace)
    return namespace


def function_of(code, **names):
    """The function that a code is called by."""
    return functions_of(code, **names)[CODES[code][2]]


# How each code is called. `tasks` is a list of float64 matrices, already weighted.


def vectors(tasks):
    """Task vectors of models with one matrix, and the configuration that comes with them."""
    names = [f"task{i}" for i in range(len(tasks))]
    return [SimpleNamespace(vector={"weight": task}) for task in tasks], {
        "DATASETS": names, "num_tasks": len(names), "device": "cpu",
    }  # fmt: skip


def of_vectors(code, tasks, common_share=None):
    """Codes that take models."""
    given, config = vectors(tasks)
    method = SimpleNamespace(common_space_fraction=common_share)
    return function_of(code)(given, SimpleNamespace(**config, method=method))["weight"]


def core_tsv(code, tasks):
    """TSV of Core Space."""
    return function_of(code)(None, tasks)


def isotropize(code, tasks):
    """Iso-C over the rank there is."""
    return function_of(code, float32_dtype=torch.float64)(sum(tasks))


def cart(code, tasks, rank_share, strength):
    """CART of Core Space."""
    return function_of(code)(None, tasks, rank_share, strength)


def star(code, tasks, eta, known_rank=None):
    """STAR of each task, and their sum. A known rank brings in a randomised SVD."""
    torch.manual_seed(0)
    return sum(function_of(code)(task, 100 * eta, known_rank) for task in tasks)


def subspace_boosting(code, tasks, beta):
    """Subspace Boosting of the sum."""
    return function_of(code)(sum(tasks), beta)


def descended(step):
    """Adam replaced by plain gradient descent, if there is a step."""
    if step is None:
        return contextlib.nullcontext()
    sgd = torch.optim.SGD
    return mock.patch.object(torch.optim, "Adam", lambda parameters, **_: sgd(parameters, lr=step))


def wudi(code, tasks, steps, step=None):
    """WUDI by Adam, or by gradient descent with a step."""
    with descended(step), mock.patch.object(torch.Tensor, "cuda", lambda x: x):
        if code == "wudi_authors":
            return function_of(code)("weight", torch.stack(tasks), steps)
        function = function_of(code, timeit_context=lambda _: contextlib.nullcontext())
        return function([{"weight": task} for task in tasks], "cpu", steps)["weight"].detach()


def pcb(code, tasks, density, clipped):
    """Without clipping, the authors' clamp does nothing where it is asked to cut off the largest magnitudes."""
    namespace = functions_of(code)
    clamp = namespace["clamp"]

    def clamp_scores(x, min_ratio=0, max_ratio=0):
        return clamp(x, min_ratio, max_ratio) if max_ratio == 0 else x

    with mock.patch.dict(namespace, clamp=clamp if clipped else clamp_scores):
        flat = torch.stack([task.flatten() for task in tasks])
        return namespace["PCB_merge"](flat, density)[0].reshape(tasks[0].shape)


def consensus(code, tasks, threshold, agreeing, base):
    """Consensus merging, with TALL masks of the sum."""
    namespace = functions_of(code)
    flat, base = torch.stack([task.flatten() for task in tasks]), base.flatten()
    stubs = {
        "log_wandb_mask_sparsity": lambda _: None,
        "load_tall_mask": lambda *_: {i: {"weight": mask} for i, mask in enumerate(masks)},
        "state_dict_to_vector": lambda state, remove_keys: state["weight"],
    }
    with mock.patch.dict(namespace, stubs):
        masks = namespace["generate_task_masks"](flat, base + flat, base, tall_mask_lambda=threshold)
        return (flat.sum(0) * namespace["construct_consensus_mask"](None, agreeing, None)).reshape(tasks[0].shape)


def lego(code, factors, rank, seed=0):
    """LoRA-LEGO: the product of what it returns."""
    np.random.seed(seed)
    a, b = function_of(code)(SimpleNamespace(device="cpu"), *zip(*factors, strict=True), rank)
    return b @ a


def calibrate(code, tasks, factor, floor, base):
    """SVC of a multiple of the sum."""
    given = base, [base + task for task in tasks], base + factor * sum(tasks)
    return function_of(code)(*given, alpha=floor, accelerator="cpu") - base


def in_core(run, code, factors, **parameters):
    """The same on the cores of Core Space."""
    cores, left, right = function_of("core")(SimpleNamespace(cache={}), [{"m": pair} for pair in factors], "m", None)
    return left @ run(code, cores, **parameters) @ right


# Tasks

SHAPE = (12, 10)
LENGTHS = (1.0, 0.5, 2.0, 0.25, 1.5)


def full(n, seed, shape=SHAPE, scale=0.05, common=0.7, lengths=LENGTHS):
    """Matrices of full rank and different lengths with a part in common."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=shape)
    made = [scale * length * (common * shared + rng.normal(size=shape)) for length in lengths[:n]]
    return {"tasks": np.stack(made, dtype=np.float32)}


def one_norm(n, seed, shape):
    """The same with all norms 1."""
    tasks = full(n, seed, shape)["tasks"]
    return {"tasks": tasks / np.linalg.norm(tasks, axis=(1, 2), keepdims=True)}


def low(n, seed, rank=2, shape=SHAPE, scale=0.05, common=0.7):
    """Factors of LoRAs that share a part of A, as those of one initialisation do."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(rank, shape[1]))
    a = np.stack([common * shared + rng.normal(size=shared.shape) for _ in range(n)], dtype=np.float32)
    b = np.stack([scale * length * rng.normal(size=(shape[0], rank)) for length in LENGTHS[:n]], dtype=np.float32)
    return {"a": a, "b": b}


def noisy(given, seed=0, size=1e-9):
    """The same as matrices, with noise that is next to nothing."""
    tasks = given["b"].astype(np.float64) @ given["a"].astype(np.float64)
    return {"tasks": tasks + size * np.random.default_rng(seed).normal(size=tasks.shape)}


def half_apart(seed):
    """Two LoRAs of rank 2 whose rows have principal cosines of a half: all four directions matter equally."""
    rng = np.random.default_rng(seed)
    rows, left = (np.linalg.qr(rng.normal(size=(size, 4)))[0] for size in reversed(SHAPE))
    a = np.stack([rows[:, :2].T, 0.5 * rows[:, :2].T + np.sqrt(0.75) * rows[:, 2:].T], dtype=np.float32)
    b = np.stack([left[:, :2], 2 * (left[:, :2] + left[:, 2:])], dtype=np.float32)
    return {"a": a, "b": b}


def clusters(n, kinds, seed, noise):
    """LoRAs whose units are a few kinds and a little noise, in any order."""
    rng = np.random.default_rng(seed)
    made = rng.normal(size=(kinds, sum(SHAPE)))
    units = np.stack([made[rng.permutation(kinds)] for _ in range(n)])
    units = (units + noise * rng.normal(size=units.shape)).astype(np.float32)
    return {"a": units[:, :, : SHAPE[1]], "b": units[:, :, SHAPE[1] :].transpose(0, 2, 1)}


def zero_last(given):
    """The same with a last task of zeros."""
    name = "tasks" if "tasks" in given else "b"
    changed = given[name].copy()
    changed[-1] = 0
    return {**given, name: changed}


# Cases


def case(code, run, given, /, *, note=None, weights=None, core=False, base=None, **parameters):
    """One merge to record."""
    return {
        "code": code, "run": run, "given": given, "note": note, "weights": weights, "core": core, "base": base,
        "parameters": parameters,
    }  # fmt: skip


SIGNED = [1.0, 0.5, -2.0]
ARBITRARY = "the code fills up with null directions, which are arbitrary"
CASES = {
    "tsv": {
        "lossless": case("tsv_lossless", of_vectors, full(3, 1)),
        "lossless_wide": case("tsv_lossless", of_vectors, full(2, 2, (8, 15))),
        "lossless_signed": case("tsv_lossless", of_vectors, full(3, 3), weights=SIGNED),
        "reduced": case("tsv", of_vectors, full(3, 4), note="min(p, q) // n directions of each task"),
        "reduced_five": case("tsv", of_vectors, full(5, 5), note="min(p, q) // n directions of each task"),
        "core": case("core_tsv", core_tsv, low(3, 6), core=True),
        "core_five": case("core_tsv", core_tsv, low(5, 7, 1), core=True),
        "core_signed": case("core_tsv", core_tsv, low(3, 8), core=True, weights=SIGNED),
        "dense": case("tsv", of_vectors, low(3, 6), note=ARBITRARY),
        "dense_noisy": case("tsv", of_vectors, noisy(low(3, 6)), note=ARBITRARY),
    },
    "iso_c": {
        "three": case("iso_c", of_vectors, full(3, 1)),
        "five": case("iso_c", of_vectors, full(5, 2, (8, 15))),
        "signed": case("iso_c", of_vectors, full(3, 3), weights=SIGNED),
        "effective_rank": case("isotropize", isotropize, low(3, 4)),
        "effective_rank_signed": case("isotropize", isotropize, low(3, 5), weights=SIGNED),
        "core": case("iso_c", of_vectors, low(3, 6), core=True),
        "dense": case("iso_c", of_vectors, low(3, 6), note=ARBITRARY),
    },
    "iso_cts": {
        "three": case("iso_cts", of_vectors, full(3, 1), common_share=0.8),
        "two": case("iso_cts", of_vectors, full(2, 2), common_share=0.7),
        "five": case("iso_cts", of_vectors, full(5, 3), common_share=0.5),
        "all_common": case("iso_cts", of_vectors, full(2, 4), common_share=0.9),
        "signed": case("iso_cts", of_vectors, full(3, 5), common_share=0.6, weights=SIGNED),
        "core": case("iso_cts", of_vectors, low(3, 6), common_share=0.8, core=True),
        "core_signed": case("iso_cts", of_vectors, low(3, 7), common_share=0.5, core=True, weights=SIGNED),
        "dense": case("iso_cts", of_vectors, low(3, 6), common_share=0.8, note=ARBITRARY),
    },
    "cart": {
        "three": case("cart", cart, full(3, 1), rank_share=0.3, strength=0.7),
        "five": case("cart", cart, full(5, 2), rank_share=0.08, strength=1.0),
        "own_defaults": case("cart", cart, full(3, 3), rank_share=0.04, strength=0.1),
        "signed": case("cart", cart, full(3, 4), rank_share=0.4, strength=1.0, weights=SIGNED),
        "core": case("cart", cart, low(3, 5), rank_share=0.4, strength=1.0, core=True),
        "dense": case("cart", cart, low(3, 5), rank_share=0.4, strength=1.0, note="the share is of min(p, q)"),
    },
    "star": {
        "three": case("star", star, full(3, 1), eta=0.4, weights=[1 / 3] * 3),
        "most": case("star", star, full(3, 2), eta=0.75, weights=[1 / 3] * 3),
        "all": case("star", star, full(2, 3), eta=1.0, weights=[0.5] * 2),
        "signed": case("star", star, full(3, 4), eta=0.4, weights=SIGNED),
        "low_rank": case("star", star, low(3, 5, 4), eta=0.4, weights=[1 / 3] * 3),
        "low_rank_most": case("star", star, low(3, 6, 4), eta=0.75, weights=[1 / 3] * 3),
        "known_rank": case("star", star, low(3, 7, 3), eta=0.6, weights=[1 / 3] * 3, known_rank=3),
    },
    "subspace_boosting": {
        "three": case("subspace_boosting", subspace_boosting, full(3, 1), beta=0.01),
        "some": case("subspace_boosting", subspace_boosting, full(3, 2), beta=0.5),
        "most": case("subspace_boosting", subspace_boosting, full(5, 3), beta=0.9),
        "signed": case("subspace_boosting", subspace_boosting, full(3, 4), beta=0.5, weights=SIGNED),
        "core": case("subspace_boosting", subspace_boosting, low(3, 5), beta=0.5, core=True),
        "dense": case("subspace_boosting", subspace_boosting, low(3, 5), beta=0.5, note=ARBITRARY),
    },
    "wudi": {
        "flow": case("wudi", wudi, full(3, 1, (24, 4)), steps=2000, step=0.0001),
        "converged": case("wudi", wudi, full(3, 2, (24, 4)), steps=500, step=0.3),
        "low_rank_flow": case("wudi", wudi, half_apart(3), steps=2000, step=0.0001),
        "low_rank_converged": case("wudi", wudi, half_apart(4), steps=500, step=0.3),
        "adam": case("wudi", wudi, full(3, 2, (24, 4)), steps=300),
        "adam_large": case("wudi", wudi, full(3, 2, (24, 4), scale=5.0), steps=300, note="100 times the tasks of adam"),
        "authors": case(
            "wudi_authors", wudi, full(3, 2, (24, 4)), steps=500, step=0.3,
            note="divides the loss by the tasks' norms, not their squares",
        ),
        "authors_one_norm": case("wudi_authors", wudi, one_norm(3, 5, (24, 4)), steps=500, step=0.3),
    },
    "pcb": {
        "three": case("pcb", pcb, full(3, 1), density=0.2, clipped=False),
        "two": case("pcb", pcb, full(2, 2), density=0.1, clipped=False),
        "five": case("pcb", pcb, full(5, 3), density=0.5, clipped=False),
        "large": case("pcb", pcb, full(3, 4, scale=1.0), density=0.2, clipped=False),
        "low_rank": case("pcb", pcb, low(3, 5), density=0.25, clipped=False),
        "uneven": case("pcb", pcb, full(3, 6), density=0.23, clipped=False, note="of 27.6 entries it keeps 28"),
        "clipped": case("pcb", pcb, full(3, 1), density=0.2, clipped=True, note="the largest entry becomes the second"),
        "model": case(
            "pcb", pcb, {"tasks": np.concatenate([full(3, 7)["tasks"], full(3, 8, scale=0.01)["tasks"]], axis=1)},
            density=0.2, clipped=False, note="two modules of 12 rows as one vector, as it takes a model",
        ),
    },
    "consensus": {
        **{
            f"threshold_{threshold}": case("consensus", consensus, full(4, 1), threshold=threshold, agreeing=2)
            for threshold in (0.2, 0.4, 0.6)
        },
        **{
            f"agreeing_{agreeing}": case("consensus", consensus, full(4, 2), threshold=0.4, agreeing=agreeing)
            for agreeing in (1, 3, 4)
        },
        "random_base": case("consensus", consensus, full(3, 3), threshold=0.4, agreeing=2, base=9),
        "low_rank": case("consensus", consensus, low(3, 4), threshold=0.4, agreeing=2),
        "too_many": case("consensus", consensus, full(2, 5), threshold=0.4, agreeing=3, note="nothing is left"),
    },
    "lego": {
        "clusters": case("lego", lego, clusters(3, 4, 1, 0.1), rank=4),
        "fewer": case("lego", lego, clusters(4, 3, 2, 0.1), rank=3),
        "all_units": case("lego", lego, low(3, 3, scale=1.0), rank=6),
        "one_cluster": case("lego", lego, low(3, 4, scale=1.0), rank=1),
        "no_clusters": case("lego", lego, low(3, 5, 4, scale=1.0), rank=4, note="the best of ten drawn starts"),
        "no_clusters_again": case("lego", lego, low(3, 5, 4, scale=1.0), rank=4, seed=1, note="and of ten others"),
    },
    "calibrate": {
        "sum": case("calibrate", calibrate, full(3, 1), factor=1.0, floor=0.1),
        "mean": case("calibrate", calibrate, full(4, 2), factor=0.25, floor=0.1),
        "floor": case("calibrate", calibrate, full(3, 3), factor=1.0, floor=1.0),
        "random_base": case("calibrate", calibrate, full(3, 4), factor=0.3, floor=0.2, base=9),
        "low_rank": case("calibrate", calibrate, low(3, 5), factor=1.0, floor=0.1),
        "accelerated": case("calibrate_accelerated", calibrate, full(3, 6), factor=1.0, floor=0.1),
        "accelerated_low_rank": case("calibrate_accelerated", calibrate, low(3, 7), factor=1.0, floor=0.2),
        "zeros": case(
            "calibrate_accelerated", calibrate, zero_last(full(3, 8)), factor=1.0, floor=0.1,
            note="a task of zeros counts with the floor",
        ),
        "tiny": case(
            "calibrate_accelerated", calibrate, full(3, 6, scale=5e-8), factor=1.0, floor=0.1,
            note="squared norms below 1e-12 count as 1e-12; a millionth of the tasks of accelerated",
        ),
    },
}  # fmt: skip


def recorded(given):
    """The arrays of one case."""
    arrays = dict(given["given"])
    parameters = dict(given["parameters"])
    weights = given["weights"] or [1.0] * len(next(iter(arrays.values())))
    wide = {name: torch.from_numpy(array.astype(np.float64)) for name, array in arrays.items()}
    if given["run"] in (consensus, calibrate):
        shape = (wide["tasks"] if "tasks" in wide else wide["b"] @ wide["a"]).shape[1:]
        parameters["base"] = torch.zeros(shape, dtype=torch.float64)
        if given["base"] is not None:
            arrays["base"] = np.random.default_rng(given["base"]).normal(size=shape)
            parameters["base"] = torch.from_numpy(arrays["base"])
    if "tasks" in wide:
        tasks = [weight * task for weight, task in zip(weights, wide["tasks"], strict=True)]
    else:
        factors = [(a, weight * b) for weight, a, b in zip(weights, wide["a"], wide["b"], strict=True)]
        tasks = [b @ a for a, b in factors]
    with contextlib.redirect_stdout(io.StringIO()):
        if given["core"]:
            merged = in_core(given["run"], given["code"], factors, **parameters)
        else:
            merged = given["run"](given["code"], factors if given["run"] is lego else tasks, **parameters)
    arrays["merged"] = merged.numpy()
    return arrays


def described(given):
    """What is said of one case."""
    names = {"code": given["code"], **({"frame": "core"} if given["core"] else {})}
    codes = {
        name: dict(zip(("repository", "path", "function"), CODES[code], strict=True), commit=COMMITS[CODES[code][0]])
        for name, code in names.items()
    }
    return {**codes, **{key: given[key] for key in ("parameters", "weights", "note")}}


def main() -> int:
    """Makes the golden."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("repositories", nargs="+", metavar="OWNER/NAME=PATH", help="where its clone is")
    parser.add_argument("-o", "--output", type=Path, default=GOLDEN)
    arguments = parser.parse_args()
    for each in arguments.repositories:
        name, _, path = each.partition("=")
        PATHS[name] = Path(path).resolve()
    folder = emptied(arguments.output)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "scikit-learn")}
    good = True
    for method, cases in CASES.items():
        about = {
            "method": method,
            "versions": versions,
            "made_by": "scripts/make_method_golden.py",
            "cases": {name: described(given) for name, given in cases.items()},
        }
        good &= save_cases(folder, method, about, cases, recorded)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
