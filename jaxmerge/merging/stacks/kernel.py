"""``lift ∘ method ∘ project`` for one module without batch axes."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmerge import dense, spaces
from jaxmerge.base import Array
from jaxmerge.lowrank import balanced, truncated_svd
from jaxmerge.merging.stacks.binding import Numbers
from jaxmerge.merging.stacks.inputs import Bucket, Inputs
from jaxmerge.merging.stacks.program import Program
from jaxmerge.merging.staging import apply
from jaxmerge.methods.pruning import cut_counts, pruning_of
from jaxmerge.selection import Cut, search
from jaxmerge.sparsify import Density


class Pace(NamedTuple):
    """How much is worked on at a time: entries of a dense delta, and settings."""

    block: int
    settings: int


class _Setting(NamedTuple):
    """What a module is merged with: of S settings, or of one of them."""

    weights: Array
    keys: Any
    numbers: Numbers


def merge_unbatched(program: Program, bucket: Bucket, one: Inputs, numbers: Numbers, pace: Pace) -> spaces.Lifted:
    """``lift ∘ method ∘ project`` for one unbatched module, `Inputs` without the axis L, with S settings.

    What all settings share is done once.
    """
    factors = spaces.Factors([a.astype(bucket.wide) for a in one.a], [b.astype(bucket.wide) for b in one.b], one.scales)
    if one.cuts is not None:
        numbers = [_with_cut(bound, cut) for bound, cut in zip(numbers, one.cuts, strict=True)]
    settings = _Setting(one.weights, one.keys, numbers)
    # A result that is low-rank anyway goes through the stages whole.
    whole = program.form.capacity(bucket.ranks, *bucket.features)
    rank = whole if program.stages and not program.form.full_rank else bucket.rank

    def staged(lifted: spaces.Lifted, setting: _Setting) -> spaces.Lifted:
        return apply(program.stages, one.stages, lifted, factors, setting.weights, bucket.rank)

    if program.stacks(bucket.ranks, rank):
        return _each(lambda setting: staged(spaces.stack(factors, setting.weights), setting), settings, pace.settings)
    if program.in_blocks:
        return _merge_in_blocks(program, bucket, factors, settings, pace, staged)
    method, form = program.row.load(), program.form
    shapes: dict[str, Any] = {"ranks": tuple(form.task_ranks(bucket.ranks, bucket.rank))} if program.row.ranked else {}
    shapes |= {"rank": bucket.rank} if program.row.on_units else {}

    def project(setting: _Setting) -> tuple[Sequence[Array], Any]:
        return form.project(factors, bucket.rank, **program.space_options(setting.numbers[0]))

    # Once for all settings, unless they are settings of the space too.
    same = None if program.space_is_swept else project(jax.tree.map(lambda x: x[0], settings))

    def merge(setting: _Setting) -> spaces.Lifted:
        sets, frame = project(setting) if same is None else same
        merged = []
        weights = form.weigh(factors.scales, setting.weights)
        for i, (tasks, own, bound) in enumerate(zip(sets, weights, setting.numbers, strict=True)):
            key = {} if setting.keys is None else {"key": _set_keys(setting.keys, i)}
            if form.filled is not None:
                bound = _of_filled(bound, form.filled(frame))
            merged.append(method(tasks, own, **program.method_options(bound), **key, **shapes))
        return staged(form.lift(merged, frame, rank), setting)

    return _each(merge, settings, pace.settings)


def in_blocks_passes(program: Program, bucket: Bucket, factors: spaces.Factors, block: int) -> dense.DeltaPasses:
    """Passes over the dense deltas of a module, a block of rows at a time."""
    widest = max(bucket.ranks)
    axes, shards = (program.mesh.axis_names, program.mesh.size) if program.by_rows and program.mesh else ((), 1)
    a = jnp.stack([jnp.pad(a, ((0, widest - a.shape[0]), (0, 0))) for a in factors.a])
    b = jnp.stack([jnp.pad(b, ((0, 0), (0, widest - b.shape[1]))) for b in factors.b])
    return dense.delta_passes(a, b, factors.scales, dense.cut_rows(bucket.features, block, axes, shards))


def _merge_in_blocks(
    program: Program,
    bucket: Bucket,
    factors: spaces.Factors,
    settings: _Setting,
    pace: Pace,
    staged: Callable[[spaces.Lifted, _Setting], spaces.Lifted],
) -> spaces.Lifted:
    """The same where the tasks are dense deltas and the method prunes and combines, without forming them whole."""
    row, n = program.row, len(bucket.ranks)
    passes = in_blocks_passes(program, bucket, factors, pace.block)
    (bound,) = settings.numbers
    found = "density" in bound and bound["density"].cut is not None
    if not found and (counts := cut_counts(row.pruning, bound, passes.size)):
        # One search for all settings: their thresholds are compared with each block while it is there.
        count = jnp.broadcast_to(jnp.concatenate(counts), (len(counts) * settings.weights.shape[0], n))
        cuts = search(passes, count, passes.guess(count))
        cuts = jax.tree.map(lambda x: x.reshape(len(counts), -1, n).swapaxes(0, 1), cuts)
        settings = settings._replace(numbers=[_with_cut(bound, cuts)])

    def merge(setting: _Setting) -> spaces.Lifted:
        options = program.method_options(setting.numbers[0])
        of_pruning = {name: options.pop(name) for name in row.per_adapter}
        keys = None if setting.keys is None else _set_keys(setting.keys, 0)
        pruning = pruning_of(row.pruning, keys, **of_pruning)
        combine = functools.partial(row.load_combine(), **options)
        u, s, vt, energy = truncated_svd(dense.merge_entries(passes, setting.weights, pruning, combine), bucket.rank)
        return staged(spaces.Lifted(*balanced(u[: bucket.features[0]], s, vt), energy), setting)

    return _each(merge, settings, pace.settings)


def _each(merge: Callable[[_Setting], spaces.Lifted], settings: _Setting, at_once: int) -> spaces.Lifted:
    """Merges with some settings at a time, in turn; one alone needs no loop."""
    if settings.weights.shape[0] > 1:
        return jax.lax.map(merge, settings, batch_size=at_once if at_once > 1 else None)
    return jax.tree.map(lambda x: jnp.asarray(x)[None], merge(jax.tree.map(lambda x: x[0], settings)))


def _of_filled(bound: Mapping[str, Any], filled: tuple[Array, ...]) -> Mapping[str, Any]:
    """Densities of the entries in so many rows and columns, from `bind_numbers`' table of those in any number."""

    def count(value: Any) -> Any:
        return dataclasses.replace(value, count=value.count[..., *filled]) if isinstance(value, Density) else value

    return {name: count(value) for name, value in bound.items()}


def _with_cut(bound: Mapping[str, Any], cut: Cut) -> Mapping[str, Any]:
    return {**bound, "density": dataclasses.replace(bound["density"], cut=cut)}


def _set_keys(keys: Array, i: int) -> Array:
    """The tasks' keys for one of the task sets that a space makes of a module."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, i)
