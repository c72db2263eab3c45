"""`convert`: the same adapter in another format."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxmerge import io
from jaxmerge.base import Adapter, nonfinite_modules
from jaxmerge.inspection import conversion_remark
from jaxmerge.layouts import Conversion
from jaxmerge.tables import Table, columns, html
from jaxmerge.words import by, pattern, span


class Written(NamedTuple):
    """A module as it was written.

    Attributes:
        features: ``(out, in)``.
        batch: Layers or experts that it holds, as axes; empty for a plain layer.
        rank: Of its factors.
    """

    features: tuple[int, int]
    batch: tuple[int, ...]
    rank: int


@dataclass(frozen=True, repr=False)
class Converted:
    """What a conversion has written.

    Attributes:
        output: Where.
        format: That it is in now.
        layout: As it was given; so are the next two.
        head_dim: Size of one attention head.
        layers: Of the model.
        modules_read: How many there were.
        ranks_read: Theirs.
        modules: Module path in the new format -> the module.
        rank_on_disk: That all were filled up to with zeros, where the format has one rank.
        remarks: What else there is to know, a line each.
    """

    output: str
    format: str
    layout: str | None
    head_dim: int | None
    layers: int | None
    modules_read: int
    ranks_read: tuple[int, ...]
    modules: Mapping[str, Written]
    rank_on_disk: int | None
    remarks: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain lists, dictionaries and numbers."""
        modules = {
            path: {"out": m.features[0], "in": m.features[1], "batch": list(m.batch), "rank": m.rank}
            for path, m in self.modules.items()
        }
        lists = {"ranks_read": list(self.ranks_read), "remarks": list(self.remarks)}
        return vars(self) | lists | {"modules": modules}

    @property
    def settings(self) -> list[str]:
        """What was asked for, in a few words each."""
        names = ("format", "layout", "head_dim", "layers")
        return [f"{name} {getattr(self, name)}" for name in names if getattr(self, name) is not None]

    def table(self) -> Table:
        """The modules by their kind: those of all layers together."""
        kinds = Counter((pattern(path), by(*m.batch, *m.features), m.rank) for path, m in self.modules.items())
        return Table(columns(["module"], ["out×in", "rank", "count"]), [(*kind, n) for kind, n in kinds.items()])

    @property
    def summary(self) -> list[str]:
        """What was read and written, and the remarks, a line each."""
        ranks = ", ".join(map(str, self.ranks_read))
        filled = [f"filled up with zeros to rank {self.rank_on_disk}, the one rank that the format has"]
        return [
            f"{self.modules_read} modules of rank {ranks} read, {len(self.modules)} written, exact",
            *self.remarks,
            *(filled if self.rank_on_disk else []),
        ]

    def __repr__(self) -> str:
        ranks = span([module.rank for module in self.modules.values()])
        return f"Converted({self.output}, {', '.join(self.settings)}, {len(self.modules)} modules, rank {ranks})"

    def _repr_html_(self) -> str:
        return html(self.output, self.settings, self.table(), *self.summary)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    format: str,
    layout: str | None = None,
    head_dim: int | None = None,
    layers: int | None = None,
    force: bool = False,
    **reading: Any,
) -> Converted:
    """Writes an adapter in another format, exactly.

    Args:
        source: Of an adapter, as in `jaxmerge.load`.
        target: Where to write, as in `jaxmerge.save`.
        format: As in `jaxmerge.save`.
        layout: As in `jaxmerge.save`.
        head_dim: As in `jaxmerge.save`.
        layers: As in `jaxmerge.save`.
        force: Replaces the target if that is an adapter.
        **reading: How the source is read, as in `jaxmerge.load`; but ``layout``, which is the target's here, is
            ``tree``.

    Returns:
        What was written.

    Raises:
        ValueError: If the source cannot be read, the other format cannot hold it, or the target may not be written; it
            names every culprit, and nothing is written.
        OSError: If the disk fails or is full; nothing is left then.
    """
    wanted = Conversion(format, layout, head_dim, layers)
    adapter = load_to_rewrite(source, target, wanted, force, **_as_in_load(reading))
    if broken := nonfinite_modules(adapter):
        raise ValueError(f"{io.as_path(source)}: NaN or inf in {broken[0]}")
    written = io.save(adapter, target, force=force, **vars(wanted))
    remarks = [f"{source}: {words}"] if (words := conversion_remark(adapter)) else []
    if left_out := json.loads(adapter.metadata.provenance).get("left_out"):
        remarks.append(f"not an adapter's, and not carried over: {', '.join(left_out)}")
    return Converted(
        output=str(target),
        **vars(wanted),
        modules_read=len(adapter.modules),
        ranks_read=tuple(sorted({lora.rank for lora in adapter.modules.values()})),
        modules={path: Written(lora.features, lora.batch, lora.rank) for path, lora in written.modules.items()},
        rank_on_disk=io.rank_on_disk(written),
        remarks=tuple(remarks),
    )


def load_to_rewrite(
    source: str | Path,
    target: str | Path,
    conversion: Conversion,
    force: bool = False,
    mapped: bool = False,
    **reading: Any,
) -> Adapter:
    """Reads one adapter, once it is known that another can be written.

    Args:
        source: The one.
        target: The other.
        conversion: How it is to be written.
        force: Whether it may replace what is there.
        mapped: As in `jaxmerge.load`.
        **reading: As in `jaxmerge.load`.

    Returns:
        The adapter.

    Raises:
        ValueError: If the other may not be written, or the one cannot be read.
    """
    place = io.as_path(target)
    if problems := io.overlap_problems([io.as_path(source)], place):
        raise ValueError("\n".join(problems))
    io.check_target([io.peek(source, **reading)], place, conversion, force)
    return io.load(source, mapped=mapped, **reading)


def _as_in_load(reading: Mapping[str, Any]) -> dict[str, Any]:
    return {"layout" if name == "tree" else name: value for name, value in reading.items()}
