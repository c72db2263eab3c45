"""A recipe's file becomes a `Recipe`. Its structure is judged here, and its values by `jaxmerge.recipes.checks`."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmerge.catalog import STAGES
from jaxmerge.io.recipe_file import located
from jaxmerge.recipes import keys, mergekit
from jaxmerge.recipes.checks import recipe_problems
from jaxmerge.recipes.model import UNREAD, Gradient, Recipe, Rule, Rules, Source, Stage
from jaxmerge.recipes.nodes import Node, parse
from jaxmerge.recipes.places import Place, Places, Problem, raise_problems, unknown
from jaxmerge.words import nearest, short, shown

# As many keys are listed in a line.
_LISTED = 12


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Reads a recipe: YAML, of jaxmerge's own form or mergekit's.

    None of the adapters is opened, but recipes that it names are read too.

    Args:
        path: Of the file. Paths in it are relative to its folder.

    Returns:
        The recipe.

    Raises:
        ValueError: If something is wrong with it: everything at once, a line each, with its place in the file.
    """
    recipe = read_file(os.fspath(path))
    raise_problems(recipe_problems(recipe))
    return recipe


def read_file(path: str, above: Sequence[str] = ()) -> Recipe:
    """`read_recipe` without errors: what could not be read is in `Recipe.faults`.

    Args:
        path: Of the file.
        above: The files that this one is read for, outermost first.

    Returns:
        The recipe.
    """
    problems: list[Problem] = []
    root = _document(path, problems)
    if root is None:
        return Recipe(faults=tuple(problems))
    folder = os.path.dirname(path)  # noqa: PTH120 - paths are kept as they are written
    if mergekit.is_its_form(root):
        return mergekit.translated(root, path, folder, problems)
    return _Reader(path, folder, (*above, os.path.realpath(path)), problems).recipe(root)


def _document(path: str, problems: list[Problem]) -> Node | None:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        problems.append(Problem(path, 0, "is not UTF-8 text"))
        return None
    except OSError as error:
        problems.append(Problem(path, 0, f"cannot be read: {error.strerror}"))
        return None
    root = parse(text, path, problems)
    if root is not None and not isinstance(root.value, dict):
        problems.append(Problem(path, root.line, "a recipe is a mapping, as in adapters: [...]"))
        return None
    return root


class _Reader:
    """Reads one recipe of a file; those inside of it have readers of their own."""

    def __init__(self, file: str, folder: str, above: Sequence[str], problems: list[Problem]):
        self.file, self.folder, self.above, self.problems = file, folder, above, problems
        self.meant: set[Place] = set()

    def tell(self, line: int, text: str) -> None:
        self.problems.append(Problem(self.file, line, text))

    def recipe(self, root: Node, inner: bool = False) -> Recipe:
        own = self.known(root, keys.RECIPE, "a recipe", ())
        for name in keys.WRITING if inner else ():
            if name in own:
                self.tell(
                    own.pop(name).line, f"{name} says what is written, and a recipe inside of another writes nothing"
                )
        read: dict[str, Any] = {name: self.value(node, keys.RECIPE[name]) for name, node in own.items()}
        if "adapters" in own:
            read["adapters"] = self.adapters(own["adapters"])
        if "stages" in own:
            read["stages"] = self.stages(own["stages"])
        hyperparameters = {name: read.pop(name) for name in keys.HYPERPARAMETERS if name in read}
        lines: dict[Place, int] = {**({(): root.line} if inner else {}), **dict(root.lines())}
        places, faults = Places(self.file, lines, frozenset(self.meant)), tuple(self.problems)
        return Recipe(**read, hyperparameters=hyperparameters, folder=self.folder, places=places, faults=faults)

    def known(self, node: Node, table: Mapping[str, Any], owner: str, place: Place) -> dict[str, Node]:
        """The parts of a mapping that are known and have a value; the others are told."""
        found = {}
        for name, child in node.value.items():
            line = (node.keys or {})[name]
            if name not in table:
                self.tell(line, self.unknown_key(name, table, owner))
                self.meant |= {(*place, meant) for meant in [nearest(name, table)] if meant}
            elif child.value is None:
                self.tell(line, f"{name} has no value")
            else:
                found[name] = child
        return found

    def unknown_key(self, name: str, table: Mapping[str, Any], owner: str) -> str:
        if table is keys.ADAPTER and name in keys.RECIPE:
            return f"{name} is not an adapter's own: it belongs to the recipe"
        if table is keys.RECIPE and name in ("path", "recipe", "name", "weight", "weights"):
            return f"{name} belongs to an adapter, as in adapters: [{{path: ..., weight: 0.5}}]"
        if len(table) > _LISTED and nearest(name, table) is None:
            return f"unknown key {shown(name)}: jaxmerge schema says what {owner} has"
        return unknown("key", name, list(table), f"{owner} has")

    def adapters(self, node: Node) -> tuple[Source, ...]:
        if not isinstance(node.value, list):
            self.tell(node.line, "adapters should be a list of paths or mappings")
            return ()
        return tuple(self.adapter(child, ("adapters", i)) for i, child in enumerate(node.value))

    def adapter(self, node: Node, place: Place) -> Source:
        if isinstance(node.value, str):
            return Source(path=node.value)
        if not isinstance(node.value, dict):
            self.tell(node.line, f"an adapter is a path, or a mapping with path or recipe, not {short(node.plain())}")
            return Source()
        own = self.known(node, keys.ADAPTER, "an adapter", place)
        given = [name for name in ("path", "recipe") if name in node.value or (*place, name) in self.meant]
        if len(given) != 1:
            self.tell(node.line, "an adapter has a path or a recipe" + (", not both" if given else ""))
        read = {name: self.value(child, keys.ADAPTER[name]) for name, child in own.items() if name != "recipe"}
        if "recipe" in own:
            for name in (*keys.READING, "sha256", "config_sha256"):
                if name in own:
                    self.tell(own[name].line, f"{name} is of files, and a recipe's result is none")
            read |= {"recipe": self.inner(own["recipe"]), "path": None}
        return Source(
            **{name: value for name, value in read.items() if name not in {**keys.READING, **keys.HYPERPARAMETERS}},
            reading={name: read[name] for name in keys.READING if name in read},
            hyperparameters={name: read[name] for name in keys.PER_ADAPTER if name in read},
        )

    def inner(self, node: Node) -> Recipe | None:
        """A recipe that makes an adapter: one that is written out here, or the path of one."""
        if isinstance(node.value, dict):
            return _Reader(self.file, self.folder, self.above, []).recipe(node, inner=True)
        if not isinstance(node.value, str):
            self.tell(node.line, f"recipe should be the path of a recipe, or a mapping, got {short(node.plain())}")
            return None
        path = located(self.folder, node.value)
        real = os.path.realpath(path)
        if real in self.above:
            names = [Path(one).name for one in (*self.above[self.above.index(real) :], real)]
            self.tell(node.line, f"the recipe needs its own result: {' needs '.join(names)}")
            return None
        return read_file(path, self.above)

    def stages(self, node: Node) -> tuple[Stage, ...]:
        if not isinstance(node.value, list):
            self.tell(node.line, "stages should be a list of names, or of mappings as in {scale: {factor: 0.8}}")
            return ()
        # One that could not be read keeps its place, so that the others have theirs.
        return tuple(self.stage(child, ("stages", i)) for i, child in enumerate(node.value))

    def stage(self, node: Node, place: Place) -> Stage:
        name, values = node.value, None
        if isinstance(node.value, dict) and len(node.value) == 1:
            ((name, values),) = node.value.items()
        if not isinstance(name, str):
            self.tell(
                node.line, f"a stage is a name, or a mapping as in scale: {{factor: 0.8}}, not {short(node.plain())}"
            )
            return Stage("")
        if name not in STAGES:
            self.tell(node.line, unknown("stage", name, list(STAGES)))
            return Stage("")
        if values is None:
            return Stage(name)
        table = keys.of_stage(name)
        if not isinstance(values.value, dict):
            self.tell(values.line, f"stage {name} takes a mapping with {', '.join(table) or 'nothing'}")
            return Stage("")
        own = self.known(values, table, f"stage {name}", (*place, name))
        return Stage(name, {key: self.value(child, table[key]) for key, child in own.items()})

    def value(self, node: Node, key: keys.Key) -> Any:
        """A value as it is written; a list of numbers or rules as what it means."""
        if not key.varies or not isinstance(node.value, list):
            return _whole(node.plain(), key)
        if not node.value:
            self.tell(node.line, f"{key.name} is an empty list")
            return UNREAD
        if all(isinstance(child.value, dict) for child in node.value):
            rules = [self.rule(child, key) for child in node.value]
            return UNREAD if None in rules else Rules(tuple(rule for rule in rules if rule is not None))
        return self.gradient(node, key)

    def gradient(self, node: Node, key: keys.Key) -> Gradient:
        if wrong := [child for child in node.value if isinstance(child.value, dict | list)]:
            self.tell(wrong[0].line, f"{key.name} should be a number, a list of numbers, or a list of rules")
            return UNREAD
        return Gradient(tuple(_whole(child.plain(), key) for child in node.value))

    def rule(self, node: Node, key: keys.Key) -> Rule | None:
        own = self.known(node, keys.RULE, f"a rule of {key.name}", ("rule", node.line))
        match, value = own.get("match"), own.get("value")
        if value is None:
            if "value" not in node.value and ("rule", node.line, "value") not in self.meant:
                self.tell(node.line, f"a rule of {key.name} has no value")
            return None
        if len(own) < len(node.value):
            return None
        is_list = isinstance(value.value, list) and value.value
        read = self.gradient(value, key) if is_list else _whole(value.plain(), key)
        return Rule(None if match is None else match.plain(), read)


def _whole(value: Any, key: keys.Key) -> Any:
    """A number of things that is written as 4.0 is 4."""
    return int(value) if key.whole and isinstance(value, float) and value.is_integer() else value
