"""Stages: what is done to a merge once it is made, one module's factors at a time. `STAGES` is the table of them.

A merged module is a pair of factors ``(a [k, in], b [out, k])`` of the weight change ``b @ a``. Its singular values are
those of a k×k core, by QRs of the factors; neither it nor a source is ever formed. Everything is for one unbatched
module in float32 or wider; several go through `jax.lax.map`.
"""

import re
from collections.abc import Iterable

import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxmerge.base import Array
from jaxmerge.lowrank import balanced, thin_qr
from jaxmerge.spaces import Factors
from jaxmerge.spectrum import Spectrum, count_by, decompose, mean_value
from jaxmerge.svd import cutoff, matmul
from jaxmerge.words import were_given

Pair = tuple[Array, Array]


def isotropize(merged: Pair) -> Pair:
    """Replaces all singular values by their mean, as Iso-C does to a sum (arXiv:2502.04959).

    The mean is over the rank that the merge has; null directions stay null.

    Args:
        merged: ``[k, in]`` and ``[out, k]``.

    Returns:
        The same shapes, at most ``min(k, in, out)`` for k.
    """
    found, frame = _decompose(merged)
    return _lift(found._replace(s=jnp.where(found.s > 0, mean_value(found.s), 0)), frame)


def calibrate(merged: Pair, sources: Factors, floor: ArrayLike = 0.1) -> Pair:
    """Singular value calibration: takes out of each direction how often it was counted (SVC, arXiv:2602.05536).

    With ``u`` a left singular vector of the merge M, ``uᵀM`` goes ``c = ⟨uᵀM, uᵀt⟩ / ‖uᵀt‖²`` times along what a task t
    has there: 1 where the merge gives the task what it wants, n where n equal tasks were added. The singular value is
    divided by the mean over the tasks of ``max(floor, c)``. So the scale of the merge does not matter, as long as the
    floor does not come in.

    A task that has nothing in a direction has no say there. (The reference code counts it with the floor, so that
    adapters of zeros would strengthen a merge.)

    Args:
        merged: ``[k, in]`` and ``[out, k]``.
        sources: The module in the n adapters; as in the paper, not weighted.
        floor: The least that a task counts, positive. The paper has 0.1 after sums, TIES, DARE and Iso-C, 0.2 after
            Iso-CTS and 1, which only ever shrinks, after TSV-M and WUDI.

    Returns:
        The same shapes, at most ``min(k, in, out)`` for k.
    """
    found, (q_b, q_a) = _decompose(merged)
    floor = jnp.asarray(floor, found.s.dtype)
    along = matmul(found.vt, q_a.T)
    total, votes = jnp.zeros_like(found.s), jnp.zeros_like(found.s)
    for a, b, norm, scale in zip(sources.a, sources.b, _source_norms(sources), sources.scales, strict=True):
        response = scale * matmul(matmul(matmul(found.u.T, q_b.T), b), a)
        length = jnp.linalg.norm(response, axis=1)
        there = length > cutoff(a) * norm
        safe = jnp.where(there, length, 1)
        count = found.s / safe * jnp.sum(along * (response / safe[:, None]), axis=1)
        total += jnp.where(there, jnp.maximum(floor, count), 0)
        votes += there.astype(votes.dtype)
    factor = jnp.where(votes > 0, votes / jnp.where(votes > 0, total, 1), 1)
    return _lift(found._replace(s=found.s * factor), (q_b, q_a))


def truncate(
    merged: Pair,
    rank: ArrayLike | None = None,
    energy: ArrayLike | None = None,
    sv_ratio: ArrayLike | None = None,
    sv_fro: ArrayLike | None = None,
    sv_cumulative: ArrayLike | None = None,
) -> Pair:
    """Keeps the leading singular values, as many as a rule finds: exactly one of the arguments.

    The rules are those of `jaxmerge.resize`. Here a number may be traced, so that the shapes do not tell how many are
    kept: rows of `a` and columns of `b` beyond them are 0.

    Args:
        merged: ``[k, in]`` and ``[out, k]``.
        rank: From 1; so many, or as many as there are.
        energy: In (0, 1]; the fewest that keep this fraction of Σσ².
        sv_ratio: From 1; those of at least σ₁ / sv_ratio.
        sv_fro: In (0, 1]; the fewest that keep this fraction of the Frobenius norm √Σσ².
        sv_cumulative: In (0, 1]; the fewest that keep this fraction of Σσ.

    Returns:
        The same shapes, at most ``min(k, in, out)`` for k.

    Raises:
        ValueError: If there is not one rule.
    """
    rules = {"rank": rank, "energy": energy, "sv_ratio": sv_ratio, "sv_fro": sv_fro, "sv_cumulative": sv_cumulative}
    given = {name: limit for name, limit in rules.items() if limit is not None}
    if len(given) != 1:
        raise ValueError(f"truncate takes one of {', '.join(rules)}: {were_given(list(given))}")
    ((rule, limit),) = given.items()
    found, frame = _decompose(merged)
    kept = count_by(rule, jnp.asarray(limit, found.s.dtype), found.s)
    return _lift(found.leading(kept.astype(found.s.dtype)), frame)


def norm_restore(merged: Pair, sources: Factors, weights: Array) -> Pair:
    """Scales a merge to the mean norm of the adapters: ``mean ‖t‖ / ‖M‖``, module by module (Pico, arXiv:2604.16826).

    For one factor for the whole model, add up `squared_norms` over the modules, and `scale` each by
    `restoring_factor` of the sums.

    Args:
        merged: ``[k, in]`` and ``[out, k]``.
        sources: The module in the n adapters.
        weights: ``[n]``; how much each adapter's norm counts is their magnitude, and their common scale does not
            matter.

    Returns:
        The same shapes.
    """
    return scale(merged, restoring_factor(*squared_norms(merged, sources), weights))


def squared_norms(merged: Pair, sources: Factors) -> tuple[Array, Array]:
    """The squared Frobenius norms of a merge and of the adapters, which add up over modules.

    Args:
        merged: ``[k, in]`` and ``[out, k]``.
        sources: The module in the n adapters.

    Returns:
        Scalar, and ``[n]``.
    """
    return jnp.square(frobenius_norm(merged)), jnp.square(_source_norms(sources))


def frobenius_norm(merged: Pair) -> Array:
    """``‖b @ a‖`` in Frobenius norm; by QRs, for Gram matrices lose it where factors cancel."""
    a, b = merged
    return jnp.linalg.norm(matmul(thin_qr(b)[1], thin_qr(a.T)[1].T))


def restoring_factor(merged: Array, sources: Array, weights: Array) -> Array:
    """What scales a merge to the weighted mean of the adapters' norms.

    Args:
        merged: Scalar; the squared norm of the merge, of one module or summed over several.
        sources: ``[n]``; those of the adapters.
        weights: ``[n]``; an adapter of weight 0, or without any norm, does not count.

    Returns:
        Scalar; 1 for a merge that is zero, or no more than the rounding errors of adapters that cancel.
    """
    norms = jnp.sqrt(sources)
    counted = jnp.where(norms > 0, jnp.abs(weights).astype(norms.dtype), 0)
    shares = counted / jnp.where(jnp.any(counted > 0), jnp.sum(counted), 1)
    norm = jnp.sqrt(merged)
    left = (norm > _CANCELLED * jnp.finfo(norm.dtype).eps * jnp.max(norms)) & jnp.any(counted > 0)
    return jnp.where(left, jnp.sum(shares * norms) / jnp.where(left, norm, 1), 1)


def scale(merged: Pair, factor: ArrayLike) -> Pair:
    """Multiplies a merge by a number, its root on both factors, so that half types hold both as well as before.

    Args:
        merged: ``[k, in]`` and ``[out, k]``.
        factor: Scalar, of any sign, which goes on `a`.

    Returns:
        The same shapes.
    """
    a, b = merged
    factor = jnp.asarray(factor, a.dtype)
    root = jnp.sqrt(jnp.abs(factor))
    return jnp.where(factor < 0, -root, root) * a, root * b


def lines_factors(paths: Iterable[str], alpha: float = 1.0, beta: float = 1.0) -> dict[str, float]:
    """LiNeS: a factor for each module, linear in its depth: ``alpha + beta · l / (L − 1)`` (arXiv:2410.17146).

    Shallow layers hold what tasks share, and are kept near the base model; deep ones are specific.

    A module's layer l is the first part of its dotted path that is a number, as in ``model.layers.7.mlp.up_proj``, or
    failing that ends in an underscore and one, as in ``decoder.layers_7.mlp``. Depth is counted within each stack, of
    modules that have the same path up to there, and L is one more than the largest layer in it: encoder and decoder are
    each of depth 0 to 1. A module without a number, such as a head or a module that holds all its layers stacked,
    counts as depth 0, as in the reference code; so does the one layer of a stack.

    Args:
        paths: Of all modules of the model that are merged.
        alpha: The factor at depth 0.
        beta: What is added to it at the last layer.

    Returns:
        Module path -> factor.
    """
    places = {path: layer_of(path) or ("", 0) for path in paths}
    last: dict[str, int] = {}
    for stack, layer in places.values():
        last[stack] = max(layer, last.get(stack, 0))
    return {path: alpha + beta * layer / max(last[stack], 1) for path, (stack, layer) in places.items()}


def layer_of(path: str) -> tuple[str, int] | None:
    """The stack that a module is in, its path up to the layer, and its layer there; None without a number."""
    for number in (r"(?:^|\.)(\d+)(?=\.|$)", r"_(\d+)(?=\.|$)"):
        if found := re.search(number, path):
            return path[: found.start(1)], int(found[1])
    return None


# Norms of cancelled merges below this many units of rounding of what cancelled are nothing.
_CANCELLED = 64


def _decompose(merged: Pair) -> tuple[Spectrum, Pair]:
    """The singular directions of a merge, in the frame of its orthonormal bases ``[out, p]`` and ``[in, q]``."""
    a, b = merged
    q_b, r_b = thin_qr(b)
    q_a, r_a = thin_qr(a.T)
    return decompose(matmul(r_b, r_a.T)), (q_b, q_a)


def _lift(found: Spectrum, frame: Pair) -> Pair:
    q_b, q_a = frame
    a, b = balanced(*found)
    return matmul(a, q_a.T), matmul(q_b, b)


def _source_norms(sources: Factors) -> Array:
    norms = jnp.stack([frobenius_norm(pair) for pair in zip(sources.a, sources.b, strict=True)])
    return jnp.abs(sources.scales).astype(norms.dtype) * norms
