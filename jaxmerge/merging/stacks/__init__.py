"""``lift ∘ method ∘ project`` on stacks of modules of equal shape: arrays in, arrays out, one compile each.

Kernels are written for one unbatched module and mapped here over modules and their batch axes.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.extend.backend import backends

from jaxmerge import dense, spaces
from jaxmerge.base import Array
from jaxmerge.merging.stacks.binding import Numbers, bind_numbers, find_cuts
from jaxmerge.merging.stacks.inputs import Bucket, Draws, Inputs, flatten_batch
from jaxmerge.merging.stacks.kernel import Pace, in_blocks_passes, merge_unbatched
from jaxmerge.merging.stacks.program import Program
from jaxmerge.sharding import on_all_devices, over_modules
from jaxmerge.sparsify import round_to

__all__ = [
    "Bucket",
    "Draws",
    "Inputs",
    "Numbers",
    "Program",
    "bind_numbers",
    "find_cuts",
    "flatten_batch",
    "in_blocks_passes",
    "merge_module",
    "merge_stack",
]


@functools.partial(jax.jit, static_argnames=("program", "bucket"))
def merge_module(program: Program, bucket: Bucket, inputs: Inputs, numbers: Numbers) -> spaces.Lifted:
    """Merges one module, as `merge_stack` merges L: without the axis L of the factors."""
    expanded = inputs._replace(
        a=tuple(a[None] for a in inputs.a),
        b=tuple(b[None] for b in inputs.b),
    )
    axis = 1 if program.sweeps else 0
    return jax.tree.map(lambda x: jnp.squeeze(x, axis), _merge_stack(program, bucket, expanded, numbers))


@functools.partial(jax.jit, static_argnames=("program", "bucket"))
def merge_stack(program: Program, bucket: Bucket, inputs: Inputs, numbers: Numbers) -> spaces.Lifted:
    """Merges L modules of one bucket with S settings.

    Args:
        program: The method and its space.
        bucket: The modules' shape.
        inputs: Their factors in n adapters.
        numbers: From `bind_numbers`.

    Returns:
        ``[S, L, *batch, rank, in]``, ``[S, L, *batch, out, rank]``, and energies ``[S, L]``; without the axis S if the
        program does not sweep.
    """
    return _merge_stack(program, bucket, inputs, numbers)


def _merge_stack(program: Program, bucket: Bucket, inputs: Inputs, numbers: Numbers) -> spaces.Lifted:
    def merge_one(one: Inputs, pace: Pace) -> spaces.Lifted:
        lifted = merge_unbatched(program, bucket, one, numbers, pace)
        dtype = jnp.dtype(bucket.dtype)
        return lifted._replace(a=round_to(lifted.a, dtype), b=round_to(lifted.b, dtype))

    def merge_each(stack: Inputs) -> spaces.Lifted:
        # On a CPU one module after another: two batched QRs and an SVD in one program never return on
        # jaxlib 0.10.2 with two cores, and the loop costs nothing. Elsewhere, as many at once as fit.
        on_cpu = functools.partial(jax.lax.map, functools.partial(merge_one, pace=Pace(dense.CPU_BLOCK, 1)))
        if set(backends()) == {"cpu"}:
            return on_cpu(stack)
        elsewhere = functools.partial(merge_one, pace=Pace(dense.DEFAULT_BLOCK, program.settings_at_once))
        return jax.lax.platform_dependent(
            stack,
            cpu=on_cpu,
            default=functools.partial(jax.lax.map, elsewhere, batch_size=program.at_once),
        )

    if isinstance(inputs.keys, Draws):
        inputs = inputs._replace(keys=inputs.keys.keys())
    spread = on_all_devices if program.by_rows else over_modules
    lifted = spread(merge_each, program.mesh)(flatten_batch(inputs, bucket.batch))
    layers = math.prod(bucket.batch)

    def unflatten(x: Array) -> Array:
        x = jnp.moveaxis(x.reshape(-1, *bucket.batch, *x.shape[1:]), 1 + len(bucket.batch), 0)
        return x if program.sweeps else jnp.squeeze(x, 0)

    energy = jax.tree.map(lambda x: jnp.sum(x.reshape(-1, layers, x.shape[1]), axis=1).T, lifted.energy)
    energy = energy if program.sweeps else jax.tree.map(lambda x: jnp.squeeze(x, 0), energy)
    return spaces.Lifted(unflatten(lifted.a), unflatten(lifted.b), energy)
