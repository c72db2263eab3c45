"""The tables of methods, spaces and PEFT's combination types.

Only literals, and no import of JAX: the command line answers ``--help`` from here. The law tests run every
row, and compare the hyperparameters with the signature of the function that the row names.
"""

from collections.abc import Mapping

from jaxmerge.catalog import combination_types, methods, spaces, stages
from jaxmerge.catalog.rows import OF_PRUNING, CombinationType, Hyperparameter, Method, Rows, Space, Stage

__all__ = [
    "COMBINATION_TYPES",
    "DTYPES",
    "FORMATS",
    "METHODS",
    "OF_PRUNING",
    "SCORES",
    "SPACES",
    "STAGES",
    "TREES",
    "CombinationType",
    "Hyperparameter",
    "Method",
    "Rows",
    "Space",
    "Stage",
    "all_hyperparameters",
]

METHODS: Mapping[str, Method] = Rows(methods.METHODS)
SPACES: Mapping[str, Space] = Rows(spaces.SPACES)
STAGES: Mapping[str, Stage] = Rows(stages.STAGES)
COMBINATION_TYPES: Mapping[str, CombinationType] = Rows(combination_types.COMBINATION_TYPES)

# What adapters can be written as, whatever they came as.
FORMATS = ("peft", "tunix", "maxtext", "maxtext-unscanned", "qwix", "nnx", "gemma", "openpi", "keras")

# What results can be of.
DTYPES = ("float32", "bfloat16", "float16", "float64")

# Of a merge, without data: see `jaxmerge.scores`.
SCORES = ("energy_kept", "worst_cosine", "norm")

# How the factors in a Flax tree are called.
TREES = ("nnx", "qwix", "gemma", "openpi", "maxtext-legacy", "keras")


def all_hyperparameters() -> list[Hyperparameter]:
    """Of all methods and spaces; where several share a name, the first one's."""
    rows = [*METHODS.values(), *SPACES.values()]
    return list({h.name: h for row in reversed(rows) for h in row.hyperparameters}.values())[::-1]
