"""Which parameter of a Flax model is which module of PEFT's: tables of rows, one table per model and format.

A table is data. Users write their own in JSON, as a list of objects with the fields of `Row`.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Conversion:
    """What a conversion was asked for.

    Attributes:
        format: ``"peft"`` or the name of another format; None for the adapter's own.
        layout: A name in `LAYOUTS`, or the path of a table.
        head_dim: The size of one attention head.
        layers: How many layers the model has, where the target stacks them.
    """

    format: str | None = None
    layout: str | None = None
    head_dim: int | None = None
    layers: int | None = None


# What the one parameter of a layer is called, so that its name says nothing: modules go by their own.
PLAIN_PARAMETERS = ("kernel", "w", "0", "embedding", "embeddings")


@dataclass(frozen=True)
class Row:
    """A module of PEFT's and the parameter of a tree that is the same weight.

    Paths are dotted and have placeholders: ``{layer}`` stands for a number, ``{block*6+2}`` for two more
    than six times a number, ``{kv=k|v}`` for one of several names. A placeholder of `peft` that `tree` does not
    have is an axis of the parameter.

    Axes are names, separated by spaces, slowest first. ``head_dim`` is the size of one attention head.

    Attributes:
        peft: Module path.
        tree: Module path.
        parameter: The adapted parameter of the tree's module. Another than ``kernel``, ``w``, ``0``, ``embedding`` or
            ``embeddings`` is the last part of the module's path, and is put there if `tree` does not end with it.
        inputs: The axes of PEFT's ``in``.
        outputs: The axes of PEFT's ``out``.
        a: The axes of the tree's A without the rank, if they are others than `inputs`.
        b: The axes of the tree's B without the rank, if they are others than `outputs`.
        scan_axis: In which place of A and B the axes lie that are in both.
        rotary: Whether the tree keeps the halves of each head's rotary pairs side by side, which PEFT keeps apart.
        head_scale: Whether the tree's weight has the factor 1/√head_dim in it that PEFT's has not.
    """

    peft: str
    tree: str
    parameter: str = "kernel"
    inputs: str = "in"
    outputs: str = "out"
    a: str = ""
    b: str = ""
    scan_axis: int = 0
    rotary: bool = False
    head_scale: bool = False

    @property
    def a_axes(self) -> tuple[str, ...]:
        """The axes of the tree's A without the rank."""
        return tuple((self.a or self.inputs).split())

    @property
    def b_axes(self) -> tuple[str, ...]:
        """The axes of the tree's B without the rank."""
        return tuple((self.b or self.outputs).split())

    @property
    def module(self) -> str:
        """The tree's module as jaxmerge calls it."""
        named = self.parameter in PLAIN_PARAMETERS or self.tree.endswith(f".{self.parameter}")
        return self.tree if named else f"{self.tree}.{self.parameter}"

    @property
    def unrolled(self) -> tuple[str, ...]:
        """The axes of the parameter that are numbers in PEFT's path."""
        return tuple(name for name in placeholders(self.peft) if name not in placeholders(self.tree))


_PLACEHOLDER = re.compile(r"\{(?P<name>\w+)(?:\*(?P<factor>\d+)(?:\+(?P<offset>\d+))?|=(?P<choices>[^}]+))?\}")


def placeholders(template: str) -> dict[str, Sequence[str]]:
    """The names of a template's placeholders, with what each may stand for if that is not any number."""
    return {m["name"]: m["choices"].split("|") if m["choices"] else () for m in _PLACEHOLDER.finditer(template)}


def layer_number(template: str) -> tuple[str, int, int] | None:
    """Of the placeholder that numbers the layers: its name, factor and offset; None if there is none."""
    for found in _PLACEHOLDER.finditer(template):
        if template[: found.start()].endswith("layers.") and not found["choices"]:
            return found["name"], int(found["factor"] or 1), int(found["offset"] or 0)
    return None


def match(template: str, path: str) -> dict[str, int] | None:
    """The numbers that its placeholders stand for in a path; None if it does not fit."""
    pattern, end = "", 0
    for found in _PLACEHOLDER.finditer(template):
        name, choices = found["name"], found["choices"]
        inner = "|".join(map(re.escape, choices.split("|"))) if choices else r"\d+"
        pattern += re.escape(template[end : found.start()]) + f"(?P<{name}>{inner})"
        end = found.end()
    fitted = re.fullmatch(pattern + re.escape(template[end:]), path)
    if fitted is None:
        return None
    values = {}
    for found in _PLACEHOLDER.finditer(template):
        text, choices = fitted[found["name"]], found["choices"]
        number = choices.split("|").index(text) if choices else int(text)
        number, rest = divmod(number - int(found["offset"] or 0), int(found["factor"] or 1))
        if rest or number < 0:
            return None
        values[found["name"]] = number
    return values


def fill(template: str, values: Mapping[str, int]) -> str:
    """The path for given numbers, the inverse of `match`."""

    def text(found: re.Match[str]) -> str:
        number = values[found["name"]]
        if found["choices"]:
            return found["choices"].split("|")[number]
        return str(number * int(found["factor"] or 1) + int(found["offset"] or 0))

    return _PLACEHOLDER.sub(text, template)


_HEADS = "heads head_dim"
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_HF = "model.layers.{layer}"

_TUNIX_MLP = tuple(Row(f"{_HF}.mlp.{name}", f"layers.{{layer}}.mlp.{name}") for name in _MLP)
_TUNIX_HEAD = Row("lm_head", "lm_head", "w")

_TUNIX_LLAMA = (
    *[Row(f"{_HF}.self_attn.{name}", f"layers.{{layer}}.attn.{name}", "w", "embed", _HEADS) for name in _ATTENTION[:3]],
    Row(f"{_HF}.self_attn.o_proj", "layers.{layer}.attn.o_proj", "w", _HEADS, "embed"),
    *_TUNIX_MLP,
    _TUNIX_HEAD,
)


def _tunix_gemma(hf: str) -> tuple[Row, ...]:
    """Keys and values share an A here, and queries with them in models that have as many of each."""
    attention, tunix = f"{hf}.self_attn", "layers.{layer}.attn"
    return (
        Row(f"{attention}.{{qkv=q|k|v}}_proj", f"{tunix}.qkv_einsum", "w", "embed", _HEADS, b=f"qkv {_HEADS}"),
        Row(f"{attention}.q_proj", f"{tunix}.q_einsum", "w", "embed", _HEADS),
        Row(f"{attention}.{{kv=k|v}}_proj", f"{tunix}.kv_einsum", "w", "embed", _HEADS, b=f"kv {_HEADS}"),
        Row(f"{attention}.o_proj", f"{tunix}.attn_vec_einsum", "w", _HEADS, "embed"),
        *[dataclasses.replace(row, peft=row.peft.replace(_HF, hf)) for row in _TUNIX_MLP],
        _TUNIX_HEAD,
    )


def _gemma(hf: str) -> tuple[Row, ...]:
    """The gemma library: keys and values share an A, and so do the gate and what it gates."""
    layer = "layer_{layer}"
    return (
        Row(f"{hf}.self_attn.q_proj", f"{layer}.attn.q_einsum", "0", "embed", _HEADS),
        Row(f"{hf}.self_attn.{{kv=k|v}}_proj", f"{layer}.attn.kv_einsum", "0", "embed", _HEADS, b=f"kv {_HEADS}"),
        Row(f"{hf}.self_attn.o_proj", f"{layer}.attn.attn_vec_einsum", "0", _HEADS, "embed"),
        Row(
            f"{hf}.mlp.{{part=gate|up}}_proj", f"{layer}.mlp.gating_einsum", "gating_einsum", "embed", "ff", b="part ff"
        ),
        Row(f"{hf}.mlp.down_proj", f"{layer}.mlp.linear", "linear", "ff", "embed"),
    )


def _maxtext(
    hf: str, block: str, unrolled: str = "", rotary: bool = False, scaled: bool = False, suffix: str = ""
) -> list[Row]:
    """The weights of one layer of MaxText's, whose heads lie flat in A and B.

    Args:
        hf: PEFT's layer.
        block: MaxText's.
        unrolled: The number in `hf` that is an axis of the parameters.
        rotary: As in `Row`, of queries and keys.
        scaled: As `Row.head_scale`, of queries.
        suffix: Of the names of the block's attention and MLP.
    """
    scan: dict[str, Any] = {"a": f"{unrolled} in", "b": f"{unrolled} out", "scan_axis": 1} if unrolled else {}
    attention, mlp = f"{block}.self_attention{suffix}", f"{block}.mlp{suffix}"
    names = dict(zip(_ATTENTION, ("query", "key", "value", "out"), strict=True))
    return [
        *[
            Row(
                f"{hf}.self_attn.{name}",
                f"{attention}.{other}",
                rotary=rotary and name in ("q_proj", "k_proj"),
                head_scale=scaled and name == "q_proj",
                **scan,
            )
            for name, other in names.items()
        ],
        *[
            Row(f"{hf}.mlp.{name}", f"{mlp}.{other}", **scan)
            for name, other in zip(_MLP, ("wi_0", "wi_1", "wo"), strict=True)
        ],
    ]


def _maxtext_unscanned(hf: str, rotary: bool = False, scaled: bool = False) -> tuple[Row, ...]:
    # A list of nnx has its numbers in keys of their own.
    blocks = ("decoder.layers_{layer}", "decoder.layers.{layer}")
    return tuple(row for block in blocks for row in _maxtext(hf, block, "", rotary, scaled))


def _maxtext_gemma2(scanned: bool) -> tuple[Row, ...]:
    """Layers come in pairs, one with local attention and one with global."""
    blocks = ("decoder.layers",) if scanned else ("decoder.layers_{pair}", "decoder.layers.{pair}")
    return tuple(
        row
        for block in blocks
        for hf, suffix in (("model.layers.{pair*2}", "_local"), ("model.layers.{pair*2+1}", "_global"))
        for row in _maxtext(hf, block, "pair" * scanned, scaled=True, suffix=suffix)
    )


_GEMMA3_BLOCK = 6


def _maxtext_gemma3(hf: str, layers: int) -> tuple[Row, ...]:
    """Layers come in sixes, scanned, and what is left of them is not."""
    blocks, rest = divmod(layers, _GEMMA3_BLOCK)
    scanned = [
        row
        for slot in range(_GEMMA3_BLOCK)
        for row in _maxtext(
            hf.format(layer=f"{{block*{_GEMMA3_BLOCK}+{slot}}}"), f"decoder.layers.layers_{slot}", "block"
        )
    ]
    remainder = [
        row
        for slot in range(rest)
        for row in _maxtext(hf.format(layer=_GEMMA3_BLOCK * blocks + slot), f"decoder.layers_remainder.layers_{slot}")
    ]
    return (*remainder, *scanned)


Table = tuple[Row, ...] | Callable[[int], tuple[Row, ...]]


def _gemma3(hf: str) -> dict[str, Table]:
    return {
        "tunix": _tunix_gemma(hf),
        "gemma": _gemma(hf),
        "maxtext": functools.partial(_maxtext_gemma3, hf),
        "maxtext-unscanned": _maxtext_unscanned(hf),
    }


def _plain(rotary: bool = False, scaled: bool = False) -> dict[str, Table]:
    return {
        "tunix": _TUNIX_LLAMA,
        "maxtext": tuple(_maxtext(_HF, "decoder.layers", "layer", rotary, scaled)),
        "maxtext-unscanned": _maxtext_unscanned(_HF, rotary, scaled),
    }


# Model -> format -> table, or a function of the model's number of layers that gives it.
LAYOUTS: Mapping[str, Mapping[str, Table]] = {
    # From Llama 3.1 on MaxText interleaves the halves of rotary pairs, and all its Llamas have queries divided by
    # √head_dim in the weights.
    "llama3": _plain(rotary=True, scaled=True),
    "llama3.0": _plain(scaled=True),
    "qwen2": _plain(),
    "qwen3": _plain(),
    "gemma2": {
        "tunix": _tunix_gemma(_HF),
        "gemma": _gemma(_HF),
        "maxtext": _maxtext_gemma2(scanned=True),
        "maxtext-unscanned": _maxtext_gemma2(scanned=False),
    },
    "gemma3": _gemma3(_HF),
    # As transformers calls the layers of the models that also see pictures.
    "gemma3-multimodal": _gemma3("model.language_model.layers.{layer}"),
}


def rows_of_scanned(table: Table, layers: int) -> tuple[Row, ...]:
    """The rows of a table for a tree whose scans have so many layers, with any remainder that there may be."""
    return table(_GEMMA3_BLOCK * layers + _GEMMA3_BLOCK - 1) if callable(table) else table


def tables(layout: str) -> Mapping[str, Table]:
    """The tables of a layout by the formats they are for.

    Args:
        layout: A name in `LAYOUTS`, or the path of a JSON file with a table for any format.

    Returns:
        Format -> rows; ``""`` in place of the format for a table of the user's.

    Raises:
        ValueError: If there is no such layout, or the file is no table.
    """
    if layout in LAYOUTS:
        return LAYOUTS[layout]
    if not layout.endswith(".json"):
        raise ValueError(f"unknown layout {layout!r}: there are {', '.join(LAYOUTS)}, or give a JSON file of your own")
    try:
        found = json.loads(Path(layout).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{layout}: cannot be read as JSON: {error}") from None
    if not isinstance(found, list) or not found:
        raise ValueError(f"{layout}: is not a list of rows")
    rows = tuple(_row(layout, number, entry) for number, entry in enumerate(found, 1))
    modules = [re.sub(_PLACEHOLDER, "{}", row.module) for row in rows]
    if twice := [number for number, module in enumerate(modules, 1) if module in modules[: number - 1]]:
        raise ValueError(f"{layout}: row {twice[0]} has the module and parameter of a row before it")
    return {"": rows}


def _row(path: str, number: int, entry: Any) -> Row:
    kinds = {field.name: type(field.default) for field in dataclasses.fields(Row)} | {"peft": str, "tree": str}
    if not isinstance(entry, dict) or not {"peft", "tree"} <= set(entry):
        raise ValueError(f"{path}: row {number} is not an object with the fields peft and tree")
    for name, value in entry.items():
        if name not in kinds:
            raise ValueError(f"{path}: row {number} has a field {name}; there are {', '.join(kinds)}")
        if type(value) is not kinds[name]:
            raise ValueError(f"{path}: row {number}: {name} must be of type {kinds[name].__name__}, got {value!r}")
    row = Row(**entry)
    for name in ("peft", "tree"):
        found = [match["name"] for match in _PLACEHOLDER.finditer(entry[name])]
        whole = not re.search(r"[{}]", _PLACEHOLDER.sub("", entry[name]))
        if not entry[name] or len(set(found)) < len(found) or not whole or not all(map(str.isidentifier, found)):
            raise ValueError(f"{path}: row {number}: {name} is no path with placeholders of different names")
        if any(match["factor"] == "0" for match in _PLACEHOLDER.finditer(entry[name])):
            raise ValueError(f"{path}: row {number}: {name} has a factor of 0")
    choices = placeholders(row.peft)
    if other := [n for n, c in placeholders(row.tree).items() if n in choices and len(c) != len(choices[n])]:
        raise ValueError(f"{path}: row {number}: {{{other[0]}}} stands for other things in tree than in peft")
    if any(len(set(names)) < len(names) for names in choices.values()):
        raise ValueError(f"{path}: row {number}: a placeholder names one thing twice")
    if not re.fullmatch(r"\w+", row.parameter) or not 0 <= row.scan_axis <= 8:
        raise ValueError(f"{path}: row {number}: parameter must be a name, and scan_axis a number from 0 to 8")
    if lost := [name for name in placeholders(row.tree) if name not in placeholders(row.peft)]:
        raise ValueError(f"{path}: row {number}: {{{lost[0]}}} is in tree and not in peft")
    axes = {*row.a_axes, *row.b_axes}
    if lost := [name for name in row.unrolled if name not in axes]:
        raise ValueError(f"{path}: row {number}: {{{lost[0]}}} is not in tree, and so must be an axis in a or b")
    if axes - set(row.unrolled) != {*row.inputs.split(), *row.outputs.split()} or "rank" in axes:
        raise ValueError(f"{path}: row {number}: a and b have other axes than inputs and outputs")
    return row
