"""The command line, from the outside: what it writes, what it says, and how it ends."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import peft
import pytest
import safetensors.numpy
import transformers

import jaxmerge as jm
from jaxmerge.cli import main
from tests.cohort import Cohort
from tests.helpers import delta64, relative_error

ADAPTERS = Path(__file__).parent / "adapters"
SMS, MOVIE, NAMES = (str(ADAPTERS / name) for name in ("sms", "movie", "names"))


@pytest.fixture(scope="module")
def queries(tmp_path_factory):
    """The query projections of two real adapters: one shape, and so one program, where what is made does not matter."""
    folders = [tmp_path_factory.mktemp("queries") / name for name in ("sms", "movie")]
    for folder, source in zip(folders, (SMS, MOVIE), strict=True):
        adapter = jm.load(source)
        modules = {path: lora for path, lora in adapter.modules.items() if path.endswith("query")}
        jm.save(dataclasses.replace(adapter, modules=modules), folder)
    return [str(folder) for folder in folders]


def run(*arguments, code=0):
    assert main([str(argument) for argument in arguments]) == code


def refused(capsys, *arguments):
    """The problems a refused command tells on standard error, without the program's name."""
    run(*arguments, code=1)
    told = capsys.readouterr()
    assert told.out == ""
    assert "Traceback" not in told.err
    lines = told.err.splitlines()
    assert all(line.startswith("jaxmerge: ") for line in lines)
    return [line.removeprefix("jaxmerge: ") for line in lines]


def written(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_real_adapters_merge_exactly_and_load_in_peft(tmp_path, capsys):
    out = tmp_path / "merged"
    run("merge", SMS, MOVIE, NAMES, "-o", out, "--weights", "1", "0.5", "-3e-1", "--dtype", "float32")
    summary = capsys.readouterr().out
    assert "rank 48 = 3×16, exact; --rank 16 keeps" in summary
    assert written(out) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "jaxmerge.json",
                            "recipe.yaml"]  # fmt: skip
    sources = [jm.load(path) for path in (SMS, MOVIE, NAMES)]
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    model = peft.PeftModel.from_pretrained(transformers.BertModel(config), str(out))
    found = 0
    for path, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            expected = sum(w * delta64(source.modules[path]) for w, source in zip((1, 0.5, -0.3), sources, strict=True))
            assert relative_error(module.get_delta_weight("default").detach().numpy(), expected) < 1e-5
            found += 1
    assert found == 36


def test_the_hint_is_what_the_rank_keeps(tmp_path, capsys):
    run("merge", SMS, MOVIE, "-o", tmp_path / "exact")
    hint = re.search(r"--rank 16 keeps ([\d.]+) %", capsys.readouterr().out)
    assert hint is not None
    run("merge", SMS, MOVIE, "-o", tmp_path / "cut", "--rank", "16", "--json")
    summary = json.loads(capsys.readouterr().out)
    assert 100 * summary["energy_kept"] == pytest.approx(float(hint[1]), abs=0.06)


def test_json_tells_everything(tmp_path, capsys, queries):
    arguments = ["--method", "dare_ties", "--density", "0.5", "--seed", "3", "--rank", "8", "--json"]
    run("merge", *queries, "-o", tmp_path / "out", *arguments)
    summary = json.loads(capsys.readouterr().out)
    assert summary["ok"] is True
    assert summary["seed"] == 3
    defaults = {"majority_sign_method": "total", "election": "unweighted", "divisor": "count"}
    assert summary["hyperparameters"] == {"density": 0.5, **defaults}
    assert [source["weight"] for source in summary["inputs"]] == [1.0, 1.0]
    assert len(summary["modules"]) == 6
    assert {module["rank"] for module in summary["modules"].values()} == {8}
    assert 0 < summary["energy_kept"] < 1
    record = json.loads((tmp_path / "out" / "jaxmerge.json").read_text())
    assert record["seed"] == 3
    assert record["energy_kept"] == summary["energy_kept"]


def test_two_runs_write_the_same_bytes(tmp_path, queries):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        arguments = [*queries, "-o", str(tmp_path / name / "out"), "--method", "dare_linear", "--density", "0.3"]
        command = [sys.executable, "-m", "jaxmerge", "merge", *arguments, "--seed", "5"]
        environment = {**os.environ, "PYTHONHASHSEED": "1" if name == "a" else "2"}
        subprocess.run(command, check=True, env=environment, capture_output=True)
    for name in written(tmp_path / "a" / "out"):
        assert (tmp_path / "a" / "out" / name).read_bytes() == (tmp_path / "b" / "out" / name).read_bytes()


def test_a_seed_is_jax_random_key(tmp_path, queries):
    run("merge", *queries, "-o", tmp_path / "out", "--method", "dare_linear", "--density", "0.5", "--seed", "9")
    import jax

    sources = [jm.load(path) for path in queries]
    expected = jm.merge(sources, method="dare_linear", density=0.5, key=jax.random.key(9))
    got = jm.load(tmp_path / "out")
    for path, lora in expected.modules.items():
        np.testing.assert_array_equal(np.asarray(lora.a), got.modules[path].a)


def test_all_problems_are_told_together_and_nothing_is_written(tmp_path, capsys, mixed: Cohort):
    broken = tmp_path / "broken"
    shutil.copytree(mixed.folders[0], broken)
    with (broken / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(100)
    disagreeing = tmp_path / "disagreeing"
    shutil.copytree(mixed.folders[0], disagreeing)
    tensors = safetensors.numpy.load_file(disagreeing / "adapter_model.safetensors")
    key = "base_model.model.first.lora_A.weight"
    tensors[key] = np.zeros((4, 13), np.float32)
    safetensors.numpy.save_file(tensors, disagreeing / "adapter_model.safetensors")
    existing = tmp_path / "existing"
    shutil.copytree(mixed.folders[1], existing)
    before = {path.name: path.read_bytes() for path in existing.iterdir()}
    problems = refused(
        capsys, "merge", mixed.folders[0], tmp_path / "missing", broken, disagreeing, mixed.folders[0],
        "-o", existing, "--weights", "1", "2", "--density", "7", "--method", "ties",
    )  # fmt: skip
    text = "\n".join(problems)
    for expected in (
        "missing: there is no such folder",
        "broken/adapter_model.safetensors: is not a sound safetensors file",
        "module first has different shapes",
        "is given twice",
        "existing: already exists",
        "2 weights for 5 adapters",
        "density should be at most 1 and above 0, got 7",
    ):
        assert expected in text, text
    assert {path.name: path.read_bytes() for path in existing.iterdir()} == before


def test_nan_is_refused_with_the_module_named(tmp_path, capsys, equal_ranks: Cohort):
    poisoned = tmp_path / "poisoned"
    shutil.copytree(equal_ranks.folders[0], poisoned)
    tensors = safetensors.numpy.load_file(poisoned / "adapter_model.safetensors")
    tensors["base_model.model.second.lora_B.weight"][3, 1] = np.nan
    safetensors.numpy.save_file(tensors, poisoned / "adapter_model.safetensors")
    problems = refused(capsys, "merge", poisoned, equal_ranks.folders[1], "-o", tmp_path / "out")
    assert problems == [f"{poisoned}: NaN or inf in second"]
    assert not (tmp_path / "out").exists()


def test_the_same_adapter_under_two_paths(tmp_path, capsys, equal_ranks: Cohort):
    shutil.copytree(equal_ranks.folders[0], tmp_path / "copy")
    problems = refused(capsys, "merge", equal_ranks.folders[0], tmp_path / "copy", "-o", tmp_path / "out")
    assert len(problems) == 1
    assert "is the same adapter as" in problems[0]


def test_an_input_is_never_overwritten(tmp_path, capsys, equal_ranks: Cohort):
    source = tmp_path / "source"
    shutil.copytree(equal_ranks.folders[0], source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    problems = refused(capsys, "merge", source, equal_ranks.folders[1], "-o", source, "--force")
    assert "would be overwritten" in problems[0]
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_force_replaces_an_adapter_and_leaves_other_files(tmp_path, capsys):
    out = tmp_path / "out"
    run("merge", SMS, MOVIE, "-o", out)
    (out / "notes.txt").write_text("mine")
    run("merge", SMS, NAMES, "-o", out, "--force", "--rank", "4")
    assert (out / "notes.txt").read_text() == "mine"
    assert jm.load(out).modules["encoder.layer.0.output.dense"].rank == 4
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("years")
    capsys.readouterr()
    assert "is not an adapter" in refused(capsys, "merge", SMS, MOVIE, "-o", tmp_path / "folder", "--force")[0]


def test_bases_that_differ(tmp_path, capsys, equal_ranks: Cohort):
    folders = []
    for name in ("llama", "mistral"):
        folders.append(tmp_path / name)
        shutil.copytree(equal_ranks.folders[len(folders) - 1], folders[-1])
        config = json.loads((folders[-1] / "adapter_config.json").read_text())
        (folders[-1] / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
    problems = refused(capsys, "merge", *folders, "-o", tmp_path / "out")
    assert "different base models: llama" in problems[0]
    assert "--allow-different-bases" in problems[0]
    run("merge", *folders, "-o", tmp_path / "out", "--allow-different-bases")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "ties"], "needs density"),
        (["--method", "dare_linear", "--density", "0.5"], "--seed"),
        (["--rank", "1000"], "largest possible is 32"),
        (["--rank", "0"], "rank should be at least 1, got 0"),
        (["--density", "0", "--method", "ties"], "density should be at most 1 and above 0, got 0"),
        (["--density", "nan", "--method", "ties"], "density should be a finite number, got nan"),
        (["--weights", "1", "nan"], "weight should be a finite number, got nan"),
        (["--combination-type", "svd", "--method", "ties"], "combination_type"),
        (["--extras", "nobody"], "extras nobody: give same, average"),
        (["--density", "0.5"], "takes no density"),
    ],
)
def test_options_that_do_not_fit(tmp_path, capsys, arguments, words):
    problems = refused(capsys, "merge", SMS, MOVIE, "-o", tmp_path / "out", *arguments)
    assert len(problems) == 1
    assert words in problems[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["merge"],
        ["merge", "A"],
        ["merge", "A", "-o", "B", "--method", "magic"],
        ["merge", "A", "-o", "B", "--seed", "-1"],
        ["merge", "A", "-o", "B", "--rank", "x"],
        ["merge", "A", "-o", "B", "--weights", "one"],
    ],
)
def test_wrong_usage_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: jaxmerge" in capsys.readouterr().err


def test_problems_as_json(tmp_path, capsys):
    run("merge", "nowhere", "-o", tmp_path / "out", "--json", code=1)
    told = json.loads(capsys.readouterr().out)
    assert told == {"ok": False, "problems": ["nowhere: there is no such folder"]}


def test_approximations_say_so(tmp_path, capsys):
    run("merge", SMS, MOVIE, "-o", tmp_path / "out", "--combination-type", "linear")
    assert "is an approximation" in capsys.readouterr().out


def test_weights_before_options_and_in_any_notation(tmp_path, capsys):
    run("merge", SMS, MOVIE, "--weights", "-1", "-2.5e-1", "--json", "-o", tmp_path / "out")
    summary = json.loads(capsys.readouterr().out)
    assert [source["weight"] for source in summary["inputs"]] == [-1, -0.25]


def test_inspect_says_what_is_there(capsys, mixed: Cohort):
    run("inspect", *mixed.folders, "--json")
    described = json.loads(capsys.readouterr().out)["adapters"]
    for adapter, description in zip(mixed.load(), described, strict=True):
        assert description["modules"].keys() == adapter.modules.keys()
        for path, module in description["modules"].items():
            lora = adapter.modules[path]
            assert (module["rank"], module["out"], module["in"]) == (lora.rank, *lora.features)
            assert module["norm"] == pytest.approx(np.linalg.norm(delta64(lora)), rel=1e-5)
    run("inspect", *mixed.folders)
    assert "norm of the change" in capsys.readouterr().out


def test_inspect_says_what_cannot_be_merged_and_why(capsys, tmp_path, make_cohort):
    dora = make_cohort([{"r": 2, "target_modules": ["first"], "use_dora": True}])
    run("inspect", dora.folders[0])
    assert "problem: is DoRA, which cannot be merged: " in capsys.readouterr().out
    run("inspect", dora.folders[0], tmp_path / "nowhere", code=1)
    told = capsys.readouterr()
    assert "is DoRA" in told.out
    assert "nowhere: there is no such folder" in told.err


def test_methods_lists_the_grid(capsys):
    run("methods")
    text = capsys.readouterr().out
    assert all(name in text for name in (*jm.METHODS, *jm.SPACES, *jm.COMBINATION_TYPES))
    run("methods", "--json")
    assert json.loads(capsys.readouterr().out)["methods"].keys() == jm.METHODS.keys()


def test_help_does_not_import_jax():
    program = (
        "import sys\nfrom jaxmerge.cli import main\ntry:\n main(sys.argv[1:])\nfinally:\n print('jax' in sys.modules)"
    )
    for arguments in (["--help"], ["merge", "--help"], ["methods"]):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
        assert done.stdout.endswith("False\n")


def test_a_killed_merge_leaves_nothing(tmp_path):
    program = """
import os, signal, sys, time
from jaxmerge.cli import main
from jaxmerge.io import peft
signal.signal(signal.SIGINT, signal.default_int_handler)  # Processes in the background are born deaf to it.
save = peft.save
def slow(*arguments, **options):
    print("merged", flush=True)
    time.sleep(0.2)
    save(*arguments, **options)
peft.save = slow
sync = os.fsync
os.fsync = lambda handle: (sync(handle), time.sleep(20))
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", program, "merge", SMS, MOVIE, "-o", str(tmp_path / "out")]
    for number, wait in ((signal.SIGTERM, 0), (signal.SIGKILL, 1), (signal.SIGINT, 1)):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "merged\n"
        time.sleep(wait)
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
        assert process.returncode != 0
        assert "Traceback" not in err
        assert list(tmp_path.iterdir()) == []


INTERRUPTED_IMPORT = """
import builtins
real = builtins.__import__
def interrupted(name, *arguments, **options):
    if name == {name!r}:
        os.kill(os.getpid(), signal.SIGINT)
    return real(name, *arguments, **options)
builtins.__import__ = interrupted
"""
# As an extension does that is loaded.
INTERRUPTED_LOAD = """
from jaxmerge import io
def interrupted(*arguments, **options):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(20)
    except KeyboardInterrupt:
        raise ImportError("Encountered an error while initializing the extension.") from None
io.load = interrupted
"""


@pytest.mark.parametrize(
    "moment", [*(INTERRUPTED_IMPORT.format(name=name) for name in ("rich.box", "jax", "scipy")), INTERRUPTED_LOAD]
)
def test_an_interruption_is_a_line_whatever_comes_of_it(tmp_path, moment):
    program = f"""
import os, signal, sys, time
from jaxmerge.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # Processes in the background are born deaf to it.
{moment}
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", program, "merge", SMS, MOVIE, "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "jaxmerge: interrupted; nothing was written\n")
    assert list(tmp_path.iterdir()) == []


def test_a_seed_that_nothing_draws_from(tmp_path, capsys):
    told = "method linear draws nothing: the seed is not used"
    run("merge", SMS, MOVIE, "-o", tmp_path / "out", "--seed", 1, "--dry-run")
    assert told in capsys.readouterr().out
    run("merge", SMS, MOVIE, "-o", tmp_path / "out", "--seed", 1)
    assert told in capsys.readouterr().out
    assert "seed" not in (tmp_path / "out" / "recipe.yaml").read_text()
    assert "seed" not in json.loads((tmp_path / "out" / "jaxmerge.json").read_text())


def test_a_reader_that_goes_away_is_no_error_to_see():
    command = f"{sys.executable} -m jaxmerge inspect {SMS} {MOVIE} {NAMES} | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert "sms" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_outputs_that_know_few_characters(tmp_path, encoding):
    command = [sys.executable, "-m", "jaxmerge", "merge", SMS, MOVIE, "-o", str(tmp_path / "out")]
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True)
    assert done.returncode == 0
    assert done.stderr == b""
    assert b"exact; --rank 16 keeps" in done.stdout


def test_a_closed_or_full_output_does_not_lose_the_result(tmp_path):
    for i, redirect in enumerate((">&-", ">/dev/full")):
        out = tmp_path / str(i)
        done = subprocess.run(
            f"{sys.executable} -m jaxmerge merge {SMS} {MOVIE} -o {out} {redirect}",
            shell=True, capture_output=True, text=True,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        assert len(jm.load(out).modules) == 36


def test_names_that_look_like_markup(tmp_path, capsys):
    for name in ("[bold]x", "back\\[red]", "end\\"):
        shutil.copytree(SMS, tmp_path / name)
        run("inspect", tmp_path / name)
        assert name in capsys.readouterr().out.replace("\n", "")


def test_small_weights_do_not_vanish_in_float16(tmp_path, capsys):
    sources = [jm.load(SMS), jm.load(MOVIE)]
    run("merge", SMS, MOVIE, "-o", tmp_path / "out", "--weights", "1e-4", "1e-4")
    merged = jm.load(tmp_path / "out")
    for path, lora in merged.modules.items():
        expected = 1e-4 * sum(delta64(source.modules[path]) for source in sources)
        assert relative_error(delta64(lora), expected) < 2e-3
    capsys.readouterr()
    problems = refused(capsys, "merge", SMS, MOVIE, "-o", tmp_path / "none", "--weights", "1e-14", "1e-14")
    assert "is too small for float16" in problems[0]


def test_a_merge_that_is_nothing_says_so(tmp_path, capsys):
    run("merge", SMS, MOVIE, "-o", tmp_path / "out", "--weights", "0", "0")
    assert "the merge is 0 everywhere" in capsys.readouterr().out


def test_what_makes_it_again_is_recorded(tmp_path):
    run("merge", SMS, MOVIE, "-o", tmp_path / "out", "--dtype", "bfloat16", "--allow-different-bases", "--rank", "8")
    record = json.loads((tmp_path / "out" / "jaxmerge.json").read_text())
    assert record["dtype"] == "bfloat16"
    assert record["allow_different_bases"] is True
    assert record["rank"] == 8


def test_a_second_run_of_the_same_shapes_compiles_nothing(tmp_path, queries):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_ENABLE_COMPILATION_CACHE": "1"}
    program = (
        "import sys, jax, jax.monitoring\n"
        "seen = []\n"
        "jax.monitoring.register_event_listener(lambda event, **_: seen.append(event))\n"
        "from jaxmerge.cli import main\n"
        "main(sys.argv[1:])\n"
        "print(seen.count('/jax/compilation_cache/cache_hits'), seen.count('/jax/compilation_cache/cache_misses'))\n"
    )

    def merge(out, *options):
        command = [sys.executable, "-c", program, "merge", *queries, "-o", str(tmp_path / out), *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return [int(number) for number in done.stdout.splitlines()[-1].split()]

    options = ["--method", "ties", "--space", "factors", "--density"]
    merge("off", *options, "0.2", "--no-compilation-cache")
    assert not (tmp_path / "cache").exists()
    hits, misses = merge("first", *options, "0.2")
    assert misses > 0
    # Another density, other weights, another budget: the same programs.
    hits, misses = merge("second", *options, "0.7", "--weights", "1", "-0.5", "--memory", "1.5GB")
    assert (hits > 0, misses) == (True, 0)
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("in the way")
    merge("without", *options, "0.2")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--memory", "1kB"], "memory 1 kB is too little: module"),
        (["--devices", "64"], "64 devices are asked for"),
        (["--mesh", "a=2,b=64"], "128 devices are asked for"),
        (["--distributed", "nowhere"], "--distributed takes nothing, or HOST:PORT"),
    ],
)
def test_a_machine_that_is_not_there(tmp_path, capsys, arguments, words):
    problems = refused(capsys, "merge", SMS, MOVIE, "-o", tmp_path / "out", *arguments)
    assert words in problems[0]
    assert len(problems) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [["--memory", "much"], ["--devices", "0"], ["--mesh", "3"], ["--mesh", "a=1,a=2"]]
)
def test_machine_options_that_mean_nothing(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as end:
        main(["merge", SMS, MOVIE, "-o", str(tmp_path / "out"), *arguments])
    assert end.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_memory_changes_no_byte(tmp_path, queries):
    run("merge", *queries, "-o", tmp_path / "a", "--method", "dare_ties", "--density", "0.5", "--seed", "1")
    run("merge", *queries, "-o", tmp_path / "b", "--method", "dare_ties", "--density", "0.5", "--seed", "1",
        "--memory", "30MB")  # fmt: skip
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab")
    assert one == other
