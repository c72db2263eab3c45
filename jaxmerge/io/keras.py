"""What Keras keeps beside LoRA factors: the model's configuration in its Orbax checkpoints; and ``.lora.h5`` files."""

import dataclasses
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmerge.base import Adapter, LoRA
from jaxmerge.io import atomic, trees
from jaxmerge.io.recipe_file import RECIPE, take_recipe

SUFFIX = ".h5"


@dataclass(frozen=True)
class File:
    """The place of an adapter that is a file of its own, of KerasHub's."""


def alphas(config: str) -> dict[str, float]:
    """The alphas in a model's configuration.

    Args:
        config: Keras's own JSON of the model.

    Returns:
        Layer -> alpha; a layer inside a model has the model's name before its own.
    """
    return {path: float(layer["lora_alpha"] or layer["lora_rank"]) for path, layer in _layers(_parsed(config))}


def with_ranks(config: str, modules: Mapping[str, LoRA]) -> str:
    """A model's configuration in which each layer has the rank of its module, and an alpha that is the same."""
    model = _parsed(config)
    for path, layer in _layers(model):
        if (module := trees.longest_tail(path, modules)) is not None:
            layer.update(lora_rank=modules[module].rank, lora_alpha=modules[module].rank)
    return json.dumps(model)


def _parsed(config: str) -> Any:
    try:
        return json.loads(config)
    except ValueError:
        return {}


def _layers(model: Any, prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The configurations of all layers with LoRA, by their paths."""
    config = model.get("config") if isinstance(model, dict) else None
    for entry in config.get("layers", []) if isinstance(config, dict) else []:
        layer = entry.get("config", {})
        path = f"{prefix}{layer.get('name')}"
        if layer.get("lora_rank"):
            yield path, layer
        yield from _layers(entry, f"{path}.")


def load(path: Path, alpha: trees.Alpha = None, **options: Any) -> Adapter:
    """Reads a ``.lora.h5`` file.

    Its modules are numbers: the layers' places in the model that it was saved from.

    Args:
        path: The file.
        alpha: None for the rank, which is what KerasHub takes it to be.
        **options: Of other formats; only None.

    Returns:
        The adapter, on the host.

    Raises:
        ValueError: If it cannot be read.
    """
    if given := [name for name, value in options.items() if value is not None]:
        raise ValueError(f"{path}: is a file of Keras's, for which {', '.join(given)} means nothing")
    h5py = _h5py(path)
    try:
        data = path.read_bytes()
        with h5py.File(io.BytesIO(data), "r") as file:
            layers = {name: group["vars"] for name, group in file["lora"].items() if name != "vars"}
            tree = {name: {key: np.asarray(array) for key, array in group.items()} for name, group in layers.items()}
    except (OSError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: is not a .lora.h5 file of Keras's: {atomic.one_line(error)}") from None
    adapter = trees.from_file(path, tree, alpha="rank" if alpha is None else alpha, layout="keras")
    record = {"path": str(path), "sha256": trees.digest(tree)}
    metadata = dataclasses.replace(adapter.metadata, name=str(path), place=File(), provenance=json.dumps(record))
    return dataclasses.replace(adapter, metadata=metadata)


def check_target(path: Path, force: bool) -> None:
    """Refuses a target that may not be written.

    Raises:
        ValueError: If something is there that may not be replaced, or the place cannot be written to.
    """
    if not path.name.endswith(SUFFIX):
        raise ValueError(f"{path}: the adapters are .lora.h5 files, and the result is one too: give it such a name")
    atomic.check_file_target(path, force)


def save(adapter: Adapter, path: Path, *, force: bool = False) -> None:
    """Writes a ``.lora.h5`` file, whole or not at all.

    Args:
        adapter: Read from such a file, or merged from such.
        path: The file.
        force: Replace a file.

    Raises:
        OSError: If the disk fails or is full.
    """
    adapter = trees.padded(adapter)
    rank = max(lora.rank for lora in adapter.modules.values())
    record = json.loads(adapter.metadata.provenance)
    recipe = take_recipe(record, path.parent)
    tree = trees.to_state(adapter)
    record["weights_sha256"] = trees.digest(tree)
    buffer = io.BytesIO()
    with _h5py(path).File(buffer, "w") as file:
        file["lora/vars/rank"] = rank
        for name, factors in tree.items():
            for key, array in factors.items():
                file[f"lora/{name}/vars/{key}"] = np.asarray(array)
        file.attrs["jaxmerge"] = json.dumps(record)
    beside = recipe_beside(path)
    if recipe is not None:
        atomic.check_file_target(beside, force)
    atomic.write_file(path, buffer.getvalue(), force=force)
    if recipe is not None:
        atomic.write_file(beside, recipe, force=force)


def recipe_beside(path: Path) -> Path:
    """Where the recipe of a ``.lora.h5`` file lies."""
    return path.with_suffix(f".{RECIPE}")


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of provenance in a ``.lora.h5`` file that jaxmerge wrote; None where there is none."""
    with _h5py(path).File(path, "r") as file:
        record = file.attrs.get("jaxmerge")
    return None if record is None else json.loads(record)


def _h5py(path: Path) -> Any:
    try:
        import h5py
    except ImportError:
        raise ValueError(f"{path}: is an HDF5 file, which needs h5py: pip install 'jaxmerge[keras]'") from None
    return h5py
