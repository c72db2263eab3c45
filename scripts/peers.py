"""Merges of the same adapters by PEFT itself, for scripts/quality.py."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jaxmerge as jm
from jaxmerge.catalog import COMBINATION_TYPES, METHODS

Merges = Mapping[float | None, jm.Adapter]


def peft_merges(
    folder: Path, tasks: Sequence[str], densities: Sequence[float], seed: int
) -> dict[str, Callable[[], Merges]]:
    """PEFT's combination types -> a function that makes the merge, at each density that matters to it."""
    return {
        kind: functools.partial(
            _merged,
            folder,
            tuple(tasks),
            kind,
            tuple(densities) if any(h.name == "density" for h in METHODS[row.method].hyperparameters) else (None,),
            seed,
        )
        for kind, row in COMBINATION_TYPES.items()
    }


@functools.cache
def _model(folder: Path, tasks: tuple[str, ...]) -> Any:
    """A model of the base model's shape with all adapters; nobody computes with its weights."""
    import peft
    import transformers

    config = transformers.BertConfig(
        vocab_size=2, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    first, *others = tasks
    model = peft.PeftModel.from_pretrained(transformers.BertModel(config), str(folder / first), adapter_name=first)
    for task in others:
        model.load_adapter(str(folder / task), task)
    return model


def _merged(folder: Path, tasks: tuple[str, ...], kind: str, densities: tuple[float | None, ...], seed: int) -> Merges:
    import peft
    import torch

    model, found = _model(folder, tasks), {}
    for density in densities:
        torch.manual_seed(seed)
        model.add_weighted_adapter(list(tasks), [1.0] * len(tasks), "merged", combination_type=kind, density=density)
        state = peft.get_peft_model_state_dict(model, adapter_name="merged")
        found[density] = jm.from_torch(state, model.peft_config["merged"])
        model.delete_adapter("merged")
    return found
