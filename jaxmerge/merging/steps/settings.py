"""What a merge can be repeated with."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from jaxmerge.values import at


class Setting(NamedTuple):
    """What a merge can be repeated with, without being compiled again.

    Any of them may be a mapping, from module path to the module's own.

    Attributes:
        weights: One per adapter.
        numbers: The numeric hyperparameters, one for all adapters or ``[n]``.
    """

    weights: Sequence[ArrayLike | Mapping[str, ArrayLike]]
    numbers: Mapping[str, Any]

    def weights_at(self, path: str, present: Sequence[int]) -> list[ArrayLike]:
        """The weights of a module that these adapters have."""
        return [at(self.weights[i], path) for i in present]

    def numbers_at(self, path: str, present: Sequence[int]) -> dict[str, Any]:
        """The hyperparameters of a module that these adapters have."""
        own = {name: at(value, path) for name, value in self.numbers.items()}
        return {name: value[np.asarray(present)] if np.ndim(value) else value for name, value in own.items()}
