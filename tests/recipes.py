"""Small adapters, and recipes that merge them."""

import zlib
from pathlib import Path

import numpy as np

import jaxmerge as jm
from jaxmerge.io.recipe_file import located

ADAPTERS = Path(__file__).parent / "adapters"
PARTS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
PATHS = [f"model.layers.{layer}.{part}" for layer in range(4) for part in PARTS]
SHAPES = {"self_attn.q_proj": (10, 8), "self_attn.v_proj": (6, 8), "mlp.up_proj": (12, 8)}


def shape(path):
    return next((shape for part, shape in SHAPES.items() if path.endswith(part)), (7, 8))


def factors(path, rank=3, seed=0):
    rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
    out, in_ = shape(path)
    a, b = rng.normal(size=(rank, in_)), rng.normal(size=(out, rank))
    return jm.LoRA(a.astype(np.float32), b.astype(np.float32), scale=0.5)


def write(folder, seed=0, rank=3, paths=PATHS):
    """An adapter of a model of four layers, in a folder."""
    adapter = jm.Adapter({path: factors(path, rank, seed) for path in paths})
    jm.save(adapter, folder)
    return jm.load(folder)


def write_three(folder):
    """The adapters a, b and c in a folder: b of another rank, and c without values and with a head of its own."""
    some = [path for path in PATHS if "v_proj" not in path]
    return [write(folder / "a", 1), write(folder / "b", 2, rank=2), write(folder / "c", 3, paths=[*some, "lm_head"])]


def problems(text, folder, name="recipe.yaml"):
    """What is wrong with a recipe, a line each, without the folder's name."""
    (folder / name).write_text(text)
    try:
        jm.merge_recipe(folder / name)
    except ValueError as error:
        return str(error).replace(f"{located(str(folder), '.')}/", "").replace(f"{folder}/", "").splitlines()
    return []


def arrays(adapter):
    return {path: (np.asarray(lora.a), np.asarray(lora.b)) for path, lora in adapter.modules.items()}


def assert_same(one, other):
    """Bit for bit."""
    one, other = arrays(one), arrays(other)
    assert list(one) == list(other)
    for path in one:
        for x, y in zip(one[path], other[path], strict=True):
            np.testing.assert_array_equal(x, y)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
