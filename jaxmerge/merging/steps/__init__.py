"""A checked merge, cut into steps: stacks of modules that are merged in one call."""

import dataclasses
import functools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxmerge import dense, lapack, spaces
from jaxmerge.base import Adapter, Array, Energy, LoRA, has_values, on_host, precision, restricted
from jaxmerge.memory import release
from jaxmerge.merging.checks import all_paths
from jaxmerge.merging.scope import DensityScope, as_cuts, count_reaching, model_thresholds
from jaxmerge.merging.stacks import (
    Bucket,
    Inputs,
    Numbers,
    Program,
    bind_numbers,
    find_cuts,
    merge_module,
    merge_stack,
)
from jaxmerge.merging.staging import Staging, narrowed
from jaxmerge.merging.steps.arrays import draws_of, stacked, table_of, unstacked
from jaxmerge.merging.steps.finishing import after_all_modules, merged_bias
from jaxmerge.merging.steps.settings import Setting
from jaxmerge.selection import Cut
from jaxmerge.sharding import device_count, fitting, laid_out, placement, seen_everywhere, several_processes
from jaxmerge.values import at

__all__ = ["Plan", "Setting", "Step"]

# How many steps are begun before the first of them is waited for.
_AHEAD = 2


@dataclass(frozen=True, eq=False)
class Plan:
    """A merge that has been checked and not yet run.

    Attributes:
        program: The method and its space.
        adapters: In the user's order.
        settings: What to merge with; one, if the program does not sweep.
        keys: ``[S]``, one for each setting, for a method that draws.
        staging: What is done to the merge once it is made.
        memory: The bytes that a stack of modules may take on one device.
        donate: Whether the adapters' arrays may be given up once they are read.
        density_scope: What a density is a fraction of: the entries of each module, or of the whole model.
        buckets: The modules of each bucket, by the positions of the adapters that have them.
        rest: The merged adapter without its modules.
    """

    program: Program
    adapters: Sequence[Adapter]
    settings: Sequence[Setting]
    keys: Array | None
    staging: Staging
    buckets: Mapping[tuple[Bucket, tuple[int, ...]], Sequence[str]]
    rest: Adapter
    memory: int
    donate: bool = False
    density_scope: DensityScope = "module"

    def steps(self) -> list["Step"]:
        """The stacks to merge: each bucket in parts of equal size, so that it compiles once.

        In the memory of a host without a mesh modules are merged one by one, where they lie.
        """
        mesh, steps = self.program.mesh, []
        for bucket, present, paths in self._alike():
            program, devices = self.program, device_count(mesh)
            own = [setting.numbers_at(paths[0], present) for setting in self.settings]
            numbers = bind_numbers(program, bucket, own)
            if mesh is None and self._lie_on_host(present, paths):
                steps += [Step(self, program, bucket, present, [path], 0, numbers) for path in paths]
                continue
            few = 2 * len(paths) * math.prod(bucket.batch) <= devices
            if few and program.in_blocks and dense.is_large(bucket.features):
                program, devices = dataclasses.replace(program, by_rows=True), 1
            fitting_merges = max(1, self.memory // (program.need(bucket) * math.prod(bucket.batch)))
            settings_at_once = min(len(self.settings), fitting_merges)
            at_once = fitting_merges // settings_at_once
            program = dataclasses.replace(program, at_once=at_once, settings_at_once=settings_at_once)
            parts = math.ceil(len(paths) / (at_once * devices))
            size = math.ceil(len(paths) / parts)
            padded = math.ceil(size / devices) * devices
            steps += [
                Step(self, program, bucket, present, paths[i : i + size], padded, numbers)
                for i in range(0, len(paths), size)
            ]
        return steps

    def _alike(self) -> Iterator[tuple[Bucket, tuple[int, ...], Sequence[str]]]:
        """The modules that share a bucket and the hyperparameters."""
        varying = [
            value for setting in self.settings for value in setting.numbers.values() if isinstance(value, Mapping)
        ]

        def own(path: str) -> tuple[Any, ...]:
            numbers = [at(value, path) for value in varying]
            return tuple(np.asarray(x).tobytes() if has_values(x) else id(x) for x in numbers)

        for (bucket, present), paths in self.buckets.items():
            groups: dict[tuple[Any, ...], list[str]] = {}
            for path in paths:
                groups.setdefault(own(path), []).append(path)
            yield from ((bucket, present, group) for group in groups.values())

    def outline(self) -> Adapter:
        """What the merge will be, as shapes: its leaves are `jax.ShapeDtypeStruct`."""
        modules = {}
        for (bucket, _), paths in self.buckets.items():
            (out, in_), batch = bucket.features, bucket.batch
            shape = functools.partial(jax.ShapeDtypeStruct, dtype=np.dtype(bucket.dtype))
            for path in paths:
                biased = any(path in one.modules and one.modules[path].bias is not None for one in self.adapters)
                modules[path] = LoRA(
                    shape((*batch, bucket.rank, in_)),  # type: ignore[arg-type]
                    shape((*batch, out, bucket.rank)),  # type: ignore[arg-type]
                    bias=shape((*batch, out)) if biased else None,  # type: ignore[arg-type]
                )
        return dataclasses.replace(self.rest, modules={path: modules[path] for path in all_paths(self.adapters)})

    def only(self, paths: Iterable[str]) -> "Plan":
        """The same merge of some of its modules; of all, where what is done to one hangs on the others."""
        if self.density_scope == "model" or any(stage.whole for stage in self.staging.stages):
            return self
        kept = set(paths)
        buckets = {key: [path for path in own if path in kept] for key, own in self.buckets.items()}
        adapters = [restricted(adapter, kept) for adapter in self.adapters]
        return dataclasses.replace(self, buckets={key: own for key, own in buckets.items() if own}, adapters=adapters)

    def _lie_on_host(self, present: Sequence[int], paths: Sequence[str]) -> bool:
        leaves = (self.adapters[i].modules[path] for i in present for path in paths)
        on_cpu = jax.default_backend() == "cpu"
        return on_cpu and all(
            on_host(leaf) and (isinstance(leaf, np.ndarray) or len(leaf.devices()) == 1)
            for lora in leaves
            for leaf in (lora.a, lora.b)
        )

    @functools.cached_property
    def thresholds(self) -> np.ndarray | None:
        """Of the whole model, ``[k, n]`` for the k cuts of the pruning; None where every module finds its own."""
        if self.density_scope == "module":
            return None
        with lapack.single_threaded():
            numbers = {name: np.asarray(self.settings[0].numbers[name]) for name in self.program.row.per_adapter}
            return model_thresholds(self.steps(), len(self.adapters), **numbers)

    def run(self) -> Iterator[dict[str, tuple[LoRA, Energy]]]:
        """The results of all steps, in order. While one is merged, the next is prepared."""
        pending: deque[tuple[Step, spaces.Lifted]] = deque()
        with lapack.single_threaded():
            for step in self.steps():
                pending.append((step, step.start()))
                if len(pending) > (0 if several_processes() else _AHEAD):
                    first, merged = pending.popleft()
                    yield first.results(merged)
            while pending:
                first, merged = pending.popleft()
                yield first.results(merged)

    def finish(self, results: Sequence[Mapping[str, tuple[LoRA, Energy]]]) -> Adapter:
        """The merged adapter, from the results of all steps."""
        merged = {path: result for step in results for path, result in step.items()}
        modules, energy = {}, {}
        for path in all_paths(self.adapters):
            lora, energy[path] = merged[path]
            bias = merged_bias(self.settings, self.adapters, path, lora.a.dtype, self.program.sweeps)
            modules[path] = dataclasses.replace(lora, bias=bias)
        modules, energy = after_all_modules(self.staging, self.settings[0], self.adapters, modules, energy)
        if any(stage.cuts for stage in self.staging.stages) and not self.program.sweeps:
            modules = narrowed(modules)
        return dataclasses.replace(self.rest, modules=modules, energy=energy)


@dataclass(frozen=True, eq=False)
class Step:
    """Modules of one bucket that are merged in one call.

    Attributes:
        plan: What they are part of.
        program: The method and its space.
        bucket: What they share.
        present: The positions of the adapters that have them.
        paths: The modules.
        padded: How many the compiled program takes; the last one is repeated to fill it. 0 where it takes one module
            without an axis for it.
        numbers: From `bind_numbers`.
    """

    plan: Plan
    program: Program
    bucket: Bucket
    present: tuple[int, ...]
    paths: Sequence[str]
    padded: int
    numbers: Numbers

    def start(self) -> spaces.Lifted:
        """Begins to merge the modules."""
        with precision(self.bucket.wide):
            arguments = self._arguments()
            alone = self.program.sweeps and self.program.form.as_stored and not self.padded
            merged = _setting_by_setting(*arguments) if alone else self._function(*arguments)
        if self.plan.donate:
            for leaf in self._leaves():
                if isinstance(leaf, jax.Array) and has_values(leaf):
                    leaf.delete()
        return merged

    def _leaves(self) -> Iterator[Any]:
        for i in self.present:
            for path in self.paths:
                lora = self.plan.adapters[i].modules[path]
                yield from (lora.a, lora.b)

    def results(self, merged: spaces.Lifted) -> dict[str, tuple[LoRA, Energy]]:
        """Path -> factors and what their truncation lost; waits for what was begun."""
        with precision(self.bucket.wide):
            jax.block_until_ready(merged)
            for leaf in self._leaves():
                release(leaf)
            if not self.padded:
                return {self.paths[0]: (LoRA(merged.a, merged.b), merged.energy)}
            if self.program.sweeps:  # Settings come first; modules are taken apart.
                merged = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), merged)
            a, b, total, lost, missed = map(unstacked, jax.tree.leaves(merged))
            first = [self.plan.adapters[self.present[0]].modules[path] for path in self.paths]
            return {
                path: (
                    LoRA(self._laid_out(a[i], lora.a, -1), self._laid_out(b[i], lora.b, -2)),
                    Energy(total[i], lost[i], missed[i]),
                )
                for i, (path, lora) in enumerate(zip(self.paths, first, strict=True))
            }

    def _laid_out(self, array: Any, first: Any, axis: int) -> Any:
        """A result on the devices: as the first adapter's was, or else along its features over the whole mesh."""
        mesh, found = self.program.mesh, placement(first)
        if found is None and mesh is not None and not isinstance(array, Tracer):
            spec: list[Any] = [None] * array.ndim
            spec[axis] = mesh.axis_names
            found = fitting(mesh, spec, array.shape)
        return laid_out(array, found)

    def lower(self) -> jax.stages.Lowered:
        """The program, not yet compiled."""
        with precision(self.bucket.wide):
            return self._function.lower(*self._arguments())

    @property
    def _function(self) -> Any:
        return merge_stack if self.padded else merge_module

    def _weights(self, paths: Sequence[str]) -> Array:
        """``[L, S, n]``."""

        def table(path: str) -> Array:
            settings = [setting.weights_at(path, self.present) for setting in self.plan.settings]
            return table_of(list(zip(*settings, strict=True)), self.bucket.wide)

        if any(isinstance(weight, Mapping) for setting in self.plan.settings for weight in setting.weights):
            tables = [table(path) for path in paths]
            stack = jnp.stack if any(isinstance(one, jax.Array) for one in tables) else np.stack
            return stack(tables)  # type: ignore[arg-type, return-value]
        same = table(paths[0])
        broadcast = jnp.broadcast_to if isinstance(same, jax.Array) else np.broadcast_to
        return broadcast(same, (len(paths), *same.shape))  # type: ignore[return-value]

    def _arguments(self) -> tuple[Any, ...]:
        inputs = self._inputs()
        return self.program, self.bucket, inputs._replace(cuts=self._cuts(inputs)), self.numbers

    def _inputs(self) -> Inputs:
        plan, present, wide = self.plan, self.present, self.bucket.wide
        paths = [*self.paths, *[self.paths[-1]] * (self.padded - len(self.paths))]
        loras = [[plan.adapters[i].modules[path] for path in paths] for i in present]
        if self.padded:
            placements = [placement(leaf) for row in loras for lora in row for leaf in (lora.a, lora.b)]
            mesh = next((found.mesh for found in placements if found is not None), None)
            a = tuple(stacked([lora.a for lora in row], mesh) for row in loras)
            b = tuple(stacked([lora.b for lora in row], mesh) for row in loras)
        else:
            a, b = tuple(row[0].a for row in loras), tuple(row[0].b for row in loras)
        return Inputs(
            a=a,
            b=b,
            scales=table_of([[lora.scale for lora in row] for row in loras], wide),
            weights=self._weights(paths),
            keys=None if plan.keys is None else draws_of(plan.keys, paths, present),
            stages=plan.staging.of(paths, wide),
        )

    def _cuts(self, inputs: Inputs) -> tuple[Cut, ...] | None:
        """Where the largest entries end, as far as that is found before."""
        thresholds = self.plan.thresholds
        if thresholds is not None:
            modules = inputs.scales.shape[0] * math.prod(self.bucket.batch)
            return as_cuts(thresholds[:, list(self.present)], modules, len(self.numbers))
        return None if self.padded else find_cuts(self.program, self.bucket, inputs, self.numbers)

    def count_reaching(self, orders: np.ndarray) -> np.ndarray:
        """How many entries of each module and task are at or above orders ``[probes, n]``: ``[modules, probes, n]``."""
        with precision(self.bucket.wide):
            program = dataclasses.replace(self.program, mesh=None, by_rows=False)
            inputs = self._inputs()
            if not self.padded:
                inputs = inputs._replace(a=tuple(x[None] for x in inputs.a), b=tuple(x[None] for x in inputs.b))
            numbers = jax.tree.map(lambda x: x[0], self.numbers[0])
            counts = count_reaching(program, self.bucket, inputs._replace(stages=()), numbers, orders)
            for leaf in self._leaves():
                release(leaf)
            return np.asarray(seen_everywhere(counts))[: len(self.paths) * math.prod(self.bucket.batch)]


def _setting_by_setting(program: Program, bucket: Bucket, inputs: Inputs, numbers: Numbers) -> spaces.Lifted:
    """A sweep where settings share nothing but their inputs: by the program that merges with one of them."""
    program = dataclasses.replace(program, sweeps=False)

    def merged(i: int) -> spaces.Lifted:
        def here(x: Any) -> Any:
            return x[:, i : i + 1]

        keys = inputs.keys if inputs.keys is None else inputs.keys._replace(key=inputs.keys.key[i : i + 1])
        own = inputs._replace(weights=here(inputs.weights), keys=keys, cuts=jax.tree.map(here, inputs.cuts))
        return merge_module(program, bucket, own, jax.tree.map(lambda x: x[i : i + 1], numbers))

    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(merged, range(inputs.weights.shape[1])))
