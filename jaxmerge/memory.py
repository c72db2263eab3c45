"""How much memory a merge may take, and giving back what a file's pages take."""

import mmap
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmerge.base import on_host

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


class Overflow:
    """Where results wait to be written: in memory as long as they fit, and then in a file without a name.

    A context, after which no more are taken; those that were taken stay.

    Args:
        folder: Where the file lies, if there is to be one.
        budget: The bytes that may be kept in memory.
    """

    def __init__(self, folder: Path, budget: int):
        self._folder, self._left, self._file = folder, budget, None

    def __enter__(self) -> "Overflow":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def keep(self, tree: Any) -> Any:
        """The tree, its arrays in the file once there is no room for them; all others as they are."""
        return jax.tree.map(self._keep, tree)

    def _keep(self, leaf: Any) -> Any:
        # What is smaller than a page gains nothing.
        if not isinstance(leaf, np.ndarray | jax.Array) or not on_host(leaf) or leaf.nbytes < mmap.PAGESIZE:
            return leaf
        self._left -= leaf.nbytes
        if self._left >= 0:
            return leaf
        array = np.ascontiguousarray(leaf)
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - for as long as arrays are mapped
        # Mappings begin at multiples of this.
        start = -(-self._file.tell() // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self._file.seek(start)
        self._file.write(array.reshape(-1).view(np.uint8).data)
        self._file.flush()
        mapped = mmap.mmap(self._file.fileno(), array.nbytes, access=mmap.ACCESS_READ, offset=start)
        return np.frombuffer(mapped, array.dtype).reshape(array.shape)


def release(leaf: Any) -> None:
    """Gives back the memory that the pages of a mapped file take; they are read again if they are wanted again."""
    if not isinstance(leaf, np.ndarray | memoryview):
        return
    root: Any = leaf if isinstance(leaf, np.ndarray) else np.asarray(leaf)
    leaf = root
    while isinstance(root, np.ndarray | memoryview):
        root = root.base if isinstance(root, np.ndarray) else root.obj
    if not isinstance(root, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    whole = np.frombuffer(root, np.uint8)
    start = leaf.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    root.madvise(mmap.MADV_DONTNEED, first, min(start + leaf.nbytes, len(root)) - first)
