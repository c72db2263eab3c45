"""What a command runs on: devices, memory, and programs that were compiled before."""

import argparse
import math
import os
import sys
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


def join(options: argparse.Namespace) -> None:
    """Joins the other processes, if this is one of several.

    Raises:
        ValueError: If they cannot be found.
    """
    if options.distributed is None:
        return
    given = options.distributed
    if given and not (len(given) == 3 and all(number.isdecimal() for number in given[1:])):
        raise ValueError(
            "--distributed takes nothing, or HOST:PORT, the number of processes, and which this is, from 0"
        )
    explicit = (
        {"coordinator_address": given[0], "num_processes": int(given[1]), "process_id": int(given[2])} if given else {}
    )
    _keep_for_ourselves()
    try:
        jax.distributed.initialize(**explicit)
    except (RuntimeError, ValueError) as error:
        if not given and "should be defined" in str(error):
            raise ValueError(
                "--distributed: nothing here says who the other processes are; give HOST:PORT of the first, how many "
                "there are, and which this is"
            ) from None
        raise ValueError(f"--distributed: {' '.join(str(error).split())[:300]}") from None


def _keep_for_ourselves() -> None:
    """Leaves standard output to us, and sends what native libraries print there (Gloo greets) to standard error."""
    sys.stdout.flush()
    own = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = os.fdopen(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)


def placing(options: argparse.Namespace) -> dict[str, Any]:
    """What is to be worked on and in, as arguments of `jaxmerge.merge`."""
    return {"mesh": _mesh(options), "memory": options.memory}


def _mesh(options: argparse.Namespace) -> Mesh | None:
    axes = options.mesh or ([("devices", options.devices)] if options.devices else None)
    if axes is None and jax.distributed.is_initialized():
        axes = [("devices", jax.device_count())]
    if axes is None:
        return None
    wanted, devices = math.prod(size for _, size in axes), jax.devices()
    if wanted > len(devices):
        kind = devices[0].platform.upper()
        raise ValueError(f"{wanted} devices are asked for, and there {_are(len(devices), kind)}")
    if wanted < len(devices) and jax.distributed.is_initialized():
        raise ValueError(f"{wanted} devices are asked for; several processes use all of their {len(devices)}")
    names, sizes = zip(*axes, strict=True)
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names), devices=devices[:wanted])


def _are(count: int, kind: str) -> str:
    return f"is 1 ({kind})" if count == 1 else f"are {count} ({kind})"
