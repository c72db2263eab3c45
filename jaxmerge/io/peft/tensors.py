"""Adapters from PEFT's tensors, and PEFT's tensors from adapters."""

import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxmerge.base import Adapter, Array, LoRA, Metadata, has_values, promote
from jaxmerge.io import products
from jaxmerge.io.peft.config import as_lora_config
from jaxmerge.io.peft.keys import Contents, Layout, ModuleKeys, TensorSpec, inside_wrapper, natural_order, nominal_rank


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
