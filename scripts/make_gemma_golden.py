"""Makes tests/goldens/gemma with the gemma library: two adapters, and what its forward pass adds for them.

Run it where `gemma` and jaxmerge are installed (Python 3.12): `python scripts/make_gemma_golden.py`. It then merges the
adapters with jaxmerge, restores the result into the real model at the merged rank, and exits non-zero if the logits
are not those of the base whose kernels were changed by the weighted sum.
"""

import argparse
import dataclasses
import math
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from gemma import gm, peft
from gemma.gm.nn import _layers, _lora
from goldens import emptied

import jaxmerge as jm

GOLDEN = Path(__file__).parents[1] / "tests" / "goldens" / "gemma"
WEIGHTS = {"a": 1.0, "b": -0.5}
RANKS = {"a": 2, "b": 3}
TOKENS = np.array([[2, 5, 7, 1, 3, 11]])
TOLERANCE = 1e-4


def tiny():
    """Gemma 3 270M with everything small, and two layers, one of each kind of attention."""
    fields = {field.name: field for field in dataclasses.fields(gm.nn.Gemma3_270M)}
    published = fields["config"].default
    config = dataclasses.replace(
        published,
        num_embed=16,
        embed_dim=8,
        hidden_dim=12,
        num_heads=2,
        head_dim=4,
        num_kv_heads=1,
        attention_types=published.attention_types[4:6],
        sliding_window_size=4,
    )
    return gm.nn.Gemma3_270M(config=config, dtype=jnp.float32)


def with_lora(rank):
    """The model with gemma's LoRA around it."""
    return gm.nn.LoRA(rank=rank, model=tiny(), dtype=jnp.float32)


def initial(model):
    """Parameters of the model's own making.

    Not jitted: flax's jit in gemma's model does not see the rank, and `init` at a second rank gives the first's.
    """
    with jax.disable_jit():
        return model.init(jax.random.key(0), jnp.asarray(TOKENS))["params"]


def random_like(tree, seed, size):
    """The tree filled with normal numbers."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * size, jnp.float32), tree)


def logits(model, params):
    """Of the fixed input, in float32."""
    with jax.disable_jit(), jax.default_matmul_precision("float32"):
        return np.asarray(model.apply({"params": params}, jnp.asarray(TOKENS)).logits)


def adapted(model, params):
    """For each einsum that gemma adapts: jaxmerge's name, where its kernel is, and the equation it is called with."""
    found = {}

    def record(call, arguments, keywords, context):
        module = context.module
        if isinstance(module, _lora._LoRAEinsum) and context.method_name == "__call__":
            wrapper, weight = list(module.path), module.wrapped.weight_name
            *inside, name = wrapper
            path = inside if weight == "w" else [*inside, name.removeprefix("_LoRAEinsum_")]
            kernel = [*inside, weight]
            equation = keywords.get("eqn", arguments[0] if arguments else None)
            found[".".join(path)] = (tuple(wrapper), tuple(kernel), equation.replace(" ", ""))
        return call(*arguments, **keywords)

    with jax.disable_jit(), nn.intercept_methods(record):
        model.apply({"params": params}, jnp.asarray(TOKENS))
    return found


def at(tree, path):
    """The leaf or branch at a path."""
    for key in path:
        tree = tree[key]
    return tree


def measured(equation, kernel, factors, rank):
    """What the real layer adds to one-hot inputs, `[*inputs, *outputs]`, and the axes that make it the kernel's shape.

    The zero kernel of the wrapped einsum leaves what the adapter adds.
    """
    operands, result = equation.replace("...", "_").split("->")
    x_letters, w_letters = operands.split(",")
    sizes = dict(zip(w_letters, kernel.shape, strict=True))
    inputs = [letter for letter in w_letters if letter in x_letters]
    free = [letter for letter in x_letters if letter not in w_letters]
    count = math.prod(sizes[letter] for letter in inputs)
    one_hot = np.eye(count, dtype=np.float32).reshape(count, *(sizes[letter] for letter in inputs))
    # One free axis of the input counts the one-hots, and the others are of size one.
    present = [free[-1], *inputs]
    x = one_hot.transpose([present.index(letter) for letter in x_letters if letter in present])
    x = x.reshape([_size(letter, sizes, free, count) for letter in x_letters])
    layer = _lora._LoRAEinsum(rank=rank, dtype=jnp.float32, wrapped=_layers.Einsum(shape=kernel.shape, weight_name="w"))
    variables = jax.eval_shape(lambda: layer.init(jax.random.key(0), equation, x))["params"]
    params = {**jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), variables), **factors}
    with jax.default_matmul_precision("float32"):
        y = np.asarray(layer.apply({"params": params}, equation, jnp.asarray(x)))
    outputs = [letter for letter in w_letters if letter not in x_letters]
    order = [free[-1], *outputs]
    rest = [letter for letter in result if letter not in order]
    y = y.transpose([result.index(letter) for letter in (*rest, *order)]).reshape(
        *(sizes[letter] for letter in inputs), *(sizes[letter] for letter in outputs)
    )
    return y, [(*inputs, *outputs).index(letter) for letter in w_letters]


def _size(letter, sizes, free, count):
    if letter in sizes:
        return sizes[letter]
    return count if letter == free[-1] else 1


def replaced(tree, path, value):
    """The tree with another leaf at a path."""
    key, *rest = path
    return {**tree, key: replaced(tree[key], rest, value) if rest else value}


def close(what, value, reference):
    """Says how far off it is; whether that is little."""
    error = np.linalg.norm(value - reference) / np.linalg.norm(reference)
    print(f"{what}: relative error {error:.1e}")
    return error < TOLERANCE


def main() -> int:
    """Makes the golden and checks it against jaxmerge."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("-o", "--output", type=Path, default=GOLDEN)
    folder = emptied(parser.parse_args().output)

    model = tiny()
    base = random_like(initial(model), 0, 0.4)
    expected = {"tokens": TOKENS, "weights": np.array(list(WEIGHTS.values())), "logits/base": logits(model, base)}
    changed = base
    kernels = {}
    for seed, (name, weight) in enumerate(WEIGHTS.items(), 1):
        lora_model = with_lora(RANKS[name])
        factors = random_like(peft.split_params(initial(lora_model)).lora, seed, 0.4)
        gm.ckpts.save_params(factors, folder / name, wait_until_finished=True)
        params = peft.merge_params(base, factors)
        expected[f"logits/{name}"] = logits(lora_model, params)
        for module, (wrapper, kernel, equation) in adapted(lora_model, params).items():
            added, axes = measured(equation, at(base, kernel), at(factors, wrapper), RANKS[name])
            expected[f"added/{name}/{module}"] = added
            expected[f"axes/{module}"] = np.array(axes)
            kernels[module] = kernel
            changed = replaced(changed, kernel, at(changed, kernel) + weight * jnp.asarray(added.transpose(axes)))
    for module in kernels:
        expected[f"added/merged/{module}"] = sum(w * expected[f"added/{name}/{module}"] for name, w in WEIGHTS.items())
    expected["logits/merged"] = logits(model, changed)
    np.savez_compressed(folder / "expected.npz", **expected)
    for note in folder.rglob("commit_success.txt"):  # Nobody needs it, and it names a path of the machine.
        note.unlink()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {len(kernels)} modules, {size / 1000:.0f} kB")

    adapters = [jm.load(folder / name) for name in WEIGHTS]
    merged = jm.merge(adapters, list(WEIGHTS.values()))
    good = size < 300_000 and set(merged.modules) == set(kernels)
    rank = sum(RANKS.values())
    with tempfile.TemporaryDirectory() as scratch:
        jm.save(merged, Path(scratch) / "merged")
        restored = gm.ckpts.load_params(Path(scratch) / "merged")
    lora_model = with_lora(rank)
    template = peft.split_params(initial(lora_model)).lora
    good &= jax.tree.map(jnp.shape, template) == jax.tree.map(jnp.shape, restored)
    found = logits(lora_model, peft.merge_params(base, restored))
    good &= close("merged adapter in the real model", found, expected["logits/merged"])
    effect = np.linalg.norm(expected["logits/merged"] - expected["logits/base"]) / np.linalg.norm(
        expected["logits/base"]
    )
    print(f"the adapters change the logits by {effect:.0%}")
    return 0 if good and effect > 0.1 else 1


if __name__ == "__main__":
    sys.exit(main())
