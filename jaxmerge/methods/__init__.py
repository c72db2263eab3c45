"""Merge methods: pure functions of stacked task matrices. `METHODS` is the table of them."""

from jaxmerge.catalog import METHODS

__all__ = ["METHODS"]
