"""What can be wrong with a merge. Checks gather problems, so that all can be told together."""

import math
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxmerge import threads
from jaxmerge.base import Adapter, Array, LoRA, has_values, nonfinite_modules
from jaxmerge.catalog import COMBINATION_TYPES, DTYPES, METHODS, SPACES, STAGES, Hyperparameter
from jaxmerge.memory import default_memory, parse_memory, release
from jaxmerge.sparsify import bind_density
from jaxmerge.values import each
from jaxmerge.words import by, folded, short, were_given

Weights = Sequence[ArrayLike | Mapping[str, ArrayLike]] | Array | None


def as_adapters(adapters: Any) -> list[Adapter]:
    """A list of adapters.

    Raises:
        ValueError: If it is something else: a path, a single adapter, or a list of others.
    """
    found: list[Any] = (
        list(adapters) if isinstance(adapters, Iterable) and not isinstance(adapters, str) else [adapters]
    )
    if isinstance(adapters, Adapter) or not all(isinstance(one, Adapter) for one in found):
        kinds = ", ".join(dict.fromkeys(type(one).__name__ for one in found))
        what = "one Adapter" if isinstance(adapters, Adapter) else kinds
        raise ValueError(f"adapters should be a list of adapters, as jm.load(path) gives each, got {what}")
    return found


def all_paths(adapters: Sequence[Adapter]) -> list[str]:
    """Every module that some adapter has, in the order of the adapters."""
    return list(dict.fromkeys(path for adapter in adapters for path in adapter.modules))


def adapter_name(adapters: Sequence[Adapter], index: int) -> str:
    """What messages call an adapter: its path, or its place in the list."""
    return adapters[index].metadata.name or f"adapter {index + 1}"


def checked_memory(memory: int | str | None, mesh: Any) -> int:
    """The budget in bytes; a ValueError if it is none."""
    if memory is None:
        return default_memory(None if mesh is None else mesh.devices.flat[0].platform)
    if isinstance(memory, bool) or not isinstance(memory, int | str):
        raise ValueError(f"memory is a number of bytes, or a size like 2GB, got {memory!r}")
    return parse_memory(str(memory))


def raise_problems(problems: Sequence[str]) -> None:
    """Raises one ValueError with all problems, a line each, if there are any."""
    if problems:
        raise ValueError("\n".join(problems))


def listing(names: Sequence[str], most: int = 8) -> str:
    """Names in a row; of many, the first few and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def method_and_space(method: str | None, space: str | None, combination_type: str | None) -> tuple[str, str]:
    """The cell of the grid that is asked for; a ValueError if there is none."""
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
    row = METHODS[method]
    if space not in row.spaces:
        raise ValueError(f"method {method} makes no sense in space {space}: {row.elsewhere}")
    return method, space


def hyperparameters_of(method: str, space: str) -> tuple[Hyperparameter, ...]:
    """What a cell of the grid takes: the method's hyperparameters, and the space's."""
    return (*METHODS[method].hyperparameters, *SPACES[space].taken(METHODS[method]))


def sign_problems(method: str, weights: Sequence[Any]) -> list[str]:
    """Whether weights are negative that may not be, as far as they are known."""
    negative = [one for weight in weights for one in each(weight) if isinstance(one, float) and one < 0]
    if not negative or not METHODS[method].on_units:
        return []
    return [f"method {method} takes weights of 0 or more, not {negative[0]:g}: {METHODS[method].breaks['negation']}"]


def count_problems(method: str, n: int) -> list[str]:
    """Whether a method takes so many adapters."""
    least, most = METHODS[method].least, METHODS[method].most
    if n >= least and (most is None or n <= most):
        return []
    wanted = f"just {least}" if most == least else f"at least {least}" if most is None else f"{least} to {most}"
    return [f"method {method} takes {wanted} adapters, not {n}"]


def hyperparameter_problems(
    method: str, space: str, given: Mapping[str, Any], n: int, optional: bool = False
) -> list[str]:
    """What is wrong with the hyperparameters of a cell of the grid for n adapters; optional ones may be left out."""
    known = {h.name: h for h in hyperparameters_of(method, space)}
    takes = f"it takes {', '.join(known)}" if known else "it takes none"
    cell = f"method {method}" + (f" in space {space}" if SPACES[space].hyperparameters else "")
    problems = [f"{cell} has no hyperparameter {name}: {takes}" for name in given if name not in known]
    for name, hyperparameter in known.items():
        value = given.get(name, hyperparameter.default)
        if value is not None or not optional:
            tasks = n if name in METHODS[method].per_adapter else None
            problems += hyperparameter_problem(f"method {method}", hyperparameter, value, tasks)
    return list(dict.fromkeys(problems))


def one_of_problems(stage: str, given: Collection[str]) -> list[str]:
    """Whether a stage that takes just one of its hyperparameters has one."""
    row = STAGES[stage]
    if not row.one_of or len(given) == 1:
        return []
    known = ", ".join(h.name for h in row.hyperparameters)
    return [f"stage {stage} takes one of {known}: {were_given(list(given))}"]


def of_stage(name: str, problem: str) -> str:
    """A problem with a stage's hyperparameter, which is told with the stage: several stages may have one."""
    return problem if problem.startswith("stage ") else f"stage {name}: {problem}"


def hyperparameter_problem(
    user: str, hyperparameter: Hyperparameter, value: Any, tasks: int | None = None
) -> list[str]:
    """What is wrong with the value of one of a method's or a stage's hyperparameters.

    Args:
        user: The method or stage, in words.
        hyperparameter: Its row.
        value: What is given; for one that may be traced also a mapping from module path to value.
        tasks: How many numbers there may be in its place, one for each adapter; None where there may be just one.

    Returns:
        Problems, a line each.
    """
    values = each(value) if hyperparameter.traceable else [value]
    found = [problem for one in values for problem in _problem_of_one(user, hyperparameter, one, tasks)]
    return list(dict.fromkeys(found))


def _problem_of_one(user: str, hyperparameter: Hyperparameter, value: Any, tasks: int | None) -> list[str]:
    name = hyperparameter.name
    if value is None:
        return [f"{user} needs {name}: {hyperparameter.help}"]
    if hyperparameter.kind == "choice" and value not in hyperparameter.choices:
        return [f"{name} {value!r} is not one of {', '.join(hyperparameter.choices)}"]
    if hyperparameter.kind == "density":
        try:
            bind_density(value, 1, name.capitalize(), tasks)
        except ValueError as error:
            return [str(error)]
        if not has_values(value):
            return []
        hyperparameter = hyperparameter.as_number
    if hyperparameter.kind in ("number", "count"):
        several = tasks is not None and np.shape(value) == (tasks,)
        return [problem for one in (value if several else [value]) for problem in _range_problem(hyperparameter, one)]
    return []


def _range_problem(hyperparameter: Hyperparameter, value: Any) -> list[str]:
    """What is wrong with a number, as far as its value is known."""
    if not has_values(value) and hyperparameter.kind == "number":
        return []
    name, number = hyperparameter.name, None if isinstance(value, bool) else _number(value)
    if not isinstance(number, float) or not math.isfinite(number):
        return [f"{name} should be a {'finite ' if isinstance(number, float) else ''}number, got {short(value)}"]
    if (hyperparameter.kind == "count" or hyperparameter.whole) and number != int(number):
        return [f"{name} should be a whole number, got {short(value)}"]
    bounds = {"at least": hyperparameter.least, "at most": hyperparameter.most,
              "above": hyperparameter.above, "below": hyperparameter.below}  # fmt: skip
    holds = {"at least": operator.ge, "at most": operator.le, "above": operator.gt, "below": operator.lt}
    if any(bound is not None and not holds[words](number, bound) for words, bound in bounds.items()):
        wanted = " and ".join(f"{words} {bound:.10g}" for words, bound in bounds.items() if bound is not None)
        return [f"{name} should be {wanted}, got {number:g}"]
    return []


def checked_weights(weights: Weights, n: int, averages: bool, problems: list[str]) -> list[Any]:
    """The weights, one per adapter or a mapping each; what is wrong with them is added to the problems."""
    if weights is None:
        return [1.0 if averages else 1.0 / n] * n
    if isinstance(weights, jax.Array | np.ndarray) and weights.ndim != 1:
        problems.append(f"weights must be one number per adapter, got an array of shape {weights.shape}")
        return [0.0] * n
    numbers = [_weight(weight) for weight in weights] if isinstance(weights, Iterable) else [None]
    if any(number is None for weight in numbers for number in each(weight)):
        problems.append(f"weights must be one number per adapter, got {weights!r}")
        return [0.0] * n
    if len(numbers) != n:
        problems.append(f"{len(numbers)} weights for {n} adapters: give one weight per adapter")
    flat = [number for weight in numbers for number in each(weight)]
    infinite = [number for number in flat if isinstance(number, float) and not math.isfinite(number)]
    problems += [f"weight {number} is not a finite number" for number in dict.fromkeys(infinite)]
    largest = float(np.finfo(np.float32).max)
    large = [number for number in flat if isinstance(number, float) and largest < abs(number) < math.inf]
    problems += [f"weight {number:g} is more than float32 holds" for number in dict.fromkeys(large)]
    return numbers


def _weight(weight: Any) -> Any:
    if isinstance(weight, Mapping):
        return {path: _number(number) for path, number in weight.items()}
    return _number(weight)


def _number(weight: Any) -> ArrayLike | None:
    """A weight as a float, or as it is where its value is traced; None if it is not a number."""
    if not has_values(weight):
        return weight if weight.ndim == 0 else None
    if weight is None:  # NaN to NumPy.
        return None
    try:
        array = np.asarray(weight, np.float64)
    except (TypeError, ValueError):
        return None
    return float(array) if array.ndim == 0 else None


def checked_rank(rank: Any, problems: list[str]) -> Any:
    """The rank that is asked for, if any, or a mapping of such; what is wrong with it is added to the problems."""
    if rank is None:
        return None
    if isinstance(rank, Mapping):
        return {path: checked_rank(own, problems) for path, own in rank.items()}
    if isinstance(rank, bool) or not isinstance(rank, int | np.integer) or rank < 1:
        problems.append(f"rank must be a whole number from 1, got {rank!r}")
        return None
    return int(rank)


def checked_dtype(dtype: Any, problems: list[str]) -> str | None:
    """The name of the dtype that is asked for, if any; what is wrong with it is added to the problems."""
    if dtype is None:
        return None
    try:
        name = str(jnp.dtype(dtype))
    except TypeError:
        name = repr(dtype)
    if name not in DTYPES:
        problems.append(f"dtype {name} is not one of {', '.join(DTYPES)}")
        return None
    return name


def module_problems(adapters: Sequence[Adapter], weights: Sequence[Any], others: Mapping[str, Any]) -> list[str]:
    """Modules that values given module by module leave out, or that there are none of."""
    problems = [
        problem
        for i, (weight, adapter) in enumerate(zip(weights, adapters, strict=True))
        for problem in coverage_problems(f"the weight of {adapter_name(adapters, i)}", weight, adapter.modules)
    ]
    paths = all_paths(adapters)
    return problems + [p for name, value in others.items() for p in coverage_problems(name, value, paths)]


def coverage_problems(name: str, value: Any, paths: Iterable[str]) -> list[str]:
    """Modules that a mapping leaves out, and names in it that no module has.

    Args:
        name: What errors call the value.
        value: One for all modules, or a mapping.
        paths: The modules.

    Returns:
        Problems, a line each.
    """
    if not isinstance(value, Mapping):
        return []
    paths = list(paths)
    missing, unknown = [path for path in paths if path not in value], sorted(set(value) - set(paths))
    return [
        *([f"{name} says nothing of {listing(missing)}"] if missing else []),
        *([f"{name} is given for modules that there are none of: {listing(unknown)}"] if unknown else []),
    ]


def key_problems(method: str, key: Any) -> list[str]:
    """Whether a method that draws has a key to draw from."""
    if not METHODS[method].random:
        return []
    if key is None:
        return [f"method {method} draws random numbers: pass key=jax.random.key(seed), or --seed"]
    # A raw key is an array of unsigned integers, a typed one has a dtype of its own.
    if not isinstance(key, jax.Array) or key.ndim != int(jnp.issubdtype(key.dtype, jnp.unsignedinteger)):
        return [f"key must be one jax.random.key(seed), got {key!r}"]
    return []


def shape_problems(adapters: Sequence[Adapter]) -> list[str]:
    """Modules whose shapes differ between adapters, or whose factors do not fit each other."""
    problems = [
        f"{adapter_name(adapters, i)}: holds no modules" for i, adapter in enumerate(adapters) if not adapter.modules
    ]
    found = []
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
            shapes = "; ".join(f"{by(*shape)} in {', '.join(who)}" for shape, who in seen.items())
            found.append(f"module {path} has different shapes: {shapes}")
    return problems + folded(found)


def base_problems(adapters: Sequence[Adapter], allow: bool) -> list[str]:
    """Whether the adapters belong to different base models."""
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
    return [f"{problem} (--allow-different-bases, allow_different_bases=True, overrides this)" for problem in problems]


def _nonfinite(adapter: Adapter) -> list[str]:
    """`nonfinite_modules`, with no more of a mapped file in memory than a few modules; on all cores if it can be."""

    def look(module: tuple[str, LoRA]) -> list[str]:
        path, lora = module
        bad = nonfinite_modules(Adapter({path: lora}))
        release(lora.a)
        release(lora.b)
        return bad

    in_numpy = all(isinstance(leaf, np.ndarray) for lora in adapter.modules.values() for leaf in (lora.a, lora.b))
    looked = threads.each(look, adapter.modules.items()) if in_numpy else map(look, adapter.modules.items())
    return [path for bad in looked for path in bad]


def value_problems(adapters: Sequence[Adapter]) -> list[str]:
    """Adapters with a NaN or inf in them."""
    problems = []
    for index, adapter in enumerate(adapters):
        if bad := _nonfinite(adapter):
            problems.append(f"{adapter_name(adapters, index)}: NaN or inf in {listing(bad)}")
    return problems
