"""Where the largest entries of a tensor end."""

import functools
from dataclasses import dataclass

import jax
from jax import lax

from jaxmerge.base import Array
from jaxmerge.selection.order import magnitude_order


@functools.partial(jax.tree_util.register_dataclass, data_fields=("threshold", "end"), meta_fields=())
@dataclass(frozen=True, eq=False)
class Cut:
    """Which entries of a tensor are its largest: those above a threshold, and the first of those at it.

    Attributes:
        threshold: ``[*batch]`` unsigned, a `magnitude_order`.
        end: ``[*batch]`` int32; of the entries at the threshold, those whose flat index is below it.
    """

    threshold: Array
    end: Array

    def keeps(self, tensor: Array, index: Array) -> Array:
        """The mask of the entries that survive.

        Args:
            tensor: ``[*batch, *shape]``, the tensors or a part of each.
            index: ``[*shape]`` int32, the flat index of each entry in its tensor.

        Returns:
            Boolean ``[*batch, *shape]``.
        """
        order = magnitude_order(lax.stop_gradient(tensor))
        threshold, end = (x.reshape(x.shape + (1,) * index.ndim) for x in (self.threshold, self.end))
        return (order > threshold) | ((order == threshold) & (index < end))
