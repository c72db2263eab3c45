"""Flax LoRA trees in memory, against the forward pass of the real models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import linen, nnx

import jaxmerge as jm
from tests.helpers import delta64, relative_error

WEIGHTS = [1.0, -0.5]


class Wrapped(nnx.Module):
    """Both of flax's own forms, and a list."""

    def __init__(self, rngs: nnx.Rngs, rank: int):
        self.fc1 = nnx.LoRALinear(8, 16, lora_rank=rank, rngs=rngs)
        self.fc2 = nnx.LoRA(16, rank, 8, base_module=nnx.Linear(16, 8, rngs=rngs), rngs=rngs)
        self.blocks = nnx.List([nnx.LoRALinear(8, 8, lora_rank=rank, rngs=rngs) for _ in range(2)])


class Attention(nnx.Module):
    """The einsums of Tunix's models: heads after r in q, before r in o, k and v with one A, experts with one B."""

    def __init__(self, rngs: nnx.Rngs):
        self.q_proj = Einsum("BTD,DNH->BTNH", (8, 2, 4), rngs)
        self.kv_einsum = Einsum("BSD,CDKH->CBSKH", (2, 8, 2, 4), rngs)
        self.o_proj = Einsum("BTNH,NHD->BTD", (2, 4, 8), rngs)
        self.experts = Einsum("EBD,EDF->EBF", (3, 8, 6), rngs)
        self.mlp = nnx.Linear(8, 12, use_bias=False, rngs=rngs)

    def __call__(self, x):
        k, v = self.kv_einsum(x)
        each = self.experts(jnp.broadcast_to(x[0], (3, *x.shape[1:])))
        return self.o_proj(self.q_proj(x)), k, v, self.mlp(x), each


class Einsum(nnx.Module):
    def __init__(self, formula: str, shape: tuple[int, ...], rngs: nnx.Rngs):
        self.formula = formula
        self.w = nnx.Param(jax.random.normal(rngs.params(), shape) / 3)

    def __call__(self, x):
        return jnp.einsum(self.formula, x, self.w.value)


def randomised(model: nnx.Module, seed: int):
    """The model's LoRA state with random numbers in it."""
    state = nnx.state(model, nnx.LoRAParam)
    leaves, structure = jax.tree.flatten(state)
    rng = np.random.default_rng(seed)
    filled = [jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    return jax.tree.unflatten(structure, filled)


def outputs(model, state, *inputs):
    nnx.update(model, state)
    return jax.tree.leaves(model(*inputs))


def qwix_model(rank: int, alpha: float, seed: int = 0):
    provider = qwix.LoraProvider(module_path=".*", rank=rank, alpha=alpha)
    base = Attention(nnx.Rngs(seed))
    return qwix.apply_lora_to_model(base, provider, jnp.ones((1, 5, 8)), rngs=nnx.Rngs(seed))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("alpha", [4.0, 6.0])
def test_qwix_models_compute_what_the_merge_says(alpha):
    x = jax.random.normal(jax.random.key(0), (1, 5, 8))
    model = qwix_model(4, alpha)
    states = [randomised(model, seed) for seed in range(2)]
    zero = jax.tree.map(jnp.zeros_like, states[0])
    base = outputs(model, zero, x)
    # The attention's o_proj sees what q_proj puts out, so each is compared on its own: A and B of the others are 0.
    adapters = [jm.from_state(state, alpha=alpha) for state in states]
    assert set(adapters[0].modules) == {"q_proj", "kv_einsum", "o_proj", "experts", "mlp"}
    merged = jm.to_state(jm.merge(adapters, WEIGHTS))
    wide = qwix_model(8, 8.0)  # alpha equal to the rank
    for module in adapters[0].modules:
        alone = [only(state, module) for state in states]
        expected = [
            b + sum(w * (one - b) for w, one in zip(WEIGHTS, changed, strict=True))
            for b, *changed in zip(base, *[outputs(model, state, x) for state in alone], strict=True)
        ]
        for got, wanted in zip(outputs(wide, only(merged, module), x), expected, strict=True):
            assert relative_error(got, wanted) < 1e-4


def only(state, module):
    """The state with the factors of all other modules at zero."""

    def keep(path, leaf):
        return leaf if f"{module}/" in jax.tree_util.keystr(path, simple=True, separator="/") else jnp.zeros_like(leaf)

    return jax.tree_util.tree_map_with_path(keep, state)


def test_nnx_models_compute_what_the_merge_says():
    model, wide = Wrapped(nnx.Rngs(0), 2), Wrapped(nnx.Rngs(0), 4)
    states = [randomised(model, seed) for seed in range(2)]
    adapters = [jm.from_state(state) for state in states]
    assert set(adapters[0].modules) == {"fc1", "fc2", "blocks.0", "blocks.1"}
    merged = jm.merge(adapters, WEIGHTS)
    nnx.update(wide, jm.to_state(merged))
    for path, layer, size in (("fc1", "fc1", 8), ("fc2", "fc2", 16), ("blocks.1", None, 8)):
        x = jax.random.normal(jax.random.key(1), (3, size))

        def run(m, layer=layer, x=x):
            return (m.blocks[1] if layer is None else getattr(m, layer))(x)

        nnx.update(model, jax.tree.map(jnp.zeros_like, states[0]))
        base = run(model)
        expected = base
        for weight, state in zip(WEIGHTS, states, strict=True):
            nnx.update(model, state)
            expected = expected + weight * (run(model) - base)
        nnx.update(wide, nnx.state(model, lambda path, value: not isinstance(value, nnx.LoRAParam)))
        assert relative_error(run(wide), expected) < 1e-4, path


@pytest.mark.parametrize("form", ["state", "pure dict", "linen params"])
def test_the_structure_comes_back(form):
    state = randomised(Wrapped(nnx.Rngs(0), 2), 0)
    tree = {"state": state, "pure dict": nnx.to_pure_dict(state)}.get(form)
    if form == "linen params":
        tree = {"params": nnx.to_pure_dict(state)}
    adapter = jm.from_state(tree)
    back = jm.to_state(adapter)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(one, other)
    assert type(back) is type(tree)


def test_under_jit_with_traced_weights():
    states = [randomised(Wrapped(nnx.Rngs(0), 2), seed) for seed in range(2)]

    @jax.jit
    def merged(states, weights):
        return jm.to_state(jm.merge([jm.from_state(state) for state in states], weights, rank=2))

    eager = jm.merge([jm.from_state(state) for state in states], WEIGHTS, rank=2)
    traced = jm.from_state(merged(states, jnp.asarray(WEIGHTS)))
    for path, lora in eager.modules.items():
        assert relative_error(delta64(traced.modules[path]), delta64(lora)) < 1e-5


@pytest.mark.parametrize("axis", [0, 1])
def test_scanned_layers(axis):
    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            a = self.param("kernel_lora_a", linen.initializers.normal(1), (8, 2))
            b = self.param("kernel_lora_b", linen.initializers.normal(1), (2, 8))
            return x + 3.0 / 2 * (x @ a @ b), None

    scanned = linen.scan(Layer, variable_axes={"params": axis}, split_rngs={"params": True}, length=3)
    x = jnp.ones((1, 8)) / 100
    trees = [{"params": {"layers": scanned().init(jax.random.key(s), x, None)["params"]}} for s in range(2)]
    wide = jm.to_state(jm.merge([jm.from_state(tree, alpha=3.0, scan_axis=axis) for tree in trees], WEIGHTS))
    for layer in range(3):
        y = x
        expected = sum(
            w * 1.5 * (y @ jnp.take(t["params"]["layers"]["kernel_lora_a"], layer, axis)
                       @ jnp.take(t["params"]["layers"]["kernel_lora_b"], layer, axis))
            for w, t in zip(WEIGHTS, trees, strict=True)
        )  # fmt: skip
        got = y @ jnp.take(wide["params"]["layers"]["kernel_lora_a"], layer, axis)
        got = got @ jnp.take(wide["params"]["layers"]["kernel_lora_b"], layer, axis)
        assert relative_error(got, expected) < 1e-5
    with pytest.raises(ValueError, match="scan_axis"):
        jm.from_state(trees[0], alpha=3.0)


class PiEinsum(linen.Module):
    """OpenPI's einsum: factors of the weight's last two axes, applied one after the other in the einsum's own form."""

    formula: str
    shape: tuple[int, ...]
    rank: int
    alpha: float

    @linen.compact
    def __call__(self, x):
        self.param("w", linen.initializers.zeros, self.shape)
        a = self.param("lora_a", linen.initializers.normal(1), (*self.shape[:-1], self.rank))
        b = self.param("lora_b", linen.initializers.normal(1), (*self.shape[:-2], self.rank, self.shape[-1]))
        left, _, out = self.formula.replace("->", ",").split(",")
        first, last = self.formula.replace("->", ",").split(",")[1][-2:]
        weight = self.formula.replace("->", ",").split(",")[1]
        inner = out.replace(last, "L")
        x = jnp.einsum(f"{left},{weight.replace(last, 'L')}->{inner}", x, a)
        return self.alpha / self.rank * jnp.einsum(f"{inner},{weight.replace(first, 'L')}->{out}", x, b)


class PiLayer(linen.Module):
    """The adapted weights of a layer of OpenPI's Gemma, each on inputs of its own."""

    rank: int
    alpha: float

    @linen.compact
    def __call__(self, carry, inputs):
        x, heads, hidden = inputs

        def einsum(name, formula, shape, x):
            return PiEinsum(formula, shape, self.rank, self.alpha, name=name)(x)

        out = [
            einsum("attn_q_einsum", "BTD,NDH->BTNH", (2, 8, 4), x),
            einsum("attn_kv_einsum_1", "BSD,2KDH->2BSKH", (2, 1, 8, 4), x),
            einsum("attn_vec_einsum", "BTNH,NHD->BTD", (2, 4, 8), heads),
        ]
        normal = linen.initializers.normal(1)
        gate = [
            self.param("gating_einsum_lora_a", normal, (2, 8, self.rank)),
            self.param("gating_einsum_lora_b", normal, (2, self.rank, 6)),
        ]
        linear = (
            self.param("linear_lora_a", normal, (6, self.rank)),
            self.param("linear_lora_b", normal, (self.rank, 8)),
        )
        out += [x @ gate[0][i] @ gate[1][i] for i in range(2)]
        return carry, [*out, hidden @ linear[0] @ linear[1]]


def test_openpi_models_compute_what_the_merge_says():
    def model(rank, alpha):
        options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
        return linen.scan(PiLayer, **options)(rank, alpha)

    shapes = (3, 1, 5, 8), (3, 1, 5, 2, 4), (3, 1, 5, 6)
    inputs = tuple(jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    narrow = model(2, 6.0)
    trees = [
        {"PaliGemma": {"llm": {"layers": {"mlp": narrow.init(jax.random.key(seed), 0.0, inputs)["params"]}}}}
        for seed in range(2)
    ]

    def outputs(model, tree):
        return model.apply({"params": tree["PaliGemma"]["llm"]["layers"]["mlp"]}, 0.0, inputs)[1]

    adapters = [jm.from_state(tree, alpha=6.0) for tree in trees]
    prefix = "PaliGemma.llm.layers.mlp"
    assert adapters[0].modules[f"{prefix}.attn_q_einsum"].batch == (3, 2)
    assert adapters[0].modules[f"{prefix}.attn_vec_einsum"].features == (8, 8)
    assert adapters[0].modules[f"{prefix}.linear"].scale == 1
    merged = jm.to_state(jm.merge(adapters, WEIGHTS))
    expected = jax.tree.map(lambda one, two: WEIGHTS[0] * one + WEIGHTS[1] * two, *[outputs(narrow, t) for t in trees])
    for got, wanted in zip(outputs(model(4, 4.0), merged), expected, strict=True):
        assert relative_error(got, wanted) < 1e-4


def test_gemma_names_and_plain_patterns():
    rng = np.random.default_rng(0)

    def factor(*shape):
        return rng.normal(size=shape).astype(np.float32)

    gemma = {
        "layer_0": {
            "attn": {"q_einsum": {"_LoRAEinsum_0": {"lora": {"a": factor(8, 2), "b": factor(2, 3, 4)}}}},
            "mlp": {
                "_LoRAEinsum_gating_einsum": {"lora": {"a": factor(8, 2), "b": factor(2, 2, 5)}},
                "_LoRAEinsum_linear": {"lora": {"a": factor(5, 2), "b": factor(2, 8)}},
            },
        }
    }
    adapter = jm.from_state(gemma)
    assert set(adapter.modules) == {"layer_0.attn.q_einsum", "layer_0.mlp.gating_einsum", "layer_0.mlp.linear"}
    assert adapter.modules["layer_0.attn.q_einsum"].features == (12, 8)
    plain = {"blocks": [{"down": factor(8, 2), "up": factor(2, 6)}, {"down": factor(8, 2), "up": factor(2, 6)}]}
    pattern = (r"(?P<module>.+)/down", r"(?P<module>.+)/up")
    adapter = jm.from_state(plain, alpha=4.0, pattern=pattern)
    assert set(adapter.modules) == {"blocks.0", "blocks.1"}
    expected = 2 * (plain["blocks"][0]["down"] @ plain["blocks"][0]["up"]).T
    assert relative_error(jm.delta(adapter.modules["blocks.0"]), expected) < 1e-6


def test_what_is_not_understood_is_refused():
    a, b = np.ones((8, 2), np.float32), np.ones((2, 6), np.float32)
    with pytest.raises(ValueError, match="alpha"):
        jm.from_state({"x": {"kernel_lora_a": a, "kernel_lora_b": b}})
    with pytest.raises(ValueError, match="module x lacks its factor B"):
        jm.from_state({"x": {"lora_a": a}})
    with pytest.raises(ValueError, match="no LoRA factors"):
        jm.from_state({"x": {"kernel": a}})
    with pytest.raises(ValueError, match="several formats"):
        jm.from_state({"x": {"lora_a": a, "lora_b": b}, "y": {"w_lora_a": a, "w_lora_b": b}})
    with pytest.raises(ValueError, match="do not make a product"):
        jm.from_state({"x": {"lora_a": a, "lora_b": np.ones((3, 6), np.float32)}})
    other = jm.from_state({"y": {"lora_a": a, "lora_b": b}})
    merged = jm.merge([jm.from_state({"x": {"lora_a": a, "lora_b": b}}), other])
    with pytest.raises(ValueError, match="no adapter's tree has a place for y"):
        jm.to_state(merged)
    with pytest.raises(ValueError, match="to_state gives it back"):
        jm.save(other, "never")


def test_parameters_of_one_module_are_told_apart():
    """Whether a tree adapts one of them or all: an adapter of the one is merged with the same one of another."""

    def tree(*names):
        factors = {name: (np.full((8, 2), i + 1.0, np.float32), np.ones((2, 6), np.float32)) for i, name in
                   enumerate(names)}  # fmt: skip
        return {
            "moe": {f"{name}_lora_{f}": x for name, pair in factors.items() for f, x in zip("ab", pair, strict=True)}
        }

    one, both = jm.from_state(tree("wi_1"), alpha=2.0), jm.from_state(tree("wi_0", "wi_1"), alpha=2.0)
    assert set(one.modules) == {"moe.wi_1"}
    assert set(both.modules) == {"moe.wi_0", "moe.wi_1"}
    merged = jm.merge([one, both], [1, 1])
    assert set(jm.to_state(merged)["moe"]) == {f"{name}_lora_{f}" for name in ("wi_0", "wi_1") for f in "ab"}
    np.testing.assert_array_equal(jm.delta(merged.modules["moe.wi_1"]), np.full((6, 8), 2 * (1.0 + 2.0)))
    with pytest.raises(ValueError, match="of different kinds"):
        jm.merge([jm.from_state(tree("kernel"), alpha=2.0), jm.from_state(tree("w"), alpha=2.0)])


def test_a_scale_that_the_dtype_cannot_hold_is_named():
    tree = {"q": {"w_lora_a": np.ones((8, 2), np.float16), "w_lora_b": np.full((2, 6), 30000, np.float16)}}
    with pytest.raises(ValueError, match="module q times its scale holds numbers too large for float16"):
        jm.to_state(jm.from_state(tree, alpha=8.0))
    with pytest.raises(ValueError, match="module q times its scale is too small for float16"):
        jm.to_state(jm.from_state(tree, alpha=1e-20))


def test_patterns_dtypes_and_alphas_are_checked():
    tree = {"q": {"w_lora_a": np.ones((8, 2), np.int32), "w_lora_b": np.ones((2, 6), np.int32)}}
    with pytest.raises(ValueError, match="module q is of dtype int32"):
        jm.from_state(tree, alpha=1.0)
    with pytest.raises(ValueError, match="not a regular expression"):
        jm.from_state(tree, pattern=("(", "("))
    with pytest.raises(ValueError, match="has no group"):
        jm.from_state(tree, pattern=(".*", ".*"))
    with pytest.raises(ValueError, match="alpha must be a finite number"):
        jm.from_state(tree, alpha=float("nan"))
