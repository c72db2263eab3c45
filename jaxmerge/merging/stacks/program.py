"""What is the same for all modules of a merge."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from jaxmerge import spaces
from jaxmerge.catalog import METHODS, SPACES, Hyperparameter, Method
from jaxmerge.merging.stacks.inputs import Bucket
from jaxmerge.merging.staging import Stage


@dataclass(frozen=True)
class Program:
    """What is the same for all modules of a merge; static under jit.

    Attributes:
        method: A name in `METHODS`.
        space: A name in `SPACES`.
        choices: The hyperparameters that are not numbers.
        stages: What modules go through once they are merged.
        mesh: What modules are spread over.
        by_rows: Whether the rows of each module's delta are spread over it instead.
        at_once: How many modules an accelerator works on at the same time.
        settings_at_once: With how many settings it merges each of them at the same time.
        sweeps: Whether results keep the axis of settings, of which there is one otherwise.
    """

    method: str
    space: str
    choices: tuple[tuple[str, Any], ...] = ()
    stages: tuple[Stage, ...] = ()
    mesh: Mesh | None = None
    by_rows: bool = False
    at_once: int = 1
    settings_at_once: int = 1
    sweeps: bool = False

    @property
    def in_blocks(self) -> bool:
        """Whether dense deltas are merged a few rows at a time."""
        return self.form.dense and bool(self.row.combine)

    @property
    def row(self) -> Method:
        """The method's row."""
        return METHODS[self.method]

    @property
    def hyperparameters(self) -> tuple[Hyperparameter, ...]:
        """Of the method, and of the space."""
        return (*self.row.hyperparameters, *self._space_hyperparameters)

    @property
    def space_is_swept(self) -> bool:
        """Whether settings differ in what the space takes."""
        return self.sweeps and any(h.traceable for h in self._space_hyperparameters)

    @property
    def _space_hyperparameters(self) -> tuple[Hyperparameter, ...]:
        return SPACES[self.space].taken(self.row)

    def method_options(self, numbers: Mapping[str, Any]) -> dict[str, Any]:
        """The method's arguments, from all choices and numbers."""
        return self._own(self.row.hyperparameters, numbers)

    def space_options(self, numbers: Mapping[str, Any]) -> dict[str, Any]:
        """The space's arguments, from all choices and numbers."""
        return self._own(self._space_hyperparameters, numbers)

    def _own(self, hyperparameters: Sequence[Hyperparameter], numbers: Mapping[str, Any]) -> dict[str, Any]:
        given = {**dict(self.choices), **numbers}
        return {h.name: given[h.name] for h in hyperparameters}

    @property
    def form(self) -> spaces.Space:
        """The space, in the form that the method works in."""
        return SPACES[self.space].load(self.row)

    def stacks(self, ranks: Sequence[int], rank: int) -> bool:
        """Whether the result is the sources' factors side by side."""
        # In any space in which a sum is exact: those that have a form for what commutes with rotations.
        return self.row.linear and bool(SPACES[self.space].rotated) and rank == sum(ranks)

    def need(self, bucket: Bucket) -> int:
        """The bytes that one module of a bucket takes while it is merged, about."""
        out, in_ = bucket.features
        # In blocks, the merged matrix, its factors and their Krylov basis.
        dense = out * in_ + 16 * (bucket.rank + 16) * (out + in_)
        numbers = dense if self.in_blocks else self.form.numbers(bucket.ranks, out, in_)
        width = 8 if bucket.wide == "float64" else 4
        return width * (numbers + sum(bucket.ranks) * (out + in_))
