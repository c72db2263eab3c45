"""`merge`: check, stack modules of equal shape, run ``lift ∘ method ∘ project`` on each stack, name the result."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxmerge.base import Adapter, Array
from jaxmerge.extras import Extras
from jaxmerge.merging.checks import Weights
from jaxmerge.merging.plan import plan_merge
from jaxmerge.merging.scope import DensityScope
from jaxmerge.merging.staging import StageLike

__all__ = ["lower", "merge", "plan_merge"]


def merge(
    adapters: Sequence[Adapter],
    weights: Weights = None,
    *,
    method: str | None = None,
    space: str | None = None,
    rank: int | Mapping[str, int] | None = None,
    combination_type: str | None = None,
    key: Array | None = None,
    mesh: Mesh | None = None,
    memory: int | str | None = None,
    donate: bool = False,
    dtype: DTypeLike | None = None,
    extras: Extras = "same",
    stages: Sequence[StageLike] = (),
    density_scope: DensityScope = "module",
    allow_different_bases: bool = False,
    **hyperparameters: Any,
) -> Adapter:
    """Merges LoRA adapters of one base model into one adapter.

    Works inside `jax.jit` too, with weights and densities traced; checks that need values are then left out.

    Args:
        adapters: At least one. A module that only some of them have is merged from those.
        weights: One number per adapter, of any sign, or in its place a mapping from module path to the module's own.
            None: equal weights, 1/n each for methods that sum and 1 each for those that average by themselves.
        method: A name in `METHODS`; ``"linear"`` if None.
        space: A name in `SPACES`; the method's own if None.
        rank: Of the result. None: the exact rank where the result is low-rank, the largest source rank of
            the module where it is not. Modules that can hold less get what they can. A mapping gives every module
            its own.
        combination_type: One of PEFT's, in place of method and space; `rank` is then PEFT's ``svd_rank``.
        key: A `jax.random.key`, for methods that draw.
        mesh: Spreads the modules over its devices, or the rows of dense deltas where there are fewer modules than
            devices; the result has the same bits. It lies as the first adapter does; where that is not spread, `a`
            along ``in`` and `b` along ``out`` over all axes of the mesh, where the size divides.
        memory: The bytes that may be worked in, or a size like ``"2GB"``; the result does not depend on it. None: a
            sixteenth of what the host has, or a quarter of an accelerator's. The adapters and the result come on top.
        donate: Frees the adapters' arrays once they have been read.
        dtype: Of the result; None keeps that of the sources. Arithmetic is float32 or wider in any case.
        extras: What to do with tensors that are not pairs of factors where adapters differ: ``"same"``
            refuses, ``"average"`` takes the mean, a number takes those of the adapter at that position.
        stages: What is done to each module's merge, in this order and before it is cut to its rank: names in `STAGES`,
            or pairs of a name and its hyperparameters, as in ``["calibrate", ("scale", {"factor": 0.7})]``. Where the
            merge is of full rank, as that of entrywise methods in the space ``full`` is, it is cut first. What the
            stage ``truncate`` leaves is the rank of the result, if no smaller one is asked for; inside `jax.jit`, where
            nobody knows it, zeros fill it up.
        density_scope: For methods that cut at a magnitude: ``"module"`` keeps a fraction of each module's entries, as
            PEFT does; ``"model"`` one of all the adapter's, as the TIES paper does, so that some modules keep more.
            Outliers are a fraction of the same.
        allow_different_bases: Merges even if the adapters name different base models.
        **hyperparameters: Of the method, for example ``density=0.2``. In place of a number there may be a mapping from
            module path to the module's own. What prunes each adapter by itself (`Method.per_adapter`) may also be one
            number per adapter, ``density=[0.2, 0.5]``, or a mapping to such.

    Returns:
        The merged adapter, of scale 1, with what truncation lost in `Adapter.energy`.

    Raises:
        ValueError: If the arguments do not fit the adapters or each other. It names every culprit.
    """
    plan = plan_merge(
        adapters,
        weights,
        method=method,
        space=space,
        rank=rank,
        combination_type=combination_type,
        key=key,
        mesh=mesh,
        memory=memory,
        donate=donate,
        dtype=dtype,
        extras=extras,
        stages=stages,
        density_scope=density_scope,
        allow_different_bases=allow_different_bases,
        **hyperparameters,
    )
    return plan.finish(list(plan.run()))


def lower(adapters: Sequence[Adapter], weights: Weights = None, **arguments: Any) -> list[jax.stages.Lowered]:
    """The programs that `merge` would run, not yet compiled.

    Args:
        adapters: As in `merge`.
        weights: As in `merge`.
        **arguments: As in `merge`.

    Returns:
        One per bucket of modules of equal shape, in the order in which they run.

    Raises:
        ValueError: As `merge` does.
    """
    steps = plan_merge(adapters, weights, **arguments).steps()
    return [step.lower() for step in {step.bucket: step for step in steps}.values()]
