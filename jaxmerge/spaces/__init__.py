"""Spaces: in what form the tasks are laid before a method. `SPACES` is the table of them."""

from jaxmerge.catalog import SPACES
from jaxmerge.spaces.pipe import Factors, Lifted, Space
from jaxmerge.spaces.plain import stack

__all__ = ["SPACES", "Factors", "Lifted", "Space", "stack"]
