"""``jaxmerge compare``, from the outside: what it prints, what it recommends and why, and how it ends."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

import jaxmerge as jm
from jaxmerge.cli import main
from jaxmerge.comparison import advice
from jaxmerge.comparison.advice import advise
from tests.cohort import Cohort

ADAPTERS = Path(__file__).parent / "adapters"
SMS, MOVIE, NAMES = (str(ADAPTERS / name) for name in ("sms", "movie", "names"))


def run(*arguments, code=0):
    assert main(["compare", *(str(argument) for argument in arguments)]) == code


def printed(capsys, *arguments):
    run(*arguments)
    return capsys.readouterr().out


def refused(capsys, *arguments):
    run(*arguments, code=1)
    told = capsys.readouterr()
    assert told.out == ""
    lines = told.err.splitlines()
    assert all(line.startswith("jaxmerge: ") for line in lines)
    return [line.removeprefix("jaxmerge: ") for line in lines]


def row(text, begin):
    """The cells of the line that begins so."""
    (line,) = [line for line in text.splitlines() if line.strip().startswith(begin)]
    return [cell.strip() for cell in line.split("   ") if cell.strip()]


def test_tables_of_real_adapters(capsys):
    text = printed(capsys, SMS, MOVIE, NAMES)
    found = jm.compare([jm.load(path) for path in (SMS, MOVIE, NAMES)])
    total = found.total
    assert row(text, f"2   {MOVIE}")[2:5] == ["0.3333", "36", "16"]
    assert float(row(text, f"2   {MOVIE}")[5]) == pytest.approx(total.norms[1], rel=1e-3)
    assert row(text, "weighted sum")[1:3] == ["36", "48"]
    pair = row(text, "1, 3")
    assert float(pair[1]) == pytest.approx(total.pairs[1].cosine, abs=6e-4)
    assert pair[2] == f"{100 * total.pairs[1].left_overlap:.1f} %"
    assert pair[5] == f"separate ({total.pairs[1].shared_a:.2f})"
    assert "by chance 75.0 %" in text
    # Six kinds of modules, those first in which some pair has the largest cosine.
    kinds = [line.split() for line in text.splitlines() if line.startswith("encoder.layer.*.")]
    assert len(kinds) == 6
    strongest = [abs(float(cells[1])) for cells in kinds]
    assert strongest == sorted(strongest, reverse=True)
    assert strongest[0] == pytest.approx(
        max(abs(pair.cosine) for record in found.modules.values() for pair in record.pairs), abs=6e-4
    )
    assert row(text, "16 ")[1] == f"{100 * total.energy_by_rank[15]:.1f} %"
    assert row(text, "48 ")[1:] == ["100 %", "exact"]
    assert "Start with --method linear: exact at rank 48." in text
    assert "arXiv:2511.21437" in text


def test_json_is_the_comparison_and_the_advice(capsys):
    told = json.loads(printed(capsys, SMS, MOVIE, "--weights", "1", "-0.5", "--json"))
    found = jm.compare([jm.load(SMS), jm.load(MOVIE)], [1, -0.5])
    assert told.pop("ok") is True
    assert [item["what"] for item in told.pop("advice")] == [item.what for item in advise(found)]
    assert told == found.to_json()


def test_two_runs_print_the_same(capsys):
    assert printed(capsys, SMS, MOVIE, "--json") == printed(capsys, SMS, MOVIE, "--json")


def test_mixed_adapters_say_which_have_what(capsys, mixed: Cohort):
    text = printed(capsys, *mixed.folders)
    assert row(text, "first")[1] == "1, 2, 3"
    assert row(text, "second")[1] == "1, 3, 4"
    # Nothing is in both of these.
    assert row(text, "2, 4")[1:] == ["0.000", "-", "-", "-", "-"]


def test_no_module_in_common(capsys, make_cohort):
    cohort = make_cohort([{"r": 2, "target_modules": [name]} for name in ("first", "second")])
    assert "No module is in more than one adapter" in printed(capsys, *cohort.folders)


def test_layers_of_a_flax_checkpoint(capsys, tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for name in ("a", "b"):
        tree = {
            "blocks": {"q": {"w_lora_a": rng.normal(size=(8, 3, 2)), "w_lora_b": rng.normal(size=(2, 3, 16))}},
            "head": {"w_lora_a": rng.normal(size=(8, 2)), "w_lora_b": rng.normal(size=(2, 4))},
        }
        paths.append(tmp_path / name)
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(paths[-1], tree)
    options = ("--alpha", "4", "--scan-axis", "1")
    told = json.loads(printed(capsys, *paths, *options, "--json"))
    assert told["modules"]["blocks.q"]["count"] == 3
    assert told["total"]["count"] == 4
    expected = jm.compare([jm.load(path, alpha=4, scan_axis=1) for path in paths])
    assert told["total"]["norms"] == list(expected.total.norms)
    assert "blocks.q" in printed(capsys, *paths, *options)
    run(*paths, "--scan-axis", "1", code=1)
    assert "alpha" in capsys.readouterr().err
    run(*paths, *options[2:], "--alpha", "1", "2", "3", code=1)
    assert "3 alphas for 2 adapters" in capsys.readouterr().err


def test_an_adapter_of_zeros(capsys, tmp_path):
    shutil.copytree(SMS, tmp_path / "zero")
    tensors = safetensors.numpy.load_file(tmp_path / "zero" / "adapter_model.safetensors")
    tensors = {key: x * ("lora_A" in key) for key, x in tensors.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "zero" / "adapter_model.safetensors")
    text = printed(capsys, SMS, tmp_path / "zero")
    assert f"{tmp_path / 'zero'} changes nothing." in text
    assert "nan" not in text.lower().replace("names", "")
    told = printed(capsys, SMS, tmp_path / "zero", "--json")
    assert "NaN" not in told
    assert "Infinity" not in told
    assert "the weighted sum is 0 everywhere" in printed(capsys, SMS, MOVIE, "--weights", "0", "0")


def test_everything_wrong_is_told_before_weights_are_read(capsys, tmp_path, mixed: Cohort):
    disagreeing = tmp_path / "disagreeing"
    shutil.copytree(mixed.folders[0], disagreeing)
    tensors = safetensors.numpy.load_file(disagreeing / "adapter_model.safetensors")
    tensors["base_model.model.first.lora_A.weight"] = np.zeros((4, 13), np.float32)
    safetensors.numpy.save_file(tensors, disagreeing / "adapter_model.safetensors")
    config = json.loads((disagreeing / "adapter_config.json").read_text())
    (disagreeing / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "mistral"}))
    llama = tmp_path / "llama"
    shutil.copytree(mixed.folders[1], llama)
    (llama / "adapter_config.json").write_text(
        json.dumps(json.loads((llama / "adapter_config.json").read_text()) | {"base_model_name_or_path": "llama"})
    )
    problems = refused(capsys, llama, disagreeing, tmp_path / "missing", "--weights", "1", "2")
    assert len(problems) == 4
    text = "\n".join(problems)
    assert "missing: there is no such folder" in text
    assert "2 weights for 3 adapters" in text
    assert f"module first has different shapes: 20×12 in {llama}; 20×13 in {disagreeing}" in text
    assert "different base models: llama" in text
    problems = refused(capsys, llama, disagreeing, "--allow-different-bases")
    assert len(problems) == 1
    run(llama, tmp_path / "missing", "--json", code=1)
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_nan_is_refused_with_the_module_named(capsys, tmp_path, equal_ranks: Cohort):
    poisoned = tmp_path / "poisoned"
    shutil.copytree(equal_ranks.folders[0], poisoned)
    tensors = safetensors.numpy.load_file(poisoned / "adapter_model.safetensors")
    tensors["base_model.model.second.lora_B.weight"][3, 1] = np.nan
    safetensors.numpy.save_file(tensors, poisoned / "adapter_model.safetensors")
    assert refused(capsys, poisoned, equal_ranks.folders[1]) == [f"{poisoned}: NaN or inf in second"]


@pytest.mark.parametrize(
    "arguments",
    [[], [SMS], [SMS, MOVIE, "--weights", "one"], [SMS, MOVIE, "--weights"], [SMS, MOVIE, "--rank", "3"]],
)
def test_wrong_usage_ends_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "usage: jaxmerge" in told
    assert len(arguments) != 1 or "at least two adapters" in told


def test_weights_that_are_no_numbers(capsys):
    assert refused(capsys, SMS, MOVIE, "--weights", "1", "nan") == ["weight nan is not a finite number"]


# What is recommended, from adapters made so that it should be.


def made(a, b, scale=1.0):
    return jm.Adapter({"layers.0.q": jm.LoRA(np.asarray(a, np.float32), np.asarray(b, np.float32), scale)})


def independent(n=2, rank=4, size=200):
    rng = np.random.default_rng(0)
    return [(rng.normal(size=(rank, size)), rng.normal(size=(size, rank))) for _ in range(n)]


def told(adapters, weights=None):
    return "\n".join(f"{item.what} {item.why} {item.source}" for item in advise(jm.compare(adapters, weights)))


def test_unrelated_adapters_are_summed():
    text = told([made(*pair) for pair in independent()])
    assert "Start with --method linear: exact at rank 8." in text
    assert "all but orthogonal" in text
    assert "50.0 % at most" in text
    for word in ("ties --density", "oppose", "norm_equalized", "same A", "twice"):
        assert word not in text
    assert text.splitlines()[-1].startswith("Then measure.")


def test_opposed_adapters_want_a_sign_consensus():
    (a, b), (c, d) = independent()
    text = told([made(a, b), made(a + 0.5 * c, -b + 0.5 * d)])
    assert "1 and 2 oppose each other: try --method ties" in text
    assert "of the energy cancels" in text
    assert "2511.21437" in text
    # Subtracted, they agree.
    agreeing = told([made(a, b), made(a + 0.5 * c, -b + 0.5 * d)], [1, -1])
    assert "oppose" not in agreeing
    assert "1 and 2 share adds up" in agreeing


def test_signs_that_differ_in_many_small_entries():
    # Columns of one size oppose each other, and a few large ones agree.
    rng = np.random.default_rng(0)
    b, a = rng.normal(size=(200, 1)), rng.normal(size=(1, 200))
    flip = np.where(np.arange(200) < 150, -1, 1)
    size = np.where(np.arange(200) < 150, 0.1, 1)
    text = told([made(a * size, b), made(a * size * flip, b)])
    assert "1 and 2 differ in sign: try --method ties" in text
    assert "Up to 7" in text


def test_norms_that_differ_are_evened_out():
    (a, b), (c, d) = independent()
    found = jm.compare([made(a, b), made(c, d, 5.0)], [0.5, 1.0])
    (item,) = [item for item in advise(found) if item.what.startswith("Norms differ")]
    even = [float(weight) for weight in item.what.split("--weights ")[1].rstrip(".").split()]
    assert even[1] * found.total.norms[1] == pytest.approx(2 * even[0] * found.total.norms[0], rel=0.01)
    assert ("--method norm_equalized" in item.what) == ("norm_equalized" in jm.METHODS)


def test_a_shared_start_is_told():
    (a, b), (_, d) = independent()
    text = told([made(a, b), made(a, d)])
    assert "1 and 2 have the same A: no solve-based method without a ridge." in text
    assert "Pathak" in text


def test_what_truncation_loses():
    adapters = [made(*pair) for pair in independent(4)]
    found = jm.compare(adapters)
    (item,) = [item for item in advise(found) if "if you can" in item.what]
    assert "rank 4 if you can: --rank 16 keeps 99 %" in item.what
    assert f"{100 * found.total.energy_by_rank[3]:.1f} %" in item.why
    # An adapter and what adds little to it.
    (a, b), (c, d) = independent()
    assert "if you can" not in told([made(a, b), made(0.01 * c, d)])


def test_crowded_outputs_and_twins():
    (a, b), (c, _) = independent()
    assert "1 and 2 share outputs (B)" in told([made(a, b), made(c, b)])
    assert "1 and 2: one adapter twice?" in told([made(a, b), made(a, b, 2.0)])


def test_advice_names_only_what_there_is(monkeypatch):
    (a, b), (c, d) = independent()
    groups = [made(a, b), made(c, b, 9.0), made(a, -b), made(c, d)], [made(a, b), made(c, d)]
    monkeypatch.setattr(advice, "SPACES", {"full": None})
    monkeypatch.setattr(advice, "METHODS", {"linear": None})
    plain = "".join(map(told, groups))
    monkeypatch.setattr(advice, "SPACES", {"full": None, "knots": None, "ctm": None})
    monkeypatch.setattr(advice, "METHODS", {"linear": None, "norm_equalized": None, "pico": None})
    full = "".join(map(told, groups))
    for option in ("--space knots", "--space ctm", "--method norm_equalized", "--method pico"):
        assert option not in plain
        assert option in full


def test_every_rule_says_where_it_is_from():
    (a, b), (c, d) = independent()
    adapters = [made(a, b), made(c, b, 9.0), made(a, -b), made(c, d), made(a, b)]
    for item in advise(jm.compare(adapters)):
        assert item.what.endswith((".", "?"))
        assert "arXiv:" in item.source or "Pathak" in item.source or "twice?" in item.what
        assert not math.isnan(len(item.why))
