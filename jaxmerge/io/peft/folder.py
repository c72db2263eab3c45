"""The files of an adapter's folder, before its weights are read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmerge.io import atomic
from jaxmerge.io.peft.keys import Contents, TensorSpec, read_contents
from jaxmerge.io.peft.weights import PICKLED, WEIGHTS, read_specs
from jaxmerge.io.recipe_file import RECIPE

CONFIG = "adapter_config.json"
PROVENANCE = "jaxmerge.json"
CARD = "README.md"
OWNED = (CONFIG, WEIGHTS, PICKLED, PROVENANCE, CARD, RECIPE)


@dataclass(frozen=True)
class Headers:
    """An adapter folder before its weights are read.

    Attributes:
        folder: Where the files lie; a subfolder of what was asked for if the adapter is saved under its name.
        weights: The file with the tensors.
        config: The parsed adapter_config.json.
        tensors: Key -> header.
        contents: The tensors sorted into modules.
    """

    folder: Path
    weights: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorSpec]
    contents: Contents


def find_folder(path: Path) -> Path:
    """The folder that holds the adapter: the path, or its only subfolder with an adapter in it.

    Raises:
        ValueError: If there is none, or several.
    """
    try:
        if not path.exists():
            what = "is a broken link" if path.is_symlink() else "there is no such folder"
            raise ValueError(f"{path}: {what}")
    except (OSError, RuntimeError) as error:  # A name too long, a link to itself.
        raise ValueError(f"{path}: cannot be opened: {atomic.one_line(error)}") from None
    if path.is_file():
        if path.name in (CONFIG, WEIGHTS, PICKLED):
            return path.parent
        raise ValueError(f"{path}: is a file; give the adapter's folder")
    if (path / CONFIG).is_file():
        return path
    inner = sorted(folder for folder in path.iterdir() if (folder / CONFIG).is_file())
    if len(inner) > 1:
        raise ValueError(f"{path}: holds several adapters ({', '.join(f.name for f in inner)}); name one of them")
    if not inner:
        raise ValueError(f"{path}: is not a PEFT adapter, there is no {CONFIG} in it")
    return inner[0]


def read_headers(path: Path) -> Headers:
    """Reads everything but the weights.

    Raises:
        ValueError: If the files are missing or broken. What they hold is not judged here: see
            `Headers.contents`.
    """
    folder = find_folder(path)
    config = read_config(folder / CONFIG)
    weights = next((folder / name for name in (WEIGHTS, PICKLED) if (folder / name).is_file()), None)
    if weights is None:
        raise ValueError(f"{folder}: there is no {WEIGHTS} in it")
    tensors = read_specs(weights)
    return Headers(folder, weights, config, tensors, read_contents(config, tensors))


def sound_headers(path: Path) -> Headers:
    """`read_headers` of what can be merged.

    Raises:
        ValueError: If it cannot be read, or holds something that jaxmerge does not merge.
    """
    headers = read_headers(path)
    if headers.contents.problems:
        raise ValueError("\n".join(f"{path}: {problem}" for problem in headers.contents.problems))
    return headers


def read_config(path: Path) -> dict[str, Any]:
    """The contents of an adapter_config.json.

    Raises:
        ValueError: If it cannot be read, or is no JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {atomic.one_line(error)}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: is not a JSON object")
    return config
