"""Factors moved from PEFT's modules to a tree's parameters, and back. On the host: these are reshapes and copies."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmerge.base import Adapter, LoRA, Metadata, promote
from jaxmerge.io.convert.pieces import Piece, sides, target_layout
from jaxmerge.io.convert.regroup import RANK, Factors, stacked
from jaxmerge.io.convert.targets import Target
from jaxmerge.io.peft.keys import Layout, natural_order
from jaxmerge.io.trees import Tree, lost_in_scaling
from jaxmerge.layouts import Row


def to_peft(adapter: Adapter, pieces: Sequence[Piece]) -> Adapter:
    """Takes a tree's adapter apart into PEFT's modules.

    Args:
        adapter: Of concrete arrays.
        pieces: From `settle`.

    Returns:
        The adapter. A module to which the tree's shared factors add nothing is left out.
    """
    modules = {}
    for piece in pieces:
        row, sizes, lora = piece.row, piece.sizes, adapter.modules[piece.module]
        batch, inputs, outputs = sides(row)
        a, b = np.asarray(lora.a), np.asarray(lora.b)
        whole = Factors(
            a.reshape(*a.shape[:-1], *[sizes[name] for name in inputs]),
            (*batch, RANK, *inputs),
            b.swapaxes(-1, -2).reshape(*a.shape[:-1], *[sizes[name] for name in outputs]),
            (*batch, RANK, *outputs),
        )
        for index, path in piece.sources.items():
            part = whole
            for name, i in zip(row.unrolled, index, strict=True):
                shared = name not in part.a_axes or name not in part.b_axes
                part = part.at(name, i)
                part = part.without_idle() if shared else part
            if not part.b.any() and whole.b.any() and row.unrolled:  # PEFT need not adapt what nothing is added to.
                continue
            part = _cut(part, row.inputs.split(), row.outputs.split())
            part = part.ordered((RANK, *row.inputs.split()), (*row.outputs.split(), RANK))
            b = _heads_to_peft(part.b, row, sizes.get("head_dim", 0))
            modules[path] = LoRA(part.a.reshape(part.rank, -1), b.reshape(-1, part.rank), lora.scale)
    modules = dict(sorted(modules.items(), key=lambda item: natural_order(item[0])))
    metadata = Metadata(
        format="peft",
        name=adapter.metadata.name,
        base_model=adapter.metadata.base_model,
        layouts=tuple((path, Layout()) for path in modules),
        config=json.dumps(
            {"bias": "none", "inference_mode": True, "init_lora_weights": True, "task_type": "CAUSAL_LM"}
        ),
        provenance=adapter.metadata.provenance,
    )
    return Adapter(modules=modules, metadata=metadata)


def _cut(factors: Factors, inputs: Sequence[str], outputs: Sequence[str]) -> Factors:
    """The factors with these axes in A, and those in B; an axis in both has factors of its own."""
    for name in dict.fromkeys((*inputs, *outputs)):
        factors = factors.moved(name, name in inputs, name in outputs)
    return factors


def from_peft(adapter: Adapter, pieces: Sequence[Piece], target: Target) -> Adapter:
    """Puts a tree's adapter together from PEFT's modules.

    Args:
        adapter: Of concrete arrays.
        pieces: From `settle`.
        target: The format.

    Returns:
        The adapter, with its scale folded into B. What no module of PEFT's is there for is zero.
    """
    modules, layouts, leaves = {}, [], {}
    for piece in pieces:
        row, sizes = piece.row, piece.sizes
        parts = {index: _part(path, adapter.modules[path], row, sizes) for index, path in piece.sources.items()}
        whole = stacked(parts, row.unrolled, [sizes[name] for name in row.unrolled])
        whole = _cut(whole, row.a_axes, row.b_axes).without_zeros()
        batch, inputs, outputs = sides(row)
        whole = whole.ordered((*batch, RANK, *inputs), (*batch, *outputs, RANK))
        shape = [sizes[name] for name in batch]
        a, b = whole.a.reshape(*shape, whole.rank, -1), whole.b.reshape(*shape, -1, whole.rank)
        modules[piece.module] = LoRA(*_within_capacity(a, b))
        found = target_layout(piece, target)
        assert not isinstance(found, str), "settle refuses it"
        rule, module, layout = found
        layouts.append((piece.module, layout))
        for factor in ("a", "b"):
            keys = [*target.wrappers, *rule.path(module, row.parameter, factor).split("/"), *["value"] * target.value]
            _put(leaves, keys, (factor, piece.module))
    roles, structure = jax.tree.flatten(leaves, is_leaf=lambda leaf: isinstance(leaf, tuple))
    metadata = Metadata(
        format=target.tree,
        name=adapter.metadata.name,
        base_model=adapter.metadata.base_model,
        layouts=tuple(layouts),
        provenance=adapter.metadata.provenance,
        tree=Tree(structure, tuple(roles)),
        place=target.place,
        config=target.config,
    )
    return Adapter(modules=modules, metadata=metadata)


def _part(path: str, lora: LoRA, row: Row, sizes: Mapping[str, int]) -> Factors:
    """One module of PEFT's with its scale folded into B."""
    inputs, outputs = row.inputs.split(), row.outputs.split()
    a, b = np.asarray(lora.a), np.asarray(lora.b)
    scaled = _wide(b) * np.asarray(lora.scale, _wide(b).dtype)
    with np.errstate(over="ignore"):
        b = _heads_from_peft(scaled, row, sizes.get("head_dim", 0)).astype(b.dtype)
    if problem := lost_in_scaling(lora, b):
        raise ValueError(f"module {path} {problem}")
    return Factors(
        a.reshape(lora.rank, *[sizes[name] for name in inputs]),
        (RANK, *inputs),
        b.reshape(*[sizes[name] for name in outputs], lora.rank),
        (*outputs, RANK),
    )


def _within_capacity(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factors of no larger rank than the weight can have: past that, one of them is the identity."""
    rank, in_, out = a.shape[-2], a.shape[-1], b.shape[-2]
    if rank <= min(in_, out):
        return a, b
    product = np.matmul(b.astype(np.float64), a.astype(np.float64))
    size = min(in_, out)
    one = np.broadcast_to(np.eye(size), (*a.shape[:-2], size, size))
    return (
        (one.astype(a.dtype), product.astype(b.dtype)) if in_ <= out else (product.astype(a.dtype), one.astype(b.dtype))
    )


def _put(tree: dict[str, Any], keys: Sequence[str], leaf: Any) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = leaf


def _heads_from_peft(b: np.ndarray, row: Row, head_dim: int) -> np.ndarray:
    """A B ``[..., r]`` whose rows are those of the tree's weight: PEFT's halves of each rotary pair interleaved."""
    if row.rotary:
        heads = b.reshape(-1, 2, head_dim // 2, b.shape[-1])
        b = heads.swapaxes(1, 2).reshape(b.shape)
    return b / np.sqrt(b.dtype.type(head_dim)) if row.head_scale else b


def _heads_to_peft(b: np.ndarray, row: Row, head_dim: int) -> np.ndarray:
    """The inverse of `_heads_from_peft`."""
    if row.rotary:
        heads = b.reshape(-1, head_dim // 2, 2, b.shape[-1])
        b = heads.swapaxes(1, 2).reshape(b.shape)
    return (_wide(b) * np.sqrt(_wide(b).dtype.type(head_dim))).astype(b.dtype) if row.head_scale else b


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(promote(x.dtype, np.float32))
