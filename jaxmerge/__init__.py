"""jaxmerge: merge LoRA adapters exactly, in the low-rank space.

Names are imported when they are first used, so that the command line can answer without JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxmerge.attribution import Contributions, contributions
    from jaxmerge.base import Adapter, Energy, LoRA, Metadata, delta, energy_kept
    from jaxmerge.catalog import COMBINATION_TYPES, METHODS, SPACES
    from jaxmerge.comparison import Comparison, compare
    from jaxmerge.consensus import calculate_majority_sign_mask, disjoint_merge
    from jaxmerge.converting import Converted, convert
    from jaxmerge.datafree import scores
    from jaxmerge.inspection import Inspection, inspect
    from jaxmerge.io import from_state, from_torch, load, peek, peft_config, save, to_state, to_torch
    from jaxmerge.merging import lower, merge
    from jaxmerge.methods.arithmetic import dare_linear, magnitude_prune, task_arithmetic
    from jaxmerge.methods.sign_consensus import dare_ties, ties
    from jaxmerge.previewing import Preview, preview
    from jaxmerge.recipes.model import Recipe
    from jaxmerge.recipes.reading import read_recipe
    from jaxmerge.recipes.running import merge_recipe
    from jaxmerge.recipes.schema import recipe_schema
    from jaxmerge.reports import Report, report
    from jaxmerge.resizing import resize
    from jaxmerge.sparsify import prune
    from jaxmerge.sweeps import Sweep, sweep
    from jaxmerge.verification import Verification, verify

_HOMES = {
    "jaxmerge.base": ("Adapter", "Energy", "LoRA", "Metadata", "delta", "energy_kept"),
    "jaxmerge.catalog": ("COMBINATION_TYPES", "METHODS", "SPACES"),
    "jaxmerge.comparison": ("Comparison", "compare"),
    "jaxmerge.attribution": ("Contributions", "contributions"),
    "jaxmerge.converting": ("Converted", "convert"),
    "jaxmerge.inspection": ("Inspection", "inspect"),
    "jaxmerge.consensus": ("calculate_majority_sign_mask", "disjoint_merge"),
    "jaxmerge.io": ("from_state", "from_torch", "load", "peek", "peft_config", "save", "to_state", "to_torch"),
    "jaxmerge.merging": ("lower", "merge"),
    "jaxmerge.methods.arithmetic": ("dare_linear", "magnitude_prune", "task_arithmetic"),
    "jaxmerge.methods.sign_consensus": ("dare_ties", "ties"),
    "jaxmerge.datafree": ("scores",),
    "jaxmerge.previewing": ("Preview", "preview"),
    "jaxmerge.recipes.model": ("Recipe",),
    "jaxmerge.recipes.reading": ("read_recipe",),
    "jaxmerge.recipes.running": ("merge_recipe",),
    "jaxmerge.recipes.schema": ("recipe_schema",),
    "jaxmerge.reports": ("Report", "report"),
    "jaxmerge.resizing": ("resize",),
    "jaxmerge.sparsify": ("prune",),
    "jaxmerge.sweeps": ("Sweep", "sweep"),
    "jaxmerge.verification": ("Verification", "verify"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "COMBINATION_TYPES",
    "METHODS",
    "SPACES",
    "Adapter",
    "Comparison",
    "Contributions",
    "Converted",
    "Energy",
    "Inspection",
    "LoRA",
    "Metadata",
    "Preview",
    "Recipe",
    "Report",
    "Sweep",
    "Verification",
    "calculate_majority_sign_mask",
    "compare",
    "contributions",
    "convert",
    "dare_linear",
    "dare_ties",
    "delta",
    "disjoint_merge",
    "energy_kept",
    "from_state",
    "from_torch",
    "inspect",
    "load",
    "lower",
    "magnitude_prune",
    "merge",
    "merge_recipe",
    "peek",
    "peft_config",
    "preview",
    "prune",
    "read_recipe",
    "recipe_schema",
    "report",
    "resize",
    "save",
    "scores",
    "sweep",
    "task_arithmetic",
    "ties",
    "to_state",
    "to_torch",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxmerge' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
