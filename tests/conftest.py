"""Real adapters, made and saved by the installed PEFT, for the tests to merge."""

import os
import warnings

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import pytest
import torch
from transformers.pytorch_utils import Conv1D

import jaxmerge as jm

jax.config.update("jax_numpy_dtype_promotion", "strict")
torch.set_num_threads(1)


class Linears(torch.nn.Module):
    """Three linear layers, two of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(12, 20)
        self.second = torch.nn.Linear(12, 20)
        self.third = torch.nn.Linear(20, 16)


class Kinds(torch.nn.Module):
    """One layer of every kind that PEFT puts LoRA on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(12, 20)
        self.hf_conv1d = Conv1D(18, 12)
        self.embedding = torch.nn.Embedding(30, 12)
        self.conv1d = torch.nn.Conv1d(6, 9, 3)
        self.conv2d = torch.nn.Conv2d(6, 9, 3)
        self.conv2d_1x1 = torch.nn.Conv2d(6, 9, 1)
        self.conv3d = torch.nn.Conv3d(6, 9, 2)
        self.attention = torch.nn.MultiheadAttention(8, 2)
        self.lm_head = torch.nn.Linear(12, 30)


KINDS = [
    "linear", "hf_conv1d", "embedding", "conv1d", "conv2d", "conv2d_1x1", "conv3d", "attention", "lm_head",
]  # fmt: skip
LINEARS = ["first", "second", "third"]


class Cohort:
    """Several PEFT adapters of one model, in memory and on disk."""

    def __init__(self, model: Callable[[], torch.nn.Module], configs: Sequence[Mapping[str, Any]], folder: Path):
        torch.manual_seed(0)
        self.names = [f"task{i}" for i in range(len(configs))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = [peft.LoraConfig(**{"init_lora_weights": False, **config}) for config in configs]
            self.model = peft.get_peft_model(model(), made[0], adapter_name=self.names[0])
            for name, config in zip(self.names[1:], made[1:], strict=True):
                self.model.add_adapter(name, config)
            with torch.no_grad():
                for key, parameter in self.model.named_parameters():
                    if "lora_" in key:
                        parameter.normal_()
            self.model.save_pretrained(str(folder))
        self.folders = [folder / name for name in self.names]
        self.make_model = model

    def load(self) -> list[jm.Adapter]:
        """The adapters, as jaxmerge reads them."""
        return [jm.load(folder) for folder in self.folders]

    def deltas(self, name: str) -> dict[str, np.ndarray]:
        """PEFT's own weight change of every module of one adapter, in its own shape."""
        return {
            path: module.get_delta_weight(name).detach().double().numpy()
            for path, module in self.lora_modules()
            if name in module.lora_A or name in module.lora_embedding_A
        }

    def merged_products(self, weights: Sequence[float], **arguments: Any) -> dict[str, np.ndarray]:
        """B·A of every module after PEFT's own add_weighted_adapter."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model.delete_adapter("merged") if "merged" in self.model.peft_config else None
            self.model.add_weighted_adapter(self.names, list(weights), "merged", **arguments)
        return {path: self._product(module, "merged") for path, module in self.lora_modules()}

    def lora_modules(self) -> list[tuple[str, Any]]:
        """Module path and PEFT layer of every adapted module."""
        found = []
        for path, module in self.model.base_model.model.named_modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                found.append((path, module))
        return found

    @staticmethod
    def _product(module: Any, name: str) -> np.ndarray:
        if name in module.lora_embedding_A:
            a, b = module.lora_embedding_A[name], module.lora_embedding_B[name]
        else:
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
        a, b = a.detach().double().numpy(), b.detach().double().numpy()
        return b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1)

    def reload(self, folder: Path) -> peft.PeftModel:
        """A fresh model with the adapter in a folder, loaded by PEFT; anything amiss is an error."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
            return peft.PeftModel.from_pretrained(self.make_model(), str(folder))


@pytest.fixture(scope="session")
def make_cohort(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Cohort]:
    """Makes a `Cohort` in a folder of its own."""

    def make(configs: Sequence[Mapping[str, Any]], model: Callable[[], torch.nn.Module] = Linears) -> Cohort:
        return Cohort(model, configs, tmp_path_factory.mktemp("cohort"))

    return make


@pytest.fixture(scope="session")
def equal_ranks(make_cohort: Callable[..., Cohort]) -> Cohort:
    """Three adapters of rank 4 with alphas of their own."""
    return make_cohort([{"r": 4, "lora_alpha": alpha, "target_modules": LINEARS} for alpha in (8, 4, 2)])


@pytest.fixture(scope="session")
def mixed(make_cohort: Callable[..., Cohort]) -> Cohort:
    """Four adapters that differ in everything that may differ."""
    return make_cohort(
        [
            {"r": 4, "lora_alpha": 8, "target_modules": LINEARS},
            {"r": 2, "lora_alpha": 16, "target_modules": ["first", "third"], "use_rslora": True},
            {
                "r": 3,
                "lora_alpha": 6,
                "target_modules": LINEARS,
                "rank_pattern": {"second": 5},
                "alpha_pattern": {"third": 1},
            },
            {"r": 1, "lora_alpha": 1, "target_modules": ["second"]},
        ]
    )


def delta64(lora: jm.LoRA) -> np.ndarray:
    """scale·B·A in float64 NumPy."""
    return float(lora.scale) * np.asarray(lora.b, np.float64) @ np.asarray(lora.a, np.float64)


def relative_error(value: Any, reference: Any) -> float:
    """‖value − reference‖ / ‖reference‖ in Frobenius norm."""
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    assert value.shape == reference.shape
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))
