"""The words everything else is written in: LoRA factors, adapters, and what was lost in a merge.

Legend of shapes, used in every docstring:

* ``n``: tasks, that is adapters being merged; ``L``: modules stacked in one bucket.
* ``in``, ``out``: features of the adapted layer; ``r``: rank of one adapter; ``R``: sum of the ranks.
* ``[p, q]``: one task matrix in whatever space a method works in.
* ``*batch``: leading axes of a module that holds several layers or experts.
"""

import contextlib
import dataclasses
import functools
import json
from collections import defaultdict
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from jaxmerge.tables import Table, columns, html
from jaxmerge.values import described, settings
from jaxmerge.words import by, kept_span, pattern, percent, span

Array = jax.Array
# What adapters hold: read from a file it stays on the host until it is merged.
AnyArray = jax.Array | np.ndarray


@functools.partial(jax.tree_util.register_dataclass, data_fields=("a", "b", "scale", "bias"), meta_fields=())
@dataclass(frozen=True, eq=False, repr=False)
class LoRA:
    """The low-rank factors of one module; the change they make to its weight is ``scale * b @ a``.

    Attributes:
        a: ``[*batch, r, in]``.
        b: ``[*batch, out, r]``.
        scale: Scalar; in PEFT's terms ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.
        bias: ``[*batch, out]`` or None; added to the module's output times ``scale`` (PEFT's ``lora_bias``).
    """

    a: AnyArray
    b: AnyArray
    scale: AnyArray | float = 1.0
    bias: AnyArray | None = None

    @property
    def rank(self) -> int:
        """The inner dimension ``r`` of the factors."""
        return self.a.shape[-2]

    @property
    def features(self) -> tuple[int, int]:
        """``(out, in)``, the shape of the weight change."""
        return self.b.shape[-2], self.a.shape[-1]

    @property
    def batch(self) -> tuple[int, ...]:
        """The leading axes; empty for a plain layer."""
        return self.a.shape[:-2]

    @property
    def size(self) -> str:
        """The shape of the weight change, in a few characters."""
        return by(*self.batch, *self.features)

    @property
    def has_shape(self) -> bool:
        """Whether the leaves are matrices: JAX rebuilds pytrees with leaves of any kind."""
        return all(len(getattr(leaf, "shape", ())) >= 2 for leaf in (self.a, self.b))

    def __repr__(self) -> str:
        if not self.has_shape:
            return f"LoRA({self.a!r}, {self.b!r})"
        return f"LoRA({self.size}, rank {self.rank}, {self.a.dtype})"

    def _repr_html_(self) -> str:
        if not self.has_shape:
            return html("LoRA", [repr(self)])
        leaves = {"A": self.a, "B": self.b} | ({} if self.bias is None else {"bias": self.bias})
        rows = [(name, by(*leaf.shape), leaf.dtype) for name, leaf in leaves.items()]
        scale = [f"scale {float(np.asarray(self.scale)):.4g}"] if is_number(self.scale) else []
        about = [self.size, f"rank {self.rank}", *scale]
        return html("LoRA", about, Table(columns(["", "shape", "dtype"], []), rows))


@functools.partial(jax.tree_util.register_dataclass, data_fields=("total", "lost", "missed"), meta_fields=())
@dataclass(frozen=True, eq=False)
class Energy:
    """What a truncation cost, in squared Frobenius norms of the weight change.

    Attributes:
        total: Scalar; of the merge before truncation.
        lost: Scalar; of what the truncation removed. 0 where the merge is exact.
        missed: Scalar; no more of that than this would the best truncation have kept. 0 where it was the best.
    """

    total: Array | float
    lost: Array | float
    missed: Array | float = 0.0

    @property
    def kept(self) -> Array:
        """The fraction kept, in [0, 1]; 1 for a merge that is zero everywhere."""
        total, lost = _known(self.total), _known(self.lost)
        # With NumPy where values are known: nothing to compile for a number in a report.
        xp = np if has_values(total) else jnp
        return xp.where(total > 0, 1 - lost / xp.where(total > 0, total, 1), 1.0)  # type: ignore[return-value]


@dataclass(frozen=True)
class Metadata:
    """What an adapter carries besides arrays. Hashable, so that adapters can be arguments of a jit.

    Attributes:
        format: The file format the adapter came in and goes back to, for example ``"peft"``.
        name: How messages speak of it; for a file, its path.
        base_model: The base model as the adapter's own configuration names it.
        rank: The nominal rank its configuration declares, which modules may undercut or exceed.
        layouts: Module path and how its factors lie in the format, as the format's own
            hashable record, for modules that need telling.
        config: The format's own configuration, as JSON.
        provenance: Where the adapter came from, as JSON: a file and its hash, or the merge that made it.
        tree: How the adapter goes back to the tree it came from, as the format's own hashable record.
        place: Where in a file of several parts the adapter lay, as the format's own hashable record.
        own_base: Why its factors belong to a base model of their own (PiSSA and its kin), or empty.
    """

    format: str = "peft"
    name: str = ""
    base_model: str | None = None
    rank: int | None = None
    layouts: tuple[tuple[str, Any], ...] = ()
    config: str = "{}"
    provenance: str = "{}"
    tree: Any = None
    place: Any = None
    own_base: str = ""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("modules", "extras", "energy"), meta_fields=("metadata",)
)
@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """A LoRA adapter: a pytree of factors with static metadata.

    Attributes:
        modules: Module path, dotted, without the format's wrappers -> its factors.
        extras: Tensors that are not a pair of factors (saved heads, embeddings, biases, trained tokens),
            under the key their format gives them.
        energy: Of a merged adapter, module path -> what truncation lost there. Empty for a loaded one.
        metadata: Everything that is not an array.
    """

    modules: Mapping[str, LoRA]
    extras: Mapping[str, AnyArray] = field(default_factory=dict)
    energy: Mapping[str, Energy] = field(default_factory=dict)
    metadata: Metadata = field(default_factory=Metadata)

    def __repr__(self) -> str:
        ranks = {lora.rank for lora in self.modules.values() if lora.has_shape}
        parts = [
            f"{len(self.modules)} modules",
            f"rank {span(ranks)}" if ranks else "",
            f"{len(self.extras)} extras" if self.extras else "",
            self.metadata.format,
            self.metadata.name,
        ]
        return f"Adapter({', '.join(part for part in parts if part)})"

    def _repr_html_(self) -> str:
        record, base = json.loads(self.metadata.provenance), self.metadata.base_model
        factors = [leaf for lora in self.modules.values() if lora.has_shape for leaf in (lora.a, lora.b)]
        about = [
            self.metadata.format,
            f"{len(self.modules)} modules",
            f"{sum(leaf.size for leaf in factors):,} parameters",
            f"base model {base}" if base else "",
        ]
        extras = f"not LoRA factors: {', '.join(self.extras)}" if self.extras else ""
        return html(self.metadata.name or "Adapter", about, *_made_of(record), *_kinds(self), extras)


def restricted(adapter: Adapter, paths: Container[str]) -> Adapter:
    """The adapter with those of its modules whose path is among some."""
    modules = {path: lora for path, lora in adapter.modules.items() if path in paths}
    return dataclasses.replace(adapter, modules=modules)


def promote(*dtypes: DTypeLike) -> jnp.dtype:
    """The narrowest dtype that holds all of them, also where JAX is set to promote nothing by itself."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes)  # type: ignore[return-value]


def precision(*dtypes: DTypeLike) -> contextlib.AbstractContextManager[Any]:
    """A context in which JAX computes in float64, if one of the dtypes is that."""
    wide = any(jnp.dtype(dtype) == np.float64 for dtype in dtypes)
    return jax.enable_x64(True) if wide else contextlib.nullcontext()


def delta(lora: LoRA) -> Array:
    """The dense weight change ``scale * b @ a`` of one module.

    Args:
        lora: Factors ``[*batch, r, in]`` and ``[*batch, out, r]``.

    Returns:
        ``[*batch, out, in]``, float32 or wider.

    Raises:
        ValueError: If it is a whole adapter, or something else.
    """
    if not isinstance(lora, LoRA):
        raise ValueError(f"delta is of one module, adapter.modules[path], got {type(lora).__name__}")
    dtype = promote(lora.a.dtype, lora.b.dtype, jnp.float32)
    with precision(dtype):
        a, b = jnp.asarray(lora.a, dtype), jnp.asarray(lora.b, dtype)
        return jnp.asarray(lora.scale, dtype) * jnp.matmul(b, a, precision="highest")


def energy_kept(adapter: Adapter) -> Array:
    """The fraction of a merge's squared Frobenius norm that its factors hold, over all modules.

    Args:
        adapter: A merged adapter.

    Returns:
        Scalar in [0, 1]; 1 where nothing was truncated.

    Raises:
        ValueError: If it is no adapter.
    """
    if not isinstance(adapter, Adapter):
        raise ValueError(f"energy_kept is of an adapter, got {type(adapter).__name__}")
    return Energy(
        total=sum(_known(energy.total) for energy in adapter.energy.values()),
        lost=sum(_known(energy.lost) for energy in adapter.energy.values()),
    ).kept


def _made_of(record: Mapping[str, Any]) -> list[Table | str]:
    """What the record of a merge or of a smaller rank says, for notebooks."""
    if "resize" in record:
        rule = ", ".join(f"{name} {described(value)}" for name, value in record["resize"].items())
        return [f"resized: {rule}"]
    if "method" not in record:
        return []
    rows = [
        (i + 1, source.get("path", "a result" if "inputs" in source else f"adapter {i + 1}"), described(weight))
        for i, (source, weight) in enumerate(zip(record["inputs"], record["weights"], strict=True))
    ]
    return [", ".join(settings(record)), Table([("", "right"), *columns(["merged from"], ["weight"])], rows)]


def _kinds(adapter: Adapter) -> list[Table | str]:
    """The modules by kind, those of all layers together, and the energy that is known to be kept."""
    kinds: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path, lora in adapter.modules.items():
        if lora.has_shape:
            kinds[pattern(path), str(lora.a.dtype), lora.size].append(path)
    known = {p: energy for p, energy in adapter.energy.items() if is_number(energy.total) and is_number(energy.lost)}
    cut = bool(known) and all(path in known for paths in kinds.values() for path in paths)
    rows = []
    for kind, paths in kinds.items():
        kept = [kept_span([float(known[path].kept) for path in paths])] if cut else []
        rows.append((*kind, span([adapter.modules[path].rank for path in paths]), len(paths), *kept))
    headings = ["out×in", "rank", "count", *(["energy kept"] if cut else [])]
    total = f"energy kept: {percent(float(energy_kept(adapter)))}" if cut else ""
    return [Table(columns(["module", "dtype"], headings), rows), total]


def is_number(leaf: Any) -> bool:
    """Whether a leaf is a scalar whose value is known here and now."""
    if isinstance(leaf, jax.Array):
        return has_values(leaf) and leaf.ndim == 0 and leaf.is_fully_addressable
    return isinstance(leaf, float | int | np.number | np.ndarray) and np.ndim(leaf) == 0


def has_values(leaf: Any) -> bool:
    """Whether a leaf's values are known now: it is neither traced nor a mere shape."""
    return not isinstance(leaf, Tracer | jax.ShapeDtypeStruct)


def on_host(leaf: Any) -> bool:
    """Whether a leaf lies in the host's memory, where NumPy reads it without a copy or a compile."""
    if isinstance(leaf, jax.Array):
        return has_values(leaf) and leaf.is_fully_addressable and all(d.platform == "cpu" for d in leaf.devices())
    return has_values(leaf)


def _known(number: Array | float) -> Any:
    """A number on the host, unless it is traced."""
    return np.asarray(number) if has_values(number) else number


def nonfinite_modules(adapter: Adapter) -> list[str]:
    """The modules with a NaN or inf in them, as far as values are known now.

    Args:
        adapter: Its leaves may be traced, or mere shapes.

    Returns:
        Module paths.
    """
    return [
        path
        for path, lora in adapter.modules.items()
        if not all(is_finite(leaf) for leaf in (lora.a, lora.b, lora.scale, lora.bias) if leaf is not None)
    ]


def is_finite(leaf: ArrayLike) -> bool:
    """Whether a leaf holds no NaN or inf, as far as its values are known now."""
    if not has_values(leaf):
        return True
    if not on_host(leaf):
        return bool(_all_finite(leaf))
    # A sum is finite if all terms are, but for overflow: the cheap pass first.
    with np.errstate(all="ignore"):
        array = np.asarray(leaf)
        array = array.astype(np.float32) if array.dtype.itemsize == 2 else array
        return bool(np.isfinite(array.sum()) or np.isfinite(array).all())


@jax.jit
def _all_finite(array: Array) -> Array:
    return jnp.isfinite(array).all()
