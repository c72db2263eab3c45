"""Merges that keep tasks from drowning each other in directions they share: Pico and SWUDI."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxmerge.base import Array
from jaxmerge.methods.tasks import Tasks, Weights
from jaxmerge.methods.weighted import task_norms, tasks_present, weighted_tasks
from jaxmerge.svd import cutoff, matmul


def pico(task_tensors: Tasks, weights: Weights) -> Array:
    """Pico: the sum, with output directions damped the more, the more of all tasks lies in them; then rescaled.

    A direction that holds the fraction s of the tasks' energy is divided by ``1 + (n − 1)·s``; the result is scaled to
    the mean norm of the tasks (Pico with task arithmetic, arXiv:2604.16826).

    The paper takes directions and energies from the stacked B of the adapters, so that its result changes when a
    factor is moved from B to A. Here they are those of the weight changes themselves, ``Σ tᵢ tᵢᵀ``: the same where the
    rows of every A are orthogonal and of one length, as they nearly are at initialisation, and of the same value for
    the same function in any case. Damping them is the solution of one linear system.

    Args:
        task_tensors: n arrays ``[p, q]``, or one array ``[n, p, q]``; p are the outputs.
        weights: ``[n]``, of any sign; they scale the tasks, 1 in the paper.

    Returns:
        ``[p, q]``, float32 or wider; its norm is the mean of the weighted tasks' norms.

    Raises:
        ValueError: If shapes or counts do not match.
    """
    return _pico(weighted_tasks(task_tensors, weights))


@jax.jit
def _pico(tasks: Array) -> Array:
    norms, n = task_norms(tasks), tasks_present(tasks)
    largest = jnp.max(norms)
    tasks = tasks / jnp.where(largest > 0, largest, 1)
    side_by_side = jnp.concatenate(list(tasks), axis=1)
    gram = matmul(side_by_side, side_by_side.T)
    energy = jnp.trace(gram)
    shares = gram / jnp.where(energy > 0, energy, 1)
    damping = jnp.eye(gram.shape[0], dtype=gram.dtype) + (n - 1) * shares
    merged = jax.scipy.linalg.solve(damping, jnp.sum(tasks, axis=0), assume_a="pos")
    norm = jnp.linalg.norm(merged)
    # What is left of tasks that cancel is rounding errors, not to be blown up.
    left = norm > cutoff(merged)
    return jnp.where(left, jnp.sum(norms) / n / jnp.where(left, norm, 1), 0) * merged


def swudi(task_tensors: Tasks, weights: Weights, *, tau: ArrayLike = 100.0) -> Array:
    """SWUDI: gradient flow from the sum of the tasks towards least interference, in closed form (arXiv:2606.07289).

    The interference of a merge M is ``Σ ‖(M − tᵢ) tᵢᵀ‖² / ‖tᵢ‖²``: how wrongly it answers inputs in each task's row
    space (WUDI, arXiv:2503.08099). With ``C = Σ tᵢᵀtᵢ/‖tᵢ‖²``, ``D = Σ tᵢ tᵢᵀtᵢ/‖tᵢ‖²`` and the sum W of the tasks, the
    flow is at ``W + (D − W C) C⁻¹ (1 − exp(−tau C))`` at time tau. Here it moves along the leading K eigenvectors of C
    only, K being the participation ratio ``(Σl)² / Σl²`` of its eigenvalues l, rounded up. WUDI itself runs Adam,
    whose steps are not those of a gradient flow and depend on the basis.

    Tasks in row spaces that are orthogonal to each other do not interfere: their merge is their sum.

    Args:
        task_tensors: n arrays ``[p, q]``, or one array ``[n, p, q]``; q are the inputs.
        weights: ``[n]``, of any sign; they scale the tasks, 1 in the paper.
        tau: Time of flow, positive. A direction of eigenvalue l gets ``1 − exp(−tau·l)`` of the way; the eigenvalues of
            n tasks add up to n. The default takes 99.8 % of it for a sixteenth and 63 % for a hundredth.

    Returns:
        ``[p, q]``, float32 or wider.

    Raises:
        ValueError: If shapes or counts do not match.
    """
    return _swudi(weighted_tasks(task_tensors, weights), tau)


@jax.jit
def _swudi(tasks: Array, tau: ArrayLike) -> Array:
    tau = jnp.asarray(tau, tasks.dtype)
    norms = task_norms(tasks)
    units = tasks / jnp.where(norms > 0, norms, 1)[:, None, None]
    gram = jnp.zeros((tasks.shape[2],) * 2, tasks.dtype)
    wanted = jnp.zeros_like(tasks[0])
    for task, unit in zip(tasks, units, strict=True):
        own = matmul(unit.T, unit)
        gram += own
        wanted += matmul(task, own)
    total = jnp.sum(tasks, axis=0)
    values, vectors = jnp.linalg.eigh(gram)
    values = jnp.maximum(values, 0)
    square = jnp.sum(values * values)
    count = jnp.ceil(jnp.sum(values) ** 2 / jnp.where(square > 0, square, 1))
    leading = jnp.arange(values.size, 0, -1, dtype=values.dtype) <= count
    # (1 − exp(−tau·l)) / l, which is tau at l = 0.
    moving = tau * values > 0
    way = jnp.where(moving, -jnp.expm1(-tau * values) / jnp.where(moving, values, 1), tau)
    step = matmul(wanted - matmul(total, gram), vectors) * jnp.where(leading, way, 0)
    return total + matmul(step, vectors.T)
