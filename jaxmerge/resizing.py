"""`resize`: an adapter of smaller ranks, chosen module by module from its singular values.

The weight change of a module is never formed: its singular values are those of an r×r core, by QRs of the factors, and
what is kept of them is the best approximation there is of that rank (Eckart-Young).
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from jaxmerge import lapack, threads
from jaxmerge.base import Adapter, Energy, LoRA, has_values, precision
from jaxmerge.io.peft.keys import outer_module
from jaxmerge.memory import release
from jaxmerge.merging.checks import checked_rank, raise_problems
from jaxmerge.merging.plan import plan_merge
from jaxmerge.merging.stacks import Bucket
from jaxmerge.sharding import laid_out, placement, seen_everywhere
from jaxmerge.spectrum import count_by
from jaxmerge.version import versions
from jaxmerge.words import were_given


def resize(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    sv_ratio: float | None = None,
    sv_fro: float | None = None,
    sv_cumulative: float | None = None,
    max_rank: int | None = None,
    dtype: DTypeLike | None = None,
) -> Adapter:
    """Truncates every module to the rank that a rule finds for it: exactly one of the first five.

    The rules are those of kohya's ``resize_lora.py``, and energy. With σ the singular values of a module's weight
    change, largest first: those that are no more than rounding are never kept, and a module that is 0 keeps rank 1.
    Layers and experts that lie in one module share its rank, the largest that any of them needs.

    Args:
        adapter: Of concrete arrays: the ranks depend on their values.
        rank: Of every module that has as much.
        energy: In (0, 1]; the smallest rank that keeps this fraction of Σσ².
        sv_ratio: From 1; what is kept are the σ of at least σ₁ / sv_ratio.
        sv_fro: In (0, 1]; the smallest rank that keeps this fraction of the Frobenius norm √Σσ².
        sv_cumulative: In (0, 1]; the smallest rank that keeps this fraction of Σσ.
        max_rank: The most that a rule other than rank may find.
        dtype: Of the result; None keeps that of the adapter. Arithmetic is float64.

    Returns:
        The adapter, of scale 1, with what truncation lost in `Adapter.energy`; a ``lora_bias`` is multiplied by the
        old scale, and extras pass through.

    Raises:
        ValueError: If there is not one rule, its number means nothing, or the adapter holds NaN or no values at all.
    """
    rule = rule_of(
        rank=rank, energy=energy, sv_ratio=sv_ratio, sv_fro=sv_fro, sv_cumulative=sv_cumulative, max_rank=max_rank
    )
    if not all(map(has_values, jax.tree.leaves(adapter))):
        raise ValueError(
            "resize chooses ranks by values, which are not known here; inside jax.jit merge([adapter], [1.0], rank=r) "
            "truncates to one rank"
        )
    resized = _resized(adapter, rule, dtype)
    record = {
        "inputs": [json.loads(adapter.metadata.provenance)],
        "resize": rule.record(),
        "dtype": json.loads(resized.metadata.provenance)["dtype"],
        "versions": versions(),
    }
    return dataclasses.replace(resized, metadata=dataclasses.replace(resized.metadata, provenance=json.dumps(record)))


def truncate(merged: Adapter, rule: "Rule") -> Adapter:
    """`resize` of an adapter that has just been merged: its record and what it has lost already stay.

    Args:
        merged: From `jaxmerge.merge`.
        rule: How ranks are found.

    Returns:
        The adapter.
    """
    resized = _resized(merged, rule, None)
    energy = {
        path: dataclasses.replace(before, lost=np.asarray(before.lost) + resized.energy[path].lost)
        for path, before in merged.energy.items()
    }
    record = {**json.loads(merged.metadata.provenance), "truncated": rule.record()}
    metadata = dataclasses.replace(merged.metadata, provenance=json.dumps(record))
    return dataclasses.replace(merged, modules=resized.modules, energy=energy, metadata=metadata)


def _resized(adapter: Adapter, rule: "Rule", dtype: DTypeLike | None) -> Adapter:
    plan = plan_merge([adapter], [1.0], dtype=dtype)
    buckets = {path: bucket for (bucket, _), paths in plan.buckets.items() for path in paths}
    groups: dict[str, dict[str, LoRA]] = {}
    for path, lora in adapter.modules.items():
        groups.setdefault(outer_module(path), {})[path] = _on_host(lora)
    with lapack.single_threaded():
        results = threads.each(lambda loras: _resized_group(loras, buckets, rule), groups.values())
    return plan.finish(
        [
            {path: (_like(adapter.modules[path], lora), lost) for path, (lora, lost) in result.items()}
            for result in results
        ]
    )


@dataclass(frozen=True)
class Rule:
    """How a rank is found.

    Attributes:
        name: That of the argument of `resize`.
        limit: Its value.
        most: The largest rank that may be found.
    """

    name: str
    limit: float
    most: int | None = None

    def rank(self, values: np.ndarray) -> int:
        """The rank of a matrix.

        Args:
            values: ``[k]`` singular values, largest first, 0 where they are no more than rounding.

        Returns:
            At least 1, and no more than there are values that are not 0.
        """
        found = int(np.count_nonzero(values))
        if not found:
            return 1
        wanted = int(count_by(self.name, self.limit, values[:found].astype(np.float64)))
        return min(wanted, found, found if self.most is None else self.most)

    def record(self) -> dict[str, Any]:
        """For provenance."""
        return {self.name: self.limit, **({} if self.most is None else {"max_rank": self.most})}


def rule_of(*, max_rank: int | None = None, **limits: float | None) -> Rule:
    """The rule that arguments of `resize` name.

    Args:
        max_rank: As in `resize`.
        **limits: The other arguments that are rules; all but one None.

    Returns:
        The rule.

    Raises:
        ValueError: If there is not one of them, or a number means nothing.
    """
    given = {name: limit for name, limit in limits.items() if limit is not None}
    if len(given) != 1:
        raise ValueError(f"give one of {', '.join(limits)}: {were_given(list(given))}")
    ((name, limit),) = given.items()
    problems: list[str] = []
    if name == "rank":
        checked_rank(limit, problems)
        if max_rank is not None:
            problems.append("max_rank is for rules that find a rank: leave it out, or rank")
    elif not isinstance(limit, int | float | np.number) or isinstance(limit, bool):
        problems.append(f"{name} must be a number, got {limit!r}")
    elif name == "sv_ratio" and not (limit >= 1 and math.isfinite(limit)):
        problems.append(f"sv_ratio must be at least 1, got {limit:g}")
    elif name != "sv_ratio" and not 0 < limit <= 1:
        problems.append(f"{name} must be above 0 and at most 1, got {limit:g}")
    most: list[str] = []
    checked_rank(max_rank, most)
    raise_problems([*problems, *(f"max_{problem}" for problem in most)])
    return Rule(name, int(limit) if name == "rank" else float(limit), None if max_rank is None else int(max_rank))


def _resized_group(
    loras: Mapping[str, LoRA], buckets: Mapping[str, Bucket], rule: Rule
) -> dict[str, tuple[LoRA, Energy]]:
    """The modules of a group that share one rank, and what their truncation lost."""
    ordered = {path: _in_order(lora, buckets[path].wide) for path, lora in loras.items()}
    rank = max(rule.rank(values) for _, _, s in ordered.values() for values in s.reshape(-1, s.shape[-1]))
    cut = {}
    for path, (a, b, s) in ordered.items():
        with np.errstate(all="ignore"):  # What the dtype cannot hold is found where the result is written.
            dtype = np.dtype(buckets[path].dtype)
            lora = LoRA(a[..., :rank, :].astype(dtype), b[..., :rank].astype(dtype))
        squares = s * s
        cut[path] = lora, Energy(float(squares.sum()), float(squares[..., rank:].sum()))
    return cut


def _in_order(lora: LoRA, wide: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Factors whose first k rows and columns are the best factors of rank k of the change, for every k.

    In float64, in which factors of float32 may be as badly conditioned as they like.

    Args:
        lora: ``[*batch, r, in]`` and ``[*batch, out, r]``.
        wide: The dtype, float32 or wider, in which numbers of the adapter's precision are told from rounding errors.

    Returns:
        ``a [*batch, k, in]``, ``b [*batch, out, k]`` of equal norms, and the singular values ``[*batch, k]``, those
        that are no more than rounding 0; k = min(r, in, out).
    """
    a, b, scale = (np.asarray(x).astype(np.float64) for x in (lora.a, lora.b, lora.scale))
    for leaf in (lora.a, lora.b):
        release(leaf)
    q_b, r_b = np.linalg.qr(b)
    q_a, r_a = np.linalg.qr(a.swapaxes(-1, -2))
    u, s, vt = np.linalg.svd(scale * r_b @ r_a.swapaxes(-1, -2), full_matrices=False)
    # Where terms cancel, their own rounding errors stay, and next to nothing is left to measure them by.
    terms = np.abs(scale) * np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-2)
    errors = np.finfo(wide).eps * s[..., :1], 4 * np.finfo(np.float64).eps * terms.max(axis=-1, keepdims=True)
    s = np.where(s > s.shape[-1] * np.maximum(*errors), s, 0)
    root = np.sqrt(s)
    return root[..., None] * (vt @ q_a.swapaxes(-1, -2)), (q_b @ u) * root[..., None, :], s


def _on_host(lora: LoRA) -> LoRA:
    a, b, scale = (np.asarray(seen_everywhere(leaf)) for leaf in (lora.a, lora.b, lora.scale))
    return LoRA(a, b, scale)


def _like(lora: LoRA, result: LoRA) -> LoRA:
    """A result where the module itself lay: on the host, on devices, spread over a mesh."""

    def put(array: Any, leaf: Any) -> Any:
        return array if isinstance(leaf, np.ndarray) else laid_out(jax.device_put(array), placement(leaf))

    with precision(result.a.dtype):
        return LoRA(put(result.a, lora.a), put(result.b, lora.b))
