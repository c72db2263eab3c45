"""The file of an adapter's tensors: safetensors, or a pickle of torch's."""

import json
import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from jaxmerge.io import atomic
from jaxmerge.io.peft.keys import FLOATS, TensorSpec

WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"


def read_specs(path: Path) -> dict[str, TensorSpec]:
    """What tensors there are, from their headers where there are such.

    Raises:
        ValueError: If the file is broken.
    """
    if path.name == PICKLED:
        return {key: TensorSpec(_name(array.dtype), array.shape) for key, array in _read_pickled(path).items()}
    try:
        path.open("rb").close()  # The library says of whatever cannot be opened that it is not there.
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        with safetensors.safe_open(path, framework="np") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {key: TensorSpec(s.get_dtype(), tuple(s.get_shape())) for key, s in slices.items()}
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: is not a sound safetensors file: {atomic.one_line(error)}") from None


def read_tensors(path: Path, mapped: bool) -> Mapping[str, np.ndarray]:
    """The tensors of a file whose headers are sound.

    Args:
        path: The file.
        mapped: Whether they stay in it until they are used, where it is no pickle.

    Returns:
        Key -> tensor.

    Raises:
        ValueError: If they cannot be read.
    """
    if path.name == PICKLED:
        return _read_pickled(path)
    try:
        return _map_tensors(path) if mapped else safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError, AttributeError, KeyError, TypeError) as error:
        # The last three are what a dtype provokes that NumPy does not have.
        raise ValueError(f"{path}: cannot be read: {atomic.one_line(error)}") from None


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


def _map_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors where they lie in a safetensors file."""
    with path.open("rb") as file:
        contents = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + int.from_bytes(contents[:8], "little")
    tensors = {}
    for key, entry in json.loads(contents[8:start]).items():
        if key != "__metadata__":
            shape, offset = entry["shape"], start + entry["data_offsets"][0]
            tensors[key] = np.frombuffer(contents, dtype_of(entry["dtype"]), math.prod(shape), offset).reshape(shape)
    return tensors


def safetensors_pieces(tensors: Mapping[str, np.ndarray]) -> list[Any]:
    """What a safetensors file of these tensors holds, piece by piece: the library's own writer copies all of them.

    In the library's order: wide dtypes first, then by name.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        dtype = _name(tensors[name].dtype)
        header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    pieces = [tensors[name].reshape(-1).view(np.uint8).data for name in names if tensors[name].size]
    return [len(head).to_bytes(8, "little") + head, *pieces]


def dtype_of(name: str) -> np.dtype:
    """That of a safetensors header; a TypeError for one that NumPy does not have."""
    if name in FLOATS:
        return np.dtype(getattr(ml_dtypes, FLOATS[name], None) or FLOATS[name])
    return np.dtype("bool" if name == "BOOL" else f"{name[0].lower()}{int(name[1:]) // 8}")


def _name(dtype: np.dtype) -> str:
    names = {value: key for key, value in FLOATS.items()} | {"bool": "BOOL"}
    return names.get(str(dtype), f"{dtype.kind.upper()}{8 * dtype.itemsize}")
