"""The record that every form of a report is made from."""

import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxmerge.attribution import Contributions, Part, contributions
from jaxmerge.base import Adapter
from jaxmerge.comparison import Comparison, Record, compare
from jaxmerge.comparison.advice import Advice, advise
from jaxmerge.io.recipe_file import dump, moved
from jaxmerge.merging.checks import Weights, adapter_name, as_adapters
from jaxmerge.reports.grid import short_names
from jaxmerge.reports.narrative import summary_of
from jaxmerge.reports.writing import write
from jaxmerge.version import versions


@dataclass(frozen=True)
class Source:
    """An adapter that was compared or merged.

    Attributes:
        name: What messages call it.
        short: What charts call it.
        sha256: Of its file; None of one in memory.
        modules: How many it has.
        ranks: Its smallest and its largest.
    """

    name: str
    short: str
    sha256: str | None
    modules: int
    ranks: tuple[int, int]


@dataclass(frozen=True, repr=False)
class Report:
    """What a comparison or a merge is told by, as HTML, Markdown and JSON.

    Attributes:
        name: Of the result, or empty.
        sources: The adapters.
        weights: One per adapter, a number or a mapping from module path to number; None where they are not known.
        comparison: How they interfere; None of a single adapter.
        contributions: How much of each is in the result; None where nothing was merged.
        settings: How they were merged: method, space, rank and the like; empty where that is not known.
        base_model: As the adapters name it.
        recipe: What the merge can be made again from, as text; or None.
        versions: Of what computed all this.
    """

    name: str
    sources: tuple[Source, ...]
    weights: tuple[float | Mapping[str, float] | None, ...]
    comparison: Comparison | None
    contributions: Contributions | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    base_model: str | None = None
    recipe: str | None = None
    versions: Mapping[str, str] = field(default_factory=versions)

    @property
    def modules(self) -> Mapping[str, Part] | Mapping[str, Record]:
        """Module path -> what is known of it: of the merge, or failing that of the adapters."""
        if self.contributions:
            return self.contributions.modules
        return self.comparison.modules if self.comparison else {}

    @property
    def matrices(self) -> int:
        """How many weights the modules are of: more where a module holds several layers."""
        return sum(module.count for module in self.modules.values())

    @property
    def title(self) -> str:
        """What a page is headed by."""
        names = [source.short for source in self.sources]
        return " + ".join(names) if len(names) <= 4 else f"{names[0]} + {len(names) - 1} more"

    @property
    def summary(self) -> tuple[str, ...]:
        """What there is to know, in sentences."""
        return summary_of(self)

    @property
    def advice(self) -> tuple[Advice, ...]:
        """What the comparison says about how to merge."""
        return tuple(advise(self.comparison)) if self.comparison else ()

    def to_json(self) -> dict[str, Any]:
        """Everything as plain lists, dictionaries and numbers; adapters count from 1 there."""
        return {
            "name": self.name,
            "adapters": [vars(source) | {"ranks": list(source.ranks)} for source in self.sources],
            "weights": [dict(w) if isinstance(w, Mapping) else w for w in self.weights],
            "base_model": self.base_model,
            "settings": dict(self.settings),
            "summary": list(self.summary),
            "advice": [item._asdict() for item in self.advice],
            "comparison": self.comparison and self.comparison.to_json(),
            "contributions": self.contributions and self.contributions.to_json(),
            "recipe": self.recipe,
            "versions": dict(self.versions),
        }

    def html(self) -> str:
        """One self-contained page."""
        from jaxmerge.reports.page import page

        return page(self)

    def markdown(self) -> str:
        """The summary and tables, for a model card or a pull request."""
        from jaxmerge.reports.markdown import markdown

        return markdown(self)

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Writes the report, whole or not at all.

        Args:
            path: Ends in .html, .md or .json, which says what is written.
            force: Replaces a file.

        Raises:
            ValueError: If the ending is another, a file is there, or the folder is not.
            OSError: If the disk fails or is full; nothing is left then.
        """
        write(path, {".html": self.html, ".md": self.markdown, ".json": self._json_text}, force)

    def _json_text(self) -> str:
        return json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def __repr__(self) -> str:
        return f"Report({self.title}{', merged' if self.contributions else ''})"

    def _repr_html_(self) -> str:
        """The page in a frame of its own, for notebooks."""
        page, title = html.escape(self.html()), html.escape(self.title)
        return f'<iframe srcdoc="{page}" title="{title}" style="width:100%;height:80vh;border:0"></iframe>'


def report(
    merged: Adapter | None,
    adapters: Sequence[Adapter],
    *,
    weights: Weights = None,
    name: str = "",
    recipe: str | None = None,
    allow_different_bases: bool = False,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
) -> Report:
    """Measures a merge, or adapters before they are merged, and puts what there is to know into a report.

    Args:
        merged: The result; None: the report is of how the adapters interfere.
        adapters: What it was merged from.
        weights: As in `jaxmerge.merge`. None: those of the result's own record; failing that 1/n each.
        name: What the result is called.
        recipe: What the merge can be made again from, as text. None: that of the result's own record, if it has one,
            with paths relative to the working directory.
        allow_different_bases: Reports even if the adapters name different base models.
        on_progress: Called with how many steps are done, and of how many.

    Returns:
        The report, with `html()`, `markdown()`, `to_json()` and `save(path)`.

    Raises:
        ValueError: If the adapters do not fit each other, or the result is not of these; it names every culprit.
    """
    adapters = as_adapters(adapters)
    record = json.loads(merged.metadata.provenance) if merged is not None else {}
    known = record.get("weights", [None] * len(adapters)) if weights is None else list(weights)
    parts = (len(adapters) > 1) + (merged is not None)

    def first(done: int, total: int) -> None:
        on_progress(done, parts * total)

    def last(done: int, total: int) -> None:
        on_progress((parts - 1) * total + done, parts * total)

    comparison = None
    if len(adapters) > 1 or merged is None:
        given = None if any(weight is None for weight in known) else known
        comparison = compare(adapters, given, allow_different_bases=allow_different_bases, on_progress=first)
    names = tuple(adapter_name(adapters, i) for i in range(len(adapters)))
    settings = {key: record[key] for key in _SETTINGS if record.get(key) not in (None, {}, [])}
    bases = [adapter.metadata.base_model for adapter in adapters if adapter.metadata.base_model]
    return Report(
        name=name,
        sources=tuple(map(_source, adapters, names, short_names(names))),
        weights=comparison.weights if comparison else tuple(known),
        comparison=comparison,
        contributions=None if merged is None else contributions(merged, adapters, on_progress=last),
        settings=settings,
        base_model=bases[0] if len(set(bases)) == 1 else None,
        recipe=_recipe_of(record) if recipe is None else recipe,
    )


_SETTINGS = (
    "method", "space", "combination_type", "rank", "hyperparameters", "density_scope", "stages", "truncated", "seed",
    "dtype", "extras",
)  # fmt: skip


def _recipe_of(record: Mapping[str, Any]) -> str | None:
    if "recipe" not in record:
        return None
    return dump(moved(record["recipe"], record["recipe_folder"], str(Path.cwd())))


def _source(adapter: Adapter, name: str, short: str) -> Source:
    ranks = [lora.rank for lora in adapter.modules.values()]
    sha256 = json.loads(adapter.metadata.provenance).get("sha256")
    return Source(name, short, sha256, len(ranks), (min(ranks), max(ranks)))
