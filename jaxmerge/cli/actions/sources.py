"""The adapters that a command reads."""

import argparse

from jax.sharding import Mesh

from jaxmerge import io
from jaxmerge.base import Adapter
from jaxmerge.cli.console import progress
from jaxmerge.cli.groups import conversion, reading
from jaxmerge.converting import load_to_rewrite
from jaxmerge.layouts import Conversion


def peek_all(options: argparse.Namespace) -> tuple[list[Adapter], list[str]]:
    """Adapters from their headers alone: those that can be read, and what is wrong with the others."""
    peeked, problems = [], []
    for i, path in enumerate(options.adapters):
        try:
            peeked.append(io.peek(path, **reading(options, i, len(options.adapters))))
        except ValueError as error:
            problems += str(error).splitlines()
    return peeked, problems


def load_all(options: argparse.Namespace, mesh: Mesh | None = None) -> list[Adapter]:
    """Adapters that stay in their files until they are used, or are spread over a mesh, with a progress bar.

    Raises:
        ValueError: If one cannot be read.
    """
    adapters = []
    with progress("reading", len(options.adapters)) as advance:
        for i, path in enumerate(options.adapters):
            adapters.append(io.load(path, mapped=True, mesh=mesh, **reading(options, i, len(options.adapters))))
            advance()
    return adapters


def load_one(options: argparse.Namespace, mapped: bool = False) -> Adapter:
    """The adapter of a command that reads one and writes one, once it is known that the output may be written.

    Raises:
        ValueError: If it may not, or the adapter cannot be read.
    """
    wanted = Conversion(**conversion(options))
    return load_to_rewrite(options.input, options.output, wanted, options.force, mapped, **reading(options))
