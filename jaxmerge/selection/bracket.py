"""A search between two ends that interpolates, with bisection as the guarantee."""

from typing import NamedTuple

import jax.numpy as jnp

from jaxmerge.base import Array


class Bracket(NamedTuple):
    """Ends ``low < high`` of many searches at once, for where a count that never turns has a wanted value.

    Attributes:
        low: ``[...]`` integers.
        high: Likewise.
        at_low: ``[...]`` int32, the count at the low ends.
        at_high: The count at the high ends.
        passes: Scalar, how many counts it has taken.
    """

    low: Array
    high: Array
    at_low: Array
    at_high: Array
    passes: Array

    def probe(self, wanted: Array) -> Array:
        """Where to count next: where the wanted count is if it changes evenly, and half-way in every third pass."""
        apart = self.high - self.low
        change = jnp.maximum(jnp.abs(self.at_high - self.at_low), 1).astype(jnp.float32)
        share = jnp.abs(wanted - self.at_low).astype(jnp.float32) / change
        interpolated = self.low + (share * apart.astype(jnp.float32)).astype(apart.dtype)
        return self.within(jnp.where(self.passes % 3 == 2, self.halfway(), interpolated))

    def halfway(self) -> Array:
        """The middle."""
        return self.low + (self.high - self.low) // 2

    def within(self, at: Array) -> Array:
        """The nearest place strictly between the ends, where there is one."""
        one = jnp.ones((), self.low.dtype)
        return jnp.clip(at, self.low + one, jnp.maximum(self.high - one, self.low + one))

    def narrowed(self, done: Array, up: Array, count: Array, low: Array, high: Array) -> "Bracket":
        """After a count.

        Args:
            done: Boolean ``[...]``, the searches that have ended already.
            up: Boolean ``[...]``, whether the low end moves; the high end does otherwise.
            count: ``[...]`` int32, what was counted.
            low: ``[...]``, where the low end moves.
            high: Where the high end moves.

        Returns:
            The bracket.
        """
        up, down = up & ~done, ~(up | done)
        return Bracket(
            jnp.where(up, low, self.low),
            jnp.where(down, high, self.high),
            jnp.where(up, count, self.at_low),
            jnp.where(down, count, self.at_high),
            self.passes + 1,
        )
