"""How the values of options are read: types for argparse, which tell what is wrong with a text."""

import argparse
import re
from typing import Any

from jaxmerge.catalog import STAGES
from jaxmerge.words import nearest


class AtLeastTwo(argparse.Action):
    """Refuses fewer than two values."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        """Stores the values."""
        if len(values) < 2:
            raise argparse.ArgumentError(self, "at least two adapters are compared")
        setattr(namespace, self.dest, values)


def count(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 is wanted, got {text}")
    return int(text)


def seed(text: str) -> int:
    """What `jax.random.key` takes."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"a seed is a whole number from 0 to 2**32 - 1, got {text}")
    return int(text)


def memory(text: str) -> str:
    """A size in bytes, as `jaxmerge.merge` takes it."""
    if not re.fullmatch(r"(\d+\.?\d*|\.\d+) *([kKmMgGtT][iI]?)?[bB]?", text):
        raise argparse.ArgumentTypeError(f"memory is a size like 2GB or 500MiB, got {text}")
    return text


def mesh(text: str) -> list[tuple[str, int]]:
    """The names and sizes of a mesh's axes."""
    axes = [axis.partition("=") for axis in text.split(",")]
    if len({name for name, _, _ in axes}) < len(axes) or not all(
        name.isidentifier() and size.isdecimal() and int(size) > 0 for name, _, size in axes
    ):
        raise argparse.ArgumentTypeError(f"a mesh is like data=2,model=4, got {text}")
    return [(name, int(size)) for name, _, size in axes]


def alpha(text: str) -> float | str:
    """A number, or ``"rank"``."""
    try:
        return text if text == "rank" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"alpha is a number, or rank, got {text}") from None


def scan_axis(text: str) -> int | str:
    """The position of an axis, or ``"none"``."""
    if text != "none" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a scan axis is a whole number from 0, or none, got {text}")
    return text if text == "none" else int(text)


def stage(text: str) -> tuple[str, dict[str, float | str]]:
    """A stage and its hyperparameters, as `jaxmerge.merge` takes them, from ``NAME[:KEY=VALUE,...]``."""
    name, _, values = text.partition(":")
    if name not in STAGES:
        meant = nearest(name, STAGES)
        instead = f"; did you mean {meant}?" if meant else f": there are {', '.join(STAGES)}"
        raise argparse.ArgumentTypeError(f"there is no stage {name}{instead}")
    own = [h.name for h in STAGES[name].hyperparameters]
    given = {}
    for part in filter(None, values.split(",")):
        key, found, value = part.partition("=")
        if not found and len(own) == 1:
            key, value = own[0], part
        if key not in own or key in given:
            raise argparse.ArgumentTypeError(f"stage {name} is given as {stage_usage(name)}, not {text}")
        try:
            given[key] = int(value) if value.isdecimal() else float(value)
        except ValueError:
            given[key] = value
    return name, given


def stage_usage(name: str) -> str:
    """How a stage is given."""
    between = "|" if STAGES[name].one_of else ","
    return ":".join([name, *filter(None, [between.join(f"{h.name}=" for h in STAGES[name].hyperparameters)])])
