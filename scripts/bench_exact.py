"""Times an exact rank-16 merge of four r=16 adapters on one 4096×4096 module against a dense SVD of it.

    python scripts/bench_exact.py [--size 4096] [--rank 16] [--adapters 4]

Both run in this process, on the same factors and with the same number of threads allowed; compile time is
given apart. The dense SVD is what PEFT's `svd` combination type does (there with full_matrices=True, which
only adds to it).
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmerge as jm


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Wall seconds of a call, and its result."""
    start = time.perf_counter()
    result = jax.block_until_ready(function())
    return time.perf_counter() - start, result


def main() -> None:
    """Prints times, their ratio, and how far the results are apart."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=4)
    options = parser.parse_args()
    rng = np.random.default_rng(0)

    def factor(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    n, r = options.size, options.rank
    adapters = [jm.Adapter({"module": jm.LoRA(factor(r, n), factor(n, r), 0.5)}) for _ in range(options.adapters)]
    cold, _ = timed(lambda: jm.merge(adapters, rank=r))
    warm, merged = min((timed(lambda: jm.merge(adapters, rank=r)) for _ in range(5)), key=lambda pair: pair[0])

    dense_svd = jax.jit(lambda x: jnp.linalg.svd(x, full_matrices=False))
    deltas = sum(jm.delta(adapter.modules["module"]) for adapter in adapters) / len(adapters)
    compiled = dense_svd.lower(deltas).compile()
    dense, (u, s, vt) = timed(lambda: compiled(deltas))
    reference = (u[:, :r] * s[:r]) @ vt[:r]
    apart = jnp.linalg.norm(jm.delta(merged.modules["module"]) - reference) / jnp.linalg.norm(reference)

    print(f"{options.adapters} adapters of rank {r} on {n}×{n}, merged at rank {r}")
    print(f"jaxmerge, first call   {cold:9.4f} s")
    print(f"jaxmerge               {warm:9.4f} s")
    print(f"dense SVD              {dense:9.4f} s")
    print(f"ratio                  {dense / warm:9.0f} ×")
    print(f"relative difference    {float(apart):9.1e}")


if __name__ == "__main__":
    main()
