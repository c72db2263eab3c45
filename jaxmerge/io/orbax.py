"""Orbax checkpoints of Flax LoRA trees: read on any machine, whatever devices they were written from.

Orbax is imported where it is used: that takes a second, and PEFT folders need none of it.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmerge.base import Adapter
from jaxmerge.io import trees

# Items that hold copies of the factors under the same names, and are no adapter.
_NOT_ADAPTERS = ("optimizer_state", "opt_state")


def load(path: Path, item: str | None = None, **options: Any) -> Adapter:
    """Reads an adapter from a checkpoint.

    Args:
        path: A checkpoint, a step, or a manager's root, of which the latest step is taken.
        item: Of a step with several items of LoRA factors, the one to take.
        **options: Of `jaxmerge.from_state`.

    Returns:
        The adapter, its arrays on the host.

    Raises:
        ValueError: If it is no checkpoint, is broken, or its tree is not understood.
    """
    folder = _step(path.resolve(), path)
    if not _is_committed(folder):  # An item: its step is what Orbax reads.
        folder, item = folder.parent, folder.name
    items = _items(folder, path)
    name = _chosen(items, item, path)
    shapes = items[name]
    try:
        tree = _restore(folder, name, shapes)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: cannot be restored: {_one_line(error)}") from None
    try:
        adapter = trees.from_state(tree, **options)
    except ValueError as error:
        raise ValueError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
    provenance = {"path": str(path), "step": folder.name if folder.name.isdigit() else None, "item": name}
    return trees.named(adapter, str(path), json.dumps({**provenance, "sha256": _digest(tree)}))


def _is_committed(folder: Path) -> bool:
    from orbax.checkpoint import v1 as ocp

    return ocp.is_orbax_checkpoint(str(folder))


def _steps(root: Path) -> list[Path]:
    """A manager's finished steps, oldest first: an unfinished one has a name that is not a number."""
    return sorted((step for step in root.iterdir() if step.is_dir() and step.name.isdigit()), key=lambda s: int(s.name))


def _step(folder: Path, path: Path) -> Path:
    if not folder.exists():
        raise ValueError(f"{path}: there is no such folder")
    if not folder.is_dir():
        raise ValueError(f"{path}: is a file, not a checkpoint")
    if _is_committed(folder) or (_is_committed(folder.parent) and (folder / "_METADATA").is_file()):
        return folder
    steps = _steps(folder)
    if not steps:
        raise ValueError(f"{path}: is not a finished Orbax checkpoint and has no steps")
    return steps[-1]


def _items(folder: Path, path: Path) -> dict[str | None, Any]:
    """Trees of shapes by the items' names; None is the name of a checkpoint that has no items."""
    from orbax.checkpoint import v1 as ocp

    try:
        if (folder / "_METADATA").is_file():
            return {None: ocp.metadata(str(folder)).metadata}
        found = ocp.checkpointables_metadata(str(folder)).metadata
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is not a sound Orbax checkpoint: {_one_line(error)}") from None
    return {name: tree for name, tree in found.items() if _of_arrays(tree)}


def _of_arrays(tree: Any) -> bool:
    leaves = jax.tree.leaves(tree)
    return bool(leaves) and all(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves)


def _restore(folder: Path, name: str | None, shapes: Any) -> Any:
    """The arrays on the host: the shardings they were saved with are those of another machine."""
    from orbax.checkpoint import v1 as ocp

    target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
    return ocp.load(str(folder), target, **({} if name is None else {"checkpointable_name": name}))


def _chosen(items: Mapping[str | None, Any], item: str | None, path: Path) -> str | None:
    if item is not None:
        if item not in items:
            raise ValueError(f"{path}: has no item {item!r}: there are {', '.join(map(str, items)) or 'none'}")
        return item
    candidates = [name for name in items if name not in _NOT_ADAPTERS]
    if len(candidates) != 1:
        what = f"several items ({', '.join(map(str, candidates))}): name one with item=" if candidates else "no arrays"
        raise ValueError(f"{path}: holds {what}")
    return candidates[0]


def _digest(tree: Any) -> str:
    """A hash of names and numbers: the files' own bytes depend on how many processes wrote them."""
    digest = hashlib.sha256()
    for key, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        digest.update(f"{jax.tree_util.keystr(key)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
