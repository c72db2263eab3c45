"""What scripts/quality.py found, as lines and tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmerge.catalog import SPACES
from scripts import scoring

Record = Mapping[str, Any]

# Differences of more than so many standard errors are told apart.
_SURE = 2
# The density of the untuned column, where a method asks for one.
_DENSITY = 0.5
# Of the second table, beside the best ones.
_ALWAYS = ("linear/full", "ties/full", "dare_ties/full", "iso_c/full", "tsv/full")
_BEST = 5


def told(part: str, name: str, record: Record) -> str:
    """A line for a record."""
    names = ("scale", "density", "seconds")
    settings = [f"{key} {record[key]:.3g}" for key in names if isinstance(record.get(key), float)]
    scores = f"mean {record['mean']:5.1f} ± {record['error']:.1f}  worst {record['worst']:5.1f}"
    return f"{part:8} {name:32} {scores}  {', '.join(settings)}"


def is_near(record: Record, best: Record, own: Mapping[str, float], sizes: Mapping[str, int]) -> bool:
    """Whether a merge cannot be told from the best one, on the same examples."""
    one, other = (_right(x, sizes) for x in (record, best))
    return best["mean"] - record["mean"] <= _SURE * 100 * scoring.paired_error(one, other, own, sizes)


def _right(record: Record, sizes: Mapping[str, int]) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(record["right"]), np.uint8), count=sum(sizes.values()))


def grid_table(results: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    """Methods by spaces: mean and worst; bold where it cannot be told from the best."""
    records, own = results["grid"], results["alone"]["test"]["own"]
    best = max(records.values(), key=lambda record: record["mean"])
    spaces = [space for space in SPACES if any(record["space"] == space for record in records.values())]

    def cell(record: Record | None) -> str:
        if record is None:
            return ""
        return _scores(record, "**" if is_near(record, best, own, sizes) else "")

    rows = []
    for method in dict.fromkeys(record["method"] for record in records.values()):
        found = [records.get(f"{method}/{space}") for space in spaces]
        plain = results.get("untuned", {})
        untuned = plain.get(method, plain.get(f"{method} {_DENSITY}"))
        cells = [f"`{method}`", *map(cell, found), "" if untuned is None else _scores(untuned)]
        rows.append((max(record["mean"] for record in found if record is not None), cells))
    rows.sort(key=lambda row: -row[0])
    return _table(["method", *spaces, "untuned"], [cells for _, cells in rows])


def _scores(record: Record, mark: str = "") -> str:
    """The mean over the tasks, and the worst of them."""
    return f"{mark}{record['mean']:.1f}{mark} / {record['worst']:.0f}"


def task_table(results: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    """Some merges task by task, with their settings: the best, the usual ones, and PEFT's."""
    records, alone = results["grid"], results["alone"]["test"]
    ordered = sorted(records, key=lambda name: -records[name]["mean"])
    chosen = [name for name in ordered if name in ordered[:_BEST] or name in _ALWAYS]
    rows = [_of_tasks("base model", {task: 100 * x for task, x in alone["base"].items()}, alone["own"])]
    rows += [_of_record(f"`{name.replace('/', '` in `')}`", records[name]) for name in chosen]
    peers = results.get("peft", {})
    rows += [_of_record(f"PEFT `{name}`", peers[name]) for name in sorted(peers, key=lambda x: -peers[x]["mean"])]
    return _table(["merge", "λ", "density", "mean", "worst", *sizes], rows)


def _of_record(name: str, record: Record) -> list[str]:
    weight = record["scale"] * record.get("weight", 1.0)
    tasks = [f"{accuracy:.1f}" for accuracy in record["accuracy"].values()]
    mean = f"{record['mean']:.1f} ± {record['error']:.1f}"
    return [
        name,
        f"{weight:.2g}",
        str(record["density"] or ""),
        mean,
        f"{record['worst']:.1f}",
        *tasks,
    ]


def _of_tasks(name: str, accuracies: Mapping[str, float], own: Mapping[str, float]) -> list[str]:
    each = [accuracies[task] / own[task] for task in own]
    tasks = [f"{accuracies[task]:.1f}" for task in own]
    return [name, "", "", f"{np.mean(each):.1f}", f"{min(each):.1f}", *tasks]


def changes_table(results: Mapping[str, Any], part: str) -> str:
    """Cells that were changed in some way, by what they were: the rank that they were cut to, or a stage."""
    records, changed = results["grid"], results[part]
    rows = []
    for record in changed.values():
        before = records[f"{record['method']}/{record['space']}"]
        what = ", ".join(record["stages"]) or f"rank {before['rank']} to {record['rank']}"
        own = f"`{record['method']}` in `{record['space']}`"
        rows.append([own, what, _scores(before), _scores(record)])
    return _table(["merge", "change", "before", "after"], rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(results: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, str]:
    """Mark in README.md -> table, of what was done."""
    found = {}
    if "grid" in results:
        found["quality"] = grid_table(results, sizes)
        found["quality by task"] = task_table(results, sizes)
        found |= {f"quality by {part}": changes_table(results, part) for part in ("rank", "stages") if part in results}
    return found


def write_readme(readme: Path, results: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Puts the tables between their marks in README.md."""
    text = readme.read_text()
    for mark, table in tables(results, sizes).items():
        before, _, rest = text.partition(f"<!-- {mark} -->\n")
        _, end, after = rest.partition(f"<!-- /{mark} -->")
        if not end:
            raise SystemExit(f"{readme.name} has no marks for the table {mark!r}")
        text = f"{before}<!-- {mark} -->\n{table}\n{end}{after}"
    readme.write_text(text)
