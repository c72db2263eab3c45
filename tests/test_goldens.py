"""What real libraries, absent here, computed for adapters in their own checkpoints (scripts/make_*_golden.py)."""

from pathlib import Path

import numpy as np
import pytest

import jaxmerge as jm
from tests.helpers import relative_error

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:orbax.*"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

GEMMA = Path(__file__).parent / "goldens" / "gemma"


@pytest.fixture(scope="module")
def expected():
    with np.load(GEMMA / "expected.npz") as file:
        return dict(file)


def added(expected, name):
    """By module, what the real layers add to one-hot inputs: `[*inputs, *outputs]`."""
    prefix = f"added/{name}/"
    return {key.removeprefix(prefix): value for key, value in expected.items() if key.startswith(prefix)}


def assert_adds(adapter, wanted):
    assert adapter.modules.keys() == wanted.keys()
    for path, reference in wanted.items():
        delta = np.asarray(jm.delta(adapter.modules[path]))
        assert relative_error(delta, reference.reshape(delta.shape[::-1]).T) < 1e-4, path


@pytest.mark.parametrize("name", ["a", "b"])
def test_gemma_adapters_are_what_the_forward_pass_adds(expected, name):
    assert_adds(jm.load(GEMMA / name), added(expected, name))


def test_gemma_merged_and_written_back(tmp_path, expected):
    adapters = [jm.load(GEMMA / name) for name in "ab"]
    merged = jm.merge(adapters, expected["weights"].tolist())
    assert_adds(merged, added(expected, "merged"))
    jm.save(merged, tmp_path / "merged")
    again = jm.load(tmp_path / "merged")
    assert_adds(again, added(expected, "merged"))
    assert {lora.rank for lora in again.modules.values()} == {5}


def test_gemma_golden_is_not_trivial(expected):
    found = added(expected, "merged")
    assert len(found) == 10
    assert all(np.linalg.norm(change) > 0.1 for change in found.values())
    # `axes` put a change in its kernel's order of axes: heads before the embedding, and 2 for keys and values.
    path = "layer_0.attn.kv_einsum"
    assert found[path].transpose(expected[f"axes/{path}"]).shape == (2, 1, 8, 4)
    logits = {name: expected[f"logits/{name}"] for name in ("base", "a", "b", "merged")}
    assert all(relative_error(logits[name], logits["base"]) > 0.1 for name in ("a", "b", "merged"))
