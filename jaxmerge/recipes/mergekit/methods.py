"""The methods of mergekit's, and what they are here. What it means by its parameters is known from its behaviour."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# A parameter that has to be given.
WANTED = object()

ARC = "there the sphere is that of whole weights, here that of the changes to the base model"
DRAWS = "masks are drawn with seed 0: mergekit takes its seed from the command line, and draws other numbers"
_RESCALES = "what is kept is divided by its chance to be kept, as in the paper; mergekit restores the sum of magnitudes"


@dataclass(frozen=True)
class Method:
    """A method of mergekit's.

    Attributes:
        method: What it is in `METHODS`.
        of_models: Parameters that each model may have its own of, and what they are if not given.
        of_merge: The others.
        fixed: Parameters that can only be what they are here, and why.
        base: What the base model is: ``"zero"`` of the changes, ``"first"`` one of the two that are merged,
            ``"ignored"`` if there is one.
        choices: Hyperparameters that make it mergekit's.
        notes: What is different all the same.
    """

    method: str
    of_models: Mapping[str, Any] = field(default_factory=dict)
    of_merge: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    base: str = "zero"
    choices: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


_WEIGHT = {"weight": WANTED}
_PRUNED = {"weight": WANTED, "density": 1.0}
_UNSCALED = {"rescale": (False, "the sum of magnitudes of what is left is not restored here, nor in the paper")}
_SCALED = {"rescale": (True, "what is kept is always divided by its chance to be kept, as in the paper")}


def _sums(normalize: bool) -> dict[str, Any]:
    return {"normalize": normalize, "lambda": 1.0, "int8_mask": False}


_ELECTS = {"election": "weighted"}

METHODS: Mapping[str, Method] = {
    "linear": Method("linear", _WEIGHT, {"normalize": True}, base="ignored"),
    "task_arithmetic": Method("linear", {**_PRUNED}, {**_sums(False), "rescale": False}),
    "ties": Method("ties", _PRUNED, _sums(True), _UNSCALED, choices=_ELECTS),
    "dare_linear": Method("dare_linear", _PRUNED, _sums(False), _SCALED, notes=(_RESCALES, DRAWS)),
    "dare_ties": Method("dare_ties", _PRUNED, _sums(False), _SCALED, choices=_ELECTS, notes=(_RESCALES, DRAWS)),
    "breadcrumbs": Method("breadcrumbs", {**_PRUNED, "gamma": 0.01}, _sums(False), _UNSCALED),
    "breadcrumbs_ties": Method(
        "breadcrumbs_ties", {**_PRUNED, "gamma": 0.01}, _sums(False), _UNSCALED, choices=_ELECTS
    ),
    "della": Method(
        "della", {**_PRUNED, "epsilon": 0.15}, _sums(True), _SCALED, choices=_ELECTS, notes=(_RESCALES, DRAWS)
    ),
    "della_linear": Method(
        "della_linear", {**_PRUNED, "epsilon": 0.15}, _sums(False), _SCALED, notes=(_RESCALES, DRAWS)
    ),
    "sce": Method(
        "sce",
        of_merge={"select_topk": 1.0, "int8_mask": False},
        notes=("adapters are weighed by their energy however small it is; mergekit weighs small changes alike",),
    ),
    "slerp": Method("slerp", of_merge={"t": WANTED}, base="first", notes=(ARC,)),
    "nuslerp": Method(
        "nuslerp",
        _WEIGHT,
        fixed={
            "nuslerp_row_wise": (False, "a weight change is turned as a whole here"),
            "nuslerp_flatten": (True, "a weight change is turned as a whole here"),
        },
    ),
    "multislerp": Method(
        "multislerp",
        _WEIGHT,
        {"eps": 1e-8},
        {"normalize_weights": (True, "only the proportions of its weights count here")},
    ),
    "karcher": Method("karcher", of_merge={"max_iter": 10, "tol": 1e-5}, base="ignored", notes=(ARC,)),
    "model_stock": Method("model_stock", fixed={"filter_wise": (False, "a change is shortened as a whole here")}),
    "nearswap": Method("nearswap", of_merge={"t": WANTED}, base="first"),
}  # fmt: skip

ELSEWHERE = {
    "arcee_fusion": "it compares whole weights by a softmax, and an adapter holds only their changes",
    "passthrough": "it takes one model as it is: jaxmerge convert, or method linear with one adapter",
    "ram": "it is not among the methods here",
    "ramplus_tl": "it is not among the methods here",
}
