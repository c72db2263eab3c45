"""Weighted sums whose coefficients come from the tasks' lengths and the angles between them, and from nothing else.

Both are in the tasks' Gram matrix, which rotations of either side leave as it is.

Where only the weights' proportions count, a weight's share is its magnitude over the sum of magnitudes, and a negative
weight turns its task around. So negative weights negate here as everywhere, weights that sum to 0 are nothing special,
and weights that are all 0 give zeros. For weights of one sign these are the shares that mergekit takes.

A task of zeros has a length and a share, but no direction.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxmerge.base import Array, promote
from jaxmerge.consensus import sum_tasks
from jaxmerge.methods.tasks import Tasks, Weights, as_weights, stack_tasks, weigh
from jaxmerge.svd import matmul, root

# SLERP is linear between directions whose cosine is beyond this, as in mergekit.
_NEARLY_PARALLEL = 0.9995


def norm_equalized(task_tensors: Tasks, weights: Weights) -> Array:
    """The weighted sum of the tasks once all are as long as they are on average: ``Σ wᵢ · mean‖t‖/‖tᵢ‖ · tᵢ``.

    Compress-then-Merge finds its subspaces among tasks of such norms (arXiv:2606.03723, β = 0). The mean is over the
    tasks that are not zero, whatever their weights.

    Args:
        task_tensors: n arrays of one shape, or one array ``[n, ...]``.
        weights: ``[n]``, of any sign.

    Returns:
        ``[...]``, float32 or wider. Tasks of zeros add nothing.

    Raises:
        ValueError: If shapes or counts do not match.
    """
    tasks = stack_tasks(task_tensors)
    return _summed(tasks, as_weights(weights, tasks), _equalized)


def slerp(task_tensors: Tasks, weights: Weights) -> Array:
    """Spherical interpolation between two tasks (SLERP as in mergekit, https://github.com/arcee-ai/mergekit).

    ``(sin((1−t)θ)·t₁ + sin(tθ)·t₂) / sin θ`` with θ the angle between them and ``t = w₂/(w₁+w₂)``; for signs of
    weights see the module. Where ``|cos θ| > 0.9995`` it is ``(1−t)·t₁ + t·t₂``. mergekit interpolates between whole
    models, of which one is called the base; here it is between the changes, so that no base is needed.

    Args:
        task_tensors: 2 arrays of one shape, or one array ``[2, ...]``. One alone comes back.
        weights: ``[2]``.

    Returns:
        ``[...]``, float32 or wider. A task of zeros counts as at a right angle to the other.

    Raises:
        ValueError: If shapes or counts do not match, or there are more than two tasks.
    """
    tasks = _at_most_two(stack_tasks(task_tensors), "slerp")
    return _summed(tasks, as_weights(weights, tasks), _slerp)


def nuslerp(task_tensors: Tasks, weights: Weights) -> Array:
    """Spherical interpolation as in `slerp`, also between tasks that are nearly opposite.

    NuSLERP as in mergekit (https://github.com/arcee-ai/mergekit), flattened and of the changes to a base. It goes
    around the sphere unless rounding does not tell the tasks from parallel, where `slerp` goes through the middle.

    Args:
        task_tensors: 2 arrays of one shape, or one array ``[2, ...]``. One alone comes back.
        weights: ``[2]``.

    Returns:
        ``[...]``, float32 or wider. A task of zeros counts as at a right angle to the other. Between opposite tasks
        no way around is the shortest: there it is the weighted mean. Between nearly opposite ones of unequal lengths
        it is longer than either, by up to the inverse of the sine.

    Raises:
        ValueError: If shapes or counts do not match, or there are more than two tasks.
    """
    tasks = _at_most_two(stack_tasks(task_tensors), "nuslerp")
    return _summed(tasks, as_weights(weights, tasks), _nuslerp)


def multislerp(task_tensors: Tasks, weights: Weights) -> Array:
    """The mean direction of the tasks, as long as they are on average.

    Multi-SLERP as in mergekit (https://github.com/arcee-ai/mergekit): ``Σ wᵢ‖tᵢ‖ · m/‖m‖`` with ``m = Σ wᵢ tᵢ/‖tᵢ‖``
    and weights that sum to 1; for their signs see the module. mergekit then moves along ``Σ wᵢ vᵢ``, the vᵢ being the
    directions without their part along m. That sum is ``m − ⟨m, m⟩m/‖m‖² = 0``, so this is all of it.

    Args:
        task_tensors: n arrays of one shape, or one array ``[n, ...]``.
        weights: ``[n]``.

    Returns:
        ``[...]``, float32 or wider. Where the directions cancel, m has none, and it is the weighted mean ``Σ wᵢ tᵢ``.

    Raises:
        ValueError: If shapes or counts do not match.
    """
    tasks = stack_tasks(task_tensors)
    return _summed(tasks, as_weights(weights, tasks), _spherical_mean, max_iter=0, tol=0.0)


def karcher(task_tensors: Tasks, weights: Weights, *, max_iter: int = 10, tol: ArrayLike = 1e-5) -> Array:
    """The Karcher mean of the tasks' directions, as long as the tasks are on average (arXiv:2603.04972).

    That is the point of the sphere with the least weighted sum of squared distances along it. From `multislerp` each
    iteration goes to the mean of the logarithms, as in mergekit (https://github.com/arcee-ai/mergekit), which has equal
    weights only; for their signs see the module.

    Args:
        task_tensors: n arrays of one shape, or one array ``[n, ...]``.
        weights: ``[n]``.
        max_iter: The most iterations; static under jit.
        tol: It stops before a step shorter than this, in radians.

    Returns:
        ``[...]``, float32 or wider. Where the directions cancel in their mean there is nowhere to start from, and it is
        the weighted mean of the tasks. A direction opposite to where the mean is pulls nowhere.

    Raises:
        ValueError: If shapes or counts do not match.
    """
    tasks = stack_tasks(task_tensors)
    return _summed(tasks, as_weights(weights, tasks), _spherical_mean, max_iter=max_iter, tol=tol)


def model_stock(task_tensors: Tasks, weights: Weights) -> Array:
    """The weighted mean, shortened the more the tasks disagree (Model Stock, arXiv:2403.19522).

    ``t · Σ wᵢ tᵢ`` with ``t = n·c / (1 + (n−1)·c)``, c the mean cosine between two tasks and weights that sum to 1;
    for their signs see the module. For unequal weights c is the mean weighted by ``wᵢwⱼ``, and n is ``1/Σ wᵢ²``, as it
    follows from the paper's picture: tasks that have a part in common, of squared length c, and are otherwise at right
    angles; t·mean is then the point nearest to that part. A task of weight 0 is as good as absent.

    Args:
        task_tensors: n arrays of one shape, or one array ``[n, ...]``. One alone comes back.
        weights: ``[n]``.

    Returns:
        ``[...]``, float32 or wider. As in the paper t is negative where c is; where its divisor vanishes, because the
        tasks cancel, it is 0. The cosine with a task of zeros is 0.

    Raises:
        ValueError: If shapes or counts do not match.
    """
    tasks = stack_tasks(task_tensors)
    return _summed(tasks, as_weights(weights, tasks), _stock)


def gram(tasks: Array) -> Array:
    """The inner products of tasks, in units of the square of the largest magnitude among them.

    Coefficients depend on proportions alone, and squares of what is large or small would leave the range of floats.

    Args:
        tasks: ``[n, ...]``, float32 or wider.

    Returns:
        ``[n, n]``. Zeros for zeros.
    """
    flat = tasks.reshape(tasks.shape[0], -1)
    largest = lax.stop_gradient(jnp.max(jnp.abs(flat), initial=0))
    flat = flat / jnp.where(largest == 0, 1, largest)
    return matmul(flat, flat.T)


@functools.partial(jax.jit, static_argnames=("coefficients", "max_iter"))
def _summed(tasks: Array, weights: Array, coefficients: Callable[..., Array], **settings: ArrayLike) -> Array:
    """``Σ cᵢ tᵢ`` with c from ``(weights [n], lengths [n], cosines [n, n], **settings)``, which are proportions.

    The cosine with a task of zeros is 0.
    """
    wide = promote(tasks.dtype, weights.dtype, jnp.float32)
    tasks = tasks.astype(wide)
    products = gram(tasks)
    lengths = root(jnp.diagonal(products))
    directions = _inverse(lengths)
    cosines = jnp.clip(directions[:, None] * products * directions, -1, 1)
    return sum_tasks(weigh(tasks, coefficients(weights.astype(wide), lengths, cosines, **settings)))


def _equalized(weights: Array, lengths: Array, cosines: Array) -> Array:
    del cosines
    mean = jnp.sum(lengths) * _inverse(jnp.sum(lengths > 0, dtype=lengths.dtype))
    return weights * mean * _inverse(lengths)


def _slerp(weights: Array, lengths: Array, cosines: Array) -> Array:
    del lengths
    return _along_arc(weights, cosines, jnp.abs(cosines) > _NEARLY_PARALLEL)


def _nuslerp(weights: Array, lengths: Array, cosines: Array) -> Array:
    del lengths
    return _along_arc(weights, cosines, _on_one_line(cosines))


def _along_arc(weights: Array, cosines: Array, straight: Array) -> Array:
    """Coefficients of two tasks that interpolate their directions, linearly where the pair is marked."""
    signs, shares = _shares(weights)
    if len(weights) == 1:
        return signs * shares
    angle = jnp.arccos(jnp.where(straight, 0, signs[:, None] * cosines * signs)[0, 1])
    return signs * jnp.where(straight[0, 1], shares, jnp.sin(shares * angle) / jnp.sin(angle))


def _spherical_mean(weights: Array, lengths: Array, cosines: Array, max_iter: int, tol: Array) -> Array:
    """Coefficients of the tasks' directions' mean on the sphere. Points on it are coefficients of the directions."""
    signs, shares = _shares(weights)
    cosines = signs[:, None] * cosines * signs
    pulls = jnp.where(lengths > 0, shares, 0)
    pulls = pulls * _inverse(jnp.sum(pulls))
    tol = jnp.asarray(tol).astype(weights.dtype)

    def squared_norm(point: Array) -> Array:
        return matmul(point, matmul(cosines, point))

    def step(_: int, point: Array) -> Array:
        dots = jnp.clip(matmul(cosines, point), -1, 1)
        on_line = _on_one_line(dots)
        angle = jnp.arccos(jnp.where(on_line, 0, dots))
        own = pulls * jnp.where(on_line, jnp.where(dots > 0, 1, 0), angle / jnp.sin(angle))
        tangent = own - jnp.sum(own * dots) * point
        length = root(squared_norm(tangent))
        moved = jnp.cos(length) * point + jnp.sinc(length / jnp.pi) * tangent
        return jnp.where(length < tol, point, moved * _inverse(root(squared_norm(moved))))

    square = squared_norm(pulls)
    cancels = square <= _rounding(square)
    start = pulls / jnp.sqrt(jnp.where(cancels, 1, square))
    point = lax.fori_loop(0, max_iter, step, start)
    return signs * jnp.where(cancels, shares, point * jnp.sum(shares * lengths) * _inverse(lengths))


def _stock(weights: Array, lengths: Array, cosines: Array) -> Array:
    del lengths
    signs, shares = _shares(weights)
    pairs = jnp.where(jnp.eye(len(shares), dtype=bool), 0, shares[:, None] * shares)
    among = jnp.sum(pairs)
    # One task has nothing to disagree with.
    cosine = jnp.where(among > 0, jnp.sum(pairs * signs[:, None] * cosines * signs) * _inverse(among), 1)
    count = _inverse(jnp.sum(shares * shares))
    divisor = 1 + (count - 1) * cosine
    cancels = jnp.abs(divisor) <= _rounding(divisor) * count
    return signs * shares * jnp.where(cancels, 0, count * cosine / jnp.where(cancels, 1, divisor))


def _shares(weights: Array) -> tuple[Array, Array]:
    """Signs, and magnitudes that sum to 1, or are 0 if all weights are."""
    signs = jnp.where(weights < 0, -jnp.ones_like(weights), 1)
    magnitudes = signs * weights  # Unlike abs it has a slope at 0.
    return signs, magnitudes * _inverse(jnp.sum(magnitudes))


def _on_one_line(cosines: Array) -> Array:
    """Where rounding does not tell directions from equal or opposite ones."""
    return (1 - cosines) * (1 + cosines) <= _rounding(cosines)


def _rounding(like: Array) -> float:
    """How much of 1 may be nothing but the rounding of inner products."""
    return 16 * float(jnp.finfo(like.dtype).eps)


def _inverse(array: Array) -> Array:
    """The inverse; 0 with a slope of 0 for 0."""
    return jnp.where(array == 0, 0, 1 / jnp.where(array == 0, 1, array))


def _at_most_two(tasks: Array, method: str) -> Array:
    if tasks.shape[0] > 2:
        raise ValueError(f"{method} interpolates between two tasks, got {tasks.shape[0]}")
    return tasks
