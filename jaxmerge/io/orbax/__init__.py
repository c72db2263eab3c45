"""Orbax checkpoints of Flax LoRA trees, read on any machine and written in the layout they came in.

Orbax is imported where it is used: that takes a second, and PEFT folders need none of it.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmerge.base import Adapter, on_host
from jaxmerge.io import atomic, keras, peft, trees
from jaxmerge.io.orbax.places import (
    MODEL_CONFIG,
    Place,
    absolute,
    custom_metadata,
    find,
    is_remote,
    is_replaceable,
    is_step,
    looks_like_one,
)
from jaxmerge.io.orbax.records import check_alpha, completed, is_of_one_rank, stored_alpha, with_rank
from jaxmerge.io.recipe_file import RECIPE, take_recipe
from jaxmerge.sharding import first_process, fitting

__all__ = [
    "Place",
    "check_target",
    "is_of_one_rank",
    "is_remote",
    "load",
    "looks_like_one",
    "peek",
    "read_record",
    "save",
]


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
    folder, place, shapes, left_out = find(path, item)
    try:
        tree = _restore(folder, place.item, shapes, mesh)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: cannot be restored: {atomic.one_line(error)}") from None
    return _adapter(path, folder, place, tree, {"sha256": trees.digest(tree), "left_out": left_out}, options)


def peek(path: Path, item: str | None = None, **options: Any) -> Adapter:
    """The adapter with the shapes of its tensors in place of the tensors. Arguments and errors are those of `load`."""
    folder, place, shapes, left_out = find(path, item)
    tree = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes)
    return _adapter(path, folder, place, tree, {"left_out": left_out}, options)


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of provenance in a checkpoint that jaxmerge wrote; None where there is none."""
    folder, place, _, _ = find(path, None)
    return custom_metadata(folder, place.item).get("jaxmerge")


def check_target(path: Path, force: bool) -> None:
    """Refuses a target that may not be written.

    Raises:
        ValueError: If something is there that may not be replaced, or the place cannot be written to.
    """
    if is_remote(path):
        try:
            there = path.exists()
        except ImportError as error:  # What reaches a kind of storage is a package of its own.
            raise ValueError(f"{path}: {error}") from None
        if there:
            raise ValueError(f"{path}: already exists, and is not replaced where folders cannot be exchanged")
        return
    if force and path.is_dir() and any(path.iterdir()) and not is_replaceable(path.resolve()):
        raise ValueError(
            f"{path}: is neither one checkpoint of an adapter nor what jaxmerge wrote, so --force does not replace it"
        )
    atomic.check_target(path, force, marker=None)


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
    custom = with_rank(json.loads(adapter.metadata.config), adapter)
    # The scale is in B, so that alpha is the rank wherever there is one.
    kept = {
        "alpha": "rank",
        "base_model": adapter.metadata.base_model,
        "format": adapter.metadata.format,
        "scan_axis": trees.scan_axis(adapter),
    }
    path = absolute(path)
    record = json.loads(adapter.metadata.provenance)
    recipe = take_recipe(record, path)
    custom["jaxmerge"] = {**record, "weights_sha256": trees.digest(tree), **kept}
    if place.sidecar and place.step is not None:
        rank = max(lora.rank for lora in adapter.modules.values())
        sidecar = {**json.loads(place.sidecar), "r": rank, "lora_alpha": rank, "use_rslora": False}
        place = dataclasses.replace(place, sidecar=json.dumps(sidecar, indent=2))
    if place.model_config:
        place = dataclasses.replace(place, model_config=keras.with_ranks(place.model_config, adapter.modules))
    # What is not replaced Orbax itself commits in its place.
    made = path.parent / f".{path.name}.partial" if replaces else path
    try:
        _write(made, place, tree, custom)
        if recipe is not None and first_process():
            (made / RECIPE).write_bytes(recipe)
        if replaces and first_process():
            atomic.put_in_place(made, path, owned=[entry.name for entry in path.iterdir()], force=True)
    except BaseException as error:
        if first_process() and not is_remote(path):
            shutil.rmtree(made, ignore_errors=True)
        if isinstance(error, OSError | ValueError | RuntimeError):
            raise ValueError(f"{path}: cannot be written, and nothing is left: {atomic.one_line(error)}") from None
        raise


def _write(path: Path, place: Place, tree: Any, custom: Any) -> None:
    import orbax.checkpoint as v0
    from orbax.checkpoint import v1

    if place.sidecar and place.step is not None and first_process():
        path.mkdir(parents=True)
        (path / peft.CONFIG).write_text(place.sidecar)
    if place.model_config and place.step is not None:
        items = {str(place.item): tree, MODEL_CONFIG: {"config": place.model_config}}
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


def _adapter(
    path: Path, folder: Path, place: Place, tree: Any, known: Mapping[str, Any], options: Mapping[str, Any]
) -> Adapter:
    custom = custom_metadata(folder, place.item)
    given, stored = options.get("alpha"), stored_alpha(path, custom, place)
    options = completed(options, custom, stored)
    adapter = trees.from_file(path, tree, **options)
    check_alpha(path, adapter, given, stored)
    base_model = custom.get("jaxmerge", {}).get("base_model")
    provenance = {
        "path": str(path),
        "step": folder.name if is_step(folder) else None,
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
