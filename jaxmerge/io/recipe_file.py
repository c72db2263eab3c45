"""The recipe that lies beside a result, and the paths in recipes: as they are written, opened, and written again."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from jaxmerge.layouts import LAYOUTS

RECIPE = "recipe.yaml"
_HEAD = "# What made this, by jaxmerge"

_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
    **{sign + word: float(f"{sign}inf") for sign in ("", "+", "-") for word in (".inf", ".Inf", ".INF")},
}
_WHOLE = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


def parse_scalar(text: str) -> Any:
    """What an unquoted text means in YAML 1.2: in 1.1 ``1e-5`` is a text, ``no`` is false and ``010`` is eight."""
    if text in _WORDS:
        return _WORDS[text]
    if _WHOLE.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def is_fixed(path: str) -> bool:
    """Whether a path means the same in every folder: it is absolute, or of another machine."""
    return "://" in path or Path(path).is_absolute()


def located(folder: str, path: str) -> str:
    """A path in a recipe as it is opened from here: relative to the working directory, if that is not far.

    So the name that a file has in messages and records does not hang on where the recipe lies.
    """
    if is_fixed(path):
        return path
    joined, here = _joined(folder, path), str(Path.cwd())
    is_far = os.path.commonpath([joined, here]) == Path(here).anchor != here
    return joined if is_far else os.path.relpath(joined, here)


def rebased(folder: str, path: str, target: str) -> str:
    """A path relative to one folder as one relative to another, which may not be there yet."""
    return path if is_fixed(path) else os.path.relpath(_joined(folder, path), os.path.realpath(target))


def _joined(folder: str, path: str) -> str:
    joined = os.path.join(os.path.realpath(folder), path)  # noqa: PTH118
    plain = os.path.normpath(joined)
    # Behind a link, a .. leads elsewhere than it looks.
    return plain if os.path.realpath(plain) == os.path.realpath(joined) else os.path.realpath(joined)


def moved(recipe: Mapping[str, Any], folder: str, target: str) -> dict[str, Any]:
    """A recipe, as JSON has it, whose paths are relative to another folder.

    Args:
        recipe: With paths relative to `folder`.
        folder: Of this machine.
        target: Of this machine or another; from another one, paths cannot be relative.

    Returns:
        The recipe.
    """

    def path(given: str) -> str:
        if "://" in target:
            return given if is_fixed(given) else _joined(folder, given)
        return rebased(folder, given, target)

    def adapter(given: Mapping[str, Any]) -> dict[str, Any]:
        if "recipe" in given:
            return {**given, "recipe": moved(given["recipe"], folder, target)}
        return {**given, "path": path(given["path"])}

    made = {**recipe, "adapters": [adapter(given) for given in recipe["adapters"]]}
    if "layout" in recipe and recipe["layout"] not in LAYOUTS:
        made["layout"] = path(recipe["layout"])
    return made


def is_ours(path: Path) -> bool:
    """Whether a recipe is one that was left beside a result."""
    try:
        return path.read_text(encoding="utf-8").startswith(_HEAD)
    except (OSError, ValueError):
        return False


def take_recipe(record: dict[str, Any], target: Any) -> bytes | None:
    """Takes the recipe out of a record of provenance, for a file beside what is written.

    Args:
        record: Changed in place.
        target: The folder that the file will lie in.

    Returns:
        The file's contents; None if the record has no recipe.
    """
    recipe, folder = record.pop("recipe", None), record.pop("recipe_folder", "")
    if recipe is None:
        return None
    version = record.get("versions", {}).get("jaxmerge", "")
    head = (
        f"{_HEAD} {version}. To make it again: jaxmerge merge {RECIPE} -o OUT\n"
        "# Paths are relative to this file; sha256 is checked.\n"
    )
    return (head + dump(moved(recipe, folder, str(target)))).encode()


def dump(value: Any) -> str:
    """YAML that `parse_scalar` reads back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=4096)


class _Dumper(yaml.SafeDumper):
    """Numbers, lists of numbers and rules each in a line, and texts in quotes where they would be something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> Any:
        return super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    means_another = parse_scalar(text) != text or not isinstance(parse_scalar(text), str)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if means_another else None)


def _list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    flat = not any(isinstance(item, dict | list) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flat)


def _mapping(dumper: yaml.SafeDumper, mapping: dict[str, Any]) -> yaml.Node:
    is_rule = "value" in mapping
    return dumper.represent_mapping("tag:yaml.org,2002:map", mapping.items(), flow_style=is_rule)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(list, _list)
_Dumper.add_representer(dict, _mapping)
