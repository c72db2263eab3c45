"""What the rows of the tables say."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from jaxmerge.tables import Table, columns, html

T = TypeVar("T")


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
        whole: Whether a number must be whole, as a count is, though it may be traced.
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
    whole: bool = False

    @property
    def traceable(self) -> bool:
        """Whether it may change without a new compile."""
        return self.kind in ("density", "number")

    @property
    def as_number(self) -> "Hyperparameter":
        """A density as the number that it is, with its bounds: what is kept is not nothing, what is dropped may be."""
        if self.kind != "density":
            return self
        return replace(self, kind="number", most=1, **({"above": 0} if self.name == "density" else {"least": 0}))


# Of each kind of `Method.pruning`, the hyperparameters that say how to prune; the others say how to combine.
OF_PRUNING = {
    "": (),
    "magnitude": ("density",),
    "outliers": ("density", "gamma"),
    "random": ("density",),
    "rank": ("density", "epsilon"),
}


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
        pruning: How it prunes each task by itself: ``"magnitude"``, ``"random"``, ``"outliers"`` (by magnitude, the
            largest too) or ``"rank"`` (at random, by the rank in a row).
        combine: ``module:name`` of a function ``(tasks [n, ...], weights [n], **options) -> [...]``, where it then
            combines them entry by entry. Dense deltas are then merged a few rows at a time.
        on_units: Whether its tasks are rank-one units ``[n, r, in + out]``, a row of A beside its column of B; it takes
            ``rank``, that of the result, static under jit.
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
    pruning: Literal["", "magnitude", "random", "outliers", "rank"] = ""
    combine: str = ""
    on_units: bool = False
    ranked: bool = False
    spaces: tuple[str, ...] = ("full", "factors", "knots", "core", "ctm")
    elsewhere: str = ""
    least: int = 1
    most: int | None = None
    breaks: Mapping[str, str] = field(default_factory=dict)
    hyperparameters: tuple[Hyperparameter, ...] = ()

    def __str__(self) -> str:
        return self.summary

    @property
    def per_adapter(self) -> tuple[str, ...]:
        """The hyperparameters that say how each task is pruned by itself, so that every adapter may have its own."""
        return OF_PRUNING[self.pruning]

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
        paper: Where it comes from.
        attribute: ``module:name`` of the `jaxmerge.spaces.Space`.
        rotated: The same space for methods that commute with rotations, where it has such a form.
        units: The same for methods of rank-one units, where it has such a form.
        breaks: As `Method.breaks`: what no method keeps in it.
        hyperparameters: What it takes itself.
    """

    summary: str
    exact: str
    paper: str
    attribute: str
    rotated: str = ""
    units: str = ""
    breaks: Mapping[str, str] = field(default_factory=dict)
    hyperparameters: tuple[Hyperparameter, ...] = ()

    def __str__(self) -> str:
        return self.summary

    def load(self, method: Method) -> Any:
        """Imports the form of the space that the method works in."""
        return _imported(self._form(method))

    def taken(self, method: Method) -> tuple[Hyperparameter, ...]:
        """The hyperparameters that matter to a method: one that is the same in any basis sees nothing of them."""
        return self.hyperparameters if self._form(method) == self.attribute else ()

    def _form(self, method: Method) -> str:
        if self.rotated and method.equivariant:
            return self.rotated
        return self.units if self.units and method.on_units else self.attribute


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

    def __str__(self) -> str:
        return f"{self.method} in {self.space}"


@dataclass(frozen=True)
class Stage:
    """A row of `STAGES`: what can be done to a merge once it is made.

    Attributes:
        summary: One line.
        paper: Where it comes from.
        function: ``module:name``. What it needs is in its arguments: the ``merged`` factors of one module, its
            ``sources`` and their ``weights``, to give new factors; or the ``paths`` of all modules, to give a factor
            for each.
        hyperparameters: In the order of the signature, but for ``scope``, which is for the caller to heed: a factor for
            each module, or one for the whole model.
        one_of: Whether just one of them is given.
    """

    summary: str
    paper: str
    function: str
    hyperparameters: tuple[Hyperparameter, ...] = ()
    one_of: bool = False

    def __str__(self) -> str:
        return self.summary

    def load(self) -> Callable[..., Any]:
        """Imports the function."""
        return _imported(self.function)

    def taken(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The hyperparameters with their defaults where they are not given; only those given if one is to be."""
        values = {h.name: given.get(h.name, h.default) for h in self.hyperparameters}
        return {name: value for name, value in values.items() if value is not None} if self.one_of else values


class Rows(dict[str, T]):
    """A table of the package, shown with what each row is."""

    def __repr__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{name:{width}}  {row}" for name, row in self.items())

    def _repr_html_(self) -> str:
        return html("", [], Table(columns(["name", "what it is"], []), list(self.items())))
