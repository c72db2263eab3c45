"""Tensors to and from torch: the only module that imports it."""

import enum
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch

from jaxmerge.base import Adapter, AnyArray
from jaxmerge.io import peft
from jaxmerge.io.peft.keys import PREFIX, TensorSpec, read_contents

_SPELLING = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
}


def from_torch(state_dict: Mapping[str, torch.Tensor], config: Any) -> Adapter:
    """See `jaxmerge.from_torch`."""
    config = _plain(config.to_dict() if hasattr(config, "to_dict") else config)
    specs = {
        key: TensorSpec(_SPELLING.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
        for key, tensor in state_dict.items()
    }
    contents = read_contents(config, specs)
    if contents.problems:
        raise ValueError("\n".join(f"the state dict {problem}" for problem in contents.problems))

    def read(key: str, shape: tuple[int, ...]) -> AnyArray:
        return _to_jax(state_dict[key].detach().reshape(shape))

    return peft.build_adapter(config, specs, contents, read, "", {})


def to_torch(adapter: Adapter) -> dict[str, torch.Tensor]:
    """See `jaxmerge.to_torch`."""
    return {PREFIX + name: _to_torch(array) for name, array in peft.export_tensors(adapter).items()}


def read_pickled(path: Path) -> dict[str, np.ndarray]:
    """The tensors of an adapter_model.bin, by torch's unpickler for weights alone: nothing is executed.

    Raises:
        ValueError: If the file is broken, or holds anything but tensors.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: torch will not load it as weights: {reason}") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in tensors.items()
    ):
        raise ValueError(f"{path}: does not hold a state dict of tensors")
    return {key: _to_numpy(tensor.detach()) for key, tensor in tensors.items()}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as JSON would hold it: LoraConfig has sets and enums."""

    def encode(value: Any) -> Any:
        if isinstance(value, enum.Enum):
            return value.value
        if isinstance(value, set | frozenset):
            return sorted(value)
        return str(value)

    return json.loads(json.dumps({str(key): value for key, value in config.items()}, default=encode))


def _to_jax(tensor: torch.Tensor) -> AnyArray:
    if tensor.dtype in (torch.float64, torch.int64) and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        return _to_numpy(tensor)  # JAX would narrow it.
    return jnp.from_dlpack(tensor.contiguous())


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _to_torch(array: np.ndarray) -> torch.Tensor:
    if not array.flags.writeable:
        # A view of a JAX array, which must not change.
        array = array.copy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
