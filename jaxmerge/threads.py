"""NumPy on all cores: its passes over arrays release the interpreter's lock."""

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def each(function: Callable[[T], R], items: Iterable[T], advance: Callable[[], object] = lambda: None) -> list[R]:
    """What a function makes of each item, in order.

    Args:
        function: It must not call JAX, whose settings are each thread's own.
        items: The items.
        advance: Called here for each item that is done, in order.

    Returns:
        What was made of each.
    """
    made = []
    for result in _pool(os.getpid()).map(function, items):
        made.append(result)
        advance()
    return made


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Of this process: a pool does not survive a fork."""
    del process
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ThreadPoolExecutor(cores, thread_name_prefix="jaxmerge")
