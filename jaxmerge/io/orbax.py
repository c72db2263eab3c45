"""Orbax checkpoints of Flax LoRA trees, read on any machine and written in the layout they came in.

Orbax is imported where it is used: that takes a second, and PEFT folders need none of it.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmerge.base import Adapter, Metadata, on_host
from jaxmerge.io import atomic, keras, trees
from jaxmerge.sharding import first_process, fitting, gathered, placement

# Items, and parts of items, that hold copies of the factors under the same names or belong to one run of training.
_NOT_ADAPTERS = (
    "optimizer_state", "opt_state", "optimizer", "optimizer_variables", "metrics_variables", "nnx_aux", "rngs", "step",
)  # fmt: skip
# What Orbax writes into a checkpoint's folder, and into one that holds a tree, beside ocdbt.process_N.
_MARKS = ("_CHECKPOINT_METADATA", "orbax.checkpoint", "commit_success.txt", "_METADATA")
_FLAT = ("_sharding", "_strings.json", "array_metadatas", "d", "manifest.ocdbt")
# In the names of what it has not finished.
_UNFINISHED = ".orbax-checkpoint-tmp"
# Beside the older checkpoints of MaxText: the rank and alpha of an adapter, as PEFT has them.
_SIDECAR = "adapter_config.json"
# Beside the trees of Keras: the model's own configuration, as a string.
_MODEL_CONFIG = "model_config"


@dataclass(frozen=True)
class Place:
    """Where in a checkpoint the adapter lay, and so lies in the one that is written.

    Attributes:
        step: The step under the path that was given; None if that was the checkpoint itself.
        item: Its name in the checkpoint; None for a checkpoint without items.
        marked: Whether it was saved by the function `save` of Orbax's v1, which marks its folders.
        sidecar: The adapter_config.json beside the steps, or empty.
        model_config: Of Keras's, the configuration of the model in an item of its own, or empty.
    """

    step: int | None
    item: str | None
    marked: bool
    sidecar: str = ""
    model_config: str = ""


def load(path: Path, item: str | None = None, mesh: Mesh | None = None, **options: Any) -> Adapter:
    """Reads an adapter from a checkpoint.

    Args:
        path: A checkpoint, a step, or a manager's root, of which the latest step is taken.
        item: Of a step with several items of LoRA factors, the one to take.
        mesh: What to put the arrays on, spread as they were saved; None for the host.
        **options: Of `jaxmerge.from_state`.

    Returns:
        The adapter.

    Raises:
        ValueError: If it is no checkpoint, is broken, or its tree is not understood.
    """
    folder, place, shapes, left_out = _find(path, item)
    try:
        tree = _restore(folder, place.item, shapes, mesh)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: cannot be restored: {atomic.one_line(error)}") from None
    return _adapter(path, folder, place, tree, {"sha256": _digest(tree), "left_out": left_out}, options)


def peek(path: Path, item: str | None = None, **options: Any) -> Adapter:
    """The adapter with the shapes of its tensors in place of the tensors. Arguments and errors are those of `load`."""
    folder, place, shapes, left_out = _find(path, item)
    tree = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes)
    return _adapter(path, folder, place, tree, {"left_out": left_out}, options)


def _adapter_part(shapes: Any) -> tuple[Any, list[str]]:
    """The tree of arrays without the state of a training run, and the names of what was left out."""
    left_out = [name for name in shapes if name in _NOT_ADAPTERS] if isinstance(shapes, dict) else []
    if left_out:
        shapes = {name: tree for name, tree in shapes.items() if name not in left_out}
    with_paths, structure = jax.tree_util.tree_flatten_with_path(shapes)
    left_out += [trees.path_of(path) for path, leaf in with_paths if not _is_array(leaf)]
    return jax.tree.unflatten(structure, [leaf if _is_array(leaf) else None for _, leaf in with_paths]), left_out


def check_target(path: Path, force: bool) -> None:
    """Refuses a target that may not be written.

    Raises:
        ValueError: If something is there that may not be replaced, or the place cannot be written to.
    """
    if is_remote(path):
        if path.exists():
            raise ValueError(f"{path}: already exists, and is not replaced where folders cannot be exchanged")
        return
    if force and path.is_dir() and any(path.iterdir()) and not _is_replaceable(path.resolve()):
        raise ValueError(
            f"{path}: is neither one checkpoint of an adapter nor what jaxmerge wrote, so --force does not replace it"
        )
    atomic.check_target(path, force, marker=None)


def _is_replaceable(folder: Path) -> bool:
    """Whether nothing is in a folder but one checkpoint of one adapter, or what jaxmerge wrote or began to write."""
    if (folder / "_METADATA").is_file():
        names = {entry.name for entry in folder.iterdir() if not entry.name.startswith("ocdbt.process_")}
        return not names - {*_MARKS, *_FLAT}
    steps = _steps(folder)
    unfinished = [entry for entry in folder.iterdir() if _UNFINISHED in entry.name]
    if steps or unfinished:
        others = [entry for entry in folder.iterdir() if entry not in (*steps, *unfinished) and entry.name != _SIDECAR]
        return not others and len(steps) <= 1 and all("jaxmerge" in _custom_metadata(step, None) for step in steps)
    items = _item_folders(folder)
    return len(items) == 1 and not {entry.name for entry in folder.iterdir()} - {*items, *_MARKS}


def save(adapter: Adapter, path: Path, *, replaces: bool = False) -> None:
    """Writes a checkpoint in the layout of the one the adapter was read from: its steps, items and names.

    Orbax commits it, so that a crash leaves nothing that looks finished. The provenance goes into its custom metadata,
    beside what the source had there.

    Args:
        adapter: Read from a checkpoint, merged from such, or converted to its format.
        path: What the source's path was: a root, a step, or a checkpoint.
        replaces: Whether there is a checkpoint there that is to be replaced.

    Raises:
        ValueError: If no adapter's tree has a place for a module.
    """
    place: Place = adapter.metadata.place
    if is_of_one_rank(adapter.metadata):
        adapter = trees.padded(adapter)
    # What lies on the devices of several processes is written by all of them; the rest needs none to be turned.
    adapter = jax.tree.map(lambda leaf: np.asarray(leaf) if on_host(leaf) else leaf, adapter)
    tree = trees.to_state(adapter)
    custom = _with_rank(json.loads(adapter.metadata.config), adapter)
    # The scale is in B, so that alpha is the rank wherever there is one.
    kept = {
        "alpha": "rank",
        "base_model": adapter.metadata.base_model,
        "format": adapter.metadata.format,
        "scan_axis": trees.scan_axis(adapter),
    }
    custom["jaxmerge"] = {**json.loads(adapter.metadata.provenance), **kept}
    if place.sidecar and place.step is not None:
        rank = max(lora.rank for lora in adapter.modules.values())
        sidecar = {**json.loads(place.sidecar), "r": rank, "lora_alpha": rank, "use_rslora": False}
        place = dataclasses.replace(place, sidecar=json.dumps(sidecar, indent=2))
    if place.model_config:
        place = dataclasses.replace(place, model_config=keras.with_ranks(place.model_config, adapter.modules))
    path = _absolute(path)
    # What is not replaced Orbax itself commits in its place.
    made = path.parent / f".{path.name}.partial" if replaces else path
    try:
        _write(made, place, tree, custom)
        if replaces and first_process():
            atomic.put_in_place(made, path, owned=[entry.name for entry in path.iterdir()], force=True)
    except BaseException as error:
        if first_process() and not is_remote(path):
            shutil.rmtree(made, ignore_errors=True)
        if isinstance(error, OSError | ValueError | RuntimeError):
            raise ValueError(f"{path}: cannot be written, and nothing is left: {atomic.one_line(error)}") from None
        raise


def is_remote(path: Any) -> bool:
    """Whether a path is one that Orbax reaches by another way than the file system, such as ``gs://bucket/folder``."""
    return "://" in str(path)


def _absolute(path: Any) -> Any:
    return path if is_remote(path) else path.resolve()


def is_of_one_rank(metadata: Metadata) -> bool:
    """Whether what is written has all modules of one rank, the smaller filled up with zeros."""
    row = trees.TREE_FORMATS.get(metadata.format)
    return (row is not None and row.one_rank) or _is_maxtext(json.loads(metadata.config))


def _is_maxtext(custom: Mapping[str, Any]) -> bool:
    stored = custom.get("lora")
    return isinstance(stored, dict) and "lora_alpha" in stored


def _write(path: Path, place: Place, tree: Any, custom: Any) -> None:
    import orbax.checkpoint as v0
    from orbax.checkpoint import v1

    if place.sidecar and place.step is not None and first_process():
        path.mkdir(parents=True)
        (path / _SIDECAR).write_text(place.sidecar)
    if place.model_config and place.step is not None:
        items = {str(place.item): tree, _MODEL_CONFIG: {"config": place.model_config}}
        with v1.training.Checkpointer(str(path)) as checkpointer:
            checkpointer.save_checkpointables(place.step, items, custom_metadata=custom)
    elif place.step is not None:
        with v0.CheckpointManager(path) as manager:
            items = v0.args.Composite(**{place.item or "default": v0.args.StandardSave(tree)})
            manager.save(place.step, args=items, custom_metadata=custom)
    elif place.marked:
        v1.save_checkpointables(str(path), {place.item or "state": tree}, custom_metadata=custom)
    elif place.item is not None:
        with v0.Checkpointer(v0.CompositeCheckpointHandler()) as checkpointer:
            items = v0.args.Composite(**{place.item: v0.args.StandardSave(tree)})
            checkpointer.save(path, args=items, custom_metadata=custom)
    else:
        with v0.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, tree, custom_metadata=custom)


def _find(path: Path, item: str | None) -> tuple[Path, Place, Any, list[str]]:
    """The checkpoint's folder, the place of the adapter in it, the shapes of its leaves, and what is none of it."""
    folder = _step(_absolute(path), path)
    below_root = folder.parent == _absolute(path)
    is_part = (folder / "_METADATA").is_file() and not (folder / "_CHECKPOINT_METADATA").is_file()
    if is_part and _is_checkpoint(folder.parent):
        folder, item = folder.parent, folder.name  # An item: its step is what Orbax reads.
    items = _items(folder, path)
    name = _chosen(items, item, path, folder)
    step = int(folder.name) if below_root else None
    sidecar = folder.parent / _SIDECAR
    text = _sidecar(sidecar) if _is_step(folder) and sidecar.is_file() else ""
    marked = (folder / "orbax.checkpoint").exists()
    return folder, Place(step, name, marked, text, _model_config(folder)), *items[name]


def _sidecar(path: Path) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {atomic.one_line(error)}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: is not a JSON object")
    return json.dumps(found)


def _model_config(folder: Path) -> str:
    from orbax.checkpoint import v1 as ocp

    if not (folder / _MODEL_CONFIG).is_dir():
        return ""
    try:
        return str(ocp.load(str(folder), checkpointable_name=_MODEL_CONFIG)["config"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _adapter(
    path: Path, folder: Path, place: Place, tree: Any, known: Mapping[str, Any], options: Mapping[str, Any]
) -> Adapter:
    custom = _custom_metadata(folder, place.item)
    given, options = options.get("alpha"), _completed(path, options, custom, place)
    try:
        adapter = trees.from_state(tree, **options)
    except ValueError as error:
        raise type(error)("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
    _check_alpha(path, adapter, given, _stored_alpha(path, custom, place))
    base_model = custom.get("jaxmerge", {}).get("base_model")
    provenance = {
        "path": str(path),
        "step": folder.name if _is_step(folder) else None,
        "item": place.item,
        "alpha": options.get("alpha"),
        **known,
    }
    metadata = dataclasses.replace(
        adapter.metadata,
        name=str(path),
        base_model=base_model if isinstance(base_model, str) else None,
        place=place,
        config=json.dumps({key: value for key, value in custom.items() if key != "jaxmerge"}),
        provenance=json.dumps(provenance),
    )
    return dataclasses.replace(adapter, metadata=metadata)


def _completed(path: Path, options: Mapping[str, Any], custom: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """The options, with what is written down beside the tree where they leave it open."""
    alpha, scan_axis, layout = options.get("alpha"), options.get("scan_axis"), options.get("layout")
    stored = _stored_alpha(path, custom, place)
    ours = custom.get("jaxmerge", {}).get("format")
    if layout is None and options.get("pattern") is None and isinstance(ours, str) and ours in trees.TREE_FORMATS:
        layout = ours
    if scan_axis is None and isinstance(custom.get("scan_layers"), bool):
        scan_axis = "some" if custom["scan_layers"] else "none"
    if scan_axis is None and isinstance(axis := custom.get("jaxmerge", {}).get("scan_axis"), int):
        scan_axis = axis
    return {**options, "alpha": stored if alpha is None else alpha, "scan_axis": scan_axis, "layout": layout}


def _stored_alpha(path: Path, custom: Mapping[str, Any], place: Place) -> trees.Alpha:
    """The alpha that is written down beside the tree, if it is."""
    if custom.get("jaxmerge", {}).get("alpha") == "rank":
        return "rank"
    lora = custom.get("lora")
    sources = {
        "lora.lora_alpha in its custom metadata": lora.get("lora_alpha") if isinstance(lora, dict) else None,
        f"lora_alpha in its {_SIDECAR}": json.loads(place.sidecar or "{}").get("lora_alpha"),
    }
    for where, value in sources.items():
        if value is None or value == 0:  # MaxText's word for one that was never set.
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{path}: {where} is {value!r}, not a number")
        return float(value)
    return (keras.alphas(place.model_config) or None) if place.model_config else None


def _check_alpha(path: Path, adapter: Adapter, alpha: trees.Alpha, stored: trees.Alpha) -> None:
    """Refuses an alpha that contradicts the checkpoint's own."""
    if alpha is None or stored is None or isinstance(stored, Mapping) or alpha == stored:
        return
    if "rank" in (alpha, stored) and all(
        lora.rank == (stored if alpha == "rank" else alpha) for lora in adapter.modules.values()
    ):
        return
    own = "that it is each module's rank" if stored == "rank" else stored
    raise ValueError(
        f"{path}: alpha {alpha} was given, but the checkpoint itself says {own}: leave alpha out, or give one per "
        "adapter"
    )


def _with_rank(custom: dict[str, Any], adapter: Adapter) -> dict[str, Any]:
    """Custom metadata in which MaxText's rank and alpha are those of the adapter: equal, as its scale is folded in."""
    if not _is_maxtext(custom):
        return custom
    (rank,) = {lora.rank for lora in adapter.modules.values()}
    return {**custom, "lora": {**custom["lora"], "lora_rank": rank, "lora_alpha": float(rank)}}


def _custom_metadata(folder: Path, item: str | None) -> dict[str, Any]:
    """Of the checkpoint, and of the item if that was saved as a checkpoint of its own."""
    custom: dict[str, Any] = {}
    for place in (folder, *([folder / item] if item else [])):
        try:
            found = json.loads((place / "_CHECKPOINT_METADATA").read_text()).get("custom_metadata")
        except (OSError, ValueError):
            continue
        custom |= found if isinstance(found, dict) else {}
    return {name: value for name, value in custom.items() if name != "jaxmerge" or isinstance(value, dict)}


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a finished checkpoint: a flat one, or one of items. Orbax's own test takes any folder."""
    if not folder.is_dir() or _UNFINISHED in folder.name:
        return False
    # Older ones have no mark but their place.
    return any((folder / mark).exists() for mark in _MARKS) or (_is_step(folder) and bool(_item_folders(folder)))


def _item_folders(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if not _is_step(entry) and (entry / "_METADATA").is_file()]


def _is_step(folder: Path) -> bool:
    return folder.name.isascii() and folder.name.isdecimal()


def _steps(root: Path) -> list[Path]:
    """A manager's finished steps, oldest first: an unfinished one has a name that is not a number."""
    return sorted((step for step in root.iterdir() if step.is_dir() and _is_step(step)), key=lambda s: int(s.name))


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


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _restore(folder: Path, name: str | None, shapes: Any, mesh: Mesh | None) -> Any:
    """The arrays: on the host, since the shardings they were saved with are another machine's; or on a mesh."""
    from orbax.checkpoint import v1 as ocp

    def target(leaf: Any) -> Any:
        if mesh is None:
            return np.empty(leaf.shape, leaf.dtype)
        spec = getattr(getattr(leaf, "sharding_metadata", None), "partition_spec", None) or ()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=fitting(mesh, spec, leaf.shape))

    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        named = {} if name is None else {"checkpointable_name": name}
        return ocp.load(str(folder), jax.tree.map(target, shapes), **named)


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


def _digest(tree: Any) -> str:
    """A hash of names and numbers: the files' own bytes depend on how many processes wrote them."""
    digest = hashlib.sha256()
    for key, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        digest.update(f"{jax.tree_util.keystr(key)} {leaf.dtype} {leaf.shape}".encode())
        if (spread := placement(leaf)) is not None:
            leaf = gathered(leaf, spread.mesh).addressable_data(0)
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
