"""PEFT's combination types, as cells of the grid."""

from collections.abc import Mapping

from jaxmerge.catalog.rows import CombinationType

COMBINATION_TYPES: Mapping[str, CombinationType] = {
    "cat": CombinationType("linear", "full", "sum"),
    "svd": CombinationType("linear", "full", "max"),
    "linear": CombinationType("linear", "factors", "equal"),
    "ties": CombinationType("ties", "factors", "equal"),
    "ties_svd": CombinationType("ties", "full", "max"),
    "dare_linear": CombinationType("dare_linear", "factors", "equal"),
    "dare_linear_svd": CombinationType("dare_linear", "full", "max"),
    "dare_ties": CombinationType("dare_ties", "factors", "equal"),
    "dare_ties_svd": CombinationType("dare_ties", "full", "max"),
    "magnitude_prune": CombinationType("magnitude_prune", "factors", "equal"),
    "magnitude_prune_svd": CombinationType("magnitude_prune", "full", "max"),
}
