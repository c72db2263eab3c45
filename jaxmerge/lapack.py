"""How LAPACK's threads are kept in hand on a CPU."""

import contextlib
import functools
import threading
from collections.abc import Iterator

import threadpoolctl

_LOCK = threading.RLock()


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Keeps OpenBLAS from spreading one thin QR or product over all cores.

    On an idle machine that gains nothing. On a busy one its threads spin at thousands of barriers while they
    wait for a core: a merge of 0.1 s was seen to take a minute. The setting is the process's, hence the lock.
    """
    with _LOCK, _pools().limit(limits=1, user_api="blas"):
        yield


@functools.cache
def _pools() -> threadpoolctl.ThreadpoolController:
    import scipy.linalg.cython_lapack  # noqa: F401 - the LAPACK that jaxlib calls, loaded for certain

    return threadpoolctl.ThreadpoolController()
