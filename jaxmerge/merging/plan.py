"""Checking a merge before any work."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxmerge.base import Adapter, AnyArray, Array, has_values, promote
from jaxmerge.catalog import COMBINATION_TYPES, METHODS
from jaxmerge.extras import Extras, merge_extras
from jaxmerge.io import combine_metadata
from jaxmerge.merging.checks import (
    Weights,
    all_paths,
    as_adapters,
    base_problems,
    checked_dtype,
    checked_memory,
    checked_rank,
    checked_weights,
    count_problems,
    hyperparameter_problems,
    hyperparameters_of,
    key_problems,
    listing,
    method_and_space,
    module_problems,
    raise_problems,
    shape_problems,
    sign_problems,
    value_problems,
)
from jaxmerge.merging.scope import DensityScope, scope_problems
from jaxmerge.merging.stacks import Bucket, Program
from jaxmerge.merging.staging import StageLike, as_stages, checked_stages
from jaxmerge.merging.steps import Plan, Setting
from jaxmerge.values import at
from jaxmerge.version import versions
from jaxmerge.words import short, size


def plan_merge(
    adapters: Sequence[Adapter],
    weights: Weights = None,
    *,
    method: str | None = None,
    space: str | None = None,
    rank: int | Mapping[str, int] | None = None,
    combination_type: str | None = None,
    key: Array | None = None,
    mesh: Mesh | None = None,
    memory: int | str | None = None,
    donate: bool = False,
    dtype: DTypeLike | None = None,
    extras: Extras = "same",
    stages: Sequence[StageLike] = (),
    density_scope: DensityScope = "module",
    allow_different_bases: bool = False,
    **hyperparameters: Any,
) -> Plan:
    """Checks a merge. Arguments and errors are those of `jaxmerge.merge`."""
    adapters = as_adapters(adapters)
    if mesh is not None and not isinstance(mesh, Mesh):
        raise ValueError(f"mesh should be a jax.sharding.Mesh, got {short(mesh)}")
    if not adapters:
        raise ValueError("there is nothing to merge: no adapters")
    method, space = method_and_space(method, space, combination_type)
    # PEFT takes one adapter as it is, whatever the type: weight · scale · B · A.
    alone = combination_type is not None and len(adapters) == 1
    problems = hyperparameter_problems(method, space, hyperparameters, len(adapters), optional=alone)
    problems += count_problems(method, len(adapters))
    weights = checked_weights(weights, len(adapters), METHODS[method].averages, problems)
    if alone:
        method, space, hyperparameters = "linear", "full", {}
    problems += sign_problems(method, weights)
    problems += key_problems(method, key)
    named = as_stages(stages)
    staging = checked_stages(named, adapters, problems)
    rank, dtype = checked_rank(rank, problems), checked_dtype(dtype, problems)
    problems += shape_problems(adapters)
    problems += base_problems(adapters, allow_different_bases)
    if len(weights) == len(adapters):
        problems += module_problems(adapters, weights, {"rank": rank, **hyperparameters})
    metadata, format_problems = combine_metadata(adapters)
    problems += format_problems
    merged_extras, unsettled = merge_extras(adapters, extras)
    if unsettled:
        problems.append(
            f"extras={extras!r} does not settle these tensors, which are not LoRA factors and differ between "
            f"the adapters: {listing(unsettled)}; use the mean of them (extras 'average') or one adapter's"
        )
    raise_problems(problems)  # What follows relies on shapes that agree.
    problems = value_problems(adapters)

    taken = hyperparameters_of(method, space)
    choices = {h.name: hyperparameters.get(h.name, h.default) for h in taken}
    numbers = {h.name: _plain_arrays(choices.pop(h.name)) for h in taken if h.traceable}
    budget = checked_memory(memory, mesh)
    program = Program(method, space, tuple(choices.items()), staging.of_modules, mesh)
    problems += scope_problems(density_scope, program, numbers)
    buckets = _buckets(adapters, program, combination_type, rank, dtype, problems)
    if density_scope == "model" and len({bucket.wide for bucket, _ in buckets}) > 1:
        problems.append("density_scope model compares entries of all modules, which are of several precisions")
    if memory is not None:
        problems += memory_problems(program, buckets, budget)
    raise_problems(problems)
    if dtype is not None:
        merged_extras = {name: _cast(tensor, dtype) for name, tensor in merged_extras.items()}
    record = {
        "inputs": [json.loads(adapter.metadata.provenance) for adapter in adapters],
        "weights": [_recordable(weight) for weight in weights],
        "method": method,
        "space": space,
        "combination_type": combination_type,
        "rank": rank,
        "density_scope": density_scope,
        "stages": [[name, _recordables(values)] for name, values in named],
        "hyperparameters": _recordables({**choices, **numbers}),
        "key": None if key is None or not METHODS[method].random else _recordable_key(key),
        "dtype": dtype,
        "extras": extras,
        "allow_different_bases": allow_different_bases,
        "versions": versions(),
    }
    metadata = dataclasses.replace(metadata, provenance=json.dumps(record))
    rest = Adapter(modules={}, extras=merged_extras, metadata=metadata)
    keys = as_keys([key]) if METHODS[method].random else None
    return Plan(
        program, adapters, [Setting(weights, numbers)], keys, staging, buckets, rest, budget, donate, density_scope
    )


def _plain_arrays(value: Any) -> Any:
    """A number as it is, and a sequence of them, one per adapter, as an array."""
    if isinstance(value, Mapping):
        return {path: _plain_arrays(own) for path, own in value.items()}
    return np.asarray(value) if isinstance(value, Sequence) else value


def as_keys(keys: Sequence[Any]) -> Array:
    """Keys as one array ``[S]`` of typed ones."""
    typed = [key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key) for key in keys]
    return jnp.stack(typed)


def _buckets(
    adapters: Sequence[Adapter],
    program: Program,
    combination_type: str | None,
    rank: int | Mapping[str, int] | None,
    dtype: str | None,
    problems: list[str],
) -> dict[tuple[Bucket, tuple[int, ...]], list[str]]:
    """Settles each module's rank; sorts modules by what they must share to be stacked, and who has them."""
    form, single = program.form, len(adapters) == 1
    nominal = [_nominal_rank(adapter) for adapter in adapters]
    kind = None if combination_type is None or single else COMBINATION_TYPES[combination_type].rank
    if kind == "equal" and len(set(nominal)) > 1:
        problems.append(_unequal(f"combination_type {combination_type}", nominal))
        return {}
    wanted = max(nominal) if kind == "max" and rank is None else rank
    buckets: dict[tuple[Bucket, tuple[int, ...]], list[str]] = {}
    most = 0
    for path in all_paths(adapters):
        present = tuple(i for i, adapter in enumerate(adapters) if path in adapter.modules)
        loras = [adapters[i].modules[path] for i in present]
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
        chosen = natural if wanted is None else min(at(wanted, path), capacity)
        bucket = Bucket(features, ranks, loras[0].batch, dtypes, chosen, dtype or str(own))
        buckets.setdefault((bucket, present), []).append(path)
    if isinstance(rank, int) and rank > most and not problems:
        problems.append(f"rank {rank} is more than any module can hold: the largest possible is {most}")
    return buckets


def memory_problems(
    program: Program, buckets: Mapping[tuple[Bucket, tuple[int, ...]], Sequence[str]], budget: int
) -> list[str]:
    """Modules of which a single one takes more than the budget."""
    for (bucket, _), paths in buckets.items():
        need = program.need(bucket)
        if need > budget:
            return [f"memory {size(budget)} is too little: module {paths[0]} takes {size(need)}"]
    return []


def _nominal_rank(adapter: Adapter) -> int:
    declared = adapter.metadata.rank
    return max((lora.rank for lora in adapter.modules.values()), default=1) if declared is None else declared


def _unequal(where: str, ranks: Sequence[int]) -> str:
    return (
        f"{where}: the ranks differ ({', '.join(map(str, ranks))}), and factors of different ranks cannot be "
        "summed; the exact merge takes any ranks: method linear in space full (combination_type cat, or svd "
        "with a rank)"
    )


def _cast(tensor: AnyArray, dtype: str) -> AnyArray:
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        return tensor
    return tensor.astype(dtype) if isinstance(tensor, jax.Array | np.ndarray) else tensor  # A shape has none.


def _recordables(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _recordable(value) for name, value in values.items()}


def _recordable(value: Any) -> Any:
    """A number, numbers, or those of all modules, as JSON holds them; None for what is traced."""
    if isinstance(value, Mapping):
        return _recordables(value)
    if not has_values(value):
        return None
    return value if isinstance(value, str) else np.asarray(value).tolist()


def _recordable_key(key: Array) -> Any:
    if not has_values(key):
        return None
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    with jax.ensure_compile_time_eval():  # Inside a jit, a key that is known would be traced here.
        return np.asarray(jax.random.key_data(key) if typed else key).tolist()
