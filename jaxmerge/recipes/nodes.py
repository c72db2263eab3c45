"""YAML as a tree that remembers its lines."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from jaxmerge.io.recipe_file import parse_scalar
from jaxmerge.recipes.places import Place, Problem

_MERGE = "<<"
# Parts of a document, of which a recipe for a thousand adapters has some ten thousand.
_MOST = 1_000_000


@dataclass(frozen=True)
class Node:
    """A part of a YAML document.

    Attributes:
        line: Where it begins, from 1.
        value: A text, a number, a truth value or None; a list of nodes; or a dict from keys to nodes.
        keys: Of a dict, key -> the line that it stands in.
    """

    line: int
    value: Any
    keys: dict[str, int] | None = None

    def plain(self) -> Any:
        """The value without lines, as JSON has it."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, list) else self.value

    def lines(self, place: Place = ()) -> Iterator[tuple[Place, int]]:
        """Where each part of it stands: values in their own line, and dicts and lists in that of their key."""
        if isinstance(self.value, dict):
            for key, node in self.value.items():
                yield (*place, key), node.line if not isinstance(node.value, dict | list) else (self.keys or {})[key]
                yield from node.lines((*place, key))
        elif isinstance(self.value, list):
            for i, node in enumerate(self.value):
                yield (*place, i), node.line
                yield from node.lines((*place, i))


def parse(text: str, file: str, problems: list[Problem]) -> Node | None:
    """Reads a YAML document; what is wrong with it is added to the problems.

    Args:
        text: The document.
        file: What problems call it.
        problems: To be added to.

    Returns:
        The document; None if it is no YAML.
    """
    try:
        # The base loader leaves plain scalars as they are, so that only tags that are written out are tags.
        root = yaml.compose(text, yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = 0 if mark is None else mark.line + 1
        words = "; ".join(part for part in (error.context, error.problem) if part)
        problems.append(Problem(file, line, f"is not YAML: {words}"))
        return None
    except (yaml.YAMLError, RecursionError) as error:
        problems.append(Problem(file, 0, f"is not YAML: {' '.join(str(error).split())}"))
        return None
    if root is None:
        problems.append(Problem(file, 0, "is empty"))
        return None
    made = _Builder(file, problems).node(root)
    if _parts(made, {}) > _MOST:
        problems.append(Problem(file, 0, "is larger than any recipe, by what its aliases stand for"))
        return None
    return made


def _parts(node: Node, known: dict[int, int]) -> int:
    """How many nodes there are, those that aliases stand for counted each time."""
    if id(node) not in known:
        value = node.value
        inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        known[id(node)] = 1 + sum(_parts(child, known) for child in inner)
    return known[id(node)]


class _Builder:
    """Makes nodes of PyYAML's; an alias becomes the node that its anchor became."""

    def __init__(self, file: str, problems: list[Problem]):
        self.file, self.problems = file, problems
        self.made: dict[int, Node] = {}
        self.making: set[int] = set()

    def node(self, node: yaml.Node) -> Node:
        if id(node) in self.making:
            self._tell(node, "an alias stands inside of what it stands for")
            return Node(_line(node), None)
        if id(node) not in self.made:
            self.making.add(id(node))
            self.made[id(node)] = self._made(node)
            self.making.remove(id(node))
        return self.made[id(node)]

    def _made(self, node: yaml.Node) -> Node:
        kind = {yaml.ScalarNode: "str", yaml.SequenceNode: "seq", yaml.MappingNode: "map"}[type(node)]
        if node.tag != f"tag:yaml.org,2002:{kind}":
            self._tell(node, f"tags are not read: {node.tag}")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node)
        if isinstance(node, yaml.SequenceNode):
            return Node(_line(node), [self.node(child) for child in node.value])
        return Node(_line(node), node.value if getattr(node, "style", None) else parse_scalar(node.value))

    def _mapping(self, node: yaml.MappingNode) -> Node:
        own: dict[str, Node] = {}
        inherited: dict[str, Node] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._tell(key, "a key is a word, not a list or a mapping")
            elif key.value == _MERGE and not key.style:
                inherited = {**self._merged(value), **inherited}
            elif key.value in own:
                self._tell(key, f"key {key.value} is given twice, first in line {lines[key.value]}")
            else:
                own[key.value], lines[key.value] = self.node(value), _line(key)
        for key, value in inherited.items():
            lines.setdefault(key, value.line)
        return Node(_line(node), {**inherited, **own}, lines)

    def _merged(self, node: yaml.Node) -> dict[str, Node]:
        """What ``<<:`` brings: of several mappings, the first that has a key."""
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not all(isinstance(source, yaml.MappingNode) for source in sources):
            self._tell(node, "<< takes a mapping, or a list of them")
            return {}
        found: dict[str, Node] = {}
        for source in reversed(sources):
            found.update(self.node(source).value or {})
        return found

    def _tell(self, node: yaml.Node, text: str) -> None:
        self.problems.append(Problem(self.file, _line(node), text))


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
