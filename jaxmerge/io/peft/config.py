"""The adapter_config.json of a merged adapter: what of the sources' it keeps, and every module's rank and scale."""

import collections
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmerge.base import Adapter, LoRA
from jaxmerge.io.peft.keys import TOKENS, Layout, as_list, natural_order, outer_module

# Fields that belong to how the first adapter was made and not to what the merged one is.
_RESET: Mapping[str, Any] = {
    "use_rslora": False,
    "init_lora_weights": True,
    "loftq_config": {},
    "corda_config": None,
    "eva_config": None,
    "lora_ga_config": None,
    "inference_mode": True,
}
# Fields kept where all adapters agree.
_AGREED = ("task_type", "auto_mapping", "revision", "ensure_weight_tying")
# Fields that say which modules are adapted.
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# Fields that adapters of all kinds have, with one meaning.
_COMMON = (
    *("base_model_name_or_path", "task_type", "auto_mapping", "revision", "inference_mode", "peft_version"),
    *("modules_to_save", *_TARGETS),
)


def as_lora_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The LoRA configuration, but for ranks and alphas, of an adapter of another kind that was made LoRA."""
    return {"peft_type": "LORA", **{field: config[field] for field in _COMMON if field in config}}


def combine_configs(adapters: Sequence[Adapter], names: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The configuration of a merged adapter, but for its ranks.

    Args:
        adapters: In the user's order.
        names: What messages call them.

    Returns:
        The configuration, and what PEFT has no way to hold in one adapter.
    """
    configs: list[dict[str, Any]] = [json.loads(adapter.metadata.config) for adapter in adapters]
    first, problems = configs[0], []
    merged = dict(first)
    merged.update({field: value for field, value in _RESET.items() if field in merged or value is True})
    for field in _AGREED:
        if field in merged and any(config.get(field) != first.get(field) for config in configs):
            merged[field] = False if isinstance(merged[field], bool) else None
    for field in ("fan_in_fan_out", "lora_bias"):
        if any(config.get(field) for config in configs):
            merged[field] = True
    for field in ("layer_replication", "trainable_token_indices"):
        values = {json.dumps(config.get(field)): name for config, name in zip(configs, names, strict=True)}
        # Adapters without trained tokens go with any; replicated layers renumber the modules of all.
        values = {k: v for k, v in values.items() if field == "layer_replication" or k not in ("null", "[]", "{}")}
        if len(values) > 1:
            problems.append(f"{field} differs between {' and '.join(values.values())}, and cannot be merged")
        elif values:
            merged[field] = json.loads(next(iter(values)))
    saved = [name for config in configs for name in as_list(config.get("modules_to_save"))]
    if saved:
        merged["modules_to_save"] = list(dict.fromkeys(saved))
    biases = {config.get("bias") or "none" for config in configs} - {"none"}
    if biases:
        merged["bias"] = "all" if len(biases) > 1 else biases.pop()
    if len({_targets(config) for config in configs}) > 1 or not first.get("target_modules"):
        merged.update(dict.fromkeys(_TARGETS))  # Written out module by module when it is saved.
    return merged, problems + _impossible(adapters, merged)


def _impossible(adapters: Sequence[Adapter], merged: Mapping[str, Any]) -> list[str]:
    """What each adapter may do alone but PEFT cannot do to one module at once: it drops something, or fails."""
    problems = []
    extras = {name for adapter in adapters for name in adapter.extras}
    layouts = dict(layout for adapter in adapters for layout in adapter.metadata.layouts)
    saved = as_list(merged.get("modules_to_save"))
    for path in dict.fromkeys(path for adapter in adapters for path in adapter.modules):
        if any(path == name or path.endswith(f".{name}") for name in saved):
            problems.append(f"module {path} is saved whole by one adapter and has LoRA factors in another")
        if f"{path}.{TOKENS}" in extras:
            problems.append(f"module {path} has trained tokens in one adapter and LoRA factors in another")
        if merged.get("lora_bias") and layouts.get(path, Layout()).kind == "embedding":
            problems.append(f"module {path} is an embedding, which PEFT does not adapt together with lora_bias")
    for name in extras:
        if name.endswith(f".{TOKENS}") and f"{name.removesuffix(TOKENS)}weight" in extras:
            problems.append(f"module {name.removesuffix(f'.{TOKENS}')} has trained tokens and is saved whole as well")
    return problems


def _targets(config: Mapping[str, Any]) -> str:
    """What a configuration adapts, in a form that can be compared: lists are sets to PEFT."""
    values = [config.get(field) for field in _TARGETS]
    return json.dumps([sorted(value, key=str) if isinstance(value, list) else value for value in values])


def export_config(adapter: Adapter) -> dict[str, Any]:
    """The adapter_config.json that gives every module its rank and scale."""
    config: dict[str, Any] = json.loads(adapter.metadata.config)
    paths = sorted(adapter.modules, key=natural_order)
    ranks = {path: adapter.modules[path].rank for path in paths}
    alphas = {path: _alpha(adapter.modules[path]) for path in paths}
    (rank, alpha), _ = collections.Counter((ranks[path], alphas[path]) for path in paths).most_common(1)[0]
    exact = {path: "^" + re.escape(path) for path in paths}
    config |= {
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.metadata.base_model,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        "rank_pattern": {exact[path]: ranks[path] for path in paths if ranks[path] != rank},
        "alpha_pattern": {exact[path]: alphas[path] for path in paths if alphas[path] != alpha},
    }
    if any(lora.bias is not None for lora in adapter.modules.values()):
        config["lora_bias"] = True
    if not config.get("target_modules"):
        config["target_modules"] = _written_out(paths)
    return config


def _written_out(paths: Sequence[str]) -> list[str] | str:
    """Target modules that are these and no others.

    PEFT takes an entry of a list for the end of a path, so that ``head`` is ``decoder.head`` too. Where that could
    happen it gets a regular expression instead, which it matches to the whole path.
    """
    targets = list(dict.fromkeys(outer_module(path) for path in paths))
    ambiguous = any("." not in target for target in targets) or any(
        other.endswith(f".{target}") for target in targets for other in targets
    )
    return "|".join(re.escape(target) for target in targets) if ambiguous else targets


def _alpha(lora: LoRA) -> int | float:
    alpha = float(lora.scale) * lora.rank
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
