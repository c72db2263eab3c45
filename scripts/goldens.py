"""What the scripts share that make goldens: a fresh folder, and the file of a method's cases."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def emptied(folder: Path) -> Path:
    """A folder with nothing in it."""
    folder = folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def save_cases(
    folder: Path,
    method: str,
    about: Mapping[str, Any],
    cases: Mapping[str, Any],
    compute: Callable[[Any], Mapping[str, np.ndarray]],
) -> bool:
    """Writes ``METHOD.npz``: what it is about, and under ``CASE/NAME`` what is computed for each case.

    Args:
        folder: Where.
        method: The method's name.
        about: As JSON.
        cases: Name -> what is given.
        compute: What is given -> name -> array, ``merged`` among them.

    Returns:
        Whether all that is merged is finite.
    """
    arrays: dict[str, Any] = {"about": np.array(json.dumps(about))}
    good = True
    for name, given in cases.items():
        found = compute(given)
        good &= bool(np.isfinite(found["merged"]).all())
        arrays |= {f"{name}/{key}": value for key, value in found.items()}
    file = folder / f"{method}.npz"
    np.savez_compressed(file, **arrays)
    print(f"{method}: {len(cases)} cases, {file.stat().st_size / 1000:.0f} kB")
    return good
