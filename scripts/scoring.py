"""Scores of adapters on the tasks in tests/adapters: which examples a model gets right, and what that makes of a merge.

Legend of shapes: ``N`` examples in the order of the files, one task after another; ``K`` classes of all tasks.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

import jaxmerge as jm
from scripts import minilm

Array = jax.Array

ADAPTERS = Path(__file__).parent.parent / "tests" / "adapters"
TASKS = ("sms", "movie", "amazon", "wordnet", "names", "debsec")

# Sequences are padded to a multiple of so many tokens, and so many tokens go through the model at a time: few shapes to
# compile, little padding, and activations that stay in a core's cache.
_MULTIPLE, _AT_ONCE = 8, 1024


class Batch(NamedTuple):
    """Examples of about one length, in parts of one size.

    Attributes:
        ids: ``[parts, B, T]``; rows of zeros fill the last part.
        classes: ``[parts, B, K]``; whether a class is one of the example's task.
        label: ``[parts, B]``; among all K classes, -1 where there is no example.
    """

    ids: np.ndarray
    classes: np.ndarray
    label: np.ndarray


@functools.partial(jax.tree_util.register_dataclass, data_fields=("batches", "place", "heads"), meta_fields=())
@dataclass(frozen=True, eq=False)
class Examples:
    """What models are scored on.

    Attributes:
        batches: All examples, by length.
        place: ``[N]``; where each example lies in the batches, one after another.
        heads: ``[K, d]``; the embedding of each class, of length 1.
    """

    batches: Sequence[Batch]
    place: np.ndarray
    heads: np.ndarray


def read_examples(
    split: str, tasks: Sequence[str] = TASKS, most: int | None = None, folder: Path = ADAPTERS / "eval"
) -> tuple[Examples, dict[str, int]]:
    """The examples of some tasks.

    Args:
        split: ``"val"``, ``"test"`` or ``"calib"``.
        tasks: Their names.
        most: The first so many of each task; None for all.
        folder: Where the files are.

    Returns:
        The examples, and how many there are of each task.
    """
    heads = [np.load(folder / "heads.npz")[task] for task in tasks]
    ends = np.cumsum([len(own) for own in heads])
    every = np.arange(ends[-1])
    ids, classes, labels, sizes = [], [], [], {}
    for task, own, end in zip(tasks, heads, ends, strict=True):
        data = np.load(folder / f"{task}.npz")
        rows, start = data[f"{split}_ids"][:most].astype(np.int32), end - len(own)
        sizes[task] = len(rows)
        ids += [row[: np.count_nonzero(row)] for row in rows]
        classes.append(np.tile((every >= start) & (every < end), (len(rows), 1)))
        labels.append(start + data[f"{split}_labels"][:most].astype(np.int32))
    batches, place = in_batches(ids, np.concatenate(classes), np.concatenate(labels))
    together = np.concatenate(heads)
    return Examples(batches, place, together / np.linalg.norm(together, axis=1, keepdims=True)), sizes


def in_batches(
    ids: Sequence[np.ndarray],
    classes: np.ndarray,
    labels: np.ndarray,
    multiple: int = _MULTIPLE,
    at_once: int = _AT_ONCE,
) -> tuple[list[Batch], np.ndarray]:
    """Sorts examples by length, into few shapes with little padding.

    Args:
        ids: N sequences of token ids, of any lengths.
        classes: ``[N, K]``.
        labels: ``[N]``.
        multiple: Lengths are rounded up to one of it.
        at_once: How many tokens a part of a batch has, about.

    Returns:
        The batches, shortest first, and where each example lies in them, ``[N]``.
    """
    lengths = np.array([multiple * math.ceil(len(row) / multiple) for row in ids])
    batches, place, start = [], np.empty(len(ids), np.int32), 0
    for length in np.unique(lengths):
        members = np.flatnonzero(lengths == length)
        parts = math.ceil(len(members) * length / at_once)
        size = math.ceil(len(members) / parts)
        batch = Batch(
            np.zeros((parts * size, length), np.int32),
            np.zeros((parts * size, classes.shape[1]), bool),
            np.full(parts * size, -1, np.int32),
        )
        for row, member in enumerate(members.tolist()):
            batch.ids[row, : len(ids[member])] = ids[member]
        batch.classes[: len(members)] = classes[members]
        batch.label[: len(members)] = labels[members]
        place[members] = start + np.arange(len(members))
        start += parts * size
        batches.append(Batch(*(x.reshape(parts, size, *x.shape[1:]) for x in batch)))
    return batches, place


def is_correct(base: minilm.Bert, examples: Examples, adapter: jm.Adapter, dtype: DTypeLike = jnp.float32) -> Array:
    """Which examples the model gets right with an adapter: ``[N]`` bool; ``dtype`` as in `minilm.with_adapter`."""
    return correct_with(minilm.with_adapter(base, adapter, dtype), examples)


def correct_with(model: minilm.Bert, examples: Examples) -> Array:
    """Which examples the model gets right: ``[N]`` bool."""

    def part(batch: Batch) -> Array:
        logits = jnp.matmul(minilm.embed(model, jnp.asarray(batch.ids)), examples.heads.T)
        # The length of an embedding is the same for all classes.
        return jnp.argmax(jnp.where(batch.classes, logits, -jnp.inf), axis=1) == batch.label

    found = [jax.lax.map(part, jax.tree.map(jnp.asarray, batch)).ravel() for batch in examples.batches]
    return jnp.concatenate(found)[examples.place]


def by_task(correct: np.ndarray, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Which examples ``[..., N]`` are right -> task -> the part ``[...]`` that is."""
    ends = np.cumsum(list(sizes.values()))[:-1]
    parts = np.split(np.asarray(correct, np.float64), ends, axis=-1)
    return {task: part.mean(axis=-1) for task, part in zip(sizes, parts, strict=True)}


def normalised(accuracies: Mapping[str, Any], own: Mapping[str, float]) -> np.ndarray:
    """Accuracies ``[...]`` by those of the tasks' own adapters: ``[tasks, ...]``."""
    return np.stack([np.asarray(accuracies[task]) / own[task] for task in own])


def standard_error(accuracies: Mapping[str, float], own: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    """Of the mean normalised accuracy, for the examples that were drawn; own accuracies count as known."""
    variances = [accuracies[t] * (1 - accuracies[t]) / sizes[t] / own[t] ** 2 for t in own]
    return math.sqrt(sum(variances)) / len(own)


def paired_error(one: np.ndarray, other: np.ndarray, own: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    """The standard error of the difference of two mean normalised accuracies on the same examples ``[N]``."""
    ends = np.cumsum(list(sizes.values()))[:-1]
    differences = np.split(np.asarray(one, np.float64) - np.asarray(other, np.float64), ends)
    variances = [d.var() / len(d) / own[t] ** 2 for t, d in zip(own, differences, strict=True)]
    return math.sqrt(sum(variances)) / len(own)
