"""How a stack of modules is spread over devices: whole modules, never parts of one.

Each device works on its own modules with the same program that a single device would run, so a merge has the
same bits on any mesh and no device waits for another.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec


def over_modules(function: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """Spreads a function of arrays stacked on axis 0 over all devices of a mesh.

    Args:
        function: Takes and returns pytrees of arrays ``[L, ...]``, module by module.
        mesh: None leaves the function as it is. L must be a multiple of the mesh's size.

    Returns:
        A function of the same arguments and results.
    """
    if mesh is None:
        return function
    spec = PartitionSpec(mesh.axis_names)
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)


def device_count(mesh: Mesh | None) -> int:
    """The number of devices modules are spread over."""
    return 1 if mesh is None else mesh.size
