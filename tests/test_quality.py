"""The parts of the quality experiment that can be wrong without anyone seeing it in the table."""

import argparse
import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.comparison import advice
from scripts import minilm, quality, quality_tables, scoring, tuning
from tests.test_minilm import small

CLASSES = 5


def examples_of(lengths, seed=0):
    """Token ids of two tasks, of two and three classes; rows of one example each."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(1, 50, length).astype(np.int32) for length in lengths]
    first = np.arange(len(ids)) < len(ids) // 2
    classes = np.where(first[:, None], np.arange(CLASSES) < 2, np.arange(CLASSES) >= 2)
    labels = np.where(first, rng.integers(0, 2, len(ids)), rng.integers(2, 5, len(ids))).astype(np.int32)
    return ids, classes, labels


def test_batches_hold_every_example_once_in_few_shapes():
    lengths = np.random.default_rng(1).integers(1, 17, 101)
    ids, classes, labels = examples_of(lengths)
    batches, place = scoring.in_batches(ids, classes, labels, multiple=4, at_once=64)
    assert [batch.ids.shape[-1] for batch in batches] == [4, 8, 12, 16]
    rows = [row for batch in batches for row in batch.ids.reshape(-1, batch.ids.shape[-1])]
    own_classes = np.concatenate([batch.classes.reshape(-1, CLASSES) for batch in batches])
    own_labels = np.concatenate([batch.label.ravel() for batch in batches])
    assert len(set(place.tolist())) == len(ids)
    for i, wanted in enumerate(ids):
        row = rows[place[i]]
        assert len(row) - len(wanted) < 4
        np.testing.assert_array_equal(row[: len(wanted)], wanted)
        assert not row[len(wanted) :].any()
    np.testing.assert_array_equal(own_classes[place], classes)
    np.testing.assert_array_equal(own_labels[place], labels)
    empty = np.setdiff1d(np.arange(len(rows)), place)
    assert (own_labels[empty] == -1).all()
    for batch in batches:
        assert batch.ids[0].size <= 64 + batch.ids.shape[-1]
        assert (batch.label == -1).sum() < len(batch.ids)


def test_an_example_is_right_by_the_nearest_head_of_its_task():
    _, base, adapter = small()
    ids, classes, labels = examples_of([3, 9, 5, 1, 2, 4, 11, 7])
    heads = np.random.default_rng(2).normal(size=(CLASSES, 24)).astype(np.float32)
    heads /= np.linalg.norm(heads, axis=1, keepdims=True)
    batches, place = scoring.in_batches(ids, classes, labels, multiple=4, at_once=16)
    found = scoring.is_correct(base, scoring.Examples(batches, place, heads), adapter)
    model = minilm.with_adapter(base, adapter)
    wanted = []
    for row, allowed, label in zip(ids, classes, labels, strict=True):
        state = np.asarray(minilm.hidden_states(model, jnp.asarray(row[None]))[0], np.float64).mean(axis=0)
        cosines = heads @ state / np.linalg.norm(state)
        wanted.append(max(np.flatnonzero(allowed), key=lambda k, cosines=cosines: cosines[k]) == label)
    np.testing.assert_array_equal(found, wanted)
    assert 0 < sum(wanted) < len(wanted)


def test_examples_come_as_they_are_in_the_files():
    examples, sizes = scoring.read_examples("test", ["names", "debsec"])
    labels = np.concatenate([batch.label.ravel() for batch in examples.batches])[examples.place]
    data = [np.load(scoring.ADAPTERS / "eval" / f"{task}.npz")["test_labels"] for task in ("names", "debsec")]
    assert sizes == {"names": 800, "debsec": 800}
    np.testing.assert_array_equal(labels, np.concatenate([data[0], data[1] + 2]))
    assert examples.heads.shape == (22, 384)
    _, few = scoring.read_examples("val", most=7)
    assert few == dict.fromkeys(scoring.TASKS, 7)


def test_accuracies_their_means_and_errors():
    sizes, own = {"one": 4, "two": 2}, {"one": 0.5, "two": 0.8}
    right = np.array([[1, 1, 0, 0, 1, 1], [1, 0, 0, 0, 0, 1]], bool)
    accuracies = scoring.by_task(right, sizes)
    np.testing.assert_allclose(accuracies["one"], [0.5, 0.25])
    np.testing.assert_allclose(accuracies["two"], [1, 0.5])
    np.testing.assert_allclose(scoring.normalised(accuracies, own), [[1, 0.5], [1.25, 0.625]])
    split = tuning.Split(None, sizes, own)
    np.testing.assert_allclose(tuning.mean_scores(split, right), [112.5, 56.25])
    one = {task: float(x[1]) for task, x in accuracies.items()}
    variance = (0.25 * 0.75 / 4 / 0.5**2 + 0.5 * 0.5 / 2 / 0.8**2) / 2**2
    assert scoring.standard_error(one, own, sizes) == pytest.approx(variance**0.5)
    # Differences are 0, 1, 0, 0 and 1, 0.
    variance = (3 / 16 / 4 / 0.5**2 + 1 / 4 / 2 / 0.8**2) / 2**2
    assert scoring.paired_error(right[0], right[1], own, sizes) == pytest.approx(variance**0.5)
    assert scoring.paired_error(right[0], right[0], own, sizes) == 0


@pytest.mark.parametrize("peak", [-11.2, -5, -2, 0.4, 1, 3, 4, 9.3])
def test_the_scale_climbs_to_a_peak_wherever_it_is(peak):
    asked = []

    def score(steps):
        asked.extend(steps)
        return {k: -abs(k - peak) for k in steps}

    known = {k: -abs(k - peak) for k in tuning.COARSE}
    scores = tuning.climb(known, score)
    best = tuning.best_of(scores)
    assert abs(best - peak) <= 0.5
    assert {best - 1, best + 1} <= set(scores)
    assert len(asked) == len(set(asked)) == len(scores) - len(known)


def test_the_scale_stops_at_its_limits():
    flat = dict.fromkeys(tuning.COARSE, 0.0)
    assert max(tuning.climb(flat | {4: 1.0}, lambda steps: {k: float(k) for k in steps})) == tuning.LIMITS[1]
    assert min(tuning.climb(flat | {-2: 2.0}, lambda steps: {k: -float(k) for k in steps})) == tuning.LIMITS[0]


def an_experiment():
    """Two small adapters, and examples that some of their merges get right."""
    _, base, one = small()
    other = dataclasses.replace(
        one, modules={path: dataclasses.replace(lora, b=lora.b[::-1]) for path, lora in one.modules.items()}
    )
    ids, classes, labels = examples_of(np.random.default_rng(3).integers(1, 12, 60), seed=3)
    heads = np.random.default_rng(2).normal(size=(CLASSES, 24)).astype(np.float32)
    batches, place = scoring.in_batches(ids, classes, labels, multiple=12)
    split = tuning.Split(scoring.Examples(batches, place, heads), {"one": 30, "two": 30}, {"one": 0.6, "two": 0.4})
    return tuning.Experiment(base, [one, other], split, split)


def scaled_by(adapter, scale):
    modules = {path: dataclasses.replace(lora, b=lora.b * np.float32(scale)) for path, lora in adapter.modules.items()}
    return dataclasses.replace(adapter, modules=modules)


def test_a_cell_is_scored_at_the_best_of_what_was_tried():
    experiment = an_experiment()
    record = tuning.tuned(experiment, tuning.Cell("ties", "full"))
    assert record["rank"] == 24
    merges = {d: jm.merge(experiment.adapters, method="ties", density=d, rank=24) for d in tuning.DENSITIES}
    tried = {}
    for density, merged in merges.items():
        assert {2 ** (k / 2) for k in tuning.COARSE} <= set(record["tried"][str(density)])
        for scale, found in record["tried"][str(density)].items():
            right = np.asarray(tuning.is_correct(experiment.base, experiment.val.examples, scaled_by(merged, scale)))
            mean = 100 * (right[:30].mean() / 0.6 + right[30:].mean() / 0.4) / 2
            # Two ways to the same merge may round one answer differently.
            assert found == pytest.approx(mean, abs=100 / 30 / 0.4)
            tried[density, scale] = found
    assert record["val"] == max(tried.values()) == tried[record["density"], record["scale"]]
    best = scaled_by(merges[record["density"]], record["scale"])
    right = np.asarray(tuning.is_correct(experiment.base, experiment.test.examples, best))
    told = np.unpackbits(np.frombuffer(bytes.fromhex(record["right"]), np.uint8), count=60).astype(bool)
    assert (told != right).sum() <= 1
    assert record["accuracy"]["one"] == pytest.approx(100 * told[:30].mean())
    assert record["mean"] == pytest.approx(100 * (told[:30].mean() / 0.6 + told[30:].mean() / 0.4) / 2)
    assert record["worst"] == pytest.approx(100 * min(told[:30].mean() / 0.6, told[30:].mean() / 0.4))


def test_a_method_without_a_density_is_tried_as_it_is():
    record = tuning.tuned(an_experiment(), tuning.Cell("iso_c", "full", rank=3))
    assert record["density"] is None
    assert list(record["tried"]) == ["None"]
    assert record["rank"] == 3


def test_adapters_alone_and_the_base_model():
    experiment = an_experiment()
    examples, sizes = experiment.test.examples, experiment.test.sizes
    found = tuning.alone(experiment.base, experiment.adapters, examples, sizes)
    for i, task in enumerate(sizes):
        right = np.asarray(tuning.is_correct(experiment.base, examples, experiment.adapters[i]))
        assert found["own"][task] == pytest.approx(scoring.by_task(right, sizes)[task])
        zero = jm.merge(experiment.adapters, [0.0, 0.0])
        right = np.asarray(tuning.is_correct(experiment.base, examples, zero))
        assert found["base"][task] == pytest.approx(scoring.by_task(right, sizes)[task])


def test_every_method_for_any_number_of_adapters_is_a_cell_in_each_space_that_differs():
    names = {cell.name for cell in quality.ways(list(jm.METHODS), list(jm.SPACES))}
    assert {"linear/full", "linear/factors", "linear/ctm", "ties/full", "ties/knots", "ties/core", "tsv/ctm"} <= names
    # What commutes with rotations is the same in these.
    assert not names & {"linear/knots", "linear/core", "tsv/core", "slerp/full"}
    assert {cell.split("/")[0] for cell in names} == {name for name, row in jm.METHODS.items() if row.most is None}
    some = quality.ways(["ties"], ["core"])
    assert [cell.name for cell in some] == ["ties/core"]


def test_each_thing_to_do_is_named_once_and_makes_what_its_name_says():
    options = argparse.Namespace(
        parts=["grid", "untuned", "rank", "stages"], methods=["ties", "linear"], spaces=["full"], rank=16, peft=False
    )
    assert list(quality.todo(options)) == [
        ("grid", "linear/full"), ("grid", "ties/full"),
        ("untuned", "linear"), ("untuned", "ties 0.2"), ("untuned", "ties 0.5"), ("untuned", "ties 0.8"),
        ("untuned", "linear+norm_restore"),
        ("rank", "linear/full@16"), ("rank", "ties/full@16"), ("rank", "ties/knots@16"), ("rank", "ties/core@16"),
        *(("stages", f"{method}/full+{stage}") for method in ("linear", "ties") for stage in quality.STAGES),
    ]  # fmt: skip


SIZES, OWN = {"one": 40, "two": 40}, {"one": 0.5, "two": 0.8}


def record_of(method, space, right, **more):
    accuracies = {task: float(part) for task, part in scoring.by_task(right, SIZES).items()}
    each = 100 * scoring.normalised(accuracies, OWN)
    return {
        "method": method,
        "space": space,
        "rank": 8,
        "stages": [],
        "weight": 0.5,
        "scale": 2.0,
        "density": None,
        "accuracy": {task: 100 * x for task, x in accuracies.items()},
        "mean": each.mean(),
        "worst": each.min(),
        "error": 0.7,
        "right": np.packbits(right).tobytes().hex(),
        **more,
    }


def results():
    best, near, far = (np.zeros(80, bool) for _ in range(3))
    best[:20] = best[40:72] = True
    near[1:20] = near[40:72] = True
    far[:10] = far[40:50] = True
    return {
        "alone": {"test": {"own": OWN, "base": {"one": 0.25, "two": 0.4}}},
        "grid": {
            "linear/full": record_of("linear", "full", far),
            "ties/full": record_of("ties", "full", near, density=0.2, weight=1.0),
            "ties/core": record_of("ties", "core", best, density=0.5, weight=1.0),
        },
        "untuned": {
            name: {"mean": mean, "worst": mean / 2}
            for name, mean in (("linear", 40.0), ("linear+norm_restore", 45.0), ("ties 0.2", 50.0), ("ties 0.5", 60.0))
        },
        "rank": {"ties/full@4": record_of("ties", "full", far, rank=4)},
        "stages": {"linear/full+calibrate": record_of("linear", "full", near, stages=["calibrate"])},
        "peft": {"svd": {**record_of("", "", far), "weight": 1.0}},
    }


def test_the_tables_tell_what_was_found():
    found = quality_tables.tables(results(), SIZES)
    assert found["quality"].splitlines() == [
        "| method | full | core | untuned |",
        "| --- | --- | --- | --- |",
        "| `ties` | **97.5** / 95 | **100.0** / 100 | 60.0 / 30 |",
        "| `linear` | 40.6 / 31 |  | 40.0 / 20 |",
    ]
    assert found["quality by task"].splitlines() == [
        "| merge | λ | density | mean | worst | one | two |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| base model |  |  | 50.0 | 50.0 | 25.0 | 40.0 |",
        "| `ties` in `core` | 2 | 0.5 | 100.0 ± 0.7 | 100.0 | 50.0 | 80.0 |",
        "| `ties` in `full` | 2 | 0.2 | 97.5 ± 0.7 | 95.0 | 47.5 | 80.0 |",
        "| `linear` in `full` | 1 |  | 40.6 ± 0.7 | 31.2 | 25.0 | 25.0 |",
        "| PEFT `svd` | 2 |  | 40.6 ± 0.7 | 31.2 | 25.0 | 25.0 |",
    ]
    assert found["quality by rank"].splitlines()[2:] == ["| `ties` in `full` | rank 8 to 4 | 97.5 / 95 | 40.6 / 31 |"]
    assert found["quality by stages"].splitlines()[2:] == ["| `linear` in `full` | calibrate | 40.6 / 31 | 97.5 / 95 |"]


def test_tables_go_between_their_marks_and_nothing_else_changes(tmp_path):
    readme, found = tmp_path / "README.md", quality_tables.tables(results(), SIZES)
    text = "before\n" + "".join(f"<!-- {mark} -->\nold\n<!-- /{mark} -->\nbetween\n" for mark in found)
    readme.write_text(text)
    quality_tables.write_readme(readme, results(), SIZES)
    for mark, table in found.items():
        text = text.replace(f"<!-- {mark} -->\nold\n", f"<!-- {mark} -->\n{table}\n")
    assert readme.read_text() == text
    readme.write_text("nothing\n")
    with pytest.raises(SystemExit, match="no marks"):
        quality_tables.write_readme(readme, results(), SIZES)
    assert readme.read_text() == "nothing\n"


def test_the_numbers_in_what_is_advised_are_those_that_were_measured():
    found = json.loads((quality.ROOT / "notebooks" / "quality.json").read_text())
    plain = found["untuned"]
    assert (round(plain["linear"]["mean"], 1), round(plain["linear+norm_restore"]["mean"], 1)) == (
        advice.MEAN, advice.RESTORED
    )  # fmt: skip
    assert round(plain["ties 0.2"]["mean"], 1) == advice.TIES
    for method, mean in advice.TUNED.items():
        assert round(found["grid"][f"{method}/full"]["mean"], 1) == mean
    assert round(found["grid"]["iso_c/ctm"]["mean"], 1) == advice.COMPRESSED
    assert found["grid"]["iso_c/ctm"]["rank"] == 16
    for method, mean in advice.CUT.items():
        assert round(found["rank"][f"{method}/full@16"]["mean"], 1) == mean
