"""Real adapters, made and saved by the installed PEFT, for the tests to merge. Needs torch."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from transformers.pytorch_utils import Conv1D

import jaxmerge as jm

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
