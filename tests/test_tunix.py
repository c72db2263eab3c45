"""The real Tunix: its models, its checkpoint manager, its loader of Hugging Face's weights. Skipped without it.

Most of what Tunix asks for is for training on TPUs. Beside the test extra, this is enough here::

    pip install --no-deps google-tunix==0.1.7 google-metrax clu wrapt tensorboardX pandas python-dateutil perfetto \
        pillow jaxtyping wadler-lindig einops sentencepiece
"""

import copy
import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as v0
import pytest
import qwix
from flax import nnx
from orbax.checkpoint import v1

import jaxmerge as jm
from tests.helpers import delta64, relative_error

CheckpointManager = pytest.importorskip("tunix.sft.checkpoint_manager").CheckpointManager

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

# Four heads of 16 are wider than the embedding, so that no two sizes are the same by accident.
SIZES = {"num_layers": 2, "embed_dim": 32, "hidden_dim": 48, "num_heads": 4, "head_dim": 16}
HF_SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "head_dim": 16,
    "vocab_size": 80,
    "max_position_embeddings": 64,
}
WINDOW = 4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = np.random.default_rng(0).integers(3, 80, (2, 9))


@dataclass(frozen=True)
class Family:
    """A model in Tunix and in transformers.

    Attributes:
        layout: What jaxmerge calls it.
        package: Where Tunix has it.
        model: Its class there.
        loader: Tunix's module that reads safetensors.
        hf: The class in transformers, without ForCausalLM.
        kv_heads: How many heads keys and values have.
    """

    layout: str
    package: str
    model: str
    loader: str
    hf: str
    kv_heads: int = 2

    def __str__(self) -> str:
        return self.layout + ("-qkv" if self.kv_heads == 4 else "")

    @property
    def library(self) -> Any:
        return importlib.import_module(f"tunix.models.{self.package}.model")

    def config(self) -> Any:
        sizes = {**SIZES, "num_kv_heads": self.kv_heads}
        if self.layout == "gemma3":
            local = {"sliding_window_size": WINDOW, "local_base_frequency": 10_000, "global_base_frequency": 1_000_000}
            return self.library.ModelConfig(**sizes, **local, num_embed=80, param_dtype=jnp.float32)
        if self.layout == "gemma2":
            kinds = self.library.AttentionType
            return self.library.ModelConfig(
                **sizes,
                num_embed=80,
                final_logit_softcap=30.0,
                attn_logits_soft_cap=50.0,
                use_post_attn_norm=True,
                use_post_ffw_norm=True,
                attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL),
                sliding_window_size=WINDOW,
            )
        # Whatever the configuration says, Tunix's Llama and Qwen3 have a theta of 1e6.
        return self.library.ModelConfig(**sizes, vocab_size=80, rope_theta=1_000_000, norm_eps=1e-6)

    def hf_config(self) -> Any:
        import transformers

        sizes = {**HF_SIZES, "num_key_value_heads": self.kv_heads, "rms_norm_eps": 1e-6}
        make = getattr(transformers, f"{self.hf.replace('Gemma3', 'Gemma3Text')}Config")
        if "gemma" in self.layout:
            return make(**sizes, query_pre_attn_scalar=16, sliding_window=WINDOW, pad_token_id=0)
        theta = {"rope_type": "default", "rope_theta": 1e6}
        return make(**sizes, rope_parameters=theta, tie_word_embeddings=False, pad_token_id=0)


FAMILIES = [
    Family("llama3", "llama3", "Llama3", "params", "Llama"),
    Family("qwen2", "qwen2", "Qwen2", "params", "Qwen2"),
    Family("qwen3", "qwen3", "Qwen3", "params", "Qwen3"),
    Family("gemma2", "gemma", "Gemma", "params_safetensors", "Gemma2"),
    Family("gemma3", "gemma3", "Gemma3", "params_safetensors", "Gemma3"),
    Family("gemma3", "gemma3", "Gemma3", "params_safetensors", "Gemma3", kv_heads=4),
]


@pytest.fixture(autouse=True)
def standard_promotion() -> Iterator[None]:
    """Tunix multiplies whole numbers with fractions."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(params=FAMILIES, ids=str, scope="module")
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


def new_model(family: Family) -> nnx.Module:
    """A model of Tunix's with random weights everywhere; its own start has zeros in the MLPs."""
    model = nnx.eval_shape(lambda: getattr(family.library, family.model)(family.config(), rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    return nnx.merge(graph, randomised(state, seed=0, size=0.2))


def randomised(state: Any, seed: int, size: float) -> Any:
    leaves, structure = jax.tree.flatten(state)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [jnp.asarray(size * rng.normal(size=x.shape), x.dtype) for x in leaves])


def with_lora(model: nnx.Module, *rules: qwix.LoraRule, seed: int | None = None) -> nnx.Module:
    """A copy of the model with LoRA, random if there is a seed, as Tunix's own command line makes it."""
    provider = qwix.LoraProvider(list(rules))

    @nnx.jit
    def attach(model: nnx.Module) -> nnx.Module:
        return qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(0), **model.get_model_input())

    lora = attach(model)
    if seed is not None:
        nnx.update(lora, randomised(nnx.state(lora, nnx.LoRAParam), seed, size=0.2))
    return lora


def rule(module_path: str, rank: int, alpha: float) -> qwix.LoraRule:
    # Zeros because random numbers take long to compile.
    return qwix.LoraRule(
        module_path=module_path, rank=rank, alpha=alpha, lora_a_initializer=nnx.initializers.zeros_init()
    )


def everywhere(rank: int, alpha: float) -> qwix.LoraRule:
    return rule(r"layers/\d+/(attn|mlp)/.*", rank, alpha)


def logits(model: nnx.Module) -> np.ndarray:
    return np.asarray(forward(model), np.float64)


@nnx.jit
def forward(model: nnx.Module) -> jax.Array:
    length = TOKENS.shape[1]
    positions = jnp.broadcast_to(jnp.arange(length), TOKENS.shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (len(TOKENS), length, length))
    return model(jnp.asarray(TOKENS), positions, None, mask)[0]


def deltas(model: nnx.Module, alpha: float | None) -> dict[str, np.ndarray]:
    """What LoRA adds to each weight, in float64 and by the layers' own einsums; alpha is each rank if None."""
    found = {}
    for path, module in nnx.iter_modules(model):
        for name in ("w", "kernel"):
            if hasattr(module, f"{name}_lora_a"):
                a, b = (np.asarray(getattr(module, f"{name}_lora_{factor}")[...], np.float64) for factor in "ab")
                inputs, weight = re.split("->|,", getattr(module, "einsum_str", "BI,IO->BO"))[:2]
                ins = "".join(axis for axis in weight if axis in inputs)
                outs = "".join(axis for axis in weight if axis not in inputs)
                scale = 1.0 if alpha is None else alpha / a.shape[-1]
                found["/".join(map(str, path))] = scale * np.einsum(f"{ins}r,r{outs}->{weight}", a, b)
    return found


def changed(model: nnx.Module, changes: Mapping[str, np.ndarray]) -> nnx.Module:
    """A copy of the model with these added to its weights."""
    model = nnx.clone(model)
    modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    for path, change in changes.items():
        weight = getattr(modules[path], "w" if hasattr(modules[path], "w") else "kernel")
        weight[...] = jnp.asarray(np.asarray(weight[...], np.float64) + change, jnp.float32)
    return model


def saved(model: nnx.Module, root: Path, optimizer: nnx.Optimizer | None = None) -> Path:
    manager = CheckpointManager(str(root))
    assert manager.save(5, model, optimizer, save_only_lora_params=True, custom_metadata={"global_step": 5})
    manager.close()
    return root


def restored(model: nnx.Module, root: Path) -> nnx.Module:
    manager = CheckpointManager(str(root))
    manager.maybe_restore(model, restore_only_lora_params=True)
    manager.close()
    return model


def rules_of(root: Path) -> list[qwix.LoraRule]:
    """A rule for each module of a checkpoint, with alpha equal to its rank."""
    with v0.CheckpointManager(root) as manager:
        step = manager.latest_step()
    tree = v1.checkpointables_metadata(str(root / str(step))).metadata["model_params"]
    rules = []
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))[0]:
        name = jax.tree_util.keystr(keys, simple=True, separator="/")
        if found := re.fullmatch(r"(.+)/\w+_lora_a(/value)?", name):
            rules.append(rule(found[1], leaf.shape[-1], float(leaf.shape[-1])))
    return rules


def test_merged_checkpoints_restore_into_the_real_model(tmp_path, family):
    """Model-level: base + Σ wᵢ·(alphaᵢ/rᵢ)·(what adapter i adds), after Tunix's own restore."""
    base = new_model(family)
    weights, ranks, alphas = [1.0, -0.5], [4, 2], [8.0, 3.0]
    models = [with_lora(base, everywhere(ranks[i], alphas[i]), seed=i + 1) for i in range(2)]
    changes = [deltas(model, alpha) for model, alpha in zip(models, alphas, strict=True)]
    for model, change in zip(models, changes, strict=True):
        assert relative_error(logits(model), logits(changed(base, change))) < 1e-4
    optimizer = nnx.Optimizer(models[1], optax.adam(1e-3), wrt=nnx.LoRAParam)
    roots = [saved(models[0], tmp_path / "0"), saved(models[1], tmp_path / "1", optimizer)]
    assert (roots[1] / "5" / "optimizer_state").is_dir()

    merged = jm.merge([jm.load(root, alpha=alpha) for root, alpha in zip(roots, alphas, strict=True)], weights)
    jm.save(merged, tmp_path / "merged")

    wide = restored(with_lora(base, everywhere(6, 6.0)), tmp_path / "merged")
    total = {path: sum(w * change[path] for w, change in zip(weights, changes, strict=True)) for path in changes[0]}
    expected = logits(changed(base, total))
    assert relative_error(logits(base), expected) > 0.1
    assert relative_error(logits(wide), expected) < 1e-4
    for path, change in deltas(wide, alpha=6.0).items():
        assert relative_error(change, total[path]) < 1e-5, path


@dataclass(frozen=True)
class Pair:
    """One model in both libraries.

    Attributes:
        hf: transformers'.
        tunix: Tunix's, read by Tunix from the safetensors that transformers wrote.
    """

    hf: Any
    tunix: nnx.Module


@pytest.fixture(scope="module")
def pair(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    import torch
    import transformers

    torch.manual_seed(0)
    hf = getattr(transformers, f"{family.hf}ForCausalLM")(family.hf_config()).eval()
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            weight.copy_(torch.randn(weight.shape) * 0.2 + (0 if "gemma" in family.layout else "norm" in name))
    folder = tmp_path_factory.mktemp(str(family))
    hf.save_pretrained(folder)
    loader = importlib.import_module(f"tunix.models.{family.package}.{family.loader}")
    with jax.numpy_dtype_promotion("standard"):
        tunix = loader.create_model_from_safe_tensors(str(folder), family.config(), dtype=jnp.float32)
        assert relative_error(logits(tunix), hf_logits(hf)) < 1e-5
    return Pair(hf, tunix)


def hf_logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.as_tensor(TOKENS)).logits.double().numpy()


def peft_model(pair: Pair, **options: Any) -> Any:
    """A copy of the model with random LoRA that PEFT attached."""
    import peft
    import torch

    torch.manual_seed(1)
    config = peft.LoraConfig(lora_alpha=6, target_modules=TARGETS, init_lora_weights=False, **options)
    return peft.get_peft_model(copy.deepcopy(pair.hf), config).eval()


def test_peft_converts_to_what_tunix_restores(tmp_path, family, pair):
    # Keys and values of different ranks have to share an A in Gemma.
    model = peft_model(pair, r=4, rank_pattern={"k_proj": 2}, alpha_pattern={"down_proj": 1})
    model.save_pretrained(tmp_path / "peft")
    jm.save(jm.load(tmp_path / "peft"), tmp_path / "tunix", format="tunix", layout=family.layout, head_dim=16)

    lora = restored(with_lora(pair.tunix, *rules_of(tmp_path / "tunix")), tmp_path / "tunix")
    expected = hf_logits(model)
    assert relative_error(logits(pair.tunix), expected) > 0.1
    assert relative_error(logits(lora), expected) < 1e-5


def test_tunix_converts_to_what_peft_loads(tmp_path, family, pair):
    import peft

    lora = with_lora(pair.tunix, everywhere(4, 6.0), seed=1)
    jm.save(jm.load(saved(lora, tmp_path / "tunix"), alpha=6.0), tmp_path / "peft", format="peft", layout=family.layout)

    model = peft.PeftModel.from_pretrained(copy.deepcopy(pair.hf), tmp_path / "peft").eval()
    expected = logits(lora)
    assert relative_error(hf_logits(pair.hf), expected) > 0.1
    assert relative_error(hf_logits(model), expected) < 1e-5


def test_peft_comes_back_from_tunix(tmp_path, family, pair):
    peft_model(pair, r=4, rank_pattern={"k_proj": 2}, alpha_pattern={"down_proj": 1}).save_pretrained(tmp_path / "peft")
    adapter = jm.load(tmp_path / "peft")
    jm.save(adapter, tmp_path / "tunix", format="tunix", layout=family.layout, head_dim=16)
    jm.save(jm.load(tmp_path / "tunix"), tmp_path / "back", format="peft", layout=family.layout)
    back = jm.load(tmp_path / "back")
    assert back.modules.keys() == adapter.modules.keys()
    for path, one in adapter.modules.items():
        assert relative_error(delta64(back.modules[path]), delta64(one)) < 1e-6, path
