"""Checking a merge before any work, and cutting it into steps.

Every problem is gathered and all are told together.
"""

import contextlib
import dataclasses
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike, DTypeLike

from jaxmerge.base import Adapter, Array, Energy, LoRA, promote
from jaxmerge.catalog import COMBINATION_TYPES, METHODS, SPACES, Hyperparameter
from jaxmerge.extras import Extras, merge_extras
from jaxmerge.io import combine_metadata
from jaxmerge.merging.stacks import Bucket, Inputs, Program, bind_numbers, merge_stack
from jaxmerge.sharding import device_count
from jaxmerge.sparsify import bind_density
from jaxmerge.version import versions

Weights = Sequence[ArrayLike] | Array | None
_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, eq=False)
class Plan:
    """A merge that has been checked and not yet run.

    Attributes:
        program: The method and its space.
        adapters: In the user's order.
        weights: One per adapter.
        numbers: The numeric hyperparameters.
        key: For a method that draws.
        buckets: The modules of each bucket.
        rest: The merged adapter without its modules.
    """

    program: Program
    adapters: Sequence[Adapter]
    weights: Sequence[ArrayLike]
    numbers: Mapping[str, Any]
    key: Array | None
    buckets: Mapping[Bucket, Sequence[str]]
    rest: Adapter

    def steps(self) -> list["Step"]:
        """The stacks to merge: each bucket in parts of equal size, so that it compiles once."""
        devices = device_count(self.program.mesh)
        steps = []
        for bucket, paths in self.buckets.items():
            parts = math.ceil(len(paths) / (bucket.modules_at_once * devices))
            size = math.ceil(len(paths) / parts)
            padded = math.ceil(size / devices) * devices
            steps += [Step(self, bucket, paths[i : i + size], padded) for i in range(0, len(paths), size)]
        return steps

    def finish(self, results: Sequence[Mapping[str, tuple[LoRA, Energy]]]) -> Adapter:
        """The merged adapter, from the results of all steps."""
        merged = {path: result for step in results for path, result in step.items()}
        modules, energy = {}, {}
        for path in all_paths(self.adapters):
            lora, energy[path] = merged[path]
            modules[path] = dataclasses.replace(lora, bias=self._bias(path, lora.a.dtype))
        return dataclasses.replace(self.rest, modules=modules, energy=energy)

    def _bias(self, path: str, dtype: jnp.dtype) -> Array | None:
        """``Σ wᵢ sᵢ biasᵢ`` over the adapters that have one: exact, whatever the method."""
        total = None
        for weight, adapter in zip(self.weights, self.adapters, strict=True):
            lora = adapter.modules.get(path)
            if lora is not None and lora.bias is not None:
                wide = promote(dtype, jnp.float32)
                term = jnp.asarray(weight, wide) * jnp.asarray(lora.scale, wide) * jnp.asarray(lora.bias, wide)
                total = term if total is None else total + term
        return None if total is None else total.astype(dtype)


@dataclass(frozen=True, eq=False)
class Step:
    """Modules of one bucket that are merged in one call.

    Attributes:
        plan: What they are part of.
        bucket: What they share.
        paths: The modules.
        padded: How many the compiled program takes; the last one is repeated to fill it.
    """

    plan: Plan
    bucket: Bucket
    paths: Sequence[str]
    padded: int

    def run(self) -> dict[str, tuple[LoRA, Energy]]:
        """Merges the modules: path -> factors and what their truncation lost."""
        with self._precision():
            merged = merge_stack(*self._arguments())
            a, b, total, lost = map(_unstack, jax.tree.leaves(merged))
            return {path: (LoRA(a[i], b[i]), Energy(total[i], lost[i])) for i, path in enumerate(self.paths)}

    def lower(self) -> jax.stages.Lowered:
        """The program, not yet compiled."""
        with self._precision():
            return merge_stack.lower(*self._arguments())

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return jax.enable_x64(True) if self.bucket.wide == "float64" else contextlib.nullcontext()

    def _arguments(self) -> tuple[Any, ...]:
        plan, wide = self.plan, self.bucket.wide
        paths = [*self.paths, *[self.paths[-1]] * (self.padded - len(self.paths))]
        present = [i for i, adapter in enumerate(plan.adapters) if paths[0] in adapter.modules]
        loras = [[plan.adapters[i].modules[path] for path in paths] for i in present]
        inputs = Inputs(
            a=tuple(_stack([lora.a for lora in row]) for row in loras),
            b=tuple(_stack([lora.b for lora in row]) for row in loras),
            scales=_table([[lora.scale for lora in row] for row in loras], wide),
            weights=_table([[plan.weights[i]] * len(paths) for i in present], wide),
            keys=None if plan.key is None else _module_keys(plan.key, paths, present),
        )
        return plan.program, self.bucket, inputs, bind_numbers(plan.program, self.bucket, plan.numbers)


def _table(rows: Sequence[Sequence[ArrayLike]], dtype: str) -> Array:
    """``[L, n]`` from n rows of L numbers, put together on the host if they are there."""
    if any(isinstance(value, jax.Array) for row in rows for value in row):
        return jnp.stack([jnp.stack([jnp.asarray(value, dtype) for value in row]) for row in rows], axis=1)
    return jnp.asarray(np.asarray(rows, dtype).T)


def _stack(arrays: Sequence[Any]) -> Array:
    """Stacks on the host what lies on the host: one transfer instead of one per module."""
    if all(isinstance(array, np.ndarray) for array in arrays):
        return jnp.asarray(np.stack(arrays))
    return jnp.stack([jnp.asarray(array) for array in arrays])


def _unstack(array: Array) -> list[Array]:
    """The entries along axis 0. What lies in the host's memory is cut there, which compiles nothing."""
    if isinstance(array, jax.core.Tracer) or any(device.platform != "cpu" for device in array.devices()):
        return list(array)
    return [jnp.asarray(entry) for entry in np.asarray(array)]


def _module_keys(key: Array, paths: Sequence[str], present: Sequence[int]) -> Array:
    """``[L, n]`` keys, from a stable hash of the path and the adapter's position: nothing else matters."""
    hashes = np.array([zlib.crc32(path.encode()) for path in paths], np.uint32)
    return _fold_keys(key, jnp.asarray(hashes), jnp.asarray(np.array(present, np.uint32)))


@jax.jit
def _fold_keys(key: Array, hashes: Array, positions: Array) -> Array:
    fold = jax.random.fold_in
    return jax.vmap(lambda h: jax.vmap(lambda i: fold(fold(key, h), i))(positions))(hashes)


def all_paths(adapters: Sequence[Adapter]) -> list[str]:
    """Every module that some adapter has, in the order of the adapters."""
    return list(dict.fromkeys(path for adapter in adapters for path in adapter.modules))


def adapter_name(adapters: Sequence[Adapter], index: int) -> str:
    """What messages call an adapter: its path, or its place in the list."""
    return adapters[index].metadata.name or f"adapter {index + 1}"


def plan_merge(
    adapters: Sequence[Adapter],
    weights: Weights = None,
    *,
    method: str | None = None,
    space: str | None = None,
    rank: int | None = None,
    combination_type: str | None = None,
    key: Array | None = None,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    extras: Extras = "same",
    allow_different_bases: bool = False,
    **hyperparameters: Any,
) -> Plan:
    """Checks a merge. Arguments and errors are those of `jaxmerge.merge`."""
    adapters = list(adapters)
    if not adapters:
        raise ValueError("there is nothing to merge: no adapters")
    method, space = _method_and_space(method, space, combination_type)
    problems = _hyperparameter_problems(method, hyperparameters)
    weights = _checked_weights(weights, len(adapters), METHODS[method].averages, problems)
    if combination_type is not None and len(adapters) == 1:
        # PEFT takes one adapter as it is, whatever the type: weight · scale · B · A.
        method, space, hyperparameters = "linear", "full", {}
    if METHODS[method].random and key is None:
        problems.append(f"method {method} draws random numbers: pass key=jax.random.key(seed), or --seed")
    if dtype is not None and (dtype := str(jnp.dtype(dtype))) not in _DTYPES:
        problems.append(f"dtype {dtype} is not one of {', '.join(_DTYPES)}")
    problems += _shape_problems(adapters)
    problems += _base_problems(adapters, allow_different_bases)
    metadata, format_problems = combine_metadata([adapter.metadata for adapter in adapters])
    problems += format_problems
    merged_extras, unsettled = merge_extras(adapters, extras)
    if unsettled:
        problems.append(
            f"extras={extras!r} does not settle these tensors, which are not LoRA factors and differ between "
            f"the adapters: {_listing(unsettled)}; use the mean of them (extras 'average') or one adapter's"
        )
    _raise(problems)  # What follows relies on shapes that agree.
    problems = _value_problems(adapters)

    choices = {h.name: hyperparameters.get(h.name, h.default) for h in METHODS[method].hyperparameters}
    numbers = {h.name: choices.pop(h.name) for h in METHODS[method].hyperparameters if h.kind == "density"}
    program = Program(method, space, tuple(choices.items()), mesh)
    buckets = _buckets(adapters, program, combination_type, rank, dtype, problems)
    _raise(problems)
    if dtype is not None:
        merged_extras = {name: _cast(tensor, dtype) for name, tensor in merged_extras.items()}
    record = {
        "inputs": [json.loads(adapter.metadata.provenance) for adapter in adapters],
        "weights": [_recordable(weight) for weight in weights],
        "method": method,
        "space": space,
        "combination_type": combination_type,
        "rank": rank,
        "hyperparameters": {name: _recordable(value) for name, value in {**choices, **numbers}.items()},
        "key": None if key is None or not METHODS[method].random else _recordable_key(key),
        "extras": extras,
        "versions": versions(),
    }
    metadata = dataclasses.replace(metadata, provenance=json.dumps(record))
    rest = Adapter(modules={}, extras=merged_extras, metadata=metadata)
    return Plan(program, adapters, weights, numbers, key if METHODS[method].random else None, buckets, rest)


def _raise(problems: Sequence[str]) -> None:
    if problems:
        raise ValueError("\n".join(problems))


def _listing(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _method_and_space(method: str | None, space: str | None, combination_type: str | None) -> tuple[str, str]:
    if combination_type is not None:
        if method is not None or space is not None:
            raise ValueError("combination_type names a method and a space: leave method and space out")
        if combination_type not in COMBINATION_TYPES:
            raise ValueError(f"unknown combination_type {combination_type!r}: there are {', '.join(COMBINATION_TYPES)}")
        row = COMBINATION_TYPES[combination_type]
        return row.method, row.space
    method = "linear" if method is None else method
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: there are {', '.join(METHODS)}")
    space = METHODS[method].space if space is None else space
    if space not in SPACES:
        raise ValueError(f"unknown space {space!r}: there are {', '.join(SPACES)}")
    return method, space


def _hyperparameter_problems(method: str, given: Mapping[str, Any]) -> list[str]:
    known = {h.name: h for h in METHODS[method].hyperparameters}
    takes = f"it takes {', '.join(known)}" if known else "it takes none"
    problems = [f"method {method} has no hyperparameter {name}: {takes}" for name in given if name not in known]
    for name, hyperparameter in known.items():
        problems += _hyperparameter_problem(method, hyperparameter, given.get(name, hyperparameter.default))
    return problems


def _hyperparameter_problem(method: str, hyperparameter: Hyperparameter, value: Any) -> list[str]:
    name = hyperparameter.name
    if value is None:
        return [f"method {method} needs {name}: {hyperparameter.help}"]
    if hyperparameter.kind == "choice" and value not in hyperparameter.choices:
        return [f"{name} {value!r} is not one of {', '.join(hyperparameter.choices)}"]
    if hyperparameter.kind == "density":
        try:
            bind_density(value, 1)
        except ValueError as error:
            return [str(error)]
    return []


def _checked_weights(weights: Weights, n: int, averages: bool, problems: list[str]) -> list[ArrayLike]:
    if weights is None:
        return [1.0 if averages else 1.0 / n] * n
    if isinstance(weights, jax.Array | np.ndarray) and weights.ndim != 1:
        problems.append(f"weights must be one number per adapter, got an array of shape {weights.shape}")
        return [0.0] * n
    weights = list(weights)
    if len(weights) != n:
        problems.append(f"{len(weights)} weights for {n} adapters: give one weight per adapter")
    for weight in weights:
        if not isinstance(weight, jax.core.Tracer) and not np.isfinite(np.asarray(weight, np.float64)).all():
            problems.append(f"weight {float(np.asarray(weight))} is not a finite number")
    return [weight if isinstance(weight, jax.Array) else float(weight) for weight in weights]  # type: ignore[arg-type]


def _shape_problems(adapters: Sequence[Adapter]) -> list[str]:
    problems = []
    for path in all_paths(adapters):
        seen: dict[tuple[Any, ...], list[str]] = {}
        for index, adapter in enumerate(adapters):
            if path not in adapter.modules:
                continue
            lora, name = adapter.modules[path], adapter_name(adapters, index)
            if lora.b.shape[-1] != lora.rank or lora.b.shape[:-2] != lora.batch:
                problems.append(f"{name}: factors of {path} do not match: a {lora.a.shape}, b {lora.b.shape}")
            seen.setdefault((*lora.batch, *lora.features), []).append(name)
        if len(seen) > 1:
            shapes = "; ".join(f"{'×'.join(map(str, shape))} in {', '.join(who)}" for shape, who in seen.items())
            problems.append(f"module {path} has different shapes: {shapes}")
    return problems


def _base_problems(adapters: Sequence[Adapter], allow: bool) -> list[str]:
    if allow or len(adapters) == 1:
        return []
    bases: dict[str, list[str]] = {}
    problems = []
    for index, adapter in enumerate(adapters):
        name = adapter_name(adapters, index)
        if adapter.metadata.base_model:
            bases.setdefault(adapter.metadata.base_model, []).append(name)
        if adapter.metadata.own_base:
            problems.append(f"{name}: {adapter.metadata.own_base}")
    if len(bases) > 1:
        listed = "; ".join(f"{base} ({', '.join(names)})" for base, names in bases.items())
        problems.append(f"the adapters name different base models: {listed}")
    return [f"{problem} (allow_different_bases overrides this)" for problem in problems]


def _value_problems(adapters: Sequence[Adapter]) -> list[str]:
    problems = []
    for index, adapter in enumerate(adapters):
        bad = nonfinite_modules(adapter)
        if bad:
            problems.append(f"{adapter_name(adapters, index)}: NaN or inf in {_listing(bad)}")
    return problems


def nonfinite_modules(adapter: Adapter) -> list[str]:
    """The modules with a NaN or inf in them, as far as values are known now."""
    return [
        path
        for path, lora in adapter.modules.items()
        if not all(_finite(leaf) for leaf in (lora.a, lora.b, lora.scale, lora.bias) if leaf is not None)
    ]


def _finite(leaf: ArrayLike) -> bool:
    if isinstance(leaf, jax.core.Tracer):
        return True
    if isinstance(leaf, jax.Array):
        return bool(_all_finite(leaf))
    # A sum is finite if all terms are, but for overflow: the cheap pass first.
    with np.errstate(all="ignore"):
        array = np.asarray(leaf)
        array = array.astype(np.float32) if array.dtype.itemsize == 2 else array
        return bool(np.isfinite(array.sum()) or np.isfinite(array).all())


@jax.jit
def _all_finite(array: Array) -> Array:
    return jnp.isfinite(array).all()


def _buckets(
    adapters: Sequence[Adapter],
    program: Program,
    combination_type: str | None,
    rank: int | None,
    dtype: str | None,
    problems: list[str],
) -> dict[Bucket, list[str]]:
    """Sorts modules by what they must share to be stacked, and settles each one's rank."""
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int | np.integer) or rank < 1):
        problems.append(f"rank must be a whole number from 1, got {rank!r}")
        return {}
    form, single = program.form, len(adapters) == 1
    nominal = [_nominal_rank(adapter) for adapter in adapters]
    kind = None if combination_type is None or single else COMBINATION_TYPES[combination_type].rank
    if kind == "equal" and len(set(nominal)) > 1:
        problems.append(_unequal(f"combination_type {combination_type}", nominal))
        return {}
    wanted = max(nominal) if kind == "max" and rank is None else rank
    buckets: dict[Bucket, list[str]] = {}
    most = 0
    for path in all_paths(adapters):
        loras = [adapter.modules[path] for adapter in adapters if path in adapter.modules]
        ranks = tuple(lora.rank for lora in loras)
        if form.equal_ranks and len(set(ranks)) > 1:
            problems.append(_unequal(f"space {program.space}, module {path}", ranks))
            continue
        features = loras[0].features
        capacity = form.capacity(ranks, *features)
        most = max(most, capacity)
        natural = min(max(ranks), capacity) if form.full_rank else capacity
        dtypes = tuple(str(leaf.dtype) for lora in loras for leaf in (lora.a, lora.b))
        own = promote(*dtypes)
        chosen = natural if wanted is None else min(int(wanted), capacity)
        bucket = Bucket(features, ranks, loras[0].batch, dtypes, chosen, dtype or str(own))
        buckets.setdefault(bucket, []).append(path)
    if rank is not None and rank > most and not problems:
        problems.append(f"rank {rank} is more than any module can hold: the largest possible is {most}")
    return buckets


def _nominal_rank(adapter: Adapter) -> int:
    declared = adapter.metadata.rank
    return max((lora.rank for lora in adapter.modules.values()), default=1) if declared is None else declared


def _unequal(where: str, ranks: Sequence[int]) -> str:
    return (
        f"{where}: the ranks differ ({', '.join(map(str, ranks))}), and factors of different ranks cannot be "
        "summed; the exact merge takes any ranks: method linear in space full (combination_type cat, or svd "
        "with a rank)"
    )


def _cast(tensor: Array, dtype: str) -> Array:
    return tensor.astype(dtype) if jnp.issubdtype(tensor.dtype, jnp.floating) else tensor


def _recordable(value: Any) -> Any:
    """A number as JSON holds it; None for one that is traced."""
    if isinstance(value, jax.core.Tracer):
        return None
    return value if isinstance(value, str) else np.asarray(value).tolist()


def _recordable_key(key: Array) -> Any:
    if isinstance(key, jax.core.Tracer):
        return None
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(key) if typed else key).tolist()
