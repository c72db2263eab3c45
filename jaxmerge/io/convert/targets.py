"""The formats that adapters are written in, whatever they came in."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from jaxmerge.io.orbax import Place


@dataclass(frozen=True)
class Target:
    """A format that adapters are written in.

    Attributes:
        tree: Its row in `TREE_FORMATS`.
        place: Where in the checkpoint it lies.
        wrappers: Keys around the tree.
        value: Whether every leaf is in a key ``value`` of its own, as nnx saves them.
        config: The checkpoint's custom metadata, as JSON.
    """

    tree: str
    place: Place
    wrappers: tuple[str, ...] = ()
    value: bool = True
    config: str = "{}"


def _maxtext(scanned: bool) -> str:
    # Its rank and alpha are filled in when it is written.
    return json.dumps({"scan_layers": scanned, "lora": {"enable_lora": True, "lora_rank": 0, "lora_alpha": 0.0}})


TARGETS: Mapping[str, Target] = {
    "tunix": Target("qwix", Place(0, "model_params", False)),
    # MaxText restores adapters from a bare tree with its metadata beside it, and from nothing else (as of 2026-08).
    "maxtext": Target("qwix", Place(None, None, False), config=_maxtext(scanned=True)),
    "maxtext-unscanned": Target("qwix", Place(None, None, False), config=_maxtext(scanned=False)),
    "qwix": Target("qwix", Place(None, "state", True)),
    "nnx": Target("nnx", Place(None, "state", True)),
    "gemma": Target("gemma", Place(None, None, False), value=False),
    "openpi": Target("openpi", Place(0, "params", False), wrappers=("params",)),
    "keras": Target("keras", Place(0, "pytree", False), wrappers=("trainable_variables",), value=False),
}
