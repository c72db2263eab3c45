"""What a merge would do, as ``--dry-run`` tells it."""

from collections import defaultdict
from typing import Any

from rich.markup import escape
from rich.padding import Padding

from jaxmerge.cli.console import out, table
from jaxmerge.previewing import Preview
from jaxmerge.values import described
from jaxmerge.words import pattern, span


def print_preview(found: Preview) -> None:
    """Prints a preview for people."""
    n = len(found.adapters)
    settings = {"method": found.method, "space": found.space, **found.hyperparameters}
    words = [f"{name} {described(value)}" for name, value in settings.items()]
    words += [
        f"then {' '.join([name, *(f'{k} {described(v)}' for k, v in own.items())])}" for name, own in found.stages
    ]
    out.print("[bold]nothing is written[/bold]  " + escape(", ".join(words)))
    out.print()
    weights = [
        (i + 1, name, described(weight))
        for i, (name, weight) in enumerate(zip(found.adapters, found.weights, strict=True))
    ]
    out.print(table([("", "right"), ("adapter", "left"), ("weight", "right")], weights))
    out.print()
    kinds: dict[tuple[Any, ...], int] = defaultdict(int)
    for group in found.groups:
        layers = "".join(f"{size}×" for size in group.batch)
        sources = "all" if len(group.sources) == n else ", ".join(str(i + 1) for i in group.sources)
        shape, ranks = f"{layers}{group.features[0]}×{group.features[1]}", ", ".join(map(str, group.ranks))
        for path in group.paths:
            kinds[pattern(path), shape, ranks, sources, group.rank, group.dtype] += 1
    headings = [("module", "left"), ("out×in", "right"), ("ranks", "left"), ("from", "left"), ("rank", "right"),
                ("dtype", "left"), ("count", "right")]  # fmt: skip
    out.print(table(headings, [(*kind, count) for kind, count in kinds.items()]))
    out.print()
    modules = sum(len(group.paths) for group in found.groups)
    ranks = span([group.rank for group in found.groups]) if found.groups else "0"
    time = "" if found.seconds is None else f", {duration(found.seconds)} once its programs have been compiled"
    out.print(
        f"{modules} modules, rank {ranks}, {found.parameters:,} parameters: {size(found.bytes)} to write; "
        f"about {size(found.memory)} of memory{time}"
    )
    for warning in found.warnings:
        out.print(Padding(escape(warning), (0, 0, 0, 0), expand=False), style="yellow", soft_wrap=False)


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, to two figures."""
    if seconds < 1:
        return "less than a second"
    if seconds < 100:
        return f"about {seconds:.2g} s"
    if seconds < 6000:
        return f"about {seconds / 60:.2g} minutes"
    return f"about {seconds / 3600:.2g} hours"
