"""`preview`: what a merge will do, what it will cost and what to look out for, from headers alone."""

import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxmerge.base import Adapter
from jaxmerge.catalog import METHODS, SPACES
from jaxmerge.merging import plan_merge
from jaxmerge.merging.checks import Weights, adapter_name, listing
from jaxmerge.merging.stacks import Bucket, Program
from jaxmerge.merging.steps import Plan
from jaxmerge.tables import Table, html
from jaxmerge.values import described, settings
from jaxmerge.words import by, duration, pattern, size, span

# What two cores of a server of 2023 do with the programs of this package, measured with ``scripts/bench``: products of
# float32 in the passes over dense deltas, QRs of tall factors, and seconds for a gigabyte of entries by the pruning.
_PRODUCTS, _QRS = 45e9, 17e9
_PER_GIGABYTE = {"": 0.6, "random": 1.1, "magnitude": 1.6, "outliers": 5.0, "rank": 15.0}
# Passes over the dense deltas, and drawing one of their entries.
_PASSES = {"": 1, "random": 1, "magnitude": 9, "outliers": 12, "rank": 2}
_DRAW, _SORT = 2e-9, 15e-9
# Sweeps over a dense merge in its decomposition, each with as many columns as the rank and some more.
_SWEEPS, _COLUMNS = 6, 16
# The subspaces that tasks share, of a module with R = 64.
_SUBSPACES = 0.035
# A product of two matrices of this size takes so many seconds on those cores.
_PROBE, _PROBE_SECONDS = 768, 0.0044
# What the interpreter and JAX take by themselves.
_AT_REST = 350e6
# The largest rank that vLLM serves unless told otherwise.
_SERVED = 16


@dataclass(frozen=True)
class Group:
    """Modules that are merged alike: they share shapes, ranks, dtypes and which adapters have them.

    Attributes:
        paths: The modules.
        features: ``(out, in)``.
        batch: Layers or experts that each of them holds, as axes; empty for a plain layer.
        sources: The positions of the adapters that have them, from 0.
        ranks: Those adapters' ranks.
        rank: Of the result; an upper bound where a rule settles it at the end.
        dtype: Of the result.
        bytes: Of the result's factors, over all of the modules.
        working: Bytes that one of them takes while it is merged, about.
        seconds: What they take together on this machine, about; None where it has an accelerator.
    """

    paths: tuple[str, ...]
    features: tuple[int, int]
    batch: tuple[int, ...]
    sources: tuple[int, ...]
    ranks: tuple[int, ...]
    rank: int
    dtype: str
    bytes: int
    working: int
    seconds: float | None


@dataclass(frozen=True, repr=False)
class Preview:
    """What a merge will be.

    Attributes:
        adapters: What messages call them.
        weights: One per adapter; a mapping where they differ between modules.
        method: A name in `METHODS`.
        space: A name in `SPACES`.
        hyperparameters: All of them, with their defaults.
        stages: Names and hyperparameters.
        groups: The modules, by what is merged alike.
        partial: Modules that not all adapters have: path -> the positions of those that have it, from 0.
        extras: Tensors beside the factors that are passed on.
        parameters: Numbers in the result's factors.
        bytes: The result, with what is passed on.
        memory: Bytes of the process at the most, about.
        seconds: For all of it on this machine, about, when its programs have been compiled before; None where it has an
            accelerator.
        warnings: What to look out for, a line each.
    """

    adapters: tuple[str, ...]
    weights: tuple[Any, ...]
    method: str
    space: str
    hyperparameters: Mapping[str, Any]
    stages: tuple[tuple[str, Mapping[str, Any]], ...]
    groups: tuple[Group, ...]
    partial: Mapping[str, tuple[int, ...]]
    extras: tuple[str, ...]
    parameters: int
    bytes: int
    memory: int
    seconds: float | None
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain lists, dictionaries and numbers; adapters count from 1 there, as in reports."""
        plain = dataclasses.asdict(self)
        plain["groups"] = [group | {"sources": [i + 1 for i in group["sources"]]} for group in plain["groups"]]
        plain["partial"] = {path: [i + 1 for i in sources] for path, sources in self.partial.items()}
        return plain

    @property
    def settings(self) -> list[str]:
        """How it is made, in a few words each."""
        return settings(vars(self))

    @property
    def summary(self) -> str:
        """What comes out, and what that takes."""
        time = "" if self.seconds is None else f", {duration(self.seconds)} once its programs have been compiled"
        return (
            f"{self._result}, {self.parameters:,} parameters: {size(self.bytes)} to write; "
            f"about {size(self.memory)} of memory{time}"
        )

    @property
    def _result(self) -> str:
        ranks = span([group.rank for group in self.groups]) if self.groups else "0"
        return f"{sum(len(group.paths) for group in self.groups)} modules, rank {ranks}"

    def tables(self) -> tuple[Table, Table]:
        """The adapters, and the modules by kind: those of all layers together."""
        numbered = enumerate(zip(self.adapters, map(described, self.weights), strict=True))
        weights = [(i + 1, name, weight) for i, (name, weight) in numbered]
        kinds: Counter[tuple[Any, ...]] = Counter()
        for group in self.groups:
            everyone = len(group.sources) == len(self.adapters)
            sources = "all" if everyone else ", ".join(str(i + 1) for i in group.sources)
            shape, ranks = by(*group.batch, *group.features), ", ".join(map(str, group.ranks))
            kinds.update((pattern(path), shape, ranks, sources, group.rank, group.dtype) for path in group.paths)
        headings = [("module", "left"), ("out×in", "right"), ("ranks", "left"), ("from", "left"), ("rank", "right"),
                    ("dtype", "left"), ("count", "right")]  # fmt: skip
        adapters = [("", "right"), ("adapter", "left"), ("weight", "right")]
        return Table(adapters, weights), Table(headings, [(*kind, count) for kind, count in kinds.items()])

    def __repr__(self) -> str:
        return f"Preview({len(self.adapters)} adapters, {self.method} in {self.space}, {self._result})"

    def _repr_html_(self) -> str:
        return html("Preview", self.settings, *self.tables(), self.summary, *self.warnings)


def preview(adapters: Sequence[Adapter], weights: Weights = None, **arguments: Any) -> Preview:
    """Checks a merge and says what it will be, without doing it.

    Args:
        adapters: As in `jaxmerge.merge`; those that `jaxmerge.peek` gives will do, which have shapes and no values.
        weights: As in `jaxmerge.merge`.
        **arguments: As in `jaxmerge.merge`.

    Returns:
        The preview.

    Raises:
        ValueError: As `jaxmerge.merge` does.
    """
    return preview_of(plan_merge(adapters, weights, **arguments))


def preview_of(plan: Plan, cut_later: bool = False, notes: Sequence[str] = ()) -> Preview:
    """The preview of a merge that has been checked.

    Args:
        plan: From `plan_merge`.
        cut_later: Whether a rule will find smaller ranks once the merge is made.
        notes: What else to look out for, first of all.

    Returns:
        The preview.
    """
    record, n = json.loads(plan.rest.metadata.provenance), len(plan.adapters)
    speed = _speed() if jax.default_backend() == "cpu" and plan.program.mesh is None else None
    groups = tuple(
        _group(plan.program, bucket, present, paths, speed) for (bucket, present), paths in plan.buckets.items()
    )
    passed_on = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in plan.rest.extras.values())
    written = sum(group.bytes for group in groups)
    total = written + passed_on
    # Two modules are prepared while one is merged; of a result beyond the budget the rest lies in a file.
    at_work = max((group.working for group in groups), default=0) * 3
    reading = sum(_source_bytes(bucket) * len(paths) for (bucket, _), paths in plan.buckets.items())
    return Preview(
        adapters=tuple(adapter_name(plan.adapters, i) for i in range(n)),
        weights=tuple(record["weights"]),
        method=record["method"],
        space=record["space"],
        hyperparameters=record["hyperparameters"],
        stages=tuple((name, own) for name, own in record["stages"]),
        groups=groups,
        partial={path: group.sources for group in groups if len(group.sources) < n for path in group.paths},
        extras=tuple(plan.rest.extras),
        parameters=sum(
            group.rank * sum(group.features) * math.prod(group.batch) * len(group.paths) for group in groups
        ),
        bytes=total,
        memory=int(_AT_REST + at_work + min(written, plan.memory)),
        seconds=None if speed is None else sum(group.seconds or 0 for group in groups) + (reading + total) / 1e9,
        warnings=(*notes, *_warnings(plan, groups, record, cut_later)),
    )


def _group(
    program: Program, bucket: Bucket, present: tuple[int, ...], paths: Sequence[str], speed: float | None
) -> Group:
    layers = math.prod(bucket.batch)
    width = np.dtype(bucket.dtype).itemsize
    seconds = None if speed is None else _seconds(program, bucket) * layers * len(paths) / speed
    return Group(
        paths=tuple(paths),
        features=bucket.features,
        batch=bucket.batch,
        sources=present,
        ranks=bucket.ranks,
        rank=bucket.rank,
        dtype=bucket.dtype,
        bytes=width * bucket.rank * sum(bucket.features) * layers * len(paths),
        working=program.need(bucket),
        seconds=seconds,
    )


def _source_bytes(bucket: Bucket) -> int:
    a, b = bucket.dtypes[::2], bucket.dtypes[1::2]
    out, in_ = bucket.features
    width = sum(
        rank * (in_ * np.dtype(of_a).itemsize + out * np.dtype(of_b).itemsize)
        for rank, of_a, of_b in zip(bucket.ranks, a, b, strict=True)
    )
    return width * math.prod(bucket.batch)


def _seconds(program: Program, bucket: Bucket) -> float:
    """What one layer of a bucket takes, on two cores."""
    (out, in_), n, total = bucket.features, len(bucket.ranks), sum(bucket.ranks)
    row, form = program.row, program.form
    factors = 4e-9 * total * (out + in_)
    per_gigabyte = _PER_GIGABYTE[row.pruning]
    if program.stacks(bucket.ranks, bucket.rank):
        return factors
    if form.as_stored or row.on_units:
        return factors * per_gigabyte
    if form.dense:
        entries, drawn = out * in_, (_DRAW if row.random else 0) + (_SORT if row.pruning == "rank" else 0)
        products = 2 * total * _PASSES[row.pruning] + 2 * _SWEEPS * (bucket.rank + _COLUMNS)
        return entries * (products / _PRODUCTS + n * drawn)
    shared = 4 * total**2 * (out + in_) / _QRS + 0.002
    if program.space == "ctm":
        return shared + _SUBSPACES * (total / 64) ** 2
    entries = n * total * in_ if program.space == "knots" and not row.equivariant else n * total**2
    return shared + 4e-9 * entries * per_gigabyte


def _speed() -> float:
    """How many times as fast as those two cores this machine multiplies; the best of a few tries."""
    matrix = np.ones((_PROBE, _PROBE), np.float32)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        np.matmul(matrix, matrix)
        times.append(time.perf_counter() - start)
    return _PROBE_SECONDS / min(times)


def _warnings(plan: Plan, groups: Sequence[Group], record: Mapping[str, Any], cut_later: bool) -> list[str]:
    """What to look out for, most important first."""
    names = [adapter_name(plan.adapters, i) for i in range(len(plan.adapters))]
    method, space = METHODS[record["method"]], SPACES[record["space"]]
    found = []
    if record["space"] == "factors" and len(names) > 1:
        found.append(f"space factors: {space.exact}; the exact choice is method linear in space full")
    if record["space"] == "ctm":
        found.append(f"space ctm {space.exact}")
    dense = [group for group in groups if plan.program.form.full_rank and group.rank < min(group.features)]
    if dense and not plan.program.stages and not method.linear:
        ranks = span([group.rank for group in dense])
        found.append(f"the merge is of full rank, and rank {ranks} holds a part of it; how much, only the merge tells")
    for i, name in enumerate(names):
        lacking = [path for group in groups if i not in group.sources for path in group.paths]
        if lacking:
            found.append(
                f"{name} lacks {len(lacking)} modules, which are merged from the others: {listing(lacking, 3)}"
            )
    zero = [name for name, weight in zip(names, record["weights"], strict=True) if weight == 0]
    if zero and not (method.averages and not method.linear):
        found.append(f"of weight 0: {', '.join(zero)}")
    ranks = {group.rank for group in groups}
    if len(ranks) > 1:
        found.append(f"ranks differ between modules: {span(ranks)}")
    if max(ranks, default=0) > _SERVED and not cut_later:
        found.append(
            f"rank {max(ranks)} is more than vLLM serves by default: set max_lora_rank there, or a smaller rank here"
        )
    found += [
        f"{name} differs between modules: {described(value)}"
        for name, value in record["hyperparameters"].items()
        if isinstance(value, Mapping)
    ]
    some = [name for name in plan.rest.extras if not all(name in adapter.extras for adapter in plan.adapters)]
    if some:
        found.append(f"only some adapters hold: {listing(some, 3)}")
    return found
