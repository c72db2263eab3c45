"""``lift ∘ method ∘ project`` on stacks of modules of equal shape: arrays in, arrays out, one compile each.

Kernels are written for one unbatched module and mapped here over modules and their batch axes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.backend import backends
from jax.sharding import Mesh

from jaxmerge import dense, spaces
from jaxmerge.base import Array, on_host
from jaxmerge.catalog import METHODS, SPACES, Hyperparameter, Method
from jaxmerge.lowrank import balanced, truncated_svd
from jaxmerge.merging.staging import Stage, apply
from jaxmerge.methods.pruning import cut_counts, pruning_of
from jaxmerge.selection import Cut, cut_on_host, search
from jaxmerge.sharding import on_all_devices, over_modules
from jaxmerge.sparsify import Density, bind_density, round_to


@dataclass(frozen=True)
class Program:
    """What is the same for all modules of a merge; static under jit.

    Attributes:
        method: A name in `METHODS`.
        space: A name in `SPACES`.
        choices: The hyperparameters that are not numbers.
        stages: What modules go through once they are merged.
        mesh: What modules are spread over.
        by_rows: Whether the rows of each module's delta are spread over it instead.
        at_once: How many modules an accelerator works on at the same time.
        settings_at_once: With how many settings it merges each of them at the same time.
        sweeps: Whether results keep the axis of settings, of which there is one otherwise.
    """

    method: str
    space: str
    choices: tuple[tuple[str, Any], ...] = ()
    stages: tuple[Stage, ...] = ()
    mesh: Mesh | None = None
    by_rows: bool = False
    at_once: int = 1
    settings_at_once: int = 1
    sweeps: bool = False

    @property
    def in_blocks(self) -> bool:
        """Whether dense deltas are merged a few rows at a time."""
        return self.form.dense and bool(self.row.combine)

    @property
    def row(self) -> Method:
        """The method's row."""
        return METHODS[self.method]

    @property
    def hyperparameters(self) -> tuple[Hyperparameter, ...]:
        """Of the method, and of the space."""
        return (*self.row.hyperparameters, *self._space_hyperparameters)

    @property
    def space_is_swept(self) -> bool:
        """Whether settings differ in what the space takes."""
        return self.sweeps and any(h.traceable for h in self._space_hyperparameters)

    @property
    def _space_hyperparameters(self) -> tuple[Hyperparameter, ...]:
        return SPACES[self.space].taken(self.row)

    def method_options(self, numbers: Mapping[str, Any]) -> dict[str, Any]:
        """The method's arguments, from all choices and numbers."""
        return self._own(self.row.hyperparameters, numbers)

    def space_options(self, numbers: Mapping[str, Any]) -> dict[str, Any]:
        """The space's arguments, from all choices and numbers."""
        return self._own(self._space_hyperparameters, numbers)

    def _own(self, hyperparameters: Sequence[Hyperparameter], numbers: Mapping[str, Any]) -> dict[str, Any]:
        given = {**dict(self.choices), **numbers}
        return {h.name: given[h.name] for h in hyperparameters}

    @property
    def form(self) -> spaces.Space:
        """The space, in the form that the method works in."""
        return SPACES[self.space].load(self.row)

    def stacks(self, ranks: Sequence[int], rank: int) -> bool:
        """Whether the result is the sources' factors side by side."""
        # In any space in which a sum is exact: those that have a form for what commutes with rotations.
        return self.row.linear and bool(SPACES[self.space].rotated) and rank == sum(ranks)

    def need(self, bucket: "Bucket") -> int:
        """The bytes that one module of a bucket takes while it is merged, about."""
        out, in_ = bucket.features
        # In blocks, the merged matrix, its factors and their Krylov basis.
        dense = out * in_ + 16 * (bucket.rank + 16) * (out + in_)
        numbers = dense if self.in_blocks else self.form.numbers(bucket.ranks, out, in_)
        width = 8 if bucket.wide == "float64" else 4
        return width * (numbers + sum(bucket.ranks) * (out + in_))


class Bucket(NamedTuple):
    """What modules must share to be stacked; static under jit.

    Attributes:
        features: ``(out, in)``.
        ranks: Of the n adapters that have the module.
        batch: The module's own leading axes.
        dtypes: Of those adapters' factors, a and b by turns.
        rank: Of the result.
        dtype: Of the result.
    """

    features: tuple[int, int]
    ranks: tuple[int, ...]
    batch: tuple[int, ...]
    dtypes: tuple[str, ...]
    rank: int
    dtype: str

    @property
    def wide(self) -> str:
        """The dtype of the arithmetic: float32, or float64 where a source is."""
        return "float64" if "float64" in (*self.dtypes, self.dtype) else "float32"


class Draws(NamedTuple):
    """What modules draw from.

    Attributes:
        key: ``[S]``, of each merge.
        modules: ``[L]`` uint32, a stable hash of each module's path.
        tasks: ``[n]`` uint32, the adapters' positions.
    """

    key: Array
    modules: Array
    tasks: Array

    def keys(self) -> Array:
        """``[L, S, n]`` keys, that hang on nothing else."""
        fold = jax.random.fold_in

        def module(hashed: Array) -> Array:
            return jax.vmap(lambda key: jax.vmap(lambda i: fold(fold(key, hashed), i))(self.tasks))(self.key)

        return jax.vmap(module)(self.modules)


class Inputs(NamedTuple):
    """The arrays of L modules of one bucket in n adapters, and S settings to merge them with.

    Attributes:
        a: n of ``[L, *batch, rᵢ, in]``.
        b: n of ``[L, *batch, out, rᵢ]``.
        scales: ``[L, n]``.
        weights: ``[L, S, n]``.
        keys: ``[L, S, n]`` keys, or what they are folded from; None for a method that draws nothing.
        cuts: Of each task set ``[L * batch, S, n]``, where the largest entries of each task end; None if that is to be
            found.
        stages: Of each stage, name -> ``[L]``.
    """

    a: tuple[Any, ...]
    b: tuple[Any, ...]
    scales: Array
    weights: Array
    keys: Any = None
    cuts: tuple[Cut, ...] | None = None
    stages: tuple[Mapping[str, Array], ...] = ()


@functools.cache
def set_sizes(
    space: str, method: str, features: tuple[int, int], ranks: tuple[int, ...], rank: int
) -> tuple[int | np.ndarray, ...]:
    """How many entries each task has, in each task set that a space makes of a module.

    Where it hangs on values how many rows, or rows and columns, hold anything: for any number of them, ``[p + 1]`` or
    ``[p + 1, q + 1]``.
    """
    form = SPACES[space].load(METHODS[method])
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    out, in_ = features

    def project(a: list[Array], b: list[Array], scales: Array) -> Sequence[Array]:
        return form.project(spaces.Factors(a, b, scales), rank)[0]

    sets = jax.eval_shape(
        project, [shape((r, in_)) for r in ranks], [shape((out, r)) for r in ranks], shape((len(ranks),))
    )
    if form.filled is None:
        return tuple(math.prod(tasks.shape[1:]) for tasks in sets)
    held = form.filled_axes
    return tuple(
        functools.reduce(np.multiply.outer, [np.arange(size + 1) for size in tasks.shape[1 : 1 + held]])
        * math.prod(tasks.shape[1 + held :])
        for tasks in sets
    )


# The numeric hyperparameters of S settings, bound to the size of each task set: name -> ``[S]``, or ``[S, n]`` where
# every adapter has its own.
Numbers = Sequence[Mapping[str, Any]]


def bind_numbers(program: Program, bucket: Bucket, settings: Sequence[Mapping[str, Any]]) -> Numbers:
    """Binds the numeric hyperparameters of each setting to the size of each task set that the space makes."""
    n = len(bucket.ranks)

    def along_settings(*leaves: Any) -> Any:
        return np.stack(leaves) if all(map(on_host, leaves)) else jnp.stack(leaves)

    densities = {h.name for h in program.hyperparameters if h.kind == "density"}
    several = {name for numbers in settings for name, value in numbers.items() if np.ndim(value)}

    def bind_one(name: str, value: Any, size: int | np.ndarray) -> Any:
        if name in several:
            value = jnp.broadcast_to(value, n) if isinstance(value, jax.Array) else np.broadcast_to(value, n)
        if name in densities:
            return bind_density(value, size, tasks=n)
        return value.astype(bucket.wide) if isinstance(value, jax.Array) else np.asarray(value, bucket.wide)

    def bind(size: int | np.ndarray) -> Mapping[str, Any]:
        bound = [{name: bind_one(name, value, size) for name, value in numbers.items()} for numbers in settings]
        return jax.tree.map(along_settings, *bound)

    sizes = set_sizes(program.space, program.method, bucket.features, bucket.ranks, bucket.rank)
    return [bind(size) for size in sizes]


def find_cuts(program: Program, bucket: Bucket, inputs: Inputs, numbers: Numbers) -> tuple[Cut, ...] | None:
    """The cuts of tasks that lie in the host's memory as they are, where NumPy finds them sooner than a program."""
    if not (program.form.as_stored and program.row.pruning == "magnitude"):
        return None
    counts = [one["density"].count for one in numbers]
    if not all(map(on_host, (*counts, *inputs.a, *inputs.b))):
        return None

    def cuts_of(arrays: Sequence[Any], count: Any) -> Cut:
        tasks = [np.asarray(x).reshape(-1, math.prod(x.shape[-2:])) for x in arrays]
        modules, n = tasks[0].shape[0], len(tasks)
        rows = [task[i].astype(bucket.wide, copy=False) for i in range(modules) for task in tasks]
        of_tasks = np.asarray(count).reshape(len(count), -1).T
        cut = cut_on_host(rows, np.broadcast_to(of_tasks, (modules, n, len(count))).reshape(-1, len(count)))
        return jax.tree.map(lambda x: x.reshape(modules, n, -1).swapaxes(1, 2), cut)

    return tuple(map(cuts_of, (inputs.a, inputs.b), counts))


@functools.partial(jax.jit, static_argnames=("program", "bucket"))
def merge_module(program: Program, bucket: Bucket, inputs: Inputs, numbers: Numbers) -> spaces.Lifted:
    """Merges one module, as `merge_stack` merges L: without the axis L of the factors."""
    expanded = inputs._replace(
        a=tuple(a[None] for a in inputs.a),
        b=tuple(b[None] for b in inputs.b),
    )
    axis = 1 if program.sweeps else 0
    return jax.tree.map(lambda x: jnp.squeeze(x, axis), _merge_stack(program, bucket, expanded, numbers))


@functools.partial(jax.jit, static_argnames=("program", "bucket"))
def merge_stack(program: Program, bucket: Bucket, inputs: Inputs, numbers: Numbers) -> spaces.Lifted:
    """Merges L modules of one bucket with S settings.

    Args:
        program: The method and its space.
        bucket: The modules' shape.
        inputs: Their factors in n adapters.
        numbers: From `bind_numbers`.

    Returns:
        ``[S, L, *batch, rank, in]``, ``[S, L, *batch, out, rank]``, and energies ``[S, L]``; without the axis S if the
        program does not sweep.
    """
    return _merge_stack(program, bucket, inputs, numbers)


def _merge_stack(program: Program, bucket: Bucket, inputs: Inputs, numbers: Numbers) -> spaces.Lifted:
    def merge_one(one: Inputs, pace: _Pace) -> spaces.Lifted:
        lifted = _merge_module(program, bucket, one, numbers, pace)
        dtype = jnp.dtype(bucket.dtype)
        return lifted._replace(a=round_to(lifted.a, dtype), b=round_to(lifted.b, dtype))

    def merge_each(stack: Inputs) -> spaces.Lifted:
        # On a CPU one module after another: two batched QRs and an SVD in one program never return on
        # jaxlib 0.10.2 with two cores, and the loop costs nothing. Elsewhere, as many at once as fit.
        on_cpu = functools.partial(jax.lax.map, functools.partial(merge_one, pace=_Pace(dense.CPU_BLOCK, 1)))
        if set(backends()) == {"cpu"}:
            return on_cpu(stack)
        elsewhere = functools.partial(merge_one, pace=_Pace(dense.DEFAULT_BLOCK, program.settings_at_once))
        return jax.lax.platform_dependent(
            stack,
            cpu=on_cpu,
            default=functools.partial(jax.lax.map, elsewhere, batch_size=program.at_once),
        )

    if isinstance(inputs.keys, Draws):
        inputs = inputs._replace(keys=inputs.keys.keys())
    spread = on_all_devices if program.by_rows else over_modules
    lifted = spread(merge_each, program.mesh)(flatten_batch(inputs, bucket.batch))
    layers = math.prod(bucket.batch)

    def unflatten(x: Array) -> Array:
        x = jnp.moveaxis(x.reshape(-1, *bucket.batch, *x.shape[1:]), 1 + len(bucket.batch), 0)
        return x if program.sweeps else jnp.squeeze(x, 0)

    energy = jax.tree.map(lambda x: jnp.sum(x.reshape(-1, layers, x.shape[1]), axis=1).T, lifted.energy)
    energy = energy if program.sweeps else jax.tree.map(lambda x: jnp.squeeze(x, 0), energy)
    return spaces.Lifted(unflatten(lifted.a), unflatten(lifted.b), energy)


class _Pace(NamedTuple):
    """How much is worked on at a time: entries of a dense delta, and settings."""

    block: int
    settings: int


class _Setting(NamedTuple):
    """What a module is merged with: of S settings, or of one of them."""

    weights: Array
    keys: Any
    numbers: Numbers


def _merge_module(program: Program, bucket: Bucket, one: Inputs, numbers: Numbers, pace: _Pace) -> spaces.Lifted:
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
    pace: _Pace,
    staged: Callable[[spaces.Lifted, _Setting], spaces.Lifted],
) -> spaces.Lifted:
    """The same where the tasks are dense deltas and the method prunes and combines, without forming them whole."""
    row, n = program.row, len(bucket.ranks)
    passes = in_blocks_passes(program, bucket, factors, pace.block)
    (bound,) = settings.numbers
    if "density" in bound and bound["density"].cut is not None:
        settings = settings._replace(
            numbers=[_with_cut(bound, jax.tree.map(lambda x: x[:, None], bound["density"].cut))]
        )
    elif counts := cut_counts(row.pruning, bound, passes.size):
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


def flatten_batch(inputs: Inputs, batch: tuple[int, ...]) -> Inputs:
    """Makes every layer of a batched module a module of its own, with keys of its own."""
    if not batch:
        return inputs
    layers = math.prod(batch)

    def flatten(x: Array) -> Array:
        return x.reshape(-1, *x.shape[1 + len(batch) :])

    def repeat(x: Array) -> Array:
        return jnp.repeat(x, layers, axis=0)

    keys = inputs.keys
    if keys is not None:
        index = jnp.tile(jnp.arange(layers, dtype=jnp.uint32), keys.shape[0])
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))
        keys = jax.vmap(fold)(repeat(keys), index)
    return Inputs(
        tuple(map(flatten, inputs.a)),
        tuple(map(flatten, inputs.b)),
        repeat(inputs.scales),
        repeat(inputs.weights),
        keys,
        inputs.cuts,
        jax.tree.map(repeat, inputs.stages),
    )
