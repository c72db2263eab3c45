"""Results that wait in a file to be written, and memory that is given back."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.memory import Overflow, release


@pytest.fixture
def tree():
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(40, 300)).astype(np.float32)
    return {
        "first": wide,
        "device": jnp.asarray(wide[:30]),
        "half": wide.astype(ml_dtypes.bfloat16),
        "transposed": wide.T,
        "small": np.float32(2),
        "number": 3.0,
    }


@pytest.mark.parametrize("budget", [0, 50_000, 10**6])
def test_what_does_not_fit_lies_in_a_file_and_is_the_same(tree, tmp_path, budget):
    with Overflow(tmp_path, budget) as overflow:
        kept = overflow.keep(tree)
    assert kept.keys() == tree.keys()
    for name, leaf in tree.items():
        np.testing.assert_array_equal(kept[name], leaf)
        assert np.asarray(kept[name]).dtype == np.asarray(leaf).dtype
    assert kept["small"] is tree["small"]
    assert (kept["transposed"] is tree["transposed"]) == (budget == 10**6)
    assert (kept["device"] is tree["device"]) == (budget > 0)  # In order of the names.
    assert not list(tmp_path.iterdir())  # It has no name.
    release(kept["transposed"])
    release(memoryview(kept["half"].view(np.uint8).reshape(-1)))
    for name, leaf in tree.items():
        np.testing.assert_array_equal(kept[name], leaf)


def test_an_adapter_is_written_from_there_as_from_memory(tmp_path):
    adapters = [jm.load(f"tests/adapters/{name}") for name in ("sms", "movie")]
    merged = jm.merge(adapters)
    jm.save(merged, tmp_path / "memory")
    with Overflow(tmp_path, 10**6) as overflow:
        jm.save(overflow.keep(merged), tmp_path / "file")
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("memory", "file"))
    assert one == other
