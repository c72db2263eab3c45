"""The notebooks, run in short form and without Jupyter: their code cells as they are, in one process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_there_are_some():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(tmp_path, path):
    (tmp_path / "cells.py").write_text("\n\n".join("".join(cell["source"]) for cell in code_cells(path)), "utf-8")
    (tmp_path / "temporary").mkdir()
    environment = os.environ | {"JAXMERGE_NOTEBOOK_STEPS": "3", "TMPDIR": str(tmp_path / "temporary")}
    command = [sys.executable, "-X", "utf8", str(tmp_path / "cells.py")]
    before = sorted(FOLDER.iterdir())
    done = subprocess.run(
        command, cwd=FOLDER, env=environment, timeout=300, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "temporary").iterdir())
    assert sorted(FOLDER.iterdir()) == before


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_clean(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    told = json.dumps([{**output, "data": {**output.get("data", {}), "image/png": ""}} for output in outputs])
    assert not [word for word in ("/tmp/", "Warning") if word in told]
    assert not re.findall(r"(?<![\w.<])/[a-z]+/", told)  # No path of any machine.
