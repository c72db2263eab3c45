"""Where things stand in a recipe's file, so that problems can be told with it."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxmerge.words import nearest, shown

# Keys and positions from the top of a recipe, as in ``("adapters", 0, "weight")``.
Place = tuple[str | int, ...]


class Problem(NamedTuple):
    """Something that is wrong.

    Attributes:
        file: The recipe's; empty for one that was not read from a file.
        line: From 1; 0 for none.
        text: One line.
    """

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        where = ":".join([self.file, *([str(self.line)] if self.line else [])]) if self.file else ""
        return f"{where}: {self.text}" if where else self.text


@dataclass(frozen=True)
class Places:
    """Where the parts of a recipe stand.

    Attributes:
        file: What problems call it; empty for a recipe that was not read from a file.
        lines: Place -> line.
        meant: Where something seems to be meant by a key that is not known.
    """

    file: str = ""
    lines: Mapping[Place, int] = field(default_factory=dict)
    meant: Collection[Place] = ()

    def has(self, *place: str | int) -> bool:
        """Whether something stands there, be it right or wrong."""
        return place in self.lines or place in self.meant

    def problem(self, place: Place, text: str) -> Problem:
        """A problem with what stands there, or with the nearest thing above it that has a line."""
        above = (self.lines[place[:i]] for i in range(len(place), -1, -1) if place[:i] in self.lines)
        return Problem(self.file, next(above, 0), text)


def told(problems: Iterable[Problem]) -> str:
    """All problems, a line each: those of a file together, in the order of its lines."""
    problems = list(dict.fromkeys(problems))
    files = list(dict.fromkeys(problem.file for problem in problems))
    return "\n".join(map(str, sorted(problems, key=lambda problem: (files.index(problem.file), problem.line))))


def unknown(kind: str, word: object, known: Sequence[str], listed: str = "there are") -> str:
    """That a word is none of those that are known, and which one may have been meant."""
    meant = nearest(str(word), known)
    return f"unknown {kind} {shown(word)}" + (f"; did you mean {meant}?" if meant else f": {listed} {', '.join(known)}")


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raises one ValueError with all problems, if there are any."""
    if problems:
        raise ValueError(told(problems))
