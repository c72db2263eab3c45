"""The tables of methods, spaces and PEFT's combination types.

Only literals, and no import of JAX: the command line answers ``--help`` from here. The law tests run every
row, and compare the hyperparameters with the signature of the function that the row names.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


def _imported(reference: str) -> Any:
    module, name = reference.split(":")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Hyperparameter:
    """An argument of a method that its users set.

    Attributes:
        name: As in the function's signature.
        help: One line.
        kind: ``"density"`` is a number in (0, 1], bound to each task matrix's size; ``"number"`` any other, which may
            be traced; ``"choice"`` one of ``choices`` and ``"count"`` a whole number, both static under jit.
        default: None where it must be given.
        choices: For ``"choice"``.
        least: The smallest value there may be.
        most: The largest.
        above: What values must be greater than.
        below: What they must be less than.
    """

    name: str
    help: str
    kind: Literal["density", "number", "choice", "count"]
    default: Any = None
    choices: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    @property
    def traceable(self) -> bool:
        """Whether it may change without a new compile."""
        return self.kind in ("density", "number")


@dataclass(frozen=True)
class Method:
    """A row of `METHODS`.

    Attributes:
        summary: One line.
        paper: Where it comes from.
        function: ``module:name`` of a pure function ``(tasks [n, p, q], weights [n], *, ...) -> [p, q]``.
        space: The default space.
        averages: Whether it averages by itself: equal weights are then 1 each, otherwise 1/n.
        linear: Whether it is ``Σ wᵢ tᵢ``; at full rank in the space ``full`` the factors are then just stacked.
        equivariant: Whether it commutes with rotations of both sides of the tasks. In the space ``full`` it
            is then computed on the R×R core, exactly.
        random: Whether it takes a key.
        pruning: ``"magnitude"`` or ``"random"`` where it prunes each task so and then combines them entry by entry.
            Dense deltas are then merged a few rows at a time.
        combine: ``module:name`` of that function ``(tasks [n, ...], weights [n], **choices) -> [...]``.
        ranked: Whether it takes ``ranks``, those of the n tasks, static under jit.
        spaces: The names in `SPACES` in which it makes sense.
        elsewhere: Why it makes none in the others, in a line.
        least: The fewest adapters it takes.
        most: The most, or None for any number.
        breaks: The laws of the grid that it does not keep, with the reason: ``"single"`` (one adapter of weight 1 and
            density 1 comes back), ``"negation"`` (negative weights negate), ``"homogeneity"`` (all scales doubled
            double the result), ``"zeros"`` (an adapter of zeros changes nothing), ``"order"`` (nor does the adapters'
            order).
        hyperparameters: In the order of the signature.
    """

    summary: str
    paper: str
    function: str
    space: str = "full"
    averages: bool = False
    linear: bool = False
    equivariant: bool = False
    random: bool = False
    pruning: Literal["", "magnitude", "random"] = ""
    combine: str = ""
    ranked: bool = False
    spaces: tuple[str, ...] = ("full", "factors", "knots", "core", "ctm")
    elsewhere: str = ""
    least: int = 1
    most: int | None = None
    breaks: Mapping[str, str] = field(default_factory=dict)
    hyperparameters: tuple[Hyperparameter, ...] = ()

    def load(self) -> Callable[..., Any]:
        """Imports the function."""
        return _imported(self.function)

    def load_combine(self) -> Callable[..., Any]:
        """Imports the function that combines tasks once they are pruned."""
        return _imported(self.combine)


@dataclass(frozen=True)
class Space:
    """A row of `SPACES`.

    Attributes:
        summary: One line.
        exact: What is exact in it and what is not, in one line.
        attribute: ``module:name`` of the `jaxmerge.spaces.Space`.
        rotated: The same space for methods that commute with rotations, where it has such a form.
    """

    summary: str
    exact: str
    attribute: str
    rotated: str = ""

    def load(self, method: Method) -> Any:
        """Imports the form of the space that the method works in."""
        return _imported(self.rotated if self.rotated and method.equivariant else self.attribute)


@dataclass(frozen=True)
class CombinationType:
    """One of PEFT's ``combination_type``s as a cell of the grid.

    Attributes:
        method: A name in `METHODS`.
        space: A name in `SPACES`.
        rank: ``"sum"`` or ``"max"`` of the adapters' ranks, or ``"equal"``: they must all have one.
    """

    method: str
    space: str
    rank: Literal["sum", "max", "equal"]


_DENSITY = Hyperparameter("density", "fraction of each task's entries to keep, in (0, 1]", "density")
_MAJORITY = Hyperparameter(
    "majority_sign_method",
    "elect the sign of the sum (total) or the one that more tasks have (frequency)",
    "choice",
    default="total",
    choices=("total", "frequency"),
)

METHODS: Mapping[str, Method] = {
    "linear": Method(
        summary="weighted sum of the deltas, exact",
        paper="Task arithmetic, arXiv:2212.04089",
        function="jaxmerge.methods.arithmetic:task_arithmetic",
        linear=True,
        equivariant=True,
    ),
    "ties": Method(
        summary="trim small entries, elect a sign per entry, average those that carry it",
        paper="TIES-Merging, arXiv:2306.01708",
        function="jaxmerge.methods.sign_consensus:ties",
        averages=True,
        pruning="magnitude",
        combine="jaxmerge.methods.sign_consensus:agree",
        hyperparameters=(_DENSITY, _MAJORITY),
    ),
    "dare_linear": Method(
        summary="drop entries at random, rescale the rest, weighted sum",
        paper="DARE, arXiv:2311.03099",
        function="jaxmerge.methods.arithmetic:dare_linear",
        random=True,
        pruning="random",
        combine="jaxmerge.methods.arithmetic:sum_weighted",
        hyperparameters=(_DENSITY,),
    ),
    "dare_ties": Method(
        summary="drop entries at random, rescale the rest, average those that carry the elected sign",
        paper="DARE, arXiv:2311.03099",
        function="jaxmerge.methods.sign_consensus:dare_ties",
        averages=True,
        random=True,
        pruning="random",
        combine="jaxmerge.methods.sign_consensus:agree",
        hyperparameters=(_DENSITY, _MAJORITY),
    ),
    "magnitude_prune": Method(
        summary="keep each task's largest entries, weighted sum",
        paper="PEFT, peft.utils.merge_utils",
        function="jaxmerge.methods.arithmetic:magnitude_prune",
        pruning="magnitude",
        combine="jaxmerge.methods.arithmetic:sum_weighted",
        hyperparameters=(_DENSITY,),
    ),
}

SPACES: Mapping[str, Space] = {
    "full": Space(
        summary="the weight change scale·B·A itself, as the papers have it",
        exact="linear is exact and never forms it; other methods form it and are cut to --rank by SVD",
        attribute="jaxmerge.spaces:FULL",
        rotated="jaxmerge.spaces:FULL_ROTATED",
    ),
    "factors": Space(
        summary="A and B each on their own, as PEFT's plain combination types have it",
        exact="an approximation for more than one adapter: products Bᵢ·Aⱼ of different adapters come in",
        attribute="jaxmerge.spaces:FACTORS",
    ),
}

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

# What adapters can be written as, whatever they came as.
FORMATS = ("peft", "tunix", "maxtext", "maxtext-unscanned", "qwix", "nnx", "gemma", "openpi", "keras")

# Of a merge, without data: see `jaxmerge.scores`.
SCORES = ("energy_kept", "worst_cosine", "norm")

# How the factors in a Flax tree are called.
TREES = ("nnx", "qwix", "gemma", "openpi", "maxtext-legacy", "keras")
