"""How merges are spread over devices, and arrays laid out on them.

A stack of modules is spread by whole modules: each device works on its own with the same program that a single device
would run, so a merge has the same bits on any mesh and no device waits for another. Only where there are more devices
than modules do they share the rows of large ones, see `jaxmerge.dense`. Arrays that come in sharded are gathered, a
stack at a time, on the devices they lie on, and the result is laid out as they were.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def over_modules(function: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """Spreads a function of arrays stacked on axis 0 over all devices of a mesh.

    Args:
        function: Takes and returns pytrees of arrays ``[L, ...]``, module by module.
        mesh: None leaves the function as it is. L must be a multiple of the mesh's size.

    Returns:
        A function of the same arguments and results.
    """
    return function if mesh is None else _mapped(function, mesh, PartitionSpec(mesh.axis_names))


def on_all_devices(function: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """Runs a function of arrays on all devices of a mesh at once, which share its work by collectives of their own."""
    return function if mesh is None else _mapped(function, mesh, PartitionSpec())


def _mapped(function: Callable[..., Any], mesh: Mesh, spec: PartitionSpec) -> Callable[..., Any]:
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    if AxisType.Explicit not in mesh.axis_types:
        return mapped

    def resharded(*arguments: Any) -> Any:
        # With explicit axes arrays must lie as they are wanted, and not be left to the compiler.
        return mapped(*jax.tree.map(lambda x: jax.reshard(x, NamedSharding(mesh, spec)), arguments))

    return resharded


def device_count(mesh: Mesh | None) -> int:
    """The number of devices modules are spread over."""
    return 1 if mesh is None else mesh.size


def placement(array: Any) -> NamedSharding | None:
    """How an array is spread over a mesh; None if it is not, or if that is the compiler's affair."""
    if not isinstance(array, jax.Array):
        return None
    sharding = jax.typeof(array).sharding if isinstance(array, Tracer) else array.sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty or sharding.mesh.size == 1:
        return None
    if isinstance(array, Tracer) and all(axes is None for axes in sharding.spec):
        return None
    return sharding


def gathered(array: Any, mesh: Any) -> Any:
    """An array in full on every device of a mesh; never by way of the host."""
    return _put(array, NamedSharding(mesh, PartitionSpec()))


def seen_everywhere(leaf: Any) -> Any:
    """A leaf as it is, or in full on every device where a process could see only a part of it."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and isinstance(leaf.sharding, NamedSharding):
        return gathered(leaf, leaf.sharding.mesh)
    return leaf


def laid_out(array: Any, sharding: NamedSharding | None) -> Any:
    """An array spread over a mesh as another one was, but for axes whose size does not divide.

    Args:
        array: With as many axes as the other.
        sharding: The `placement` of the other.

    Returns:
        The array.
    """
    return array if sharding is None else _put(array, fitting(sharding.mesh, sharding.spec, array.shape))


def fitting(mesh: Any, spec: Iterable[Any], shape: Sequence[int]) -> NamedSharding:
    """How an array of a shape lies on a mesh, by a specification meant for another.

    Args:
        mesh: The mesh.
        spec: For each axis the mesh's axes it is spread over: a name, several, or None.
        shape: Of the array. What does not divide is not spread; nor is what the mesh has no axis for.

    Returns:
        The sharding.
    """
    sizes = mesh.shape
    named = [() if axes is None else (axes,) if isinstance(axes, str) else tuple(axes) for axes in spec]
    kept = [
        names if all(name in sizes for name in names) and size % math.prod(sizes[name] for name in names) == 0 else ()
        for names, size in zip(named, shape, strict=False)
    ]
    return NamedSharding(mesh, PartitionSpec(*[names or None for names in kept]))


def first_process() -> bool:
    """Whether this process does what only one of several should."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def several_processes() -> bool:
    """Whether this process is one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def from_first_process(make: Callable[[], str]) -> str:
    """A text of 64 ASCII characters, such as a digest, that the first process makes and all get to know."""
    if not several_processes():
        return make()
    from jax.experimental import multihost_utils

    text = make().encode() if first_process() else b" " * 64
    return bytes(multihost_utils.broadcast_one_to_all(np.frombuffer(text, np.uint8))).decode()


def wait_for_all(name: str) -> None:
    """Waits until all processes are here, if there are several."""
    if several_processes():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def _put(array: Any, sharding: NamedSharding) -> Any:
    if isinstance(array, Tracer):
        return jax.reshard(array, sharding)
    moved = jax.device_put(array, sharding)
    # Between processes one at a time: transfers under way together may meet in another order elsewhere, and wait for
    # each other for ever.
    return jax.block_until_ready(moved) if several_processes() else moved
