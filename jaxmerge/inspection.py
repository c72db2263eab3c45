"""`inspect`: what is in an adapter, and why what in it cannot be merged."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmerge import io
from jaxmerge.base import Adapter, LoRA, has_values, nonfinite_modules
from jaxmerge.io import peft
from jaxmerge.io.peft.keys import natural_order
from jaxmerge.io.trees import MissingAlphaError
from jaxmerge.metrics import norms
from jaxmerge.tables import Table, columns, html
from jaxmerge.words import by, counted, pattern, span


@dataclass(frozen=True)
class Module:
    """A module of an adapter.

    Attributes:
        kind: Of its layer, such as ``"linear"``.
        features: ``(out, in)``.
        batch: Layers or experts that it holds, as axes; empty for a plain layer.
        rank: Of its factors.
        scale: Their product times this is the weight change; None where that is not known.
        dtype: Of the factors.
        bias: Whether it has one of its own.
        norm: Frobenius norm of the weight change; None where that is not known, or not finite.
    """

    kind: str
    features: tuple[int, int]
    batch: tuple[int, ...]
    rank: int
    scale: float | None
    dtype: str
    bias: bool
    norm: float | None

    @property
    def size(self) -> str:
        """Its shape, in a few characters."""
        return by(*self.batch, *self.features)


class Tensor(NamedTuple):
    """A tensor that is not a pair of factors."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, repr=False)
class Inspection:
    """What is in an adapter.

    Attributes:
        path: Where it lies, or what it is called.
        format: The file format that it is in.
        base_model: As it names it.
        parameters: Numbers in it.
        cannot_be_merged: Why not, a line each; none of an adapter that can.
        modules: Module path -> the module. None where the adapter is of a kind that is not read.
        extras: Tensors beside the factors.
        sha256: Of its file or files; None of one in memory.
        converted: That it is no LoRA in its files, and read as one.
        file: PEFT's file of weights.
        peft_type: As PEFT's configuration has it.
        tensors: How many are in PEFT's file.
    """

    path: str
    format: str
    base_model: str | None
    parameters: int
    cannot_be_merged: tuple[str, ...]
    modules: Mapping[str, Module]
    extras: Mapping[str, Tensor]
    sha256: str | None = None
    converted: str | None = None
    file: str | None = None
    peft_type: str | None = None
    tensors: int | None = None

    def to_json(self) -> dict[str, Any]:
        """All of it as plain lists, dictionaries and numbers."""
        return vars(self) | {
            "cannot_be_merged": list(self.cannot_be_merged),
            "modules": {path: _plain(module) for path, module in self.modules.items()},
            "extras": {name: {"shape": list(x.shape), "dtype": x.dtype} for name, x in self.extras.items()},
        }

    @property
    def facts(self) -> list[str]:
        """What there is to say of all of it, in a few words each."""
        dtypes = {module.dtype for module in self.modules.values()}
        return [self.format, *(dtypes if len(dtypes) == 1 else ()), f"{self.parameters:,} parameters"]

    def table(self) -> Table:
        """The modules by their kind: those of all layers together."""
        kinds: dict[tuple[Any, ...], list[Module]] = defaultdict(list)
        for path, m in self.modules.items():
            kinds[pattern(path), m.kind, m.dtype, m.size, m.rank, m.scale].append(m)
        # What all have in common is no column.
        own = [len({kind[i] for kind in kinds}) > 1 or (i == 1 and next(iter(kinds))[1] != "linear") for i in (1, 2)]
        rows = []
        for (path, *words, size, rank, scale), members in kinds.items():
            shown = [word for word, is_own in zip(words, own, strict=True) if is_own]
            rows.append((path, *shown, size, rank, _scale(scale), len(members), _norm(members)))
        left = ["module", *(name for name, is_own in zip(("kind", "dtype"), own, strict=True) if is_own)]
        return Table(columns(left, ["out×in", "rank", "scale", "count", "norm of the change"]), rows)

    def remarks(self) -> list[str]:
        """What else there is to know, a line each."""
        extras = f"not LoRA factors: {', '.join(self.extras)}" if self.extras else None
        return [line for line in (self.converted, extras) if line]

    def __repr__(self) -> str:
        ranks = [f"rank {span([module.rank for module in self.modules.values()])}"] if self.modules else []
        problems = [counted(len(self.cannot_be_merged), "problem")] if self.cannot_be_merged else []
        parts = [self.path, self.format, f"{len(self.modules)} modules", *ranks, *problems]
        return f"Inspection({', '.join(filter(None, parts))})"

    def _repr_html_(self) -> str:
        base = [f"base model {self.base_model}"] if self.base_model else []
        problems = [f"problem: {problem}" for problem in self.cannot_be_merged]
        return html(self.path or "Adapter", [*self.facts, *base], self.table(), *self.remarks(), *problems)


def inspect(adapter: Adapter | str | Path, **options: Any) -> Inspection:
    """Says what is in an adapter, and why what in it cannot be merged.

    Args:
        adapter: One in memory, or a path as in `jaxmerge.load`; also of one that `load` refuses because of what it is
            (DoRA, say), whose modules are not looked at then.
        **options: How a path is read, as in `jaxmerge.load`. Where ``alpha`` is wanted and not given, all but the scale
            is told.

    Returns:
        What is in it.

    Raises:
        ValueError: If its files are missing or broken.
    """
    if isinstance(adapter, Adapter):
        return _of(adapter, [])
    path = io.as_path(adapter)
    return _of_tree(path, options) if io.is_tree(path) else _of_peft(path)


def _of_tree(path: Path, options: Mapping[str, Any]) -> Inspection:
    problems = []
    try:
        io.peek(path, **options)
    except MissingAlphaError as error:
        problems = str(error).splitlines()
        options = {**options, "alpha": 1.0}
    return _of(io.load(path, **options), problems, path=str(path), scaled=not problems)


def _of_peft(path: Path) -> Inspection:
    headers = peft.read_headers(path)
    tensors, problems = headers.tensors.values(), tuple(headers.contents.problems)
    own = {
        "path": str(path),
        "file": str(headers.weights),
        "base_model": headers.config.get("base_model_name_or_path"),
        "peft_type": headers.config.get("peft_type"),
        "tensors": len(tensors),
        "parameters": int(sum(np.prod(tensor.shape, dtype=np.int64) for tensor in tensors)),
    }
    if problems:
        return Inspection(format="peft", cannot_be_merged=problems, modules={}, extras={}, **own)
    return _of(peft.load(path), [], **own)


def _of(adapter: Adapter, problems: Sequence[str], scaled: bool = True, **own: Any) -> Inspection:
    broken, metadata = nonfinite_modules(adapter), adapter.metadata
    own_base = [metadata.own_base] if metadata.own_base else []
    factors = [leaf for lora in adapter.modules.values() for leaf in (lora.a, lora.b)]
    told = {
        "path": metadata.name,
        "format": metadata.format,
        "base_model": metadata.base_model,
        "parameters": int(sum(leaf.size for leaf in factors)),
        "cannot_be_merged": (*problems, *own_base, *(f"module {module} holds NaN or inf" for module in broken)),
        "sha256": json.loads(metadata.provenance).get("sha256"),
        "converted": conversion_remark(adapter),
        "modules": _modules(adapter, broken, scaled),
        "extras": {name: Tensor(tuple(x.shape), str(x.dtype)) for name, x in adapter.extras.items()},
    }
    return Inspection(**told | own)


def _modules(adapter: Adapter, broken: Sequence[str], scaled: bool) -> dict[str, Module]:
    layouts, norm = dict(adapter.metadata.layouts), {}
    if scaled:
        sound = {path: lora for path, lora in adapter.modules.items() if path not in broken and _has_values(lora)}
        with np.errstate(all="ignore"):
            norm = {path: value for path, value in norms(Adapter(sound)).items() if np.isfinite(value)}
    return {
        path: Module(
            kind=getattr(layouts.get(path), "kind", "linear"),
            features=lora.features,
            batch=lora.batch,
            rank=lora.rank,
            scale=float(np.asarray(lora.scale)) if scaled and has_values(lora.scale) else None,
            dtype=str(lora.a.dtype),
            bias=lora.bias is not None,
            norm=norm.get(path),
        )
        for path, lora in sorted(adapter.modules.items(), key=lambda item: natural_order(item[0]))
    }


def _has_values(lora: LoRA) -> bool:
    return all(has_values(leaf) for leaf in (lora.a, lora.b, lora.scale))


def conversion_remark(adapter: Adapter) -> str | None:
    """That an adapter was not LoRA in its files, if it was not."""
    kind = json.loads(adapter.metadata.provenance).get("converted_from")
    ranks = span({lora.rank for lora in adapter.modules.values()})
    return None if kind is None else f"is {kind}, read as LoRA of its exact rank, {ranks}"


def _scale(scale: float | None) -> str:
    return "alpha / rank" if scale is None else f"{scale:.4g}"


def _norm(members: Sequence[Module]) -> str:
    """The smallest and the largest norm, where all are known."""
    known = [member.norm for member in members if member.norm is not None]
    return span(known, digits=3) if len(known) == len(members) else "unknown"


def _plain(module: Module) -> dict[str, Any]:
    plain = vars(module) | {"out": module.features[0], "in": module.features[1], "batch": list(module.batch)}
    del plain["features"]
    return plain
