"""What factors are called in the trees of each library, which of their axes are what, and what the scale is.

`TREE_FORMATS` is the table: a new format is a row.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# A is [*in, r] and B [r, *out]: heads, windows of a convolution, experts that share a B are axes of one side.
_FLAT = ("*in rank", "rank *out")
_OUT = ("in batch in rank", "rank batch out"), ("in batch in rank", "out batch rank")
_EACH = ("*batch in rank", "*batch rank out")


@dataclass(frozen=True)
class Rule:
    """What the factors of some modules are called, and what their axes are.

    The axes are names of what they do. ``in`` and ``out`` are the sides of the weight; ``rank`` is r; the layers or
    heads of ``batch`` have factors of their own; a B is summed along ``sum`` before it is used. A starred name stands
    for any number of axes.

    Attributes:
        leaf: The path of a factor, its keys joined by ``/``. ``{factor}`` is a or b; ``{module}`` and, where a module
            may have several adapted parameters, ``{parameter}`` stand for any path and any name, or for what the
            regular expression after a colon matches.
        axes: Of A and of B. Of several such pairs the first that fits the shapes.
        scale: ``"one"`` where the forward pass has no scale, ``"alpha"`` where it is alpha / r and alpha is not in
            the tree.
    """

    leaf: str
    axes: tuple[tuple[str, str], ...] = (_FLAT,)
    scale: Literal["one", "alpha"] = "alpha"

    def pattern(self, factor: Literal["a", "b"]) -> str:
        """The regular expression that the paths of all A, or of all B, match."""
        parts = re.split(r"\{(\w+)(?::([^}]*))?\}", self.leaf)
        made = re.escape(parts[0])
        for name, given, after in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
            default = {"module": ".+", "parameter": r"\w+", "factor": factor}[name]
            made += (default if name == "factor" else f"(?P<{name}>{given or default})") + re.escape(after)
        return made

    def path(self, module: str, parameter: str, factor: Literal["a", "b"]) -> str:
        """The path of a factor of a module, whose own path is joined by dots."""
        values = {"module": module.replace(".", "/"), "parameter": parameter, "factor": factor}
        return re.sub(r"\{(\w+)(:[^}]*)?\}", lambda match: values[match[1]], self.leaf)

    def knows(self, module: str, parameter: str) -> bool:
        """Whether the rule itself would recognise the factors of a module."""
        return re.fullmatch(self.pattern("a"), self.path(module, parameter, "a")) is not None


@dataclass(frozen=True)
class PatternRule(Rule):
    """A rule whose names are regular expressions of the user's, with the groups module and, perhaps, parameter."""

    patterns: tuple[str, str] = ("", "")

    def pattern(self, factor: Literal["a", "b"]) -> str:
        """The user's own."""
        return self.patterns[factor == "b"]


@dataclass(frozen=True)
class TreeFormat:
    """A row of `TREE_FORMATS`.

    Attributes:
        rules: Of the rules that match a leaf, the first holds.
        one_rank: Whether all modules must be of one rank; smaller ones are filled up with zeros.
    """

    rules: tuple[Rule, ...]
    one_rank: bool = False


TREE_FORMATS: Mapping[str, TreeFormat] = {
    # nnx.LoRALinear has its factors in its attribute `lora`, nnx.LoRA in the module itself.
    "nnx": TreeFormat(
        (Rule("{module}/lora/lora_{factor}", scale="one"), Rule("{module}/lora_{factor}", scale="one")),
    ),
    # Also Tunix and MaxText, whose adapters qwix makes.
    "qwix": TreeFormat((Rule("{module}/{parameter}_lora_{factor}"),)),
    "gemma": TreeFormat(
        (
            Rule("{module}/_LoRAEinsum_{parameter}/lora/{factor}", scale="one"),
            Rule("{module}/lora/{factor}", scale="one"),
        ),
        one_rank=True,
    ),
    # Its einsums give every head factors of its own, but the output's sums over the heads between A and B. Its MLP
    # leaves the scale out.
    "openpi": TreeFormat(
        (
            Rule(
                r"{module:.*attn_vec_einsum(?:_\d+)?}/lora_{factor}", (("*batch in in rank", "*batch sum rank out"),)
            ),
            Rule(r"{module:.*_einsum(?:_\d+)?}/lora_{factor}", (_EACH,)),
            Rule("{module}/{parameter:gating_einsum|linear}_lora_{factor}", (_EACH,), "one"),
        ),
    ),
    # MaxText before it took qwix; its layers are scanned at axis 1, also where heads come before them. Its own
    # converter wrote the output's B the other way round.
    "maxtext-legacy": TreeFormat(
        (
            Rule("{module:.*out}/lora_{factor}.kernel", (*_OUT, _FLAT)),
            Rule("{module}/lora_{factor}.kernel", (("in batch rank", "rank batch *out"), _FLAT)),
        ),
        one_rank=True,
    ),
    "keras": TreeFormat(
        (Rule("{module}/lora_{parameter:kernel|embeddings}_{factor}"),),
    ),
}  # fmt: skip
