"""A merge ends: jaxlib 0.10.2 on two cores never returns from two batched QRs and an SVD in one program."""

import subprocess
import sys

import pytest

PROGRAM = """
import jax, numpy as np
import jaxmerge as jm

rng = np.random.default_rng(0)
def adapter(rank, out, in_, modules):
    return jm.Adapter({f"m.{i}": jm.LoRA(rng.normal(size=(rank, in_)).astype(np.float32),
                                         rng.normal(size=(out, rank)).astype(np.float32)) for i in range(modules)})
"""

CASES = {
    "exact, many modules": """
adapters = [adapter(16, 2048, 2048, 16) for _ in range(4)]
for _ in range(3):
    jax.block_until_ready(jm.merge(adapters, rank=16))
""",
    "inside the user's jit": """
adapters = [adapter(16, 2048, 1024, 16) for _ in range(4)]
jax.block_until_ready(jax.jit(lambda adapters: jm.merge(adapters, rank=16))(adapters))
""",
    "two shapes in the user's jit": """
a, b = ([adapter(16, 1024, n, 8) for _ in range(4)] for n in (512, 2048))
jax.block_until_ready(jax.jit(lambda a, b: (jm.merge(a, rank=16), jm.merge(b, rank=16)))(a, b))
""",
    "dense, large enough for block Krylov": """
adapters = [adapter(8, 600, 600, 4) for _ in range(3)]
jax.block_until_ready(jm.merge(adapters, method="ties", density=0.2))
""",
    "dense, decomposed whole": """
adapters = [adapter(8, 256, 300, 8) for _ in range(3)]
jax.block_until_ready(jm.merge(adapters, method="ties", density=0.2))
""",
    "spread over eight devices": """
mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
adapters = [adapter(16, 512, 512, 16) for _ in range(4)]
jax.block_until_ready(jm.merge(adapters, rank=16, mesh=mesh))
""",
}


@pytest.mark.parametrize("case", CASES)
def test_ends(case, monkeypatch):
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # As many as a user's process has.
        monkeypatch.delenv(name)
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8" if "eight" in case else "")
    done = subprocess.run([sys.executable, "-c", PROGRAM + CASES[case]], timeout=100, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
