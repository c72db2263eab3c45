"""PEFT's key names and configuration: which tensor is what, and what scale a module has.

Nothing here reads a file; keys, shapes and the configuration go in, and a `Contents` comes out, with
everything that stands in the way of a merge told in words.
"""

import functools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxmerge.io import products
from jaxmerge.words import folded, short

PREFIX = "base_model.model."
TOKENS = "token_adapter.trainable_tokens_delta"

# A tensor's role by the end of its key. An adapter's name may stand inside, as it does in memory.
_NAME = r"(?:\.(?P<name>[^.]+))?"
_ROLES: Sequence[tuple[str, re.Pattern[str]]] = [
    ("a", re.compile(rf"^(?P<module>.+)\.lora_A{_NAME}\.weight$")),
    ("b", re.compile(rf"^(?P<module>.+)\.lora_B{_NAME}\.weight$")),
    ("bias", re.compile(rf"^(?P<module>.+)\.lora_B{_NAME}\.bias$")),
    ("embedding_a", re.compile(rf"^(?P<module>.+)\.lora_embedding_A{_NAME}$")),
    ("embedding_b", re.compile(rf"^(?P<module>.+)\.lora_embedding_B{_NAME}$")),
    ("extra", re.compile(rf"^(?P<module>.+)\.token_adapter\.trainable_tokens_delta{_NAME}$")),
    ("extra", re.compile(r"^(?P<module>.+)\.modules_to_save\.(?P<name>[^.]+)\.(?P<rest>.+)$")),
]

# Keys that change what B·A means, and what they belong to.
_FOREIGN: Sequence[tuple[str, str]] = [
    (
        "lora_magnitude_vector",
        "DoRA: its magnitudes multiply the whole weight, so its change is not scale·B·A",
    ),
    ("lora_diag", "KaSA: a diagonal stands between B and A"),
    ("lora_velora", "VeLoRA"),
    ("lora_monteclora", "MonteCLoRA"),
    ("lora_E", "AdaLoRA"),
    ("ia3_l", "IA³: it scales activations and has no factors"),
    ("hada_", "LoHa"),
    ("lokr_", "LoKr"),
    ("oft_", "OFT"),
    ("vera_lambda", "VeRA"),
    ("lora_", "a kind of LoRA that jaxmerge does not know"),
]

# Switches in adapter_config.json under which scale·B·A is not the change of the weight.
_SWITCHES: Mapping[str, str] = {
    "use_dora": "DoRA: its magnitudes multiply the whole weight, so its change is not scale·B·A",
    "use_qalora": "QA-LoRA: its A acts on pooled inputs",
    "use_bdlora": "BD-LoRA: its factors are block-diagonal",
    "kasa_config": "KaSA: a diagonal stands between B and A",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow: it routes between adapters",
    "alora_invocation_tokens": "aLoRA: it is active only after its invocation tokens",
}
# The switches that are read, by the kind of adapter.
_KNOWN_SWITCHES: Mapping[str, Collection[str]] = {
    "LORA": {"use_rslora", "use_dora", "use_qalora", "use_bdlora"},
    **dict.fromkeys(products.NAMES, ("use_effective_conv2d",)),
}

_OWN_BASE: Mapping[str, str] = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "loftq": "LoftQ",
    "lora_ga": "LoRA-GA",
}

FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as its header tells it: ``dtype`` in safetensors' spelling, and its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """How a module's factors lie in the file.

    Attributes:
        kind: ``"linear"``, ``"embedding"`` or ``"conv"``.
        kernel: The kernel's size, for a convolution.
    """

    kind: str = "linear"
    kernel: tuple[int, ...] = ()


@dataclass
class ModuleKeys:
    """The keys of one module's tensors, and what the configuration says of it."""

    keys: dict[str, str] = field(default_factory=dict)
    layout: Layout = Layout()
    scale: float = 1.0
    product: products.Product | None = None


@dataclass
class Contents:
    """What an adapter holds.

    Attributes:
        modules: Module path -> its keys.
        extras: Name without the prefix and the adapter's name -> key.
        problems: Why it cannot be read as LoRA factors; empty if it can.
        own_base: Why its factors belong to a base model of their own, or empty.
        kind: ``"LORA"``, or one of the kinds in `jaxmerge.io.products`, whose modules become LoRA when they are read.
    """

    modules: dict[str, ModuleKeys]
    extras: dict[str, str]
    problems: list[str]
    own_base: str = ""
    kind: str = "LORA"


def read_contents(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> Contents:
    """Sorts an adapter's tensors into modules and extras, and gives every module its scale.

    Args:
        config: The parsed adapter_config.json.
        tensors: Key -> header.

    Returns:
        The contents, with all problems found.
    """
    kind = str(config.get("peft_type", "LORA")).rsplit(".", 1)[-1].upper()
    if kind not in _KNOWN_SWITCHES:
        return Contents({}, {}, [_unmergeable(f"{kind}: it is not LoRA and has no pairs of factors")])
    problems = _config_problems(config, kind)
    if problems:  # The tensors of another kind of adapter would only repeat it, key by key.
        return Contents({}, {}, problems)
    modules, extras, problems = _sort_keys(tensors, kind)
    if not modules and not problems:
        whats = f"{products.NAMES[kind]} factors" if kind in products.NAMES else "LoRA factors (no lora_A and lora_B)"
        problems.append(f"holds no {whats}")
    check = _check_module if kind == "LORA" else functools.partial(_check_product, kind=kind)
    found = [(path, check(path, module, tensors, config)) for path, module in modules.items()]
    problems += folded(f"module {path} {problem}" for path, problem in found if problem)
    return Contents(modules, extras, problems, _own_base(config), kind)


def nominal_rank(config: Mapping[str, Any]) -> int:
    """The rank that PEFT takes an adapter to have: the largest that its configuration names."""
    return max(config.get("r", 8), *(config.get("rank_pattern") or {}).values(), 1)


def _config_problems(config: Mapping[str, Any], kind: str) -> list[str]:
    problems = [_unmergeable(what) for name, what in _SWITCHES.items() if config.get(name)]
    if config.get("target_parameters"):
        names = ", ".join(map(str, as_list(config["target_parameters"])))
        problems.append(f"adapts nn.Parameters ({names}; target_parameters), which cannot be merged yet")
    for name, value in config.items():
        if name.startswith("use_") and value and name not in _KNOWN_SWITCHES[kind]:
            variant = products.NAMES.get(kind, "LoRA")
            problems.append(f"sets {name} in adapter_config.json, a variant of {variant} that jaxmerge does not know")
        elif name in ("use_rslora", "fan_in_fan_out") and not isinstance(value, bool | None):
            problems.append(f"{name} in adapter_config.json is {short(value)}, not true or false")
    for name in ("r", "lora_alpha" if kind == "LORA" else "alpha"):
        value = config.get(name, 8)
        if not _is_number(value):
            problems.append(f"{name} in adapter_config.json is {short(value)}, not a number")
    for name in ("base_model_name_or_path", "bias"):
        value = config.get(name) or ""
        if not isinstance(value, str) or not value.isprintable():
            problems.append(f"{name} in adapter_config.json is {short(value)}, not a name")
    for name in ("rank_pattern", "alpha_pattern"):
        problems += _pattern_problems(name, config.get(name) or {})
    targets = config.get("target_modules")
    if isinstance(targets, str) and (error := _not_regular(targets)):
        problems.append(f"target_modules in adapter_config.json is not a regular expression: {error}")
    return problems


def as_list(names: Any) -> list[Any]:
    """A list of names of which the configuration may have one alone, or none."""
    return [names] if isinstance(names, str) else list(names or [])


def _unmergeable(what: str) -> str:
    """Says of ``"name: reason"`` or ``"name"`` that it cannot be merged."""
    name, colon, reason = what.partition(": ")
    return f"is {name}, which cannot be merged{colon}{reason}"


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -1e30 < value < 1e30  # NaN is not, nor is an integer too long to be a float.


def _pattern_problems(name: str, patterns: Any) -> list[str]:
    if not isinstance(patterns, Mapping):
        return [f"{name} in adapter_config.json is not a mapping"]
    problems = []
    for pattern, value in patterns.items():
        if not _is_number(value):
            problems.append(f"{name}[{pattern!r}] in adapter_config.json is {short(value)}, not a number")
        if error := _not_regular(pattern):
            problems.append(f"{name}[{pattern!r}] in adapter_config.json is not a regular expression: {error}")
    return problems


def _not_regular(pattern: str) -> str | None:
    """Why a text is no regular expression; None if it is one."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error) or type(error).__name__
    return None


def _own_base(config: Mapping[str, Any]) -> str:
    init = config.get("init_lora_weights")
    if not isinstance(init, str):
        return ""
    for start, what in _OWN_BASE.items():
        if init.lower().startswith(start):
            return (
                f"was initialised with {what}, which changed its base model's weights, so that its factors do "
                "not fit other adapters; convert it first (PEFT: save_pretrained with "
                "path_initial_model_for_weight_conversion)"
            )
    return ""


def _sort_keys(tensors: Collection[str], kind: str) -> tuple[dict[str, ModuleKeys], dict[str, str], list[str]]:
    modules: dict[str, ModuleKeys] = {}
    extras: dict[str, str] = {}
    problems, names, roles = [], set(), _roles(kind)
    foreign: dict[str, list[str]] = {}
    loose: dict[str, str] = {}
    if strange := [key for key in tensors if not key.isprintable()]:
        return {}, {}, [f"holds a tensor with characters in its name that cannot be shown: {short(strange[0])}"]
    for key in sorted(tensors, key=natural_order):
        role, path, name = _role(key.removeprefix(PREFIX), roles)
        names.add(name)
        if role == "foreign":
            foreign.setdefault(path, []).append(key)
        elif role == "extra":
            loose[key] = path
        else:
            keys = modules.setdefault(path, ModuleKeys()).keys
            if role in keys:
                problems.append(f"{key} and {keys[role]} are the same factor under two names")
            keys[role] = key
    for key, path in loose.items():
        name = outside_wrapper(path, modules)
        if name in extras:
            problems.append(f"{key} and {extras[name]} are the same tensor under two names")
        extras[name] = key
    for what, keys in foreign.items():
        more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
        problems.append(f"{_unmergeable(what)} ({keys[0]}{more})")
    if len(names - {None}) > 1:
        listed = ", ".join(sorted(name for name in names if name))
        problems = [f"holds several adapters in one file ({listed}); save them one by one"]
    return modules, extras, problems


def outside_wrapper(name: str, modules: Collection[str]) -> str:
    """An extra's name without the wrapper ``base_layer`` that PEFT puts around a module with LoRA factors.

    What one adapter saves as ``head.bias`` is ``head.base_layer.bias`` to another that adapts ``head``.
    """
    path = max((path for path in modules if name.startswith(f"{path}.base_layer.")), key=len, default=None)
    return name if path is None else path + name.removeprefix(f"{path}.base_layer")


def inside_wrapper(name: str, modules: Collection[str]) -> str:
    """The inverse of `outside_wrapper`: an extra's name where these modules have LoRA factors."""
    path = max((path for path in modules if name.startswith(f"{path}.")), key=len, default=None)
    return name if path is None else f"{path}.base_layer{name.removeprefix(path)}"


def _roles(kind: str) -> Sequence[tuple[str, re.Pattern[str]]]:
    """The roles that tensors of a kind of adapter have."""
    if kind == "LORA":
        return _ROLES
    own = [(role, re.compile(rf"^(?P<module>.+)\.{role}{_NAME}$")) for role in products.ROLES[kind]]
    return [*own, *(row for row in _ROLES if row[0] == "extra")]


def _role(key: str, roles: Sequence[tuple[str, re.Pattern[str]]]) -> tuple[str, str, str | None]:
    """A key's role, its module path, and the adapter's name in it.

    In place of the path: for an extra its own name, for a foreign key what it belongs to.
    """
    for role, pattern in roles:
        match = pattern.match(key)
        if match is None:
            continue
        name = match["name"]
        if role != "extra":
            return role, match["module"], name
        if "rest" in match.groupdict():
            return role, f"{match['module']}.{match['rest']}", name
        return role, f"{match['module']}.{TOKENS}", name
    for start, what in _FOREIGN:
        if any(part.startswith(start) for part in key.split(".")):
            return "foreign", what, None
    return "extra", key, None


def _check_module(
    path: str, module: ModuleKeys, tensors: Mapping[str, TensorSpec], config: Mapping[str, Any]
) -> str | None:
    """Finds the module's layout and scale; returns what is wrong with it, if anything, to be said after its name."""
    embedding = any(role.startswith("embedding") for role in module.keys)
    roles = ("embedding_a", "embedding_b") if embedding else ("a", "b")
    missing = [role[-1].upper() for role in roles if role not in module.keys]
    if missing or (embedding and len(module.keys) > 2):
        return f"lacks its factor {missing[0]}" if missing else "mixes two kinds"
    a, b = (tensors[module.keys[role]] for role in roles)
    module.keys["a"], module.keys["b"] = (module.keys.pop(role) for role in roles)
    for spec in (a, b):
        if spec.dtype not in FLOATS:
            return f"is stored as {spec.dtype}; LoRA factors must be F16, BF16, F32 or F64"
    kernel = a.shape[2:]
    if len(a.shape) < 2 or len(a.shape) != len(b.shape) or 0 in a.shape or 0 in b.shape:
        return f"has factors of shapes {a.shape} and {b.shape}, which no layer has"
    rank = a.shape[0]
    if kernel and b.shape[1] != rank and rank % b.shape[1] == 0:
        return f"is a grouped convolution ({rank // b.shape[1]} groups), which cannot be merged yet"
    if b.shape[1] != rank or any(size != 1 for size in b.shape[2:]):
        return f"has factors of shapes {a.shape} and {b.shape}, whose ranks differ"
    name = outer_module(path)
    declared = _declared_rank(config, name)
    if declared != rank:
        return _other_rank(rank, declared, config)
    bias = tensors[module.keys["bias"]] if "bias" in module.keys else None
    if bias is not None and (bias.shape != b.shape[:1] or bias.dtype not in FLOATS):
        return f"has a lora_B.bias of shape {bias.shape} and type {bias.dtype}, which does not fit"
    alpha = _for_module(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    module.scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    module.layout = Layout("embedding" if embedding else "conv" if kernel else "linear", kernel)
    return None


def _check_product(
    path: str, module: ModuleKeys, tensors: Mapping[str, TensorSpec], config: Mapping[str, Any], kind: str
) -> str | None:
    """`_check_module` for a module of LoHa or LoKr."""
    if missing := products.lacking(kind, module.keys):
        return f"lacks its factor {missing[0]}"
    specs = {role: tensors[key] for role, key in module.keys.items()}
    if others := [spec.dtype for spec in specs.values() if spec.dtype not in FLOATS]:
        return f"is stored as {others[0]}; {products.NAMES[kind]} must be F16, BF16, F32 or F64"
    product = products.of_shapes(kind, {role: spec.shape for role, spec in specs.items()})
    if product is None:
        shapes = ", ".join(f"{role} {spec.shape}" for role, spec in specs.items())
        return f"has tensors that no {products.NAMES[kind]} layer has: {shapes}"
    declared = _declared_rank(config, path)
    if others := product.inner - {declared}:
        return _other_rank(min(others), declared, config)
    if not declared > 0:
        return f"has rank {declared} in adapter_config.json, by which its alpha is divided"
    module.product = product
    module.scale = _for_module(config.get("alpha_pattern"), path, config.get("alpha", 8)) / declared
    module.layout = Layout("conv" if product.kernel else "linear", product.kernel)
    return None


def outer_module(path: str) -> str:
    """The module whose rank and alpha a module has: that around it, for the projection inside MultiheadAttention."""
    return path.removesuffix(".base_layer.out_proj")


def _declared_rank(config: Mapping[str, Any], name: str) -> Any:
    return _for_module(config.get("rank_pattern"), name, config.get("r", 8))


def _other_rank(rank: int, declared: Any, config: Mapping[str, Any]) -> str:
    says = f"says {declared}" if "r" in config else f"has no r, for which PEFT takes {declared}"
    return f"has rank {rank}, but adapter_config.json {says}"


def _for_module(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that PEFT would match to a module's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def natural_order(path: str) -> list[tuple[int, int | str]]:
    """A sort key under which ``layers.2`` comes before ``layers.10``."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", path)]
