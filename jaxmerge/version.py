"""Versions, for provenance."""

import functools
import importlib.metadata


@functools.cache
def versions() -> dict[str, str]:
    """The versions of what computes a merge."""
    return {name: importlib.metadata.version(name) for name in ("jaxmerge", "jax", "jaxlib")}
