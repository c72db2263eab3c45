"""What is done once all modules are merged: biases, and the stages that wait for all of them."""

import functools
import operator
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxmerge import lapack
from jaxmerge.base import Adapter, Array, Energy, LoRA, precision, promote
from jaxmerge.merging.staging import Staging, scaled, squared_norms
from jaxmerge.merging.steps.settings import Setting
from jaxmerge.stages import restoring_factor
from jaxmerge.values import at


def after_all_modules(
    staging: Staging,
    setting: Setting,
    adapters: Sequence[Adapter],
    modules: dict[str, LoRA],
    energy: dict[str, Energy],
) -> tuple[dict[str, LoRA], dict[str, Energy]]:
    """The stages that wait for all modules: each is a factor for the whole model, or one for each module."""
    done, paths = len(staging.of_modules), list(modules)
    for stage, numbers in zip(staging.stages[done:], staging.numbers[done:], strict=True):
        factors = _restoring(setting, adapters, modules) if stage.whole else numbers["factor"]
        for path in paths:
            factor = at(factors, path)
            modules[path] = scaled(modules[path], factor)
            energy[path] = jax.tree.map(lambda x, f=factor: x * jnp.asarray(f, x.dtype) ** 2, energy[path])
    return modules, energy


def _restoring(setting: Setting, adapters: Sequence[Adapter], modules: Mapping[str, LoRA]) -> Array:
    """The factor that gives the whole merge the adapters' mean norm."""
    n = len(adapters)
    total, sources, weighed = jnp.zeros(()), jnp.zeros(n), jnp.zeros(n)
    with lapack.single_threaded():
        for path, lora in modules.items():
            present = [i for i, adapter in enumerate(adapters) if path in adapter.modules]
            merged, own = squared_norms(lora, [adapters[i].modules[path] for i in present])
            weights = jnp.stack([jnp.asarray(at(setting.weights[i], path), total.dtype) for i in present])
            own, at_present = own.astype(total.dtype), jnp.asarray(present)
            total += merged.astype(total.dtype)
            sources = sources.at[at_present].add(own)
            weighed = weighed.at[at_present].add(weights**2 * own)
    # Where an adapter's weight differs between modules, the one that gives its change the norm it has by those.
    shared = [jnp.asarray(w, total.dtype) if not isinstance(w, Mapping) else None for w in setting.weights]
    rms = jnp.sqrt(weighed / jnp.where(sources > 0, sources, 1))
    weights = jnp.stack([rms[i] if weight is None else weight for i, weight in enumerate(shared)])
    return restoring_factor(total, sources, weights)


def merged_bias(
    settings: Sequence[Setting], adapters: Sequence[Adapter], path: str, dtype: jnp.dtype, sweeps: bool
) -> Array | None:
    """``Σ wᵢ sᵢ biasᵢ`` of a module over the adapters that have one: exact, whatever the method.

    ``[out]``, or ``[S, out]`` in a sweep; None where no adapter has one.
    """
    with_bias = [i for i, one in enumerate(adapters) if path in one.modules and one.modules[path].bias is not None]
    loras = [adapters[i].modules[path] for i in with_bias]
    biases = [_bias_of(setting.weights_at(path, with_bias), loras, dtype) for setting in settings]
    return jnp.stack(biases) if sweeps and biases[0] is not None else biases[0]  # type: ignore[arg-type]


def _bias_of(weights: Sequence[ArrayLike], loras: Sequence[LoRA], dtype: jnp.dtype) -> Array | None:
    wide = promote(dtype, jnp.float32)
    with precision(wide):
        terms = [
            jnp.asarray(weight, wide) * jnp.asarray(lora.scale, wide) * jnp.asarray(lora.bias, wide)
            for weight, lora in zip(weights, loras, strict=True)
        ]
        return functools.reduce(operator.add, terms).astype(dtype) if terms else None
