"""PEFT's LoRA folder: ``adapter_config.json`` and ``adapter_model.safetensors``. Needs no torch.

Folders of LoHa and LoKr are read too, and are LoRA from then on.
"""

import dataclasses
import functools
import hashlib
import json
import math
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import Mesh

from jaxmerge.base import Adapter, Array, LoRA, Metadata, has_values, promote
from jaxmerge.io import atomic, card, products
from jaxmerge.io.peft_config import as_lora_config, export_config
from jaxmerge.io.peft_keys import (
    FLOATS,
    PREFIX,
    Contents,
    Layout,
    ModuleKeys,
    TensorSpec,
    inside_wrapper,
    natural_order,
    nominal_rank,
    read_contents,
)
from jaxmerge.io.recipe_file import RECIPE, take_recipe
from jaxmerge.sharding import fitting, from_first_process

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
PROVENANCE = "jaxmerge.json"
CARD = "README.md"
OWNED = (CONFIG, WEIGHTS, PICKLED, PROVENANCE, CARD, RECIPE)


@dataclass(frozen=True)
class Headers:
    """An adapter folder before its weights are read.

    Attributes:
        folder: Where the files lie; a subfolder of what was asked for if the adapter is saved under its name.
        weights: The file with the tensors.
        config: The parsed adapter_config.json.
        tensors: Key -> header.
        contents: The tensors sorted into modules.
    """

    folder: Path
    weights: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorSpec]
    contents: Contents


def find_folder(path: Path) -> Path:
    """The folder that holds the adapter: the path, or its only subfolder with an adapter in it.

    Raises:
        ValueError: If there is none, or several.
    """
    try:
        if not path.exists():
            raise ValueError(f"{path}: there is no such folder")
    except (OSError, RuntimeError) as error:  # A name too long, a link to itself.
        raise ValueError(f"{path}: cannot be opened: {atomic.one_line(error)}") from None
    if path.is_file():
        if path.name in (CONFIG, WEIGHTS, PICKLED):
            return path.parent
        raise ValueError(f"{path}: is a file; give the adapter's folder")
    if (path / CONFIG).is_file():
        return path
    inner = sorted(folder for folder in path.iterdir() if (folder / CONFIG).is_file())
    if len(inner) > 1:
        raise ValueError(f"{path}: holds several adapters ({', '.join(f.name for f in inner)}); name one of them")
    if not inner:
        raise ValueError(f"{path}: is not a PEFT adapter, there is no {CONFIG} in it")
    return inner[0]


def read_headers(path: Path) -> Headers:
    """Reads everything but the weights.

    Raises:
        ValueError: If the files are missing or broken. What they hold is not judged here: see
            `Headers.contents`.
    """
    folder = find_folder(path)
    config = read_config(folder / CONFIG)
    if (folder / WEIGHTS).is_file():
        weights = folder / WEIGHTS
        tensors = _read_safetensors_header(weights)
    elif (folder / PICKLED).is_file():
        weights = folder / PICKLED
        tensors = {
            key: TensorSpec(_safetensors_name(array.dtype), array.shape)
            for key, array in _read_pickled(weights).items()
        }
    else:
        raise ValueError(f"{folder}: there is no {WEIGHTS} in it")
    return Headers(folder, weights, config, tensors, read_contents(config, tensors))


def read_config(path: Path) -> dict[str, Any]:
    """The contents of an adapter_config.json.

    Raises:
        ValueError: If it cannot be read, or is no JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {atomic.one_line(error)}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: is not a JSON object")
    return config


def _read_safetensors_header(path: Path) -> dict[str, TensorSpec]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {key: TensorSpec(s.get_dtype(), tuple(s.get_shape())) for key, s in slices.items()}
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: is not a sound safetensors file: {atomic.one_line(error)}") from None


def _read_pickled(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch  # noqa: F401
    except ImportError:
        raise ValueError(
            f"{path}: is a pickle, which only torch can read safely: pip install 'jaxmerge[torch]', or save it "
            "again as safetensors"
        ) from None
    from jaxmerge.io.torch import read_pickled

    return read_pickled(path)


def peek(path: Path) -> Adapter:
    """The adapter with the shapes of its tensors in place of the tensors, from the headers alone.

    Raises:
        ValueError: If it cannot be read, or holds something that jaxmerge does not merge.
    """
    headers = _sound_headers(path)

    def shape_of(key: str, shape: tuple[int, ...]) -> Any:
        try:
            return jax.ShapeDtypeStruct(shape, _dtype(headers.tensors[key].dtype))
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
    headers = _sound_headers(path)
    tensors, digest = _read_tensors(headers, mapped or mesh is not None)
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


def _sound_headers(path: Path) -> Headers:
    headers = read_headers(path)
    if headers.contents.problems:
        raise ValueError("\n".join(f"{path}: {problem}" for problem in headers.contents.problems))
    return headers


def _read_tensors(headers: Headers, mapped: bool) -> tuple[Mapping[str, np.ndarray], str]:
    digest = from_first_process(functools.partial(_digest, headers.weights))
    if headers.weights.name == PICKLED:
        return _read_pickled(headers.weights), digest
    try:
        if mapped:
            return _map_tensors(headers.weights), digest
        return safetensors.numpy.load_file(headers.weights), digest
    except (OSError, safetensors.SafetensorError, AttributeError, KeyError, TypeError) as error:
        # The last three are what a dtype provokes that NumPy does not have.
        raise ValueError(f"{headers.weights}: cannot be read: {atomic.one_line(error)}") from None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _map_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors where they lie in a safetensors file that has been found to be sound."""
    with path.open("rb") as file:
        contents = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + int.from_bytes(contents[:8], "little")
    tensors = {}
    for key, entry in json.loads(contents[8:start]).items():
        if key != "__metadata__":
            shape, offset = entry["shape"], start + entry["data_offsets"][0]
            tensors[key] = np.frombuffer(contents, _dtype(entry["dtype"]), math.prod(shape), offset).reshape(shape)
    return tensors


def build_adapter(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorSpec],
    contents: Contents,
    read: Callable[[str, tuple[int, ...]], Any],
    name: str,
    provenance: Mapping[str, Any],
) -> Adapter:
    """Puts an adapter together.

    Args:
        config: The parsed adapter_config.json.
        tensors: Key -> header.
        contents: What is in it, without problems.
        read: ``(key, shape) ->`` the tensor, in that shape.
        name: What messages call it.
        provenance: Where it came from.

    Returns:
        The adapter.
    """
    modules, layouts = {}, []
    for path, module in contents.modules.items():
        layouts.append((path, module.layout))
        if module.product is not None:
            modules[path] = _multiplied_out(module, contents.kind, tensors, read)
            continue
        a, b = module.keys["a"], module.keys["b"]
        a_shape, b_shape = tensors[a].shape, tensors[b].shape
        modules[path] = LoRA(
            a=read(a, (a_shape[0], math.prod(a_shape[1:]))),
            b=read(b, b_shape[:2]),
            scale=module.scale,
            bias=read(module.keys["bias"], b_shape[:1]) if "bias" in module.keys else None,
        )
    rank = nominal_rank(config)
    if contents.kind != "LORA":
        # What is of another kind has its exact ranks, whatever it declares.
        rank, config = None, as_lora_config(config)
        provenance = {**provenance, "converted_from": products.NAMES[contents.kind]}
    metadata = Metadata(
        format="peft",
        name=name,
        base_model=config.get("base_model_name_or_path") or None,
        rank=rank,
        layouts=tuple(layouts),
        config=json.dumps(config, sort_keys=True),
        provenance=json.dumps(provenance),
        own_base=contents.own_base,
    )
    extras = {name: read(key, tensors[key].shape) for name, key in contents.extras.items()}
    return Adapter(modules=modules, extras=extras, metadata=metadata)


def _multiplied_out(
    module: ModuleKeys,
    kind: str,
    tensors: Mapping[str, TensorSpec],
    read: Callable[[str, tuple[int, ...]], Any],
) -> LoRA:
    """The exact LoRA factors of a module of LoHa or LoKr; of shapes alone their shapes."""
    assert module.product is not None
    found = {role: read(key, tensors[key].shape) for role, key in module.keys.items()}
    if all(map(has_values, found.values())):
        return LoRA(*products.factors(kind, found), module.scale)
    (out, in_), rank = module.product.features, module.product.rank
    dtype = promote(np.float32, *(leaf.dtype for leaf in found.values()))
    shape_of: Any = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    return LoRA(shape_of((rank, in_)), shape_of((out, rank)), module.scale)


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
    tensors = {PREFIX + name: array for name, array in export_tensors(adapter).items()}
    files = {
        CONFIG: _json(config),
        WEIGHTS: _safetensors(tensors),
        PROVENANCE: _json(record),
        CARD: card.model_card(config, record).encode(),
        **({} if recipe is None else {RECIPE: recipe}),
    }
    atomic.write_folder(path, files, force=force, marker=CONFIG, owned=OWNED)


def _safetensors(tensors: Mapping[str, np.ndarray]) -> list[Any]:
    """What a safetensors file of these tensors holds, piece by piece: the library's own writer copies all of them.

    In the library's order: wide dtypes first, then by name.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        dtype = _safetensors_name(tensors[name].dtype)
        header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    pieces = [tensors[name].reshape(-1).view(np.uint8).data for name in names if tensors[name].size]
    return [len(head).to_bytes(8, "little") + head, *pieces]


def export_tensors(adapter: Adapter) -> dict[str, np.ndarray]:
    """The adapter's tensors on the host, under PEFT's keys without the prefix."""
    layouts = dict(adapter.metadata.layouts)
    with_bias = any(lora.bias is not None for lora in adapter.modules.values())
    tensors = {}
    for path in sorted(adapter.modules, key=natural_order):
        lora, layout = adapter.modules[path], layouts.get(path, Layout())
        if lora.batch:
            raise ValueError(f"module {path} has batch axes {lora.batch}, which PEFT's format does not have")
        a, b = _host(lora.a), _host(lora.b)
        if layout.kind == "embedding":
            tensors[f"{path}.lora_embedding_A"], tensors[f"{path}.lora_embedding_B"] = a, b
        else:
            ones = [1] * len(layout.kernel)
            tensors[f"{path}.lora_A.weight"] = a.reshape(
                a.shape[0], a.shape[1] // math.prod(layout.kernel), *layout.kernel
            )
            tensors[f"{path}.lora_B.weight"] = b.reshape(*b.shape, *ones)
        if with_bias:  # PEFT's switch is for all modules at once.
            bias = np.zeros(b.shape[0], b.dtype) if lora.bias is None else _host(lora.bias)
            tensors[f"{path}.lora_B.bias"] = bias
    extras = {inside_wrapper(name, adapter.modules): _host(array) for name, array in adapter.extras.items()}
    return tensors | extras


def _host(array: Array | np.ndarray) -> np.ndarray:
    return np.asarray(array, order="C")


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _dtype(name: str) -> np.dtype:
    """Of a safetensors header; a TypeError for one that NumPy does not have."""
    if name in FLOATS:
        return np.dtype(getattr(ml_dtypes, FLOATS[name], None) or FLOATS[name])
    return np.dtype("bool" if name == "BOOL" else f"{name[0].lower()}{int(name[1:]) // 8}")


def _safetensors_name(dtype: np.dtype) -> str:
    names = {value: key for key, value in FLOATS.items()} | {"bool": "BOOL"}
    return names.get(str(dtype), f"{dtype.kind.upper()}{8 * dtype.itemsize}")
