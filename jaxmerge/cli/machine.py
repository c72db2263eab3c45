"""What a command runs on: devices, memory, and programs that were compiled before."""

import argparse
import os
from typing import Any

import jax
import platformdirs
from jax.sharding import AxisType, Mesh


def keep_programs(options: argparse.Namespace) -> None:
    """Keeps compiled programs in the user's cache folder, so that a second run of the same shapes compiles nothing."""
    if options.no_compilation_cache:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = platformdirs.user_cache_path("jaxmerge") / "programs"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return
        if not os.access(folder, os.W_OK):
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def placing(options: argparse.Namespace) -> dict[str, Any]:
    """What is to be worked on and in, as arguments of `jaxmerge.merge`."""
    return {"mesh": _mesh(options), "memory": options.memory}


def _mesh(options: argparse.Namespace) -> Mesh | None:
    axes = options.mesh or ([("devices", options.devices)] if options.devices else None)
    if axes is None:
        return None
    wanted, devices = 1, jax.devices()
    for _, size in axes:
        wanted *= size
    if wanted > len(devices):
        kind = devices[0].platform.upper()
        raise ValueError(f"{wanted} devices are asked for, and there {_are(len(devices), kind)}")
    names, sizes = zip(*axes, strict=True)
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names), devices=devices[:wanted])


def _are(count: int, kind: str) -> str:
    return f"is 1 ({kind})" if count == 1 else f"are {count} ({kind})"
