"""Settings and fixtures. What needs torch is imported where it is used: the other tests run without it."""

import os
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Workers of a parallel run are told the width of a terminal that they do not write to.
os.environ.pop("COLUMNS", None)
# Nothing of the tests goes into the user's cache folder.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
# As `jaxmerge.lapack` has it: the BLAS of NumPy and SciPy would spin on all cores for matrices of these sizes, and each
# process of a parallel run on all of them.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

# Most of the time would go into optimising programs of which each runs once. Left as they come they take a third of it.
# `XLA_FLAGS= scripts/test` has them as users have them, and so have tests that start processes of several devices.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    # JAX ends where it meets a flag that it does not have.
    + " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10."),
)

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import pytest
import threadpoolctl

if TYPE_CHECKING:
    import torch

    from tests.cohort import Cohort

LINEARS = ["first", "second", "third"]

jax.config.update("jax_numpy_dtype_promotion", "strict")
# Where a plugin of pytest has imported NumPy already.
threadpoolctl.threadpool_limits(1, user_api="blas")


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_file() -> Iterator[None]:
    """Frees what a file has compiled.

    A program holds several memory maps, of which Linux gives a process 65,530: a worker that keeps those of all tests
    ends in a segmentation fault.
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def make_cohort(tmp_path_factory: pytest.TempPathFactory) -> "Callable[..., Cohort]":
    """Makes a `Cohort` in a folder of its own."""
    from tests.cohort import Cohort, Linears

    def make(configs: Sequence[Mapping[str, Any]], model: "Callable[[], torch.nn.Module]" = Linears) -> "Cohort":
        return Cohort(model, configs, tmp_path_factory.mktemp("cohort"))

    return make


@pytest.fixture(scope="session")
def equal_ranks(make_cohort: "Callable[..., Cohort]") -> "Cohort":
    """Three adapters of rank 4 with alphas of their own."""
    return make_cohort([{"r": 4, "lora_alpha": alpha, "target_modules": LINEARS} for alpha in (8, 4, 2)])


@pytest.fixture(scope="session")
def mixed(make_cohort: "Callable[..., Cohort]") -> "Cohort":
    """Four adapters that differ in everything that may differ."""
    return make_cohort(
        [
            {"r": 4, "lora_alpha": 8, "target_modules": LINEARS},
            {"r": 2, "lora_alpha": 16, "target_modules": ["first", "third"], "use_rslora": True},
            {
                "r": 3,
                "lora_alpha": 6,
                "target_modules": LINEARS,
                "rank_pattern": {"second": 5},
                "alpha_pattern": {"third": 1},
            },
            {"r": 1, "lora_alpha": 1, "target_modules": ["second"]},
        ]
    )
