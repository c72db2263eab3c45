"""Keras: checkpoints of its OrbaxCheckpoint and KerasHub's .lora.h5, given back to the real models."""

import os

import jax
import numpy as np
import pytest

import jaxmerge as jm
from tests.helpers import relative_error

os.environ.setdefault("KERAS_BACKEND", "jax")
keras = pytest.importorskip("keras")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:orbax.*"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

RANK, ALPHA, WEIGHTS = 3, 6, [1.0, -0.5]
ADAPTED = ("emb", "query", "out", "conv", "dd")


def model(rank, alpha=None, size=8):
    """One output per adapted layer, so that each is the base's plus what that layer's factors add.

    Args:
        rank: Of all layers, or by their names.
        alpha: Keras's default is the rank.
        size: Of the last axis of the kernels of `query` and `conv`, and so the highest rank that their factors have.
    """
    keras.utils.set_random_seed(0)
    layers = keras.layers
    ids = keras.Input((5,), dtype="int32")
    sequence, heads, image, vector = (keras.Input(shape) for shape in ((5, 8), (5, 2, 4), (5, 6, 3), (8,)))
    outputs = [
        layers.Embedding(11, 8, name="emb")(ids),
        layers.EinsumDense("btd,ndh->btnh", output_shape=(None, 2, size), name="query")(sequence),
        layers.EinsumDense("btnh,nhd->btd", output_shape=(None, 8), name="out")(heads),
        layers.Conv2D(size, (3, 2), padding="same", name="conv")(image),
        layers.Dense(7, name="dd")(vector),
    ]
    built = keras.Model([ids, sequence, heads, image, vector], outputs, name="net")
    for name in ADAPTED:
        built.get_layer(name).enable_lora(rank[name] if isinstance(rank, dict) else rank, lora_alpha=alpha)
    built.compile("adam", "mse")  # Keras neither saves nor restores a model without an optimizer.
    return built


def trained(seed, rank=RANK, size=8):
    made = model(rank, ALPHA, size)
    fill(made, seed)
    return made


def fill(made, seed):
    rng = np.random.default_rng(seed)
    for variable in made.variables:
        if "lora_" in variable.path:
            variable.assign(rng.normal(size=variable.shape))


def inputs():
    rng = np.random.default_rng(99)
    shapes = ((4, 5, 8), (4, 5, 2, 4), (4, 5, 6, 3), (4, 8))
    return [rng.integers(0, 11, (4, 5)), *(rng.normal(size=shape).astype(np.float32) for shape in shapes)]


def outputs(made):
    # Not `predict`: it is traced once, with the factors' scale of that time.
    with jax.default_matmul_precision("float32"):
        return [np.asarray(x, np.float64) for x in made(inputs())]


def checkpoint(folder, made, **options):
    callback = keras.callbacks.OrbaxCheckpoint(str(folder), save_on_background=False, **options)
    callback.set_model(made)
    callback.on_epoch_end(0)
    callback.on_train_end()
    return folder


def expected(models, size=8):
    base = outputs(model(RANK, size=size))  # B is zero.
    added = [[x - y for x, y in zip(outputs(made), base, strict=True)] for made in models]
    return [x + sum(w * a[i] for w, a in zip(WEIGHTS, added, strict=True)) for i, x in enumerate(base)]


def assert_outputs(made, wanted):
    for name, found, x in zip(ADAPTED, outputs(made), wanted, strict=True):
        assert relative_error(found, x) < 1e-4, name


def restored(folder, rank, size=8):
    made = model(rank, size=size)
    made.load_weights(str(folder))
    return made


@pytest.mark.parametrize("weights_only", [True, False])
def test_merged_checkpoint_restores_into_the_real_model(tmp_path, weights_only):
    models = [trained(seed) for seed in range(2)]
    for i, made in enumerate(models):
        checkpoint(tmp_path / str(i), made, save_weights_only=weights_only)
    adapters = [jm.load(tmp_path / str(i), alpha=ALPHA) for i in range(2)]
    assert [sorted(adapter.modules) for adapter in adapters] == [sorted(ADAPTED)] * 2
    jm.save(jm.merge(adapters, WEIGHTS), tmp_path / "merged")
    assert_outputs(restored(tmp_path / "merged", 2 * RANK), expected(models))


def test_a_rank_of_choice(tmp_path):
    """Rank 5 holds two adapters of rank 2 and 3: what was added to models of either rank is there again."""
    models = [trained(0, rank=2), trained(1, rank=3)]
    adapters = [jm.load(checkpoint(tmp_path / str(i), made), alpha=ALPHA) for i, made in enumerate(models)]
    jm.save(jm.merge(adapters, WEIGHTS, rank=5), tmp_path / "merged")
    assert_outputs(restored(tmp_path / "merged", 5), expected(models))


def test_layers_too_small_for_the_sum_of_ranks(tmp_path):
    """A factorisation of the last axis has no more rank than that axis; Keras's layers can each have their own."""
    models = [trained(seed, size=4) for seed in range(2)]
    adapters = [jm.load(checkpoint(tmp_path / str(i), made), alpha=ALPHA) for i, made in enumerate(models)]
    jm.save(jm.merge(adapters, WEIGHTS), tmp_path / "merged")
    ranks = {name: lora.rank for name, lora in jm.load(tmp_path / "merged").modules.items()}
    assert_outputs(restored(tmp_path / "merged", ranks, size=4), expected(models, size=4))


def test_the_optimizer_and_metrics_are_not_merged(tmp_path):
    """They differ between runs, and have the old rank: Keras refuses them when it restores a model in training."""
    models = [trained(seed) for seed in range(2)]
    for i, made in enumerate(models):
        made.optimizer.build(made.trainable_variables)
        for variable in made.optimizer.variables:
            variable.assign(np.full(variable.shape, i + 1, variable.dtype))
        checkpoint(tmp_path / str(i), made)
    adapters = [jm.load(tmp_path / str(i), alpha=ALPHA) for i in range(2)]
    jm.save(jm.merge(adapters, WEIGHTS), tmp_path / "merged")
    resumed = model(2 * RANK)
    resumed.optimizer.build(resumed.trainable_variables)
    # The name is counted up with every optimizer of a process; a user's own has that of the checkpoint.
    for variable, source in zip(resumed.optimizer.variables, models[0].optimizer.variables, strict=True):
        variable._path = source.path
    resumed.load_weights(str(tmp_path / "merged"))
    assert_outputs(resumed, expected(models))


def test_the_model_is_rebuilt_from_its_configuration(tmp_path):
    """`load_model` rebuilds layers with the rank in the checkpoint: the merged one must say its own, and alpha."""
    models = [trained(seed) for seed in range(2)]
    adapters = [jm.load(checkpoint(tmp_path / str(i), made), alpha=ALPHA) for i, made in enumerate(models)]
    jm.save(jm.merge(adapters, WEIGHTS), tmp_path / "merged")
    rebuilt = keras.saving.load_model(str(tmp_path / "merged"))
    assert {(rebuilt.get_layer(name).lora_rank, rebuilt.get_layer(name).lora_alpha) for name in ADAPTED} == {(6, 6)}
    assert_outputs(rebuilt, expected(models))


@pytest.fixture
def backbone():
    hub = pytest.importorskip("keras_hub")

    def make():
        keras.utils.set_random_seed(0)
        return hub.models.GemmaBackbone(
            vocabulary_size=20,
            num_layers=1,
            num_query_heads=4,
            num_key_value_heads=2,
            hidden_dim=16,
            intermediate_dim=32,
            head_dim=8,
        )

    return make


def test_merged_lora_h5_is_loaded_by_the_real_backbone(tmp_path, backbone):
    """The kernels of query and value: base + Σ wᵢ·(what adapter i adds), its scale being 1."""
    sources = [backbone() for _ in range(2)]
    for i, made in enumerate(sources):
        made.enable_lora(RANK)
        fill(made, i)
        made.save_lora_weights(str(tmp_path / f"{i}.lora.h5"))
    adapters = [jm.load(tmp_path / f"{i}.lora.h5", alpha=RANK) for i in range(2)]
    jm.save(jm.merge(adapters, WEIGHTS), tmp_path / "merged.lora.h5")
    found = backbone()
    found.load_lora_weights(str(tmp_path / "merged.lora.h5"))
    assert found._lora_rank == 2 * RANK
    for name in ("query_dense", "value_dense"):
        base = kernel(backbone(), name)
        wanted = base + sum(w * (kernel(made, name) - base) for w, made in zip(WEIGHTS, sources, strict=True))
        assert relative_error(kernel(found, name), wanted) < 1e-4
    # The recipe of such a file lies beside it, under its name.
    each = (f"{{path: {i}.lora.h5, alpha: {RANK}, weight: {w}}}" for i, w in enumerate(WEIGHTS))
    (tmp_path / "recipe.yaml").write_text(f"adapters: [{', '.join(each)}]")
    for recipe, name in (("recipe.yaml", "one"), ("one.lora.recipe.yaml", "two")):
        jm.save(jm.merge_recipe(tmp_path / recipe), tmp_path / f"{name}.lora.h5")
    one, two, merged = (jm.load(tmp_path / f"{name}.lora.h5", alpha=2 * RANK) for name in ("one", "two", "merged"))
    for path, lora in merged.modules.items():
        for other in (one, two):
            np.testing.assert_array_equal(other.modules[path].a, lora.a)
            np.testing.assert_array_equal(other.modules[path].b, lora.b)
    found = jm.verify(tmp_path / "one.lora.h5")
    assert (found.status, found.intact, found.problems) == ("same", True, ())


def kernel(made, name):
    """As the layer's forward pass has it, factors included."""
    return np.asarray(getattr(made.get_layer("decoder_block_0").attention, name).kernel, np.float64)
