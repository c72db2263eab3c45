"""The methods, and what of their rows several share."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxmerge.catalog.rows import Hyperparameter, Method

_DENSITY = Hyperparameter("density", "fraction of each task's entries to keep, in (0, 1]", "density")
_MAJORITY = Hyperparameter(
    "majority_sign_method",
    "elect the sign of the sum (total) or the one that more tasks have (frequency)",
    "choice",
    default="total",
    choices=("total", "frequency"),
)
_ELECTION = Hyperparameter(
    "election",
    "whether tasks vote for a sign as they are (unweighted) or times their weights (weighted)",
    "choice",
    default="unweighted",
    choices=("unweighted", "weighted"),
)
_DIVISOR = Hyperparameter(
    "divisor",
    "divide by how many tasks carry the sign (count), by the sum of their weights (weight), or not at all (none)",
    "choice",
    default="count",
    choices=("count", "weight", "none"),
)
_EPSILON = Hyperparameter(
    "epsilon",
    "by how much the largest entry of a row is kept with more probability than the smallest",
    "number",
    default=0.14,
    least=0,
    most=1,
)
_GAMMA = Hyperparameter(
    "gamma",
    "fraction of each task's entries to drop as outliers, as far as the density leaves it",
    "density",
    default=0.01,
)
# Where a method looks at whole changes.
_WHOLE_CHANGES = ("full", "knots", "core", "ctm")
_BY_ANGLES: Mapping[str, Any] = {
    "equivariant": True,
    "spaces": _WHOLE_CHANGES,
    "elsewhere": "it goes by lengths and angles, and those of A and of B apart are not those of the change",
}
_BY_DIRECTIONS: Mapping[str, Any] = {
    "equivariant": True,
    "ranked": True,
    "spaces": _WHOLE_CHANGES,
    "elsewhere": "it goes by singular values and directions, and those of A and of B apart are not those of the change",
}
_FLATTENED = {"single": "one adapter's singular values are replaced by their mean too"}

METHODS: Mapping[str, Method] = {
    "linear": Method(
        summary="weighted sum of the deltas, exact",
        paper="Task arithmetic, arXiv:2212.04089",
        function="jaxmerge.methods.arithmetic:task_arithmetic",
        linear=True,
        equivariant=True,
    ),
    "ties": Method(
        summary="trim small entries, elect a sign per entry, average those that carry it",
        paper="TIES-Merging, arXiv:2306.01708",
        function="jaxmerge.methods.sign_consensus:ties",
        averages=True,
        pruning="magnitude",
        combine="jaxmerge.methods.sign_consensus:agree",
        hyperparameters=(_DENSITY, _MAJORITY, _ELECTION, _DIVISOR),
    ),
    "dare_linear": Method(
        summary="drop entries at random, rescale the rest, weighted sum",
        paper="DARE, arXiv:2311.03099",
        function="jaxmerge.methods.arithmetic:dare_linear",
        random=True,
        pruning="random",
        combine="jaxmerge.methods.arithmetic:sum_weighted",
        hyperparameters=(_DENSITY,),
    ),
    "dare_ties": Method(
        summary="drop entries at random, rescale the rest, average those that carry the elected sign",
        paper="DARE, arXiv:2311.03099",
        function="jaxmerge.methods.sign_consensus:dare_ties",
        averages=True,
        random=True,
        pruning="random",
        combine="jaxmerge.methods.sign_consensus:agree",
        hyperparameters=(_DENSITY, _MAJORITY, _ELECTION, _DIVISOR),
    ),
    "magnitude_prune": Method(
        summary="keep each task's largest entries, weighted sum",
        paper="PEFT, peft.utils.merge_utils",
        function="jaxmerge.methods.arithmetic:magnitude_prune",
        pruning="magnitude",
        combine="jaxmerge.methods.arithmetic:sum_weighted",
        hyperparameters=(_DENSITY,),
    ),
    "della": Method(
        summary="drop entries at random by rank, rescale, average those that carry the elected sign",
        paper="DELLA, arXiv:2406.11617",
        function="jaxmerge.methods.della:della",
        averages=True,
        random=True,
        pruning="rank",
        combine="jaxmerge.methods.sign_consensus:agree",
        hyperparameters=(_DENSITY, _EPSILON, _MAJORITY, _ELECTION, _DIVISOR),
    ),
    "della_linear": Method(
        summary="drop entries at random by rank, rescale, weighted sum",
        paper="MagPrune of DELLA, arXiv:2406.11617",
        function="jaxmerge.methods.della:della_linear",
        random=True,
        pruning="rank",
        combine="jaxmerge.methods.arithmetic:sum_weighted",
        hyperparameters=(_DENSITY, _EPSILON),
    ),
    "breadcrumbs": Method(
        summary="drop each task's outliers and small entries, weighted sum",
        paper="Model Breadcrumbs, arXiv:2312.06795",
        function="jaxmerge.methods.breadcrumbs:breadcrumbs",
        pruning="outliers",
        combine="jaxmerge.methods.arithmetic:sum_weighted",
        hyperparameters=(_DENSITY, _GAMMA),
    ),
    "breadcrumbs_ties": Method(
        summary="drop each task's outliers and small entries, average those that carry the elected sign",
        paper="Model Breadcrumbs, arXiv:2312.06795",
        function="jaxmerge.methods.breadcrumbs:breadcrumbs_ties",
        averages=True,
        pruning="outliers",
        combine="jaxmerge.methods.sign_consensus:agree",
        hyperparameters=(_DENSITY, _GAMMA, _MAJORITY, _ELECTION, _DIVISOR),
    ),
    "sce": Method(
        summary="keep the entries that vary most across tasks, average by the tasks' energy without minority signs",
        paper="SCE of FuseChat, arXiv:2408.07990",
        function="jaxmerge.methods.sce:sce",
        averages=True,
        breaks={"zeros": "zeros count in the variance by which entries are selected"},
        hyperparameters=(replace(_DENSITY, default=0.1), _MAJORITY, _ELECTION),
    ),
    "pcb": Method(
        summary="drop entries that lose in their task or against the others, average the rest by their score",
        paper="PCB-Merging, arXiv:2410.02396",
        function="jaxmerge.methods.competition:pcb",
        averages=True,
        spaces=("full", "knots", "core", "ctm"),
        elsewhere="its scores go by the sizes of entries, which A and B share out at will",
        breaks={
            "homogeneity": "scores go by the hyperbolic tangent of products of entries, which levels off near 1",
            "zeros": "scores are sharper the more tasks there are",
        },
        hyperparameters=(replace(_DENSITY, default=0.2),),
    ),
    "consensus": Method(
        summary="weighted sum of the entries that several tasks use",
        paper="Consensus merging with TALL masks, arXiv:2405.07813",
        function="jaxmerge.methods.masks:consensus",
        combine="jaxmerge.methods.masks:sum_used",
        hyperparameters=(
            Hyperparameter(
                "threshold",
                "how far from a task the sum may be where the task uses it: more is stricter",
                "number",
                default=0.4,
                least=0,
            ),
            Hyperparameter(
                "agreeing", "how many tasks must use an entry; all, where there are fewer", "count", default=2, least=1
            ),
        ),
    ),
    "nearswap": Method(
        summary="move the first adapter's entries towards the second's, by no more than t",
        paper="nearswap in mergekit, https://github.com/arcee-ai/mergekit",
        function="jaxmerge.methods.nearswap:nearswap",
        averages=True,
        combine="jaxmerge.methods.nearswap:move",
        spaces=("full",),
        elsewhere="t is a distance between entries of the weight change",
        least=2,
        most=2,
        breaks={
            "homogeneity": "t does not grow with the scale",
            "zeros": "zeros as the second adapter draw the first towards 0",
            "order": "the first adapter is the one that moves",
        },
        hyperparameters=(Hyperparameter("t", "how far an entry may move", "number", least=0),),
    ),
    "lego": Method(
        summary="cluster the rank-one units of all adapters; each cluster makes a unit of the result",
        paper="LoRA-LEGO, arXiv:2409.16167",
        function="jaxmerge.methods.units:lego",
        space="factors",
        averages=True,
        on_units=True,
        spaces=("factors",),
        elsewhere="its units are rows of A with their columns of B, which other spaces do not have",
        breaks={"negation": "a weight scales both halves of a unit alike"},
        hyperparameters=(Hyperparameter("iterations", "of k-means", "count", default=20, least=1),),
    ),
    "norm_equalized": Method(
        summary="scale all deltas to their mean length, weighted sum",
        paper="norms of Compress-then-Merge with β = 0, arXiv:2606.03723",
        function="jaxmerge.methods.gram:norm_equalized",
        **_BY_ANGLES,
    ),
    "slerp": Method(
        summary="interpolate two deltas along the sphere, in proportion to the weights",
        paper="SLERP in mergekit, https://github.com/arcee-ai/mergekit",
        function="jaxmerge.methods.gram:slerp",
        averages=True,
        **_BY_ANGLES,
        least=2,
        most=2,
        breaks={"zeros": "zeros count as at a right angle to the other adapter, and have their share of the way"},
    ),
    "nuslerp": Method(
        summary="slerp, also between deltas that are nearly opposite",
        paper="NuSLERP in mergekit, https://github.com/arcee-ai/mergekit",
        function="jaxmerge.methods.gram:nuslerp",
        averages=True,
        **_BY_ANGLES,
        least=2,
        most=2,
        breaks={"zeros": "zeros count as at a right angle to the other adapter, and have their share of the way"},
    ),
    "multislerp": Method(
        summary="weighted mean of the deltas' directions, with their mean length",
        paper="Multi-SLERP in mergekit, https://github.com/arcee-ai/mergekit",
        function="jaxmerge.methods.gram:multislerp",
        averages=True,
        **_BY_ANGLES,
        breaks={"zeros": "zeros have no direction, but their length counts in the mean length"},
    ),
    "karcher": Method(
        summary="Riemannian mean of the deltas' directions on the sphere, with their mean length",
        paper="Karcher mean, arXiv:2603.04972",
        function="jaxmerge.methods.gram:karcher",
        averages=True,
        **_BY_ANGLES,
        breaks={"zeros": "zeros have no direction, but their length counts in the mean length"},
        hyperparameters=(
            Hyperparameter("max_iter", "iterations at most", "count", default=10, least=1),
            Hyperparameter("tol", "length of a step, in radians, at which it stops", "number", default=1e-5, least=0),
        ),
    ),
    "model_stock": Method(
        summary="weighted mean of the deltas, shorter the more they disagree",
        paper="Model Stock, arXiv:2403.19522",
        function="jaxmerge.methods.gram:model_stock",
        averages=True,
        **_BY_ANGLES,
        breaks={"zeros": "zeros have their share of the mean, and agree with nothing"},
    ),
    "tsv": Method(
        summary="the adapters' singular directions, made orthogonal to each other",
        paper="TSV-M, arXiv:2412.00081",
        function="jaxmerge.methods.orthogonal:tsv",
        averages=True,
        **_BY_DIRECTIONS,
    ),
    "iso_c": Method(
        summary="the sum, with all singular values equal to their mean",
        paper="Iso-C, arXiv:2502.04959",
        function="jaxmerge.methods.singular_values:iso_c",
        averages=True,
        **_BY_DIRECTIONS,
        breaks=_FLATTENED,
    ),
    "iso_cts": Method(
        summary="directions of the sum and of each adapter beside it, orthogonal, all of one size",
        paper="Iso-CTS, arXiv:2502.04959",
        function="jaxmerge.methods.orthogonal:iso_cts",
        averages=True,
        **_BY_DIRECTIONS,
        breaks=_FLATTENED,
        hyperparameters=(
            Hyperparameter(
                "common_share", "fraction of the rank for the sum's directions", "number", default=0.8, least=0, most=1
            ),
        ),
    ),
    "cart": Method(
        summary="the mean, and the leading directions of what each adapter has beside it",
        paper="CART, arXiv:2412.12153",
        function="jaxmerge.methods.singular_values:cart",
        averages=True,
        **_BY_DIRECTIONS,
        hyperparameters=(
            Hyperparameter(
                "rank_share",
                "fraction of the rank that is kept of what each adapter has beside the mean",
                "number",
                default=0.08,
                least=0,
                most=1,
            ),
            Hyperparameter("strength", "of what is added to the mean", "number", default=1.0),
        ),
    ),
    "star": Method(
        summary="cut each adapter to its leading directions, restore its nuclear norm, weighted sum",
        paper="STAR, arXiv:2502.10339",
        function="jaxmerge.methods.singular_values:star",
        **_BY_DIRECTIONS,
        breaks={"single": "each adapter is cut and rescaled before the sum, one alone too"},
        hyperparameters=(
            Hyperparameter(
                "eta", "fraction of each adapter's nuclear norm to keep", "number", default=0.4, above=0, most=1
            ),
        ),
    ),
    "subspace_boosting": Method(
        summary="weighted sum, with small singular values raised",
        paper="Subspace Boosting, arXiv:2506.16506",
        function="jaxmerge.methods.singular_values:subspace_boosting",
        **_BY_DIRECTIONS,
        breaks={"single": "small singular values are raised in one adapter too"},
        hyperparameters=(
            Hyperparameter(
                "beta",
                "singular values are raised to the one at which they add up to this fraction of all",
                "number",
                default=0.01,
                least=0,
                most=1,
            ),
        ),
    ),
    "pico": Method(
        summary="sum with crowded output directions damped, at the adapters' mean norm",
        paper="Pico, arXiv:2604.16826",
        function="jaxmerge.methods.interference:pico",
        averages=True,
        equivariant=True,
        spaces=_WHOLE_CHANGES,
        elsewhere="it goes by the output directions of the weight change, and A has none",
    ),
    "swudi": Method(
        summary="the sum, moved to where it interferes least with each adapter's own inputs",
        paper="SWUDI, arXiv:2606.07289",
        function="jaxmerge.methods.interference:swudi",
        averages=True,
        equivariant=True,
        spaces=_WHOLE_CHANGES,
        elsewhere="it goes by how the weight change answers inputs, and B sees none",
        hyperparameters=(
            Hyperparameter(
                "tau", "for how long the sum is moved; a hundred is nearly to the end", "number", default=100.0, above=0
            ),
        ),
    ),
}
