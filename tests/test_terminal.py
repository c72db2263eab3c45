"""What the command line says around its work: help, misspelt words, progress, completion, narrow terminals."""

import dataclasses
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import jaxmerge as jm
from jaxmerge.cli import build_parser, console, main
from jaxmerge.cli.commands import COMMANDS
from tests import recipes

REPOSITORY = Path(__file__).parent.parent
# These print a text that is asked for, and nothing else.
PRINTERS = ("completion", "schema")


def ended(capsys, *arguments):
    """The exit code of a command that argparse ends, and what it says."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    told = capsys.readouterr()
    return end.value.code, told.out, told.err


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Three small adapters, a, b and c, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        recipes.write(name, seed)
    return tmp_path


@pytest.mark.parametrize(("arguments", "told"), [
    ("merg A", "argument COMMAND: there is no merg; did you mean merge?"),
    ("--versoin", "there is no option --versoin; did you mean --version?"),
    ("merge A -o B --densty 0.5", "there is no option --densty; did you mean --density?"),
    ("merge A -o B --densty=0.5", "there is no option --densty; did you mean --density?"),
    # What is missing is there, misspelt.
    ("merge A --ouput B", "there is no option --ouput; did you mean --output?"),
    ("merge A -o B --methd ties --sede 1",
     "there is no option --methd; did you mean --method?; there is no option --sede; did you mean --seed?"),
    ("merge A -o B --method dare-ties", "argument --method: there is no dare-ties; did you mean dare_ties?"),
    ("merge A -o B --method TIES", "argument --method: there is no TIES; did you mean ties?"),
    ("merge A -o B --space knot", "argument --space: there is no knot; did you mean knots?"),
    ("merge A -o B --stage isotropise", "there is no stage isotropise; did you mean isotropize?"),
    ("convert A B --format tunik", "argument --format: there is no tunik; did you mean tunix?"),
    ("merge A -o B --method qqq", "argument --method: there is no qqq: there are linear, ties, dare_linear"),
    ("methods more", "unrecognized arguments: more"),
    ("completion bahs", "there is no bahs; did you mean bash?"),
])  # fmt: skip
def test_the_word_that_may_have_been_meant(capsys, arguments, told):
    code, out, err = ended(capsys, *arguments.split())
    assert (code, out) == (2, "")
    usage, problem, more = err.splitlines()
    command = f"jaxmerge {arguments.split()[0]}".removesuffix(" merg").removesuffix(" --versoin")
    assert usage.startswith(f"usage: {command} ")
    assert problem.startswith(f"{command}: error: ")
    assert told in problem
    assert more == f"{command} --help says more"


def test_what_only_looks_misspelt_is_taken(folders, capsys):
    """A beginning of an option is one, as are negative numbers; a name may begin with dashes after --."""
    shutil.move("c", "--c")
    assert main(["merge", "-o", "out", "--weigh", "-1", "-2e-1", "-q", "--", "a", "--c"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("arguments", [["--help"], ["help"]])
def test_the_overview_says_what_to_start_with(capsys, arguments):
    code, out, _ = ended(capsys, *arguments)
    assert code == 0
    assert len(out.splitlines()) <= 35
    assert re.findall(r"^  jaxmerge (\w+)", out, re.MULTILINE) == ["inspect", "compare", "merge"]
    assert all(re.search(rf"^    {name}\b", out, re.MULTILINE) for name in COMMANDS)


def test_nothing_at_all_is_wrong_usage_and_shows_the_overview(capsys):
    code, out, err = ended(capsys)
    assert (code, out) == (2, "")
    assert err == ended(capsys, "--help")[1]


def test_help_of_a_command(capsys):
    assert ended(capsys, "help", "resize") == ended(capsys, "resize", "--help")
    code, _, err = ended(capsys, "help", "resiz")
    assert code == 2
    assert "did you mean resize?" in err


def examples():
    """Those of the overview, and of each command."""
    parser = build_parser()
    texts = {"": parser.description, **{name: command.epilog for name, command in parser.commands.items()}}
    for name, text in texts.items():
        lines = [line.strip() for line in (text or "").splitlines() if line.startswith("  jaxmerge ")]
        yield pytest.param(lines, id=name or "jaxmerge")


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A working directory with what a clone of the repository has in tests/adapters; the first layers of it."""
    monkeypatch.chdir(tmp_path)
    for name in ("sms", "movie", "names"):
        adapter = jm.load(REPOSITORY / "tests" / "adapters" / name)
        first = {path: lora for path, lora in adapter.modules.items() if "layer.0." in path}
        jm.save(dataclasses.replace(adapter, modules=first), f"tests/adapters/{name}")
    jm.save(llama_adapter(), "llama-adapter")


@pytest.mark.parametrize("lines", list(examples()))
def test_examples_work(lines, clone, capsys):
    assert lines
    for line in lines:
        command, _, file = line.partition(" > ")
        program, *arguments = shlex.split(command)
        assert program == "jaxmerge"
        assert all(Path(word).exists() for word in arguments if word.startswith("tests/"))
        assert main(arguments) == 0, line
        printed = capsys.readouterr().out
        assert printed
        if file:
            Path(file).write_text(printed)


def llama_adapter():
    modules = {}
    for part, (out, in_) in {"self_attn.q_proj": (256, 16), "mlp.up_proj": (24, 16)}.items():
        lora = jm.LoRA(np.ones((2, in_), np.float32), np.ones((out, 2), np.float32))
        modules |= {f"model.layers.{layer}.{part}": lora for layer in range(2)}
    return jm.Adapter(modules)


def test_every_command_can_be_quiet_and_has_examples():
    for name, command in build_parser().commands.items():
        assert command.description, name
        assert re.search(rf"^  jaxmerge {name}( |$)", command.epilog or "", re.MULTILINE), name
        assert set(command._option_string_actions) >= {"--quiet", "-q", "--json"} or name in PRINTERS, name


QUIET = [
    "merge a b -o out", "inspect a b", "compare a b", "sweep a b --scale 0.5 1", "methods",
    "convert a out --format peft", "resize a out --rank 1",
]  # fmt: skip


@pytest.mark.parametrize("line", QUIET)
def test_quiet_says_nothing(folders, capsys, line):
    assert main([*line.split(), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    if "out" in line:
        assert len(jm.load("out").modules) == 12
        shutil.rmtree("out")
    # What is asked for is printed; and the next command is not quiet.
    assert main([*line.split(), "-q", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)
    assert told.err == ""
    if "out" in line:
        shutil.rmtree("out")
    assert main(line.split()) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("line", [line.replace(" a", " nowhere") for line in QUIET if " a" in line])
def test_quiet_tells_problems(folders, capsys, line):
    assert main([*line.split(), "--quiet"]) == 1
    assert capsys.readouterr() == ("", "jaxmerge: nowhere: there is no such folder\n")


def test_a_quiet_verify_says_what_is_wrong(folders, capsys):
    assert main(["merge", "a", "b", "-o", "out", "-q"]) == 0
    assert main(["verify", "out", "-q"]) == 0
    assert capsys.readouterr() == ("", "")
    shutil.rmtree("a")
    recipes.write("a", seed=7)
    assert main(["verify", "out", "-q"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("jaxmerge: ")


def in_terminal(columns, *arguments, **environment):
    """What a command writes to a terminal."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), "LINES": "30", **environment}
    command = [sys.executable, "-m", "jaxmerge", *arguments]
    with subprocess.Popen(command, stdout=follower, stderr=follower, stdin=follower, env=environment) as process:
        os.close(follower)
        written = b""
        while True:
            try:
                part = os.read(leader, 65536)
            except OSError:
                break
            if not part:
                break
            written += part
    os.close(leader)
    assert process.returncode == 0
    return written.decode().replace("\r\n", "\n")


def shown(text):
    """The lines that stay on a terminal, which knows how to go back, up, and to erase a line."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", text):
        if part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part == "\x1b[1A":
            row -= 1
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return lines


def test_in_a_terminal_there_is_progress_and_it_goes_away(folders):
    text = in_terminal(50, "compare", "a", "b", NO_COLOR="1")
    assert "comparing" in text
    assert "12/12" in text
    left = shown(text)
    assert not any("comparing" in line or "reading" in line for line in left)
    # Nothing is wider than the terminal, and nothing is coloured.
    assert max(map(len, left)) <= 50
    assert not re.search(r"\x1b\[[0-9;]*(?<![0-9])(3[0-7]|38|9[0-7])[;m]", text)
    assert "\x1b[1m" in text


def test_colours_are_there_without_no_color(folders):
    """So that the test above can fail."""
    text = in_terminal(50, "compare", "a", "b")
    assert re.search(r"\x1b\[[0-9;]*(?<![0-9])(3[0-7]|38|9[0-7])[;m]", text)


def test_a_pipe_gets_no_progress(folders):
    command = [sys.executable, "-m", "jaxmerge", "merge", "a", "b", "-o", "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout


COLUMNS = [
    ("", "right"),
    ("module", "left"),
    ("largest\ncosine", "right"),
    ("norm of the change", "right"),
    ("", "left"),
]
ROWS = [
    ("1", "model.layers.*.self_attn.q_proj", "-0.123", "0.4542 … 0.6079", "[b]ends"),
    ("2", "lm_head", "0.5", "7 %", ""),
]


def rendered(width):
    screen = Console(width=width, file=None, highlight=False)
    with screen.capture() as capture:
        screen.print(console.table(COLUMNS, ROWS), soft_wrap=False)
    return capture.get()


def test_a_table_where_there_is_room():
    heading, second, line, *rows = rendered(100).splitlines()
    assert "largest" in heading
    assert second.split() == ["module", "cosine", "norm", "of", "the", "change"]
    assert set(line) == {"─"}
    assert rows[0].split() == ["1", ROWS[0][1], "-0.123", "0.4542", "…", "0.6079", "[b]ends"]
    assert len(rows) == 2


def test_only_paths_are_broken_to_make_room():
    text = rendered(72)
    assert all(cell in text for cell in ("-0.123", "0.4542 … 0.6079", "norm of the change"))
    assert "model.layers.*.self_attn.q_proj" not in text
    assert max(map(len, text.splitlines())) <= 72


@pytest.mark.parametrize("width", [50, 34])
def test_paragraphs_where_there_is_none(width):
    text = rendered(width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0] == "1 model.layers.*.self_attn.q_proj"
    words = " ".join(" ".join(lines).split())
    assert "largest cosine: -0.123; norm of the change: 0.4542 … 0.6079; [b]ends 2 lm_head" in words
    # No number ends a line before its unit.
    assert any("0.4542 … 0.6079" in line for line in lines)
    assert words.endswith("2 lm_head largest cosine: 0.5; norm of the change: 7 %")


def completed(folder, *words):
    """What bash offers for the last of some words."""
    program = (
        "source ./completion || exit 3\n"
        'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))\n'
        "$(complete -p jaxmerge | sed 's/.*-F \\([^ ]*\\) .*/\\1/')\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    command = ["bash", "-c", program, "bash", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes(tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    for name in ("adapters/sms", "adapters/movie", "other"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "adapters" / "two.yaml").touch()
    (tmp_path / "adapters" / "notes.txt").touch()
    offered = {
        ("jaxmerge", "me"): {"merge", "methods"},
        ("jaxmerge", "merge", "a"): {"adapters"},
        # Folders and recipes, and nothing else.
        ("jaxmerge", "merge", "adapters/"): {"adapters/sms", "adapters/movie", "adapters/two.yaml"},
        ("jaxmerge", "merge", "adapters/sms", "adapters/m"): {"adapters/movie"},
        ("jaxmerge", "merge", "adapters/sms", "-o", "ot"): {"other"},
        ("jaxmerge", "merge", "adapters/sms", "--output", "adapters/"): {"adapters/sms", "adapters/movie"},
        ("jaxmerge", "merge", "adapters/sms", "--method", "dare_"): {"dare_linear", "dare_ties"},
        ("jaxmerge", "merge", "adapters/sms", "--comb"): {"--combination-type"},
        ("jaxmerge", "resize", "adapters/s"): {"adapters/sms"},
        ("jaxmerge", "completion", "z"): {"zsh"},
    }
    assert {words: set(completed(tmp_path, *words)) for words in offered} == offered


@pytest.mark.parametrize("shell", ["zsh", "fish", "tcsh"])
def test_the_other_shells_know_every_command(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    assert "combination" in script


def test_progress_is_told_module_by_module(folders):
    adapters = [jm.load(name) for name in "ab"]
    told = []
    jm.compare(adapters, on_progress=lambda *step: told.append(step))
    assert told == [(i, 12) for i in range(1, 13)]
    told.clear()
    grid = {"scale": [0.5, 1.0], "weights": [[1.0, 1.0], [1.0, 0.0]]}
    jm.sweep(adapters, jm.scores(adapters), grid, on_progress=lambda *step: told.append(step))
    assert told == [(i, 12) for i in range(1, 13)]
    # Where one merge fits at a time, each is told.
    told.clear()
    jm.sweep(adapters, jm.scores(adapters), grid, memory="5kB", on_progress=lambda *step: told.append(step))
    assert told == [(i, 24) for i in range(1, 25)]
