"""A checked merge, cut into steps: stacks of modules that are merged in one call."""

import dataclasses
import functools
import math
import operator
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxmerge import lapack
from jaxmerge.base import Adapter, Array, Energy, LoRA, on_host, precision, promote
from jaxmerge.merging.checks import all_paths
from jaxmerge.merging.stacks import Bucket, Inputs, Program, bind_numbers, merge_stack
from jaxmerge.sharding import device_count, gathered, laid_out, placement


@dataclass(frozen=True, eq=False)
class Plan:
    """A merge that has been checked and not yet run.

    Attributes:
        program: The method and its space.
        adapters: In the user's order.
        weights: One per adapter.
        numbers: The numeric hyperparameters.
        key: For a method that draws.
        buckets: The modules of each bucket, by the positions of the adapters that have them.
        rest: The merged adapter without its modules.
    """

    program: Program
    adapters: Sequence[Adapter]
    weights: Sequence[ArrayLike]
    numbers: Mapping[str, Any]
    key: Array | None
    buckets: Mapping[tuple[Bucket, tuple[int, ...]], Sequence[str]]
    rest: Adapter

    def steps(self) -> list["Step"]:
        """The stacks to merge: each bucket in parts of equal size, so that it compiles once."""
        devices = device_count(self.program.mesh)
        steps = []
        for (bucket, present), paths in self.buckets.items():
            parts = math.ceil(len(paths) / (self.program.modules_at_once(bucket) * devices))
            size = math.ceil(len(paths) / parts)
            padded = math.ceil(size / devices) * devices
            steps += [Step(self, bucket, present, paths[i : i + size], padded) for i in range(0, len(paths), size)]
        return steps

    def finish(self, results: Sequence[Mapping[str, tuple[LoRA, Energy]]]) -> Adapter:
        """The merged adapter, from the results of all steps."""
        merged = {path: result for step in results for path, result in step.items()}
        modules, energy = {}, {}
        for path in all_paths(self.adapters):
            lora, energy[path] = merged[path]
            modules[path] = dataclasses.replace(lora, bias=self._bias(path, lora.a.dtype))
        return dataclasses.replace(self.rest, modules=modules, energy=energy)

    def _bias(self, path: str, dtype: jnp.dtype) -> Array | None:
        """``Σ wᵢ sᵢ biasᵢ`` over the adapters that have one: exact, whatever the method."""
        wide = promote(dtype, jnp.float32)
        with precision(wide):
            terms = [
                jnp.asarray(weight, wide) * jnp.asarray(lora.scale, wide) * jnp.asarray(lora.bias, wide)
                for weight, adapter in zip(self.weights, self.adapters, strict=True)
                if (lora := adapter.modules.get(path)) is not None and lora.bias is not None
            ]
            return functools.reduce(operator.add, terms).astype(dtype) if terms else None


@dataclass(frozen=True, eq=False)
class Step:
    """Modules of one bucket that are merged in one call.

    Attributes:
        plan: What they are part of.
        bucket: What they share.
        present: The positions of the adapters that have them.
        paths: The modules.
        padded: How many the compiled program takes; the last one is repeated to fill it.
    """

    plan: Plan
    bucket: Bucket
    present: tuple[int, ...]
    paths: Sequence[str]
    padded: int

    def run(self) -> dict[str, tuple[LoRA, Energy]]:
        """Merges the modules: path -> factors and what their truncation lost."""
        with precision(self.bucket.wide), lapack.single_threaded():
            merged = jax.block_until_ready(merge_stack(*self._arguments()))
            a, b, total, lost, missed = map(_unstack, jax.tree.leaves(merged))
            first = [self.plan.adapters[self.present[0]].modules[path] for path in self.paths]
            return {
                path: (
                    LoRA(laid_out(a[i], placement(lora.a)), laid_out(b[i], placement(lora.b))),
                    Energy(total[i], lost[i], missed[i]),
                )
                for i, (path, lora) in enumerate(zip(self.paths, first, strict=True))
            }

    def lower(self) -> jax.stages.Lowered:
        """The program, not yet compiled."""
        with precision(self.bucket.wide):
            return merge_stack.lower(*self._arguments())

    def _arguments(self) -> tuple[Any, ...]:
        plan, present, wide = self.plan, self.present, self.bucket.wide
        paths = [*self.paths, *[self.paths[-1]] * (self.padded - len(self.paths))]
        loras = [[plan.adapters[i].modules[path] for path in paths] for i in present]
        placements = [placement(leaf) for row in loras for lora in row for leaf in (lora.a, lora.b)]
        mesh = next((found.mesh for found in placements if found is not None), None)
        inputs = Inputs(
            a=tuple(_stack([lora.a for lora in row], mesh) for row in loras),
            b=tuple(_stack([lora.b for lora in row], mesh) for row in loras),
            scales=_table([[lora.scale for lora in row] for row in loras], wide),
            weights=_table([[plan.weights[i]] * len(paths) for i in present], wide),
            keys=None if plan.key is None else _module_keys(plan.key, paths, present),
        )
        return plan.program, self.bucket, inputs, bind_numbers(plan.program, self.bucket, plan.numbers)


def _table(rows: Sequence[Sequence[ArrayLike]], dtype: str) -> Array:
    """``[L, n]`` from n rows of L numbers, put together on the host if they are there."""
    if any(isinstance(value, jax.Array) for row in rows for value in row):
        return jnp.stack([jnp.stack([jnp.asarray(value, dtype) for value in row]) for row in rows], axis=1)
    with np.errstate(over="ignore"):  # A weight too large for the dtype makes a result that is refused.
        return jnp.asarray(np.asarray(rows, dtype).T)


def _stack(arrays: Sequence[Any], mesh: Any) -> Array:
    """Stacks on the host what lies on the host: one transfer instead of one per module.

    What is spread over a mesh is gathered on all its devices.
    """
    if all(isinstance(array, np.ndarray) for array in arrays):
        return jnp.asarray(np.stack(arrays))
    return jnp.stack([jnp.asarray(array) if mesh is None else gathered(array, mesh) for array in arrays])


def _unstack(array: Array) -> list[Array]:
    """The entries along axis 0. What lies in the host's memory is cut there, which compiles nothing."""
    if not on_host(array) or len(array.devices()) > 1:
        return list(array)
    return [jnp.asarray(entry) for entry in np.asarray(array)]


def _module_keys(key: Array, paths: Sequence[str], present: Sequence[int]) -> Array:
    """``[L, n]`` keys, from a stable hash of the path and the adapter's position: nothing else matters."""
    hashes = np.array([zlib.crc32(path.encode()) for path in paths], np.uint32)
    return _fold_keys(key, jnp.asarray(hashes), jnp.asarray(np.array(present, np.uint32)))


@jax.jit
def _fold_keys(key: Array, hashes: Array, positions: Array) -> Array:
    fold = jax.random.fold_in
    return jax.vmap(lambda h: jax.vmap(lambda i: fold(fold(key, h), i))(positions))(hashes)
