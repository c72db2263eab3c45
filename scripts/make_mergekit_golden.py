"""Makes tests/goldens/mergekit with mergekit: what its merge methods give for small random tasks.

Run it where `mergekit` is installed (Python 3.11, torch on the CPU; jaxmerge is not needed):
`python scripts/make_mergekit_golden.py`. It writes one file per method, ``METHOD.npz``:

* ``about``: JSON: versions, and for each case its parameters as mergekit takes them, which input is its base
  (``"zero"``, ``"random"``, ``"first task"`` or null), and a note where mergekit does what one would not expect.
* ``CASE/tasks``: ``[n, p, q]``, float32, the changes. What mergekit merges is base + task in float32.
* ``CASE/base``: ``[p, q]``, where the base is zero or random.
* ``CASE/merged``: ``[p, q]``, what mergekit returns: with the base in it, if there is one.
* ``CASE/probabilities``, ``CASE/masks``: ``[n, p, q]``, where it draws: the chance to stay, and what stayed.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from goldens import emptied, save_cases
from mergekit.merge_methods import merge_tensors

GOLDEN = Path(__file__).parents[1] / "tests" / "goldens" / "mergekit"
# Neither 0.3 nor 0.01 of 132 entries is next to a whole number.
SHAPE = (12, 11)
LENGTHS = (1.0, 0.5, 2.0, 0.25, 1.5)


def tasks(n, seed, common=0.7, scale=0.05):
    """Tasks of different lengths with a part in common."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=SHAPE)
    return np.stack(
        [scale * LENGTHS[i] * (common * shared + rng.normal(size=SHAPE)) for i in range(n)], dtype=np.float32
    )


def with_zeros(n, seed):
    """The last of the tasks is zero."""
    made = tasks(n, seed)
    made[-1] = 0
    return made


def opposite(seed):
    """Two tasks that differ by a factor of exactly −2."""
    (one,) = tasks(1, seed)
    return np.stack([one, -2 * one])


def nearly(cosine, seed):
    """Two tasks of lengths 1 and 2 with a given cosine."""
    one, other = (made / np.linalg.norm(made) for made in tasks(2, seed, common=0).astype(np.float64))
    other -= np.vdot(one, other) * one
    other /= np.linalg.norm(other)
    return np.stack([one, 2 * (cosine * one + np.sqrt(1 - cosine**2) * other)], dtype=np.float32)


def case(made, parameters, base=None, note=None):
    """One merge to record."""
    return {"tasks": made, "parameters": parameters, "base": base, "note": note}


EQUAL = [1.0, 1.0]
UNEQUAL = [0.3, 0.9, 0.6, 1.2, 0.1]
SIGNED = [1.0, 0.5, -2.0]
GENERAL = {"weight": UNEQUAL[:3], "density": 0.3}
OUTLIERS = {"weight": UNEQUAL[:3], "density": 0.6, "gamma": 0.1}
DRAWN = {"weight": UNEQUAL[:3], "density": 0.5}
DELLA = {**DRAWN, "epsilon": 0.15}


def general(parameters):
    """What is asked of every method of mergekit's family of task arithmetic."""
    return {
        "zero_base": case(tasks(3, 1), parameters, "zero"),
        "random_base": case(tasks(3, 2), parameters, "random"),
        "two": case(tasks(2, 3), {**parameters, "weight": EQUAL}, "zero"),
        "five": case(tasks(5, 4), {**parameters, "weight": UNEQUAL}, "zero"),
        "signed": case(tasks(3, 5), {**parameters, "weight": SIGNED}, "zero"),
        "normalized": case(tasks(3, 6), {**parameters, "normalize": True}, "zero"),
        "summed": case(tasks(3, 6), {**parameters, "normalize": False}, "zero"),
        "lambda": case(tasks(3, 6), {**parameters, "lambda": 0.4}, "zero"),
        "rescaled": case(tasks(3, 6), {**parameters, "rescale": True}, "zero"),
        "unscaled": case(tasks(3, 6), {**parameters, "rescale": False}, "zero"),
    }


CASES = {
    "slerp": {
        "half": case(tasks(2, 1), {"t": 0.5}, "first task"),
        "quarter": case(tasks(2, 2), {"t": 0.25}, "first task"),
        "apart": case(tasks(2, 3, common=0), {"t": 0.75}, "first task"),
        "with_zeros": case(with_zeros(2, 4), {"t": 0.75}, "first task"),
        "near_parallel": case(nearly(0.9996, 5), {"t": 0.3}, "first task"),
        "near_opposite": case(nearly(-0.9996, 5), {"t": 0.3}, "first task"),
        "opposite": case(opposite(6), {"t": 0.75}, "first task"),
    },
    "nuslerp": {
        "equal": case(tasks(2, 1), {"weight": EQUAL}),
        "unequal": case(tasks(2, 2), {"weight": [0.3, 0.9]}),
        "zero_base": case(tasks(2, 2), {"weight": [0.3, 0.9]}, "zero"),
        "random_base": case(tasks(2, 3), {"weight": [0.9, 0.3]}, "random"),
        "with_zeros": case(with_zeros(2, 4), {"weight": [0.3, 0.9]}),
        "near_parallel": case(nearly(0.9996, 5), {"weight": [0.7, 0.3]}),
        "near_opposite": case(nearly(-0.9996, 5), {"weight": [0.7, 0.3]}),
        "signed": case(tasks(2, 6), {"weight": [1.0, -0.5]}, note="extrapolates"),
        "cancelling": case(tasks(2, 6), {"weight": [1.0, -1.0]}, note="weights that sum to 0 count as equal"),
    },
    "multislerp": {
        "two": case(tasks(2, 1), {"weight": EQUAL}),
        "three": case(tasks(3, 2), {"weight": UNEQUAL[:3]}),
        "five": case(tasks(5, 3), {"weight": UNEQUAL}),
        "zero_base": case(tasks(3, 2), {"weight": UNEQUAL[:3]}, "zero"),
        "random_base": case(tasks(3, 4), {"weight": UNEQUAL[:3]}, "random"),
        "with_zeros": case(with_zeros(3, 5), {"weight": UNEQUAL[:3]}),
        "opposite": case(opposite(6), {"weight": EQUAL}),
        "opposite_unequal": case(opposite(6), {"weight": [0.3, 0.9]}),
        "signed": case(tasks(3, 7), {"weight": SIGNED}, note="shares are of the sum of the weights, signs and all"),
    },
    "karcher": {
        "two": case(tasks(2, 1), {}),
        "three": case(tasks(3, 2), {}),
        "five": case(tasks(5, 3), {}),
        "apart": case(tasks(5, 4, common=0), {}),
        "one_step": case(tasks(3, 2), {"max_iter": 1}),
        "coarse": case(tasks(3, 2), {"tol": 0.01}),
        "with_zeros": case(with_zeros(3, 5), {}),
        "opposite": case(opposite(6), {}, note="goes where rounding points"),
        "tiny": case(tasks(3, 7, scale=1e-7), {}, note="tasks shorter than tol count as zero"),
    },
    "model_stock": {
        "two": case(tasks(2, 1), {}, "zero"),
        "three": case(tasks(3, 2), {}, "zero"),
        "five": case(tasks(5, 3), {}, "zero"),
        "random_base": case(tasks(3, 4), {}, "random"),
        "with_zeros": case(with_zeros(3, 5), {}, "zero"),
        "disagreeing": case(nearly(-0.3, 6), {}, "zero"),
        "opposite": case(opposite(6), {}, "zero"),
        "tiny": case(tasks(3, 7, scale=1e-5), {}, "zero", note="products of lengths below 1e-6 count as 1e-6"),
    },
    "ties": general(GENERAL),
    "breadcrumbs": {
        **general(OUTLIERS),
        "few_outliers": case(tasks(3, 7), {**OUTLIERS, "gamma": 0.01}, "zero"),
        "no_outliers": case(tasks(3, 7), {**OUTLIERS, "gamma": 0.005}, "zero"),
        "dense": case(tasks(3, 7), {**OUTLIERS, "density": 0.95}, "zero", note="density goes before gamma"),
        "whole": case(tasks(3, 7), {**OUTLIERS, "density": 1.0}, "zero", note="nothing is removed at density 1"),
    },
    "breadcrumbs_ties": general(OUTLIERS),
    "sce": {
        "two": case(tasks(2, 1), {}, "zero"),
        "three": case(tasks(3, 2), {}, "zero"),
        "five": case(tasks(5, 3), {}, "zero"),
        "random_base": case(tasks(3, 4), {}, "random"),
        "selected": case(tasks(3, 2), {"select_topk": 0.3}, "zero"),
        "selected_five": case(tasks(5, 3), {"select_topk": 0.6}, "zero"),
        "selected_random_base": case(tasks(3, 4), {"select_topk": 0.3}, "random"),
        "with_zeros": case(with_zeros(3, 5), {"select_topk": 0.6}, "zero"),
        "tiny": case(
            tasks(3, 6, scale=1e-4), {}, "zero", note="mean squares that sum to less than 1e-6 count as equal"
        ),
    },
    "nearswap": {
        "small": case(tasks(2, 1), {"t": 0.01}, "first task"),
        "large": case(tasks(2, 2), {"t": 0.1}, "first task"),
        "nothing": case(tasks(2, 3), {"t": 0.0}, "first task"),
        "same": case(np.repeat(tasks(1, 4), 2, axis=0), {"t": 0.01}, "first task"),
    },
    "dare_linear": general(DRAWN),
    "dare_ties": general(DRAWN),
    "della": general(DELLA),
    "della_linear": general(DELLA),
}


@contextlib.contextmanager
def draws_kept(found):
    """Notes what torch.bernoulli is asked for and gives, without another way to learn it from mergekit."""
    draw = torch.bernoulli

    def noted(probabilities):
        mask = draw(probabilities)
        found.append((probabilities.numpy().copy(), mask.numpy().copy()))
        return mask

    with mock.patch.object(torch, "bernoulli", noted):
        yield


def merged(method, given):
    """The arrays of one case."""
    arrays = {"tasks": given["tasks"]}
    inputs = [torch.from_numpy(task.copy()) for task in given["tasks"]]
    index = 0 if given["base"] == "first task" else None
    if given["base"] in ("zero", "random"):
        base = np.zeros(SHAPE, np.float32)
        if given["base"] == "random":
            base = np.random.default_rng(99).normal(size=SHAPE).astype(np.float32)
        arrays["base"] = base
        base = torch.from_numpy(base)
        inputs, index = [*(base + task for task in inputs), base], len(inputs)
    draws = []
    torch.manual_seed(0)
    with draws_kept(draws), torch.no_grad():
        result = merge_tensors(inputs, method, parameters=given["parameters"], base_index=index, dtype=torch.float32)
    arrays["merged"] = result.numpy()
    if draws:
        arrays["probabilities"], arrays["masks"] = (np.stack(each) for each in zip(*draws, strict=True))
    return arrays


def main() -> int:
    """Makes the golden."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("-o", "--output", type=Path, default=GOLDEN)
    folder = emptied(parser.parse_args().output)
    versions = {name: importlib.metadata.version(name) for name in ("mergekit", "torch", "numpy")}
    good = True
    for method, cases in CASES.items():
        about = {
            "method": method,
            "versions": versions,
            "made_by": "scripts/make_mergekit_golden.py, with mergekit.merge_methods.merge_tensors in float32",
            "cases": {
                name: {key: given[key] for key in ("parameters", "base", "note")} for name, given in cases.items()
            },
        }
        good &= save_cases(folder, method, about, cases, functools.partial(merged, method))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
