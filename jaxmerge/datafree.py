"""Scores of a merge that need no data: the energy it keeps, how near it is to each task, how large it is."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxmerge.base import Adapter, Array, LoRA, energy_kept, promote

Modules = Mapping[str, LoRA]
# Modules of one shape: ``[M, r, in]`` and ``[M, out, r]``.
_Pair = tuple[Array, Array]


def scores(adapters: Sequence[Adapter]) -> Callable[[Adapter], dict[str, Array]]:
    """An ``evaluate`` for `jaxmerge.sweep`, from the adapters that are merged.

    Args:
        adapters: The tasks.

    Returns:
        A function: merged adapter -> ``energy_kept``, in [0, 1], what truncation left; ``worst_cosine``, in [-1, 1],
        the smallest cosine between the merged weight change and a task's, over all modules together; ``norm``, the
        Frobenius norm of the merged weight change.
    """
    return jax.tree_util.Partial(_scores, [dict(adapter.modules) for adapter in adapters])


def _scores(tasks: Sequence[Modules], merged: Adapter) -> dict[str, Array]:
    square = _inner_product(merged.modules, merged.modules)
    cosines = []
    for task in tasks:
        length = jnp.sqrt(_inner_product(task, task) * square)
        inner = _inner_product(task, merged.modules)
        cosines.append(jnp.where(length > 0, inner / jnp.where(length > 0, length, 1), 0))
    kept = jnp.asarray(energy_kept(merged) if merged.energy else 1.0, jnp.float32)
    return {"energy_kept": kept, "worst_cosine": jnp.min(jnp.stack(cosines)), "norm": jnp.sqrt(square)}


def _inner_product(one: Modules, other: Modules) -> Array:
    """The sum of products of two weight changes' entries over the modules that both have, from their factors."""
    total = jnp.zeros((), jnp.float32)
    for (a, b), (c, d) in _stacks(one, other):
        left = jnp.matmul(b.swapaxes(-1, -2), d, precision="highest")
        right = jnp.matmul(a, c.swapaxes(-1, -2), precision="highest")
        total += jnp.sum(left * right).astype(jnp.float32)
    return total


def _stacks(one: Modules, other: Modules) -> Iterator[tuple[_Pair, _Pair]]:
    """Modules of equal shapes together, so that a program has few products, however many layers there are."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for path in one:
        if path in other:
            shapes = tuple((leaf.shape, leaf.dtype) for lora in (one[path], other[path]) for leaf in (lora.a, lora.b))
            groups.setdefault(shapes, []).append(path)
    for paths in groups.values():
        yield _stack([one[path] for path in paths]), _stack([other[path] for path in paths])


def _stack(loras: Sequence[LoRA]) -> _Pair:
    """Factors in float32 or wider, the scale in B; batch axes count as modules."""
    dtype = promote(loras[0].a.dtype, jnp.float32)
    a = jnp.stack([jnp.asarray(lora.a, dtype) for lora in loras])
    b = jnp.stack([jnp.asarray(lora.scale, dtype) * jnp.asarray(lora.b, dtype) for lora in loras])
    return a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
