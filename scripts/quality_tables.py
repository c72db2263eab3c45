"""What scripts/quality.py found, as lines and tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def told(part: str, name: str, record: Mapping[str, Any]) -> str:
    """A line for a record."""
    names = ("scale", "density", "seconds")
    settings = [f"{key} {record[key]:.3g}" for key in names if isinstance(record.get(key), float)]
    scores = f"mean {record['mean']:5.1f} ± {record['error']:.1f}  worst {record['worst']:5.1f}"
    return f"{part:8} {name:32} {scores}  {', '.join(settings)}"


def write_readme(readme: Path, results: Mapping[str, Any]) -> None:
    """Puts the tables between their marks in README.md."""
