"""``--report``: what is written, and what is refused before a weight is read."""

import json
import shutil
from pathlib import Path

import pytest

import jaxmerge as jm
from jaxmerge import reports
from jaxmerge.cli import main

ADAPTERS = Path(__file__).parent / "adapters"
SMS, MOVIE, NAMES = (str(ADAPTERS / name) for name in ("sms", "movie", "names"))


def run(*arguments, code=0):
    assert main([str(argument) for argument in arguments]) == code


@pytest.fixture
def unread(monkeypatch):
    """Nothing of the adapters but their headers may be read."""

    def refuse(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr("jaxmerge.io.load", refuse)


@pytest.mark.parametrize("suffix", [".html", ".md", ".json"])
def test_compare_writes_a_report(capsys, tmp_path, suffix):
    path = tmp_path / f"report{suffix}"
    run("compare", SMS, MOVIE, NAMES, "--weights", 1, 0.5, -0.3, "--report", path)
    printed = capsys.readouterr().out
    assert "Start with --method linear" in printed
    expected = jm.report(None, [jm.load(x) for x in (SMS, MOVIE, NAMES)], weights=[1, 0.5, -0.3])
    if suffix == ".json":
        assert json.loads(path.read_text()) == expected.to_json()
    else:
        assert path.read_text() == (expected.html() if suffix == ".html" else expected.markdown())
    run("compare", SMS, MOVIE, "--report", path, code=1)
    assert capsys.readouterr().err == f"jaxmerge: --report {path}: already exists (--force replaces it)\n"
    run("compare", SMS, MOVIE, "--report", path, "--force")
    assert "names" not in path.read_text()


@pytest.mark.parametrize("command", ["compare", "merge"])
def test_what_cannot_be_written_is_told_before_weights_are_read(capsys, tmp_path, unread, command):
    output = ("-o", tmp_path / "out") if command == "merge" else ()
    (tmp_path / "there.html").write_text("old")
    for path, told in (
        ("report.pdf", "give a file that ends in .html, .md or .json"),
        ("there.html", "already exists"),
        ("missing/report.html", f"there is no folder {tmp_path / 'missing'}"),
    ):
        run(command, SMS, MOVIE, *output, "--report", tmp_path / path, code=1)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith(f"jaxmerge: --report {tmp_path / path}: {told}")
    # Together with whatever else is wrong.
    run(command, SMS, tmp_path / "none", *output, "--report", tmp_path / "report.pdf", code=1)
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert (tmp_path / "there.html").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["there.html"]


def test_merge_writes_a_report_with_its_recipe(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (SMS, MOVIE):
        shutil.copytree(path, Path(path).name)
    options = ("--weights", 1, 0.5, "--rank", 8)
    run("merge", "sms", "movie", "-o", "out", *options, "--report", "report.json")
    told = json.loads(Path("report.json").read_text())
    assert told["name"] == "out"
    assert [adapter["name"] for adapter in told["adapters"]] == ["sms", "movie"]
    assert told["weights"] == [1, 0.5]
    assert told["settings"]["rank"] == 8
    kept = json.loads((Path("out") / "jaxmerge.json").read_text())["energy_kept"]
    assert told["contributions"]["total"]["energy_kept"] == pytest.approx(kept)
    # The recipe, put where the report says, gives the same.
    Path("again.yaml").write_text(told["recipe"])
    run("merge", "again.yaml", "-o", "again")
    weights = "adapter_model.safetensors"
    assert (Path("again") / weights).read_bytes() == (Path("out") / weights).read_bytes()
    capsys.readouterr()
    # The merge itself is the same without a report.
    run("merge", "sms", "movie", "-o", "plain", *options)
    assert (Path("plain") / weights).read_bytes() == (Path("out") / weights).read_bytes()


def test_a_report_may_lie_in_the_folder_of_the_result(capsys, tmp_path):
    out = tmp_path / "out"
    run("merge", SMS, MOVIE, "-o", out, "--report", out / "report.html")
    assert "What is in the result" in (out / "report.html").read_text()
    assert jm.load(out).modules
    for name in ("README.md", "adapter_config.json"):
        run("merge", SMS, MOVIE, "-o", out, "--force", "--report", out / name, code=1)
        assert "is a file of an adapter itself" in capsys.readouterr().err
    # Nor may it take the place of what is merged.
    shutil.copytree(SMS, tmp_path / "sms")
    config = (tmp_path / "sms" / "adapter_config.json").read_bytes()
    for command in (["compare"], ["merge", "-o", tmp_path / "other"]):
        report = ["--force", "--report", tmp_path / "sms" / "adapter_config.json"]
        run(*command[:1], tmp_path / "sms", MOVIE, *command[1:], *report, code=1)
        assert "is a file of an adapter itself" in capsys.readouterr().err
    assert (tmp_path / "sms" / "adapter_config.json").read_bytes() == config
    # An earlier report is not a part of the adapter, and replaced like one.
    run("merge", SMS, NAMES, "-o", out, "--force", "--report", out / "report.html")
    assert "names" in (out / "report.html").read_text()


def test_a_recipe_that_allows_different_bases(capsys, tmp_path):
    shutil.copytree(MOVIE, tmp_path / "movie")
    config = json.loads((tmp_path / "movie" / "adapter_config.json").read_text())
    (tmp_path / "movie" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "other"}))
    recipe = {"adapters": [SMS, "movie"], "allow_different_bases": True}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    run("merge", tmp_path / "recipe.yaml", "-o", tmp_path / "out", "--report", tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["base_model"] is None


def test_an_error_of_the_disk_says_what_is_written(capsys, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reports.Report, "save", full)
    run("merge", SMS, MOVIE, "-o", tmp_path / "out", "--report", tmp_path / "report.html", code=1)
    assert "No space left on device; the adapter is written" in capsys.readouterr().err
    assert jm.load(tmp_path / "out").modules
    run("compare", SMS, MOVIE, "--report", tmp_path / "report.html", code=1)
    assert capsys.readouterr().err.endswith("No space left on device\n")
