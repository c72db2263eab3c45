"""What jaxmerge wrote down of an adapter beside it, whatever its format."""

import json
from pathlib import Path
from typing import Any

from jaxmerge.io import is_orbax, keras, orbax, peft
from jaxmerge.io.recipe_file import RECIPE


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of provenance beside an adapter.

    Args:
        path: The adapter's.

    Returns:
        The record; None where there is none.

    Raises:
        ValueError: If it cannot be read.
    """
    if path.is_file() and path.name.endswith(keras.SUFFIX):
        return keras.read_record(path)
    if orbax.is_remote(path) or is_orbax(path):
        return orbax.read_record(path)
    return _of_folder(peft.find_folder(path) / peft.PROVENANCE)


def _of_folder(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from None
    return record if isinstance(record, dict) else None


def recipe_beside(path: Path) -> Path | None:
    """The recipe that an adapter was made with, if it lies beside it."""
    beside = keras.recipe_beside(path) if path.name.endswith(keras.SUFFIX) else path / RECIPE
    return beside if beside.is_file() else None
