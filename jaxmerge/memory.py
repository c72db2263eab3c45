"""How much memory a merge may take, and giving back what a file's pages take."""

import mmap
import os
import re
from typing import Any

import jax
import numpy as np

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_memory(text: str) -> int:
    """Bytes from ``"2GB"``, ``"500MiB"`` or a plain number.

    Raises:
        ValueError: If it is none of these, or 0.
    """
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([KMGT]I?)?B?\s*", text.upper())
    size = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if size < 1:
        raise ValueError(f"memory is a size like 2GB or 500MiB, got {text}")
    return size


def default_memory(platform: str | None = None) -> int:
    """A sixteenth of what the host has, or a quarter of what one of its accelerators has."""
    device = jax.devices(platform)[0]
    limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
    if limit is not None:
        return limit // 4
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 16
    except (AttributeError, ValueError, OSError):  # Not everywhere.
        return 2**29


def release(leaf: Any) -> None:
    """Gives back the memory that the pages of a mapped file take; they are read again if they are wanted again."""
    if not isinstance(leaf, np.ndarray):
        return
    root: Any = leaf
    while isinstance(root, np.ndarray | memoryview):
        root = root.base if isinstance(root, np.ndarray) else root.obj
    if not isinstance(root, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    whole = np.frombuffer(root, np.uint8)
    start = leaf.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    root.madvise(mmap.MADV_DONTNEED, first, min(start + leaf.nbytes, len(root)) - first)
