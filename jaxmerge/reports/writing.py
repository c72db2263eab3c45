"""Where a report is written, and in what form."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from jaxmerge.io.atomic import write_file
from jaxmerge.io.peft.folder import CONFIG, OWNED

FORMS = (".html", ".md", ".json")


def check_target(
    path: str | Path, force: bool = False, forms: Iterable[str] = FORMS, beside: str | Path | None = None
) -> None:
    """Refuses a file that a report may not be written to, before any work is done for it.

    Args:
        path: The file to be.
        force: Whether a file may be replaced.
        forms: The endings there are.
        beside: A folder that will be there by then, with an adapter in it.

    Raises:
        ValueError: If the ending is another, something is there that may not be replaced, or its folder is not there
            or not writable, or it would be one of an adapter's own files.
    """
    if str(path).endswith(os.sep):
        raise ValueError(f"report {path}: is no name of a file")
    path, forms = Path(path), tuple(forms)
    if path.suffix.lower() not in forms:
        raise ValueError(f"report {path}: give a file that ends in {', '.join(forms[:-1])} or {forms[-1]}")
    if path.is_dir():
        raise ValueError(f"report {path}: is a folder")
    folder = path.absolute().parent
    in_the_result = beside is not None and folder.resolve() == Path(beside).resolve()
    if path.name in OWNED and (in_the_result or (folder / CONFIG).is_file()):
        raise ValueError(f"report {path}: is a file of an adapter itself")
    if path.exists() and not force:
        raise ValueError(f"report {path}: already exists (--force replaces it)")
    if in_the_result:
        return
    if not folder.is_dir():
        raise ValueError(f"report {path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"report {path}: {folder} is not writable")


def write(path: str | Path, makers: Mapping[str, Callable[[], str]], force: bool) -> None:
    """Writes a file in the form that its ending names, whole or not at all.

    Args:
        path: The file.
        makers: Ending -> what makes the text.
        force: Whether a file may be replaced.

    Raises:
        ValueError: As `check_target` does.
        OSError: If the disk fails or is full; nothing is left then.
    """
    check_target(path, force, makers)
    path = Path(path)
    write_file(path, makers[path.suffix.lower()]().encode(), force=force)
