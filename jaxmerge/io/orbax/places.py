"""Where in a checkpoint an adapter lies: roots, steps, items, and what is written beside them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxmerge.io import atomic, peft, trees
from jaxmerge.io.recipe_file import RECIPE

# Items, and parts of items, that hold copies of the factors under the same names or belong to one run of training.
_NOT_ADAPTERS = (
    "optimizer_state", "opt_state", "optimizer", "optimizer_variables", "metrics_variables", "nnx_aux", "rngs", "step",
)  # fmt: skip
# What Orbax writes into a checkpoint's folder, and into one that holds a tree, beside ocdbt.process_N.
_MARKS = ("_CHECKPOINT_METADATA", "orbax.checkpoint", "commit_success.txt", "_METADATA")
_FLAT = ("_sharding", "_strings.json", "array_metadatas", "d", "manifest.ocdbt")
# In the names of what it has not finished.
_UNFINISHED = ".orbax-checkpoint-tmp"
# Beside the trees of Keras: the model's own configuration, as a string.
MODEL_CONFIG = "model_config"


@dataclass(frozen=True)
class Place:
    """Where in a checkpoint the adapter lay, and so lies in the one that is written.

    Attributes:
        step: The step under the path that was given; None if that was the checkpoint itself.
        item: Its name in the checkpoint; None for a checkpoint without items.
        marked: Whether it was saved by the function `save` of Orbax's v1, which marks its folders.
        sidecar: The adapter_config.json beside the steps, as MaxText's older form has one, or empty.
        model_config: Of Keras's, the configuration of the model in an item of its own, or empty.
    """

    step: int | None
    item: str | None
    marked: bool
    sidecar: str = ""
    model_config: str = ""


def is_remote(path: Any) -> bool:
    """Whether a path is one that Orbax reaches by another way than the file system, such as ``gs://bucket/folder``."""
    return "://" in str(path)


def absolute(path: Any) -> Any:
    """The path from the root of the file system, links followed; a remote one as it is."""
    return path if is_remote(path) else path.resolve()


def find(path: Path, item: str | None) -> tuple[Path, Place, Any, list[str]]:
    """The checkpoint's folder, the place of the adapter in it, the shapes of its leaves, and what is none of it."""
    folder = _step(absolute(path), path)
    below_root = folder.parent == absolute(path)
    is_part = (folder / "_METADATA").is_file() and not (folder / "_CHECKPOINT_METADATA").is_file()
    if is_part and _is_checkpoint(folder.parent):
        folder, item = folder.parent, folder.name  # An item: its step is what Orbax reads.
    items = _items(folder, path)
    name = _chosen(items, item, path, folder)
    step = int(folder.name) if below_root else None
    sidecar = folder.parent / peft.CONFIG
    text = json.dumps(peft.read_config(sidecar)) if is_step(folder) and sidecar.is_file() else ""
    marked = (folder / "orbax.checkpoint").exists()
    return folder, Place(step, name, marked, text, _model_config(folder)), *items[name]


def looks_like_one(folder: Path) -> bool:
    """Whether a folder seems to be a checkpoint, or the root of some; imports nothing to tell."""
    return _is_checkpoint(folder) or any(is_step(entry) or _UNFINISHED in entry.name for entry in folder.iterdir())


def _step(folder: Path, path: Path) -> Path:
    if not folder.exists():
        raise ValueError(f"{path}: there is no such folder")
    if not folder.is_dir():
        raise ValueError(f"{path}: is a file, not a checkpoint")
    if _is_checkpoint(folder):
        return folder
    steps = _steps(folder)
    if not steps:
        unfinished = [entry.name for entry in folder.iterdir() if _UNFINISHED in entry.name]
        what = f"only unfinished steps ({', '.join(unfinished)})" if unfinished else "no steps, whose names are numbers"
        raise ValueError(f"{path}: is not a finished Orbax checkpoint and has {what}")
    return steps[-1]


def _steps(root: Path) -> list[Path]:
    """A manager's finished steps, oldest first: an unfinished one has a name that is not a number."""
    return sorted((step for step in root.iterdir() if step.is_dir() and is_step(step)), key=lambda s: int(s.name))


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a finished checkpoint: a flat one, or one of items. Orbax's own test takes any folder."""
    if not folder.is_dir() or _UNFINISHED in folder.name:
        return False
    # Older ones have no mark but their place.
    return any((folder / mark).exists() for mark in _MARKS) or (is_step(folder) and bool(_item_folders(folder)))


def _item_folders(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if not is_step(entry) and (entry / "_METADATA").is_file()]


def is_step(folder: Path) -> bool:
    """Whether a folder is called as a manager calls its steps."""
    return folder.name.isascii() and folder.name.isdecimal()


def _items(folder: Path, path: Path) -> dict[str | None, tuple[Any, list[str]]]:
    """By the items' names the shapes of their arrays, and what is none; a checkpoint without items has one, None."""
    from orbax.checkpoint import v1 as ocp

    try:
        if (folder / "_METADATA").is_file():
            found = {None: ocp.metadata(str(folder)).metadata}
        else:
            found = ocp.checkpointables_metadata(str(folder)).metadata
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is not a sound Orbax checkpoint: {atomic.one_line(error)}") from None
    parts = {name: _adapter_part(tree) for name, tree in found.items()}
    return {name: part for name, part in parts.items() if jax.tree.leaves(part[0])}


def _adapter_part(shapes: Any) -> tuple[Any, list[str]]:
    """The tree of arrays without the state of a training run, and the names of what was left out."""
    left_out = [name for name in shapes if name in _NOT_ADAPTERS] if isinstance(shapes, dict) else []
    if left_out:
        shapes = {name: tree for name, tree in shapes.items() if name not in left_out}
    with_paths, structure = jax.tree_util.tree_flatten_with_path(shapes)
    left_out += [trees.path_of(path) for path, leaf in with_paths if not _is_array(leaf)]
    return jax.tree.unflatten(structure, [leaf if _is_array(leaf) else None for _, leaf in with_paths]), left_out


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _chosen(items: Mapping[str | None, Any], item: str | None, path: Path, folder: Path) -> str | None:
    if item is not None:
        if item not in items:
            named = ", ".join(name for name in items if name)
            raise ValueError(f"{path}: has no item {item!r}: there {f'are {named}' if named else 'is but one tree'}")
        return item
    candidates = [name for name in items if name not in _NOT_ADAPTERS]
    if not candidates:
        raise ValueError(f"{path}: nothing in {folder.name} can be read; it is no finished checkpoint of arrays")
    if len(candidates) > 1:
        raise ValueError(
            f"{path}: holds several items ({', '.join(map(str, candidates))}): name one with item= (--item)"
        )
    return candidates[0]


def _model_config(folder: Path) -> str:
    from orbax.checkpoint import v1 as ocp

    if not (folder / MODEL_CONFIG).is_dir():
        return ""
    try:
        return str(ocp.load(str(folder), checkpointable_name=MODEL_CONFIG)["config"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def custom_metadata(folder: Path, item: str | None) -> dict[str, Any]:
    """Of the checkpoint, and of the item if that was saved as a checkpoint of its own."""
    custom: dict[str, Any] = {}
    for place in (folder, *([folder / item] if item else [])):
        try:
            found = json.loads((place / "_CHECKPOINT_METADATA").read_text()).get("custom_metadata")
        except (OSError, ValueError):
            continue
        custom |= found if isinstance(found, dict) else {}
    return {name: value for name, value in custom.items() if name != "jaxmerge" or isinstance(value, dict)}


def is_replaceable(folder: Path) -> bool:
    """Whether nothing is in a folder but one checkpoint of one adapter, or what jaxmerge wrote or began to write."""
    if (folder / "_METADATA").is_file():
        names = {entry.name for entry in folder.iterdir() if not entry.name.startswith("ocdbt.process_")}
        return not names - {*_MARKS, *_FLAT, RECIPE}
    steps = _steps(folder)
    unfinished = [entry for entry in folder.iterdir() if _UNFINISHED in entry.name]
    if steps or unfinished:
        others = [
            entry
            for entry in folder.iterdir()
            if entry not in (*steps, *unfinished) and entry.name not in (peft.CONFIG, RECIPE)
        ]
        return not others and len(steps) <= 1 and all("jaxmerge" in custom_metadata(step, None) for step in steps)
    items = _item_folders(folder)
    return len(items) == 1 and not {entry.name for entry in folder.iterdir()} - {*items, *_MARKS, RECIPE}
