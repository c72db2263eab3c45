"""Recipes of mergekit's: what mergekit itself gives for the same, and what is told of the rest."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import jaxmerge as jm
from jaxmerge.methods.sign_consensus import agree
from jaxmerge.recipes.mergekit.methods import METHODS
from jaxmerge.recipes.model import Gradient, Rule, Rules
from jaxmerge.sparsify import ByRank
from tests.helpers import delta64, relative_error
from tests.recipes import PATHS, assert_same, problems, write_three

MERGEKIT = Path(__file__).parent / "goldens" / "mergekit"
OF_MODELS = ("weight", "density", "gamma", "epsilon")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("mergekit")
    write_three(made)
    return made


def goldens(method):
    """Case -> (its parameters, its base, its arrays)."""
    with np.load(MERGEKIT / f"{method}.npz") as file:
        arrays = dict(file)
    cases = json.loads(str(arrays.pop("about")))["cases"]
    return {
        name: (
            case["parameters"],
            case["base"],
            {key.removeprefix(f"{name}/"): x for key, x in arrays.items() if key.startswith(f"{name}/")},
        )
        for name, case in cases.items()
    }


def write_task(folder, task):
    """An adapter whose change to its one module is a task ``[12, 11]``, to the bit."""
    jm.save(jm.Adapter({"layers.0.q": jm.LoRA(task, np.eye(12, dtype=np.float32), 1.0)}), folder)


def as_mergekit_has_it(method, parameters, base, tasks):
    """A file for mergekit whose models are a base model and the adapters t0, t1, ..."""
    names = [f"org/base+t{i}" for i in range(len(tasks))]
    own = {name: value for name, value in parameters.items() if name in OF_MODELS}
    models = []
    for i, name in enumerate(names):
        each = {key: value[i] if isinstance(value, list) else value for key, value in own.items()}
        models.append({"model": name, **({"parameters": each} if each else {})})
    document = {"merge_method": method, "models": models, "dtype": "float32"}
    common = {name: value for name, value in parameters.items() if name not in OF_MODELS}
    if common:
        document["parameters"] = common
    if base == "first task":
        document["base_model"] = names[0]
    elif base is not None:
        document["base_model"] = "org/base"
    return document


def merged(folder, document, tasks):
    for i, task in enumerate(tasks):
        write_task(folder / f"t{i}", task)
    (folder / "mergekit.yaml").write_text(yaml.safe_dump(document))
    return jm.merge_recipe(folder / "mergekit.yaml")


# What mergekit does and jaxmerge refuses, or does otherwise, is tested by itself.
REFUSED = {("nearswap", "same"), *((method, "rescaled") for method in ("ties", "breadcrumbs", "breadcrumbs_ties"))}
DIFFERENT = {
    ("sce", "tiny"),  # weighs small changes alike
    ("nuslerp", "signed"), ("nuslerp", "cancelling"),  # goes on beyond the other, or to the middle
    ("multislerp", "signed"),  # shares are of a sum of signed weights
    ("karcher", "opposite"),  # goes where rounding points
    ("karcher", "tiny"), ("model_stock", "tiny"),  # divides by no less than a floor
}  # fmt: skip
EXACT = ("ties", "breadcrumbs", "breadcrumbs_ties", "sce", "slerp", "nuslerp", "multislerp", "karcher", "model_stock",
         "nearswap")  # fmt: skip
CASES = [
    (method, name)
    for method in EXACT
    for name in goldens(method)
    if (method, name) not in REFUSED and (method, name) not in DIFFERENT
]


@pytest.mark.parametrize(("method", "name"), CASES)
def test_a_recipe_of_mergekits_gives_what_mergekit_gives(tmp_path, method, name):
    got, expected = beside_mergekit(tmp_path, method, name)
    # Between tasks that are nearly opposite, directions hang on the last digits of a cosine.
    close = 1e-3 if name == "near_opposite" else 2e-5
    np.testing.assert_allclose(got, expected, rtol=close, atol=3e-6)


@pytest.mark.parametrize(("method", "name"), sorted(DIFFERENT))
def test_what_is_different_is_different(tmp_path, method, name):
    got, expected = beside_mergekit(tmp_path, method, name)
    assert np.linalg.norm(got - expected) > 1e-3 * np.linalg.norm(got)


@pytest.mark.parametrize(("method", "name"), sorted(REFUSED))
def test_what_is_refused_is_refused(tmp_path, method, name):
    with pytest.raises(ValueError, match=r"rescale can only be false|is the same adapter as"):
        beside_mergekit(tmp_path, method, name)


def beside_mergekit(tmp_path, method, name):
    """The change that a recipe makes, and the one that mergekit made."""
    parameters, base, arrays = goldens(method)[name]
    # mergekit rounds what it merges beside its base model.
    origin = arrays.get("base", np.float32(0))
    tasks = (origin + arrays["tasks"]) - origin
    got = merged(tmp_path, as_mergekit_has_it(method, parameters, base, tasks), tasks)
    return delta64(got.modules["layers.0.q"]), arrays["merged"] - origin


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_been_asked_of_mergekit(method):
    """Or is plain arithmetic, or draws, and is tested below."""
    assert method in EXACT or method in (
        "linear",
        "task_arithmetic",
        "dare_linear",
        "dare_ties",
        "della",
        "della_linear",
    )


@pytest.mark.parametrize("normalize", [None, True, False])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_sums(tmp_path, method, normalize):
    """From mergekit's formulas: R = Σ w W (/ Σ w), and R = base + λ Σ w d (/ Σ w)."""
    rng = np.random.default_rng(0)
    tasks, weights = rng.normal(size=(3, 12, 11)).astype(np.float32), [0.3, 0.9, -0.2]
    if method == "linear" and normalize is False:
        weights = [0.3, 0.9, -0.2]
    parameters = {"weight": weights, **({} if normalize is None else {"normalize": normalize})}
    if method == "task_arithmetic":
        parameters |= {"lambda": 0.5, "density": 0.2, "int8_mask": True}
    got = merged(tmp_path, as_mergekit_has_it(method, parameters, "zero", tasks), tasks)
    divided = normalize if normalize is not None else method == "linear"
    expected = np.einsum("n,nij", weights, tasks.astype(np.float64)) / (sum(weights) if divided else 1)
    expected *= 0.5 if method == "task_arithmetic" else 1
    assert relative_error(delta64(got.modules["layers.0.q"]), expected) < 1e-6


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_della_keeps_with_the_chances_that_mergekit_keeps_with(tmp_path, method):
    for name, (parameters, base, arrays) in goldens(method).items():
        if name == "unscaled":  # It is refused.
            continue
        document = as_mergekit_has_it(method, parameters, base, arrays["tasks"])
        (tmp_path / "mergekit.yaml").write_text(yaml.safe_dump(document))
        recipe = jm.read_recipe(tmp_path / "mergekit.yaml")
        assert recipe.method == method
        for source, task, chances in zip(recipe.adapters, arrays["tasks"], arrays["probabilities"], strict=True):
            own = source.hyperparameters
            pruning = ByRank(jnp.float32(own["density"]), jnp.float32(own["epsilon"]), jax.random.key(0))
            np.testing.assert_allclose(pruning.probabilities(jnp.asarray(task)), chances, atol=1e-6)


@pytest.mark.parametrize("method", ["della", "dare_ties"])
def test_what_is_drawn_is_combined_as_mergekit_combines_it(tmp_path, method):
    """With mergekit's own masks in place of those that are drawn, and without what it rescales by."""
    for name, (parameters, base, arrays) in goldens(method).items():
        if not np.isclose(arrays["base"], 0).all() or name == "unscaled":
            continue
        document = as_mergekit_has_it(method, parameters, base, arrays["tasks"])
        (tmp_path / "mergekit.yaml").write_text(yaml.safe_dump(document))
        recipe = jm.read_recipe(tmp_path / "mergekit.yaml")
        kept = arrays["tasks"] * arrays["masks"]
        if parameters.get("rescale", True):
            sums = [np.abs(x).sum(axis=(1, 2), keepdims=True) for x in (arrays["tasks"], kept)]
            kept = kept * (sums[0] / sums[1])
        choices = [recipe.hyperparameters[choice] for choice in ("election", "divisor")]
        weights = jnp.asarray([source.weight for source in recipe.adapters], jnp.float32)
        factor = recipe.stages[0].values["factor"] if recipe.stages else 1.0
        got = np.asarray(agree(jnp.asarray(kept), weights, "total", *choices)) * factor
        np.testing.assert_allclose(got, arrays["merged"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_what_is_drawn_is_summed_as_mergekit_sums_it(tmp_path, method):
    for name, (parameters, base, arrays) in goldens(method).items():
        if not np.isclose(arrays["base"], 0).all() or name == "unscaled":
            continue
        (tmp_path / "mergekit.yaml").write_text(
            yaml.safe_dump(as_mergekit_has_it(method, parameters, base, arrays["tasks"]))
        )
        recipe = jm.read_recipe(tmp_path / "mergekit.yaml")
        kept = arrays["tasks"] * arrays["masks"]
        sums = [np.abs(x).sum(axis=(1, 2), keepdims=True) for x in (arrays["tasks"], kept)]
        weights = [source.weight for source in recipe.adapters]
        factor = recipe.stages[0].values["factor"] if recipe.stages else 1.0
        got = np.einsum("n,nij", weights, kept * (sums[0] / sums[1])) * factor
        np.testing.assert_allclose(got, arrays["merged"], rtol=1e-5, atol=1e-6)


def test_it_becomes_a_recipe_of_ones_own(folder):
    text = """
merge_method: ties
base_model: org/base
models:
  - model: org/base
  - model: org/base+a
    parameters:
      weight: [0, 1]
      density: 0.5
  - model: org/base@main+b
    parameters:
      weight:
        - filter: self_attn
          value: [0.1, 0.2]
        - filter: mlp.up_proj.weight
          value: 2
        - value: 1
parameters:
  density: 0.7
  lambda: 0.5
  normalize: false
  int8_mask: true
dtype: bfloat16
out_dtype: float32
tokenizer_source: base
"""
    (folder / "mergekit.yaml").write_text(text)
    recipe = jm.read_recipe(folder / "mergekit.yaml")
    one, two = recipe.adapters
    assert (one.path, one.weight, one.hyperparameters) == ("a", Gradient((0, 1)), {"density": 0.5})
    rules = Rules((Rule("*self_attn*", Gradient((0.1, 0.2))), Rule("*mlp.up_proj", 2), Rule(None, 1)))
    assert (two.path, two.weight, two.hyperparameters) == ("b", rules, {"density": 0.7})
    assert (recipe.method, recipe.dtype) == ("ties", "float32")
    assert recipe.hyperparameters == {"election": "weighted", "divisor": "none"}
    assert recipe.notes == (
        "tokenizer_source is left out: an adapter has none",
        "org/base is left out of models: the base model has no change to merge",
        "dtype bfloat16 is that of the result: arithmetic is float32 or wider",
    )
    sources = [jm.load(folder / name) for name in "ab"]
    weights = [
        {path: int(path.split(".")[2]) / 3 for path in PATHS},
        {path: 0.1 + int(path.split(".")[2]) / 30 if "self_attn" in path else 2 for path in PATHS},
    ]
    expected = jm.merge(
        sources, weights, method="ties", density=[0.5, 0.7], election="weighted", divisor="none", dtype="float32",
        stages=[("scale", {"factor": 0.5})],
    )  # fmt: skip
    got = jm.merge_recipe(folder / "mergekit.yaml")
    for path, lora in expected.modules.items():
        assert relative_error(delta64(got.modules[path]), delta64(lora)) < 1e-6


def test_its_result_has_a_recipe_of_jaxmerges_beside_it(folder, tmp_path):
    text = "merge_method: slerp\nbase_model: x+a\nmodels: [{model: x+a}, {model: x+b}]\nparameters: {t: [0, 1]}\n"
    (folder / "mergekit.yaml").write_text(text)
    got = jm.merge_recipe(folder / "mergekit.yaml")
    jm.save(got, tmp_path / "out")
    recipe = jm.read_recipe(tmp_path / "out" / "recipe.yaml")
    assert [source.weight for source in recipe.adapters] == [Gradient((1, 0)), Gradient((0, 1))]
    assert_same(jm.merge_recipe(tmp_path / "out" / "recipe.yaml"), got)


def test_weights_that_vary_are_normalized_where_their_sum_does_not(folder):
    text = """
merge_method: linear
models:
  - {model: x+a, parameters: {weight: [{filter: mlp, value: [0, 2]}, {value: 3}]}}
  - {model: x+b, parameters: {weight: [{filter: mlp, value: [2, 0]}, {value: 1}]}}
"""
    (folder / "mergekit.yaml").write_text(text)
    one, two = jm.read_recipe(folder / "mergekit.yaml").adapters
    assert one.weight == Rules((Rule("*mlp*", Gradient((0, 1))), Rule(None, 0.75)))
    assert two.weight == Rules((Rule("*mlp*", Gradient((1, 0))), Rule(None, 0.25)))
    wrong = "recipe.yaml:2: weights that vary can be normalized here only where their sum does not: write weights that "
    wrong += "sum to 1, and normalize: false in the parameters"
    assert problems(text.replace("[2, 0]", "[2, 1]"), folder) == [wrong]
    assert problems(text.replace("filter: mlp, value: [2, 0]", "filter: attn, value: [2, 0]"), folder) == [wrong]


TWO = "models: [{model: x+a, parameters: {weight: 1}}, {model: x+b, parameters: {weight: 0.5}}]\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"merge_method: tise\n{TWO}", ["recipe.yaml:1: unknown merge_method tise; did you mean ties?"]),
        (f"merge_method: passthrough\n{TWO}", [
            "recipe.yaml:1: merge_method passthrough is mergekit's alone: it takes one model as it is: jaxmerge "
            "convert, or method linear with one adapter"
        ]),
        (TWO, ["recipe.yaml:1: a recipe of mergekit's needs merge_method"]),
        ("merge_method: ties\n", ["recipe.yaml:1: a recipe of mergekit's needs models: the list of what is merged"]),
        ("merge_method: ties\nmodels: x\n", ["recipe.yaml:2: models should be a list, as in [{model: BASE+ADAPTER}]"]),
        ("merge_method: linear\nslices: []\n", [
            "recipe.yaml:2: slices puts layers of models together, and an adapter has its layers"
        ]),
        (f"merge_method: linear\nmodules: {{}}\n{TWO}", [
            "recipe.yaml:2: modules puts layers of models together, and an adapter has its layers"
        ]),
        (f"merge_method: linear\n{TWO}dtyp: bfloat16\n", ["recipe.yaml:3: unknown key dtyp; did you mean dtype?"]),
        (f"merge_method: linear\n{TWO}parameters: {{normalise: true}}\n", [
            "recipe.yaml:3: unknown key normalise; did you mean normalize?"
        ]),
        ("merge_method: ties\nmodels: [{model: x+a, parameters: {weight: 1, densty: 0.5}}, {modle: x+b}]\n", [
            "recipe.yaml:2: unknown key densty; did you mean density?",
            "recipe.yaml:2: unknown key modle; did you mean model?",
            "recipe.yaml:2: model should be a text, as in BASE+ADAPTER",
        ]),
        ("merge_method: linear\nmodels: [{model: x+a}, {model: x+b, parameters: {weight: 1}}]\n", [
            "recipe.yaml:1: merge_method linear needs weight"
        ]),
        (f"merge_method: slerp\nbase_model: x+a\n{TWO.replace(', parameters: {weight: 1}', '')}", [
            "recipe.yaml:1: merge_method slerp needs t",
            "recipe.yaml:3: unknown key weight: a model of this method has t",
        ]),
        ("merge_method: slerp\nmodels: [{model: x+a}, {model: x+b}]\nparameters: {t: 0.5}\n", [
            "recipe.yaml:1: base_model is missing: it is the first of the two that are merged",
        ]),
        ("merge_method: slerp\nbase_model: x+a\nmodels: [{model: x+b}, {model: x+c}]\nparameters: {t: 0.5}\n", [
            "recipe.yaml:1: method slerp takes just 2 adapters, not 3"
        ]),
        ("merge_method: slerp\nbase_model: x+a\nmodels: [{model: x+b}]\nparameters: {t: 1.5}\n", [
            "recipe.yaml:4: t is a part of the way from one model to the other, from 0 to 1"
        ]),
        ("merge_method: ties\nmodels: [{model: x+a}, {model: y+b}]\nbase_model: x\nparameters: {weight: 1}\n", [
            "recipe.yaml:2: the adapters are of different base models: x, y"
        ]),
        ("merge_method: ties\nmodels: [{model: x+a}, {model: x+b}]\nbase_model: x+c\nparameters: {weight: 1}\n", [
            "recipe.yaml:3: base_model is the model that the adapters were trained on, without an adapter"
        ]),
        ("merge_method: ties\nmodels: [{model: x+a@v2}, {model: x+b}]\nparameters: {weight: 1}\n", [
            "recipe.yaml:2: a@v2 names a revision on a model hub: give the adapter's folder on this machine",
            "recipe.yaml:2: a@v2: there is no such folder",
        ]),
        ("merge_method: ties\nmodels: [{model: x+aa}, {model: x+b}]\nparameters: {weight: 1, density: 2}\n", [
            "recipe.yaml:2: aa: there is no such folder; did you mean a?",
            "recipe.yaml:3: density should be at most 1 and above 0, got 2",
        ]),
        (f"merge_method: ties\n{TWO}parameters: {{rescale: true}}\n", [
            "recipe.yaml:3: rescale can only be false: the sum of magnitudes of what is left is not restored here, nor "
            "in the paper"
        ]),
        (f"merge_method: dare_ties\n{TWO}parameters: {{rescale: false, normalize: maybe}}\n", [
            "recipe.yaml:3: rescale can only be true: what is kept is always divided by its chance to be kept, as in "
            "the paper",
            "recipe.yaml:3: normalize should be true or false, got 'maybe'",
        ]),
        ("merge_method: ties\nmodels: [{model: x+a, parameters: {weight: 1, normalize: true}}]\n", [
            "recipe.yaml:2: normalize is not a model's own: it belongs to parameters"
        ]),
        (f"merge_method: linear\n{TWO}parameters: {{normalize: false}}\n", [
            "recipe.yaml:1: without normalize weights that do not sum to 1 scale the base model too, which an adapter "
            "cannot: merge_method task_arithmetic leaves it as it is"
        ]),
        ("merge_method: ties\nmodels: [{model: x+a}]\nparameters: {weight: [{filtr: mlp, value: 1}]}\n", [
            "recipe.yaml:3: unknown key filtr; did you mean filter?"
        ]),
        ("merge_method: ties\nmodels: [{model: x+a}]\nparameters: {weight: [{filter: mpl, value: 1}, {value: 2}]}\n", [
            "recipe.yaml:3: *mpl* matches no module; the nearest is model.layers.0.mlp.up_proj"
        ]),
        (f"merge_method: linear\n{TWO}dtype: int8\n", [
            "recipe.yaml:3: unknown dtype int8: there are float32, bfloat16, float16, float64"
        ]),
        (f"merge_method: linear\n{TWO}adapters: [a]\n", [
            "recipe.yaml:1: unknown key merge_method; did you mean method?",
            "recipe.yaml:2: unknown key models: jaxmerge schema says what a recipe has",
        ]),
    ],
)  # fmt: skip
def test_what_is_wrong_word_for_word(folder, text, told):
    found = [line.partition(" adapters, method")[0] for line in problems(text, folder)]
    assert found == told


NOTES = {
    "slerp": ["there the sphere is that of whole weights, here that of the changes to the base model"],
    "nuslerp": ["there the sphere is that of whole weights, here that of the changes to the base model"],
    "karcher": ["there the sphere is that of whole weights, here that of the changes to the base model"],
    "sce": ["adapters are weighed by their energy however small it is; mergekit weighs small changes alike"],
    "ties": [],
    "task_arithmetic": [],
    "dare_ties": [
        "what is kept is divided by its chance to be kept, as in the paper; mergekit restores the sum of magnitudes",
        "masks are drawn with seed 0: mergekit takes its seed from the command line, and draws other numbers",
    ],
}


@pytest.mark.parametrize("method", NOTES)
def test_what_differs_is_noted(folder, method):
    base = "x+a" if method == "slerp" else None if method in ("nuslerp", "karcher") else "x"
    parameters = {"t": 0.5} if method == "slerp" else {} if method in ("karcher", "sce") else {"weight": 1}
    document = {"merge_method": method, "models": [{"model": "x+a"}, {"model": "x+b"}], "parameters": parameters}
    (folder / "mergekit.yaml").write_text(yaml.safe_dump({**document, **({"base_model": base} if base else {})}))
    assert list(jm.read_recipe(folder / "mergekit.yaml").notes) == NOTES[method]


def test_negative_weights_of_nuslerp_are_noted(folder):
    text = "merge_method: nuslerp\nbase_model: x\nmodels: [{model: x+a}, {model: x+b, parameters: {weight: -1}}]\n"
    (folder / "mergekit.yaml").write_text(text + "parameters: {weight: 1}\n")
    assert jm.read_recipe(folder / "mergekit.yaml").notes == (
        "a negative weight turns an adapter around; mergekit goes on beyond the other one",
    )


def test_a_recipe_of_mergekits_may_be_part_of_a_chain(folder):
    (folder / "mergekit.yaml").write_text(f"merge_method: linear\n{TWO}")
    (folder / "chain.yaml").write_text("adapters: [{recipe: mergekit.yaml}, c]\n")
    inner = jm.merge([jm.load(folder / name) for name in "ab"], [1 / 1.5, 0.5 / 1.5])
    assert_same(jm.merge_recipe(folder / "chain.yaml"), jm.merge([inner, jm.load(folder / "c")]))
