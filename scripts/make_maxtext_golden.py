"""Makes tests/goldens/maxtext with MaxText: adapters as it writes them, what they add, what its weight hooks make.

Run it where a checkout of MaxText runs (CPU, Python 3.12) and jaxmerge is installed:
`python scripts/make_maxtext_golden.py path/of/maxtext`. MaxText then restores what jaxmerge wrote, a merge and
conversions both ways, by its own `lora_restore_path`, and the script exits non-zero if any logits are not those of the
base with the change in its kernels.
"""

import argparse
import importlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

import jaxmerge as jm

GOLDEN = Path(__file__).parents[1] / "tests" / "goldens" / "maxtext"
WEIGHTS = {"a": 1.0, "b": -0.5}
RANKS = {"a": 2, "b": 3}
ALPHAS = {"a": 5.0, "b": 4.0}
# No two widths are the same: 24 features of queries, 12 of keys.
EMBED, MLP, HEADS, KV_HEADS, HEAD_DIM = 8, 10, 4, 2, 6
TOKENS = np.array([[2, 5, 7, 1, 3, 11, 4, 9]])
PEFT_CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "r": 3,
    "lora_alpha": 7,
    "rank_pattern": {"k_proj": 2},
    "alpha_pattern": {"down_proj": 2},
}
TOLERANCE = 1e-4
# MaxText's names of what is adapted, and Hugging Face's.
NAMES = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "out": "o_proj",
    "wi_0": "gate_proj",
    "wi_1": "up_proj",
    "wo": "down_proj",
}
BUDGET = 600_000


@dataclass(frozen=True)
class Model:
    """A tiny model.

    Attributes:
        folder: Under the goldens.
        name: MaxText's.
        layout: jaxmerge's.
        layers: How many.
        paired: Whether MaxText counts two layers as one.
        scanned: Whether MaxText scans them.
        names: Of `NAMES`, what is adapted.
        kept: Whether it becomes a golden; else jaxmerge is only checked with it.
    """

    folder: str
    name: str
    layout: str
    layers: int
    paired: bool = False
    scanned: bool = True
    names: tuple[str, ...] = tuple(NAMES)
    kept: bool = True

    @property
    def format(self) -> str:
        """How jaxmerge calls it that MaxText scans the layers, or does not."""
        return "maxtext" if self.scanned else "maxtext-unscanned"


MODELS = [
    Model("llama3", "llama3.1-8b", "llama3", 2),
    Model("llama3-unscanned", "llama3.1-8b", "llama3", 2, scanned=False),
    Model("qwen3", "qwen3-0.6b", "qwen3", 2),
    Model("gemma2", "gemma2-2b", "gemma2", 4, paired=True, names=("query", "key", "out", "wi_1")),
    Model("gemma2-whole", "gemma2-2b", "gemma2", 4, paired=True, kept=False),
    # A block of six, and two layers that are left.
    Model("gemma3", "gemma3-4b", "gemma3-multimodal", 8, names=("query", "wo")),
    Model("gemma3-whole", "gemma3-4b", "gemma3-multimodal", 8, kept=False),
]


def maxtext(module: str) -> Any:
    """A module of MaxText's, which is on the path only once `main` put it there."""
    return importlib.import_module(f"maxtext.{module}")


def config_of(model: Model, **lora: Any) -> Any:
    """MaxText's own configuration of the model, with everything small."""
    base = Path(maxtext("utils.globals").MAXTEXT_CONFIGS_DIR) / "base.yml"
    return maxtext("configs.pyconfig").initialize_pydantic(
        ["", str(base)],
        run_name="golden",
        model_name=model.name,
        override_model_config=True,
        base_emb_dim=EMBED,
        base_mlp_dim=MLP,
        base_num_query_heads=HEADS,
        base_num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        base_num_decoder_layers=model.layers // 2 if model.paired else model.layers,
        vocab_size=16,
        max_target_length=TOKENS.shape[1],
        max_prefill_predict_length=TOKENS.shape[1] // 2,
        per_device_batch_size=1.0,
        attention="dot_product",
        scan_layers=model.scanned,
        weight_dtype="float32",
        dtype="float32",
        matmul_precision="highest",
        enable_checkpointing=True,
        async_checkpointing=False,
        checkpoint_period=1,
        base_output_directory=tempfile.gettempdir(),
        skip_jax_distributed_system=True,
        log_config=False,
        hardware="cpu",
        lora={"enable_lora": True, "lora_module_path": rf".*/({'|'.join(model.names)})$", **lora} if lora else {},
    )


def filled(model: nnx.Module, kind: Any, seed: int, size: float) -> None:
    """Fills the parameters of exactly this kind with normal numbers, in place."""
    rng = np.random.default_rng(seed)
    for _, variable in nnx.to_flat_state(nnx.state(model, kind)):
        if type(variable) is kind:
            shape = variable.get_value().shape
            variable.set_value(jnp.asarray(rng.normal(size=shape) * size, jnp.float32))


def built(config: Any, base_seed: int = 0) -> tuple[Any, Any]:
    """The real model with LoRA if the configuration has it, and a mesh. The base's weights depend on the seed only."""
    model, mesh = maxtext("utils.model_creation_utils").from_pretrained(config, mesh=None)
    filled(model, nnx.Param, base_seed, 0.3)
    return maxtext("utils.lora_utils").apply_lora_to_model(model, mesh, config), mesh


class Forward:
    """The real forward pass, compiled once per structure."""

    def __init__(self, model: Any, mesh: Any) -> None:
        """Takes the model apart."""
        self.graph, self.state = nnx.split(model)
        self.mesh = mesh
        positions, segments = jnp.arange(TOKENS.shape[1])[None], jnp.ones(TOKENS.shape, jnp.int32)

        def run(state: Any) -> Any:
            return nnx.merge(self.graph, state)(
                decoder_input_tokens=jnp.asarray(TOKENS),
                decoder_positions=positions,
                decoder_segment_ids=segments,
                enable_dropout=False,
            )

        self.run = jax.jit(run)

    def logits(self, changes: dict[str, np.ndarray] | None = None) -> np.ndarray:
        """The logits with these added to the kernels."""
        flat = dict(nnx.to_flat_state(self.state))
        for name, change in (changes or {}).items():
            path = (*name.split("."), "kernel")
            value = flat[path].get_value()
            flat[path] = flat[path].replace(jnp.asarray(np.asarray(value, np.float64) + change, jnp.float32))
        with jax.set_mesh(self.mesh), jax.default_matmul_precision("float32"):
            return np.asarray(self.run(nnx.from_flat_state(list(flat.items()))), np.float64)


def added(model: Any, alpha: float) -> dict[str, np.ndarray]:
    """What LoRA adds to each kernel, of the kernel's shape, float64. `verified` holds it against the forward pass."""
    flat = {path: variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    found = {}
    for path, kernel in flat.items():
        if path[-1] != "kernel" or (*path[:-1], "kernel_lora_a") not in flat:
            continue
        a, b = (np.asarray(flat[*path[:-1], f"kernel_lora_{factor}"], np.float64) for factor in "ab")
        if a.ndim == 3:
            one = kernel.shape[:1] + kernel.shape[2:]
            change = np.stack([(a[:, i] @ b[:, i]).reshape(one) for i in range(a.shape[1])], axis=1)
        else:
            change = (a @ b).reshape(kernel.shape)
        found[".".join(map(str, path[:-1]))] = alpha / a.shape[-1] * change
    return found


def error(value: np.ndarray, reference: np.ndarray) -> float:
    """‖value − reference‖ / ‖reference‖."""
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


def verified(what: str, base: Forward, changes: dict[str, np.ndarray], logits: np.ndarray) -> bool:
    """Whether the base with these changes has these logits, and has others without any one of them."""
    off = error(base.logits(changes), logits)
    least = min(error(base.logits({k: v for k, v in changes.items() if k != left_out}), logits) for left_out in changes)
    print(f"  {what}: relative error {off:.1e}; without any one kernel's change at least {least:.1e}")
    return off < TOLERANCE / 10 and least > 10 * TOLERANCE


def saved_by_trainer(folder: Path, model: Any, config: Any) -> None:
    """As `pre_train/train.py` saves its state after a step: with the optimizer's, in the layout of Linen."""
    checkpointing, states = maxtext("common.checkpointing"), maxtext("common.train_state_nnx")
    schedule = maxtext("utils.maxtext_utils").create_learning_rate_schedule(config)
    optimizer = maxtext("optimizers.optimizers").get_optimizer(config, schedule, model)
    state = states.TrainStateNNX(model, nnx.Optimizer(model, optimizer, wrt=nnx.LoRAParam))
    manager = checkpointing.create_orbax_checkpoint_manager(str(folder), True, False, 1)
    assert checkpointing.save_checkpoint(manager, 7, nnx.state(state), config, force=True)
    checkpointing.wait_until_finished(manager)
    manager.close()


def saved_by_converter(folder: Path, model: Any, config: Any) -> None:
    """As `to_maxtext.py` saves an adapter that it converted from PEFT's."""
    tree = jax.tree.map(lambda x: {"value": np.asarray(x)}, nnx.state(model, nnx.LoRAParam).to_pure_dict())
    maxtext("checkpoint_conversion.utils.utils").save_weights_to_checkpoint(str(folder), tree, 1, True, True, config)


class Hooks:
    """MaxText's converters of base weights, applied to changes of them."""

    def __init__(self, model: Model, config: Any) -> None:
        """Finds them by the model's name."""
        self.utils = maxtext("checkpoint_conversion.utils.utils")
        tables = maxtext("checkpoint_conversion.utils.param_mapping")
        published = maxtext("checkpoint_conversion.utils.hf_model_configs").HF_MODEL_CONFIGS[model.name].to_dict()
        text = published.get("text_config", published)
        text |= {"num_hidden_layers": model.layers, "head_dim": HEAD_DIM, "hidden_size": EMBED}
        text |= {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "intermediate_size": MLP}
        self.config = config
        every = tables.PARAM_MAPPING[model.name](published, config, model.scanned)
        self.mapping = {
            key: value
            for key, value in every.items()
            if key.startswith("params-decoder-") and key.endswith(tuple(f"-{name}-kernel" for name in model.names))
        }
        self.hooks = {
            to_hf: tables.HOOK_FNS[model.name](published, config, model.scanned, saving_to_hf=to_hf)
            for to_hf in (False, True)
        }

    def modules(self) -> dict[str, tuple[int, int]]:
        """The modules that Hugging Face's model has, with the shapes of their weights."""
        heads, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        shapes = {"q_proj": (heads, EMBED), "k_proj": (kv, EMBED), "v_proj": (kv, EMBED), "o_proj": (EMBED, heads)}
        shapes |= {"gate_proj": (MLP, EMBED), "up_proj": (MLP, EMBED), "down_proj": (EMBED, MLP)}
        names = [n for value in self.mapping.values() for n in (value if isinstance(value, list) else [value])]
        return {name.removesuffix(".weight"): shapes[name.split(".")[-2]] for name in names}

    def to_maxtext(self, changes: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        """Changes of kernels of these shapes from changes of Hugging Face's weights."""
        found = {}
        for key, names in self.mapping.items():
            kernel = ".".join(key.split("-")[1:-1])
            load = self.utils._get_hf_loading_function(
                names,
                lambda name: changes[name.removesuffix(".weight")].astype(np.float32),
                self.hooks[False][key],
                shapes[kernel],
                self.config,
            )
            found[kernel] = np.asarray(load())
            assert found[kernel].shape == shapes[kernel], kernel
        return found

    def to_hf(self, changes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Changes of Hugging Face's weights from changes of kernels."""
        shapes = {f"{name}.weight": shape for name, shape in self.modules().items()}
        found = {}
        for key in self.mapping:
            change = jnp.asarray(changes[".".join(key.split("-")[1:-1])], jnp.float32)
            pairs = self.utils.process_maxtext_param(key, change, self.mapping, self.hooks[True], shapes, self.config)
            found |= {name.removesuffix(".weight"): value for name, value in pairs}
        return found


def peft_adapter(folder: Path, modules: dict[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    """Writes a random adapter as PEFT does; returns its changes."""
    rng = np.random.default_rng(5)
    tensors, changes = {}, {}
    for path, (out, in_) in modules.items():
        name = path.rsplit(".", 1)[1]
        rank = PEFT_CONFIG["rank_pattern"].get(name, PEFT_CONFIG["r"])
        alpha = PEFT_CONFIG["alpha_pattern"].get(name, PEFT_CONFIG["lora_alpha"])
        a, b = (rng.normal(size=shape).astype(np.float32) * 0.3 for shape in ((rank, in_), (out, rank)))
        tensors |= {f"base_model.model.{path}.lora_A.weight": a, f"base_model.model.{path}.lora_B.weight": b}
        changes[path] = alpha / rank * b.astype(np.float64) @ a.astype(np.float64)
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {**PEFT_CONFIG, "target_modules": sorted({path.rsplit(".", 1)[1] for path in modules})}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return changes


def restored(model: Model, path: Path, rank: int) -> np.ndarray:
    """The logits of the real model after MaxText restored an adapter of this rank, and alpha, from there."""
    config = config_of(model, lora_rank=rank, lora_alpha=float(rank), lora_restore_path=str(path))
    lora_model, mesh = built(config)
    filled(lora_model, nnx.LoRAParam, 0, np.nan)
    with jax.set_mesh(mesh):
        maxtext("utils.lora_utils").restore_lora_from_path(lora_model, config)
    return Forward(lora_model, mesh).logits()


def close(what: str, value: Callable[[], np.ndarray], reference: np.ndarray) -> bool:
    """Says how far off it is; whether that is little."""
    try:
        off = error(value(), reference)
    except Exception as problem:
        print(f"  {what}: {type(problem).__name__}: {str(problem).splitlines()[0][:200]}")
        return False
    print(f"  {what}: relative error {off:.1e}")
    return off < TOLERANCE


def peft_changes(path: Path) -> dict[str, np.ndarray]:
    """The changes that a PEFT adapter on disk makes, without jaxmerge."""
    config = json.loads((path / "adapter_config.json").read_text())
    tensors = safetensors.numpy.load_file(path / "adapter_model.safetensors")
    found = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[name.replace("lora_A", "lora_B")].astype(np.float64)
            fits = [key for key in config.get("rank_pattern") or {} if module.endswith(key)]
            rank = config["rank_pattern"][fits[0]] if fits else config["r"]
            assert rank == len(a), module
            fits = [key for key in config.get("alpha_pattern") or {} if module.endswith(key)]
            alpha = config["alpha_pattern"][fits[0]] if fits else config["lora_alpha"]
            found[module] = alpha / rank * b @ a.astype(np.float64)
    return found


def golden(model: Model, folder: Path) -> bool:
    """Makes one model's goldens and checks jaxmerge against the model; whether all is well."""
    print(model.folder)
    folder.mkdir(parents=True)
    plain = config_of(model)
    base_model, mesh = built(plain)
    base = Forward(base_model, mesh)
    expected: dict[str, Any] = {
        "weights": np.array(list(WEIGHTS.values())),
        "head_dim": np.array(HEAD_DIM),
    }
    good, changes = True, {}
    for seed, name in enumerate(WEIGHTS, 1):
        lora = {"lora_rank": RANKS[name], "lora_alpha": ALPHAS[name]}
        config = config_of(model, **lora)
        lora_model, mesh = built(config)
        filled(lora_model, nnx.LoRAParam, seed, 0.3)
        changes[name] = added(lora_model, ALPHAS[name])
        good &= verified(f"adapter {name}", base, changes[name], Forward(lora_model, mesh).logits())
        (saved_by_trainer if name == "a" else saved_by_converter)(folder / name, lora_model, config)
        expected |= {f"added/{name}/{path}": change.astype(np.float32) for path, change in changes[name].items()}

    hooks = Hooks(model, plain)
    hf_changes = peft_adapter(folder / "peft", hooks.modules())
    shapes = {path: change.shape for path, change in changes["a"].items()}
    from_peft = hooks.to_maxtext(hf_changes, shapes)
    to_hf = hooks.to_hf(changes["b"])
    good &= set(from_peft) == set(changes["a"]) and set(to_hf) == set(hf_changes)
    there_and_back = hooks.to_maxtext(to_hf, shapes)
    good &= all(error(there_and_back[path], change) < 1e-6 for path, change in changes["b"].items())
    expected |= {f"added/peft/{path}": change for path, change in from_peft.items()}
    expected |= {f"hf/b/{path}": change for path, change in to_hf.items()}
    np.savez_compressed(folder / "expected.npz", **expected)
    for note in folder.rglob("commit_success.txt"):  # Nobody needs it, and it names a path of the machine.
        note.unlink()

    options: dict[str, Any] = {"layout": model.layout, "head_dim": HEAD_DIM}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        merged = jm.merge([jm.load(folder / name) for name in WEIGHTS], list(WEIGHTS.values()))
        jm.save(merged, scratch / "merged", format=model.format, **options)
        total: dict[str, Any] = {path: sum(w * changes[name][path] for name, w in WEIGHTS.items()) for path in shapes}
        wanted = base.logits(total)
        good &= close("merged", lambda: restored(model, scratch / "merged", sum(RANKS.values())), wanted)
        effect = error(base.logits(), wanted)

        jm.save(jm.load(folder / "peft"), scratch / "converted", format=model.format, **options)
        wanted = base.logits(from_peft)
        good &= close("from PEFT", lambda: restored(model, scratch / "converted", PEFT_CONFIG["r"]), wanted)
        effect = min(effect, error(base.logits(), wanted))

        jm.save(jm.load(folder / "b"), scratch / "peft", format="peft", **options)
        back = hooks.to_maxtext(peft_changes(scratch / "peft"), shapes)
        good &= close("to PEFT", lambda: base.logits(back), base.logits(changes["b"]))
        effect = min(effect, error(base.logits(), base.logits(changes["b"])))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"  {len(shapes)} kernels, {size / 1000:.0f} kB; the adapters change the logits by {effect:.0%} or more")
    return good and effect > 0.1


def main() -> int:
    """Makes the goldens and checks jaxmerge with them."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("maxtext", type=Path, help="a checkout of MaxText")
    parser.add_argument("-o", "--output", type=Path, default=GOLDEN)
    parser.add_argument("--models", nargs="*", default=[model.folder for model in MODELS])
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.maxtext.resolve() / "src"))
    sys.argv = sys.argv[:1]
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in MODELS:
            if model.folder in arguments.models:
                folder = (arguments.output.resolve() if model.kept else Path(scratch)) / model.folder
                shutil.rmtree(folder, ignore_errors=True)
                if not golden(model, folder):
                    failed.append(model.folder)
    size = sum(file.stat().st_size for file in arguments.output.rglob("*") if file.is_file())
    print(f"{arguments.output}: {size / 1000:.0f} kB" + (f"; wrong: {', '.join(failed)}" if failed else ""))
    return 1 if failed or size > BUDGET else 0


if __name__ == "__main__":
    sys.exit(main())
