"""The quality experiment: six real adapters merged in every way, scored on their six tasks. Called by scripts/quality.

    scripts/quality [--parts alone grid untuned rank stages] [--peft] [--methods ...] [--spaces ...] [--readme]

The base model is all-MiniLM-L6-v2; adapters and examples are in tests/adapters. The score is the accuracy on a task by
that of the task's own adapter on the same examples, in percent, and its mean over the six tasks.

Protocol. All adapters weigh the same. A cell is a method in a space, at the rank that loses nothing. For each density
the merge is scored at 1/2, 1, 2 and 4 times the method's natural scale, on the first ``--val`` validation examples of
each task. At the best density the scale then moves by factors of 2 for as long as the best is the last one tried, and
by √2 to both sides of it. The best setting is scored once on the test examples. Other hyperparameters keep their
defaults, and what draws has seed 0.

Results go to .bench/quality.json, a cell at a time; what is there, or in notebooks/quality.json, is not done again.
With --readme they go into the tables of README.md and into notebooks/quality.json, which
notebooks/02_which_method.ipynb draws.
"""

import argparse
import functools
import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import jaxmerge as jm
from jaxmerge.catalog import SPACES
from scripts import minilm, peers, quality_tables, scoring, tuning
from scripts.tuning import Cell, Experiment, Split

ROOT = Path(__file__).parent.parent
TARGET = ROOT / ".bench" / "quality.json"
# What notebooks/02_which_method.ipynb draws.
DRAWN = ROOT / "notebooks" / "quality.json"
# Cells first that are most asked for.
FIRST = (
    "linear", "ties", "dare_ties", "magnitude_prune", "tsv", "iso_c", "iso_cts", "pcb", "cart", "star", "swudi", "pico",
    "subspace_boosting", "della", "dare_linear",
)  # fmt: skip
# Merges that are also cut to the rank of their sources.
CUT = (
    ("linear", "full"), ("ties", "full"), ("ties", "knots"), ("ties", "core"), ("dare_ties", "full"), ("tsv", "full"),
    ("iso_c", "full"), ("iso_cts", "full"), ("subspace_boosting", "full"), ("pico", "full"), ("swudi", "full"),
)  # fmt: skip
STAGED = (("linear", "full"), ("ties", "full"), ("tsv", "full"))
# What is advised where there is nothing to tune with.
ADVISED = (("linear", "norm_restore"),)
STAGES = ("isotropize", "calibrate", "norm_restore")

Todo = dict[tuple[str, str], Callable[[Experiment], dict[str, Any]]]


def ways(methods: Sequence[str], spaces: Sequence[str]) -> list[Cell]:
    """Every method that takes any number of adapters, in the spaces that are not the same to it."""
    cells: dict[Any, Cell] = {}
    ordered = sorted(jm.METHODS, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    for method in (name for name in ordered if name in methods and jm.METHODS[name].most is None):
        row = jm.METHODS[method]
        for space in (name for name in SPACES if name in row.spaces):
            cells.setdefault((method, id(SPACES[space].load(row))), Cell(method, space))
    return [cell for cell in cells.values() if cell.space in spaces]


def untuned_densities(method: str) -> tuple[float | None, ...]:
    """Those that are tried where the method asks for one; otherwise None."""
    asks = any(h.name == "density" and h.default is None for h in jm.METHODS[method].hyperparameters)
    return tuning.DENSITIES if asks else (None,)


def todo(options: argparse.Namespace) -> Todo:
    """Part and name -> what makes the record."""
    cells = ways(options.methods, options.spaces)
    methods = list(dict.fromkeys(cell.method for cell in cells))
    parts = {
        "grid": cells,
        "rank": [Cell(*cell, rank=options.rank) for cell in CUT if cell[0] in methods],
        "stages": [Cell(*cell, stages=(stage,)) for cell in STAGED for stage in STAGES if cell[0] in methods],
    }
    found: Todo = {}
    for part in options.parts:
        for cell in parts.get(part, ()):
            found[part, cell.name] = functools.partial(tuning.tuned, cell=cell)
        if part == "untuned":
            for method in methods:
                for density in untuned_densities(method):
                    name = method if density is None else f"{method} {density}"
                    found[part, name] = functools.partial(tuning.untuned, method=method, density=density)
            for method, stage in ADVISED:
                if method in methods:
                    made = functools.partial(tuning.untuned, method=method, stages=(stage,))
                    found[part, f"{method}+{stage}"] = made
    if options.peft:
        merges = peers.peft_merges(scoring.ADAPTERS, scoring.TASKS, tuning.DENSITIES, tuning.SEED)
        for kind, make in merges.items():
            found["peft", kind] = lambda experiment, make=make: tuning.peers(experiment, make())
    return found


def write(results: Mapping[str, Any], target: Path = TARGET) -> None:
    """Whole or not at all, so that an interruption leaves what was there."""
    target.parent.mkdir(exist_ok=True)
    draft = target.with_suffix(".draft")
    draft.write_text(json.dumps(results, indent=1) + "\n")
    draft.replace(target)


def started(protocol: dict[str, Any]) -> dict[str, Any]:
    """The results that are there already, of the same protocol; those that are published where nothing else is."""
    there = next((file for file in (TARGET, DRAWN) if file.exists()), None)
    if there is None:
        return {"protocol": protocol}
    results = json.loads(there.read_text())
    if results["protocol"] != protocol:
        raise SystemExit(f"{there} is of another protocol, {results['protocol']}: move it away to start anew")
    return results


def prepared(results: dict[str, Any], most: int) -> Experiment:
    """Reads models and examples; measures the adapters alone, unless the results have it."""
    base = minilm.load()
    adapters = [jm.load(scoring.ADAPTERS / task) for task in scoring.TASKS]
    read = {"val": scoring.read_examples("val", most=most), "test": scoring.read_examples("test")}
    if "alone" not in results:
        results["alone"] = {split: tuning.alone(base, adapters, *found) for split, found in read.items()}
        write(results)
    splits = {split: Split(*found, own=results["alone"][split]["own"]) for split, found in read.items()}
    return Experiment(base, adapters, **splits)


def main() -> None:
    """Does what is asked for and not yet done."""
    parser = argparse.ArgumentParser()
    parts = ["grid", "untuned", "rank", "stages"]
    parser.add_argument("--parts", nargs="*", choices=parts, default=parts)
    parser.add_argument("--peft", action="store_true", help="PEFT's own combination types too")
    parser.add_argument("--methods", nargs="+", choices=list(jm.METHODS), default=list(jm.METHODS))
    parser.add_argument("--spaces", nargs="+", choices=list(SPACES), default=list(SPACES))
    parser.add_argument("--rank", type=int, default=16, help="to cut merges to")
    parser.add_argument("--val", type=int, default=100, help="validation examples of each task, up to 300")
    parser.add_argument("--readme", action="store_true", help="write the tables into README.md")
    options = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(ROOT / ".bench" / "compiled"))
    results = started({"val": options.val, "densities": list(tuning.DENSITIES), "seed": tuning.SEED})
    experiment = prepared(results, options.val)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    for (part, name), make in todo(options).items():
        records = results.setdefault(part, {})
        if name in records:
            continue
        records[name] = {**make(experiment), "commit": commit}
        write(results)
        print(quality_tables.told(part, name, records[name]), flush=True)
    if options.readme:
        quality_tables.write_readme(ROOT / "README.md", results, experiment.test.sizes)
        write(results, DRAWN)


if __name__ == "__main__":
    main()
