"""PEFT's LoRA folder: ``adapter_config.json`` and ``adapter_model.safetensors``. Needs no torch.

Folders of LoHa and LoKr are read too, and are LoRA from then on.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxmerge.base import Adapter
from jaxmerge.io import atomic, card
from jaxmerge.io.peft.config import export_config
from jaxmerge.io.peft.folder import (
    CARD,
    CONFIG,
    OWNED,
    PROVENANCE,
    Headers,
    find_folder,
    read_config,
    read_headers,
    sound_headers,
)
from jaxmerge.io.peft.keys import PREFIX
from jaxmerge.io.peft.tensors import build_adapter, export_tensors
from jaxmerge.io.peft.weights import PICKLED, WEIGHTS, dtype_of, read_tensors, safetensors_pieces
from jaxmerge.io.recipe_file import RECIPE, take_recipe
from jaxmerge.sharding import fitting, from_first_process

__all__ = [
    "CONFIG",
    "PICKLED",
    "PROVENANCE",
    "WEIGHTS",
    "Headers",
    "build_adapter",
    "check_target",
    "export_tensors",
    "find_folder",
    "load",
    "peek",
    "read_config",
    "read_headers",
    "save",
]


def peek(path: Path) -> Adapter:
    """The adapter with the shapes of its tensors in place of the tensors, from the headers alone.

    Raises:
        ValueError: If it cannot be read, or holds something that jaxmerge does not merge.
    """
    headers = sound_headers(path)

    def shape_of(key: str, shape: tuple[int, ...]) -> Any:
        try:
            return jax.ShapeDtypeStruct(shape, dtype_of(headers.tensors[key].dtype))
        except (TypeError, ValueError):
            raise ValueError(f"{path}: {key} is stored as {headers.tensors[key].dtype}, which is not read") from None

    provenance = {"path": str(path)}
    return build_adapter(headers.config, headers.tensors, headers.contents, shape_of, str(path), provenance)


def load(path: Path, mesh: Mesh | None = None, mapped: bool = False) -> Adapter:
    """Reads a PEFT LoRA folder.

    Args:
        path: The folder.
        mesh: What to spread the factors over, along their features; each process reads its own part of the file.
        mapped: Whether arrays on the host stay in the file until they are used.

    Returns:
        The adapter, its arrays on the host if there is no mesh, and in the dtype of the file.

    Raises:
        ValueError: If it cannot be read, or holds something that jaxmerge does not merge.
    """
    headers = sound_headers(path)
    digest = from_first_process(functools.partial(_digest, headers.weights))
    tensors = read_tensors(headers.weights, mapped or mesh is not None)
    provenance = {
        "path": str(path),
        "file": headers.weights.name,
        "sha256": digest,
        "config_sha256": hashlib.sha256((headers.folder / CONFIG).read_bytes()).hexdigest(),
    }

    def read(key: str, shape: tuple[int, ...]) -> Any:
        return tensors[key].reshape(shape)

    adapter = build_adapter(headers.config, headers.tensors, headers.contents, read, str(path), provenance)
    return adapter if mesh is None else _spread(adapter, mesh)


def _spread(adapter: Adapter, mesh: Mesh) -> Adapter:
    """The adapter with ``a`` along ``in`` and ``b`` along ``out`` over all axes of a mesh, where the size divides."""

    def put(array: Any, spec: tuple[Any, ...]) -> Any:
        sharding = fitting(mesh, spec, array.shape)
        return jax.make_array_from_callback(array.shape, sharding, lambda at: array[at])

    modules = {
        path: dataclasses.replace(lora, a=put(lora.a, (None, mesh.axis_names)), b=put(lora.b, (mesh.axis_names, None)))
        for path, lora in adapter.modules.items()
    }
    return dataclasses.replace(adapter, modules=modules)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(pieces: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def check_target(path: Path, force: bool) -> None:
    """Raises the ValueError that `save` would raise for the folder."""
    atomic.check_target(path, force, CONFIG)


def save(adapter: Adapter, path: Path, *, force: bool = False) -> None:
    """Writes a PEFT LoRA folder, whole or not at all.

    Args:
        adapter: Of concrete arrays.
        path: The folder.
        force: Replace a folder that is an adapter; files in it that are neither PEFT's nor jaxmerge's stay.

    Raises:
        ValueError: If the folder may not be written, or the adapter cannot be expressed.
        OSError: If the disk fails or is full.
    """
    record = json.loads(adapter.metadata.provenance)
    recipe = take_recipe(record, path)
    config = export_config(adapter)
    config_file = _json(config)
    tensors = {PREFIX + name: array for name, array in export_tensors(adapter).items()}
    weights = safetensors_pieces(tensors)
    record["weights_sha256"] = _hash(weights)
    record["config_sha256"] = _hash([config_file])
    files = {
        CONFIG: config_file,
        WEIGHTS: weights,
        PROVENANCE: _json(record),
        CARD: card.model_card(config, record).encode(),
        **({} if recipe is None else {RECIPE: recipe}),
    }
    atomic.write_folder(path, files, force=force, marker=CONFIG, owned=OWNED)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
