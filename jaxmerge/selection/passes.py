"""Passes over the entries of tensors: what a search asks of them, and how arrays answer."""

from dataclasses import dataclass
from typing import Any, Protocol

import jax.numpy as jnp
from jax import lax

from jaxmerge.base import Array
from jaxmerge.selection.bracket import Bracket


class Passes(Protocol):
    """How the entries of tensors are gone through. Each call is one pass; orders and counts are ``[*batch]``."""

    @property
    def size(self) -> int:
        """The number of entries of one tensor."""
        ...

    @property
    def dtype(self) -> Any:
        """Of the `magnitude_order` of the entries."""
        ...

    def count(self, order: Array) -> Array:
        """How many entries are at or above orders ``[..., *batch]``."""
        ...

    def neighbours(self, order: Array) -> tuple[Array, Array, Array]:
        """That count; the greatest entry below, 0 if there is none; the least at or above, or the dtype's maximum."""
        ...

    def end_of_ties(self, order: Array, ties: Array, wanted: Array) -> Array:
        """An index before which just so many entries of an order lie; takes no pass where all of them are wanted."""
        ...


@dataclass(frozen=True, eq=False)
class ArrayPasses:
    """Passes over tensors, or parts of them, that are there as arrays.

    Attributes:
        order: ``[*batch, *shape]``, of `magnitude_order`.
        index: ``[*shape]``, flat indices.
    """

    order: Array
    index: Array

    @property
    def size(self) -> int:
        """The number of entries of one tensor."""
        return self.index.size

    @property
    def dtype(self) -> Any:
        """Of the orders."""
        return self.order.dtype

    def _over(self, x: Array) -> Array:
        return x.reshape(x.shape + (1,) * self.index.ndim)

    @property
    def _axes(self) -> tuple[int, ...]:
        return tuple(range(-self.index.ndim, 0))

    def count(self, order: Array) -> Array:
        """See `Passes`."""
        return jnp.sum(self.order >= self._over(order), self._axes, dtype=jnp.int32)

    def neighbours(self, order: Array) -> tuple[Array, Array, Array]:
        """See `Passes`."""
        reaches = self.order >= self._over(order)
        top = jnp.full((), jnp.iinfo(self.dtype).max, self.dtype)
        below = jnp.max(jnp.where(reaches, jnp.zeros_like(top), self.order), self._axes)
        above = jnp.min(jnp.where(reaches, self.order, top), self._axes)
        return jnp.sum(reaches, self._axes, dtype=jnp.int32), below, above

    def count_ties(self, order: Array, end: Array) -> Array:
        """How many entries of an order have a flat index below ``end``."""
        ties = (self.order == self._over(order)) & (self.index < self._over(end))
        return jnp.sum(ties, self._axes, dtype=jnp.int32)

    def end_of_ties(self, order: Array, ties: Array, wanted: Array) -> Array:
        """See `Passes`. Searched as the threshold was: where ties are spread evenly, in a few passes."""
        size = jnp.full_like(wanted, self.size)

        def found(bracket: Bracket) -> Array:
            return bracket.at_high == wanted

        def narrow(bracket: Bracket) -> Bracket:
            end = bracket.probe(wanted)
            before = self.count_ties(order, end)
            return bracket.narrowed(found(bracket), before < wanted, before, end, end)

        start = Bracket(jnp.zeros_like(size), size, jnp.zeros_like(size), ties, jnp.zeros((), jnp.int32))
        return lax.while_loop(lambda bracket: jnp.any(~found(bracket)), narrow, start).high
