"""The tables of methods, spaces and PEFT's combination types.

Only literals, and no import of JAX: the command line answers ``--help`` from here. The law tests run every
row, and compare the hyperparameters with the signature of the function that the row names.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal


def _imported(reference: str) -> Any:
    module, name = reference.split(":")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Hyperparameter:
    """An argument of a method that its users set.

    Attributes:
        name: As in the function's signature.
        help: One line.
        kind: ``"density"`` is a number in (0, 1], bound to each task matrix's size; ``"number"`` any other, which may
            be traced; ``"choice"`` one of ``choices`` and ``"count"`` a whole number, both static under jit.
        default: None where it must be given.
        choices: For ``"choice"``.
        least: The smallest value there may be.
        most: The largest.
        above: What values must be greater than.
        below: What they must be less than.
        whole: Whether a number must be whole, as a count is, though it may be traced.
    """

    name: str
    help: str
    kind: Literal["density", "number", "choice", "count"]
    default: Any = None
    choices: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    whole: bool = False

    @property
    def traceable(self) -> bool:
        """Whether it may change without a new compile."""
        return self.kind in ("density", "number")


# Of each kind of `Method.pruning`, the hyperparameters that say how to prune; the others say how to combine.
OF_PRUNING = {
    "": (),
    "magnitude": ("density",),
    "outliers": ("density", "gamma"),
    "random": ("density",),
    "rank": ("density", "epsilon"),
}


@dataclass(frozen=True)
class Method:
    """A row of `METHODS`.

    Attributes:
        summary: One line.
        paper: Where it comes from.
        function: ``module:name`` of a pure function ``(tasks [n, p, q], weights [n], *, ...) -> [p, q]``.
        space: The default space.
        averages: Whether it averages by itself: equal weights are then 1 each, otherwise 1/n.
        linear: Whether it is ``Σ wᵢ tᵢ``; at full rank in the space ``full`` the factors are then just stacked.
        equivariant: Whether it commutes with rotations of both sides of the tasks. In the space ``full`` it
            is then computed on the R×R core, exactly.
        random: Whether it takes a key.
        pruning: How it prunes each task by itself: ``"magnitude"``, ``"random"``, ``"outliers"`` (by magnitude, the
            largest too) or ``"rank"`` (at random, by the rank in a row).
        combine: ``module:name`` of a function ``(tasks [n, ...], weights [n], **options) -> [...]``, where it then
            combines them entry by entry. Dense deltas are then merged a few rows at a time.
        on_units: Whether its tasks are rank-one units ``[n, r, in + out]``, a row of A beside its column of B; it takes
            ``rank``, that of the result, static under jit.
        ranked: Whether it takes ``ranks``, those of the n tasks, static under jit.
        spaces: The names in `SPACES` in which it makes sense.
        elsewhere: Why it makes none in the others, in a line.
        least: The fewest adapters it takes.
        most: The most, or None for any number.
        breaks: The laws of the grid that it does not keep, with the reason: ``"single"`` (one adapter of weight 1 and
            density 1 comes back), ``"negation"`` (negative weights negate), ``"homogeneity"`` (all scales doubled
            double the result), ``"zeros"`` (an adapter of zeros changes nothing), ``"order"`` (nor does the adapters'
            order).
        hyperparameters: In the order of the signature.
    """

    summary: str
    paper: str
    function: str
    space: str = "full"
    averages: bool = False
    linear: bool = False
    equivariant: bool = False
    random: bool = False
    pruning: Literal["", "magnitude", "random", "outliers", "rank"] = ""
    combine: str = ""
    on_units: bool = False
    ranked: bool = False
    spaces: tuple[str, ...] = ("full", "factors", "knots", "core", "ctm")
    elsewhere: str = ""
    least: int = 1
    most: int | None = None
    breaks: Mapping[str, str] = field(default_factory=dict)
    hyperparameters: tuple[Hyperparameter, ...] = ()

    @property
    def per_adapter(self) -> tuple[str, ...]:
        """The hyperparameters that say how each task is pruned by itself, so that every adapter may have its own."""
        return OF_PRUNING[self.pruning]

    def load(self) -> Callable[..., Any]:
        """Imports the function."""
        return _imported(self.function)

    def load_combine(self) -> Callable[..., Any]:
        """Imports the function that combines tasks once they are pruned."""
        return _imported(self.combine)


@dataclass(frozen=True)
class Space:
    """A row of `SPACES`.

    Attributes:
        summary: One line.
        exact: What is exact in it and what is not, in one line.
        paper: Where it comes from.
        attribute: ``module:name`` of the `jaxmerge.spaces.Space`.
        rotated: The same space for methods that commute with rotations, where it has such a form.
        units: The same for methods of rank-one units, where it has such a form.
        breaks: As `Method.breaks`: what no method keeps in it.
        hyperparameters: What it takes itself.
    """

    summary: str
    exact: str
    paper: str
    attribute: str
    rotated: str = ""
    units: str = ""
    breaks: Mapping[str, str] = field(default_factory=dict)
    hyperparameters: tuple[Hyperparameter, ...] = ()

    def load(self, method: Method) -> Any:
        """Imports the form of the space that the method works in."""
        return _imported(self._form(method))

    def taken(self, method: Method) -> tuple[Hyperparameter, ...]:
        """The hyperparameters that matter to a method: one that is the same in any basis sees nothing of them."""
        return self.hyperparameters if self._form(method) == self.attribute else ()

    def _form(self, method: Method) -> str:
        if self.rotated and method.equivariant:
            return self.rotated
        return self.units if self.units and method.on_units else self.attribute


@dataclass(frozen=True)
class CombinationType:
    """One of PEFT's ``combination_type``s as a cell of the grid.

    Attributes:
        method: A name in `METHODS`.
        space: A name in `SPACES`.
        rank: ``"sum"`` or ``"max"`` of the adapters' ranks, or ``"equal"``: they must all have one.
    """

    method: str
    space: str
    rank: Literal["sum", "max", "equal"]


@dataclass(frozen=True)
class Stage:
    """A row of `STAGES`: what can be done to a merge once it is made.

    Attributes:
        summary: One line.
        paper: Where it comes from.
        function: ``module:name``. What it needs is in its arguments: the ``merged`` factors of one module, its
            ``sources`` and their ``weights``, to give new factors; or the ``paths`` of all modules, to give a factor
            for each.
        hyperparameters: In the order of the signature, but for ``scope``, which is for the caller to heed: a factor for
            each module, or one for the whole model.
        one_of: Whether just one of them is given.
    """

    summary: str
    paper: str
    function: str
    hyperparameters: tuple[Hyperparameter, ...] = ()
    one_of: bool = False

    def load(self) -> Callable[..., Any]:
        """Imports the function."""
        return _imported(self.function)

    def taken(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The hyperparameters with their defaults where they are not given; only those given if one is to be."""
        values = {h.name: given.get(h.name, h.default) for h in self.hyperparameters}
        return {name: value for name, value in values.items() if value is not None} if self.one_of else values


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
# Where a method looks at lengths and angles of changes.
_WHOLE_CHANGES = ("full", "knots", "core", "ctm")
_NO_DIRECTIONS = "it goes by singular values and directions, and those of A and of B apart are not those of the change"
_FLATTENED = {"single": "one adapter's singular values are replaced by their mean too"}
_NO_ANGLES = "it goes by lengths and angles, and those of A and of B apart are not those of the change"

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
            Hyperparameter("agreeing", "how many tasks must use an entry", "count", default=2, least=1),
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
        paper="Compress-then-Merge with β = 0, arXiv:2606.03723",
        function="jaxmerge.methods.gram:norm_equalized",
        equivariant=True,
        spaces=_WHOLE_CHANGES,
        elsewhere=_NO_ANGLES,
    ),
    "slerp": Method(
        summary="interpolate two deltas along the sphere, in proportion to the weights",
        paper="SLERP in mergekit, https://github.com/arcee-ai/mergekit",
        function="jaxmerge.methods.gram:slerp",
        averages=True,
        equivariant=True,
        spaces=_WHOLE_CHANGES,
        elsewhere=_NO_ANGLES,
        least=2,
        most=2,
        breaks={"zeros": "zeros count as at a right angle to the other adapter, and have their share of the way"},
    ),
    "nuslerp": Method(
        summary="slerp, also between deltas that are nearly opposite",
        paper="NuSLERP in mergekit, https://github.com/arcee-ai/mergekit",
        function="jaxmerge.methods.gram:nuslerp",
        averages=True,
        equivariant=True,
        spaces=_WHOLE_CHANGES,
        elsewhere=_NO_ANGLES,
        least=2,
        most=2,
        breaks={"zeros": "zeros count as at a right angle to the other adapter, and have their share of the way"},
    ),
    "multislerp": Method(
        summary="weighted mean of the deltas' directions, with their mean length",
        paper="Multi-SLERP in mergekit, https://github.com/arcee-ai/mergekit",
        function="jaxmerge.methods.gram:multislerp",
        averages=True,
        equivariant=True,
        spaces=_WHOLE_CHANGES,
        elsewhere=_NO_ANGLES,
        breaks={"zeros": "zeros have no direction, but their length counts in the mean length"},
    ),
    "karcher": Method(
        summary="Riemannian mean of the deltas' directions on the sphere, with their mean length",
        paper="Karcher mean, arXiv:2603.04972",
        function="jaxmerge.methods.gram:karcher",
        averages=True,
        equivariant=True,
        spaces=_WHOLE_CHANGES,
        elsewhere=_NO_ANGLES,
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
        equivariant=True,
        spaces=_WHOLE_CHANGES,
        elsewhere=_NO_ANGLES,
        breaks={"zeros": "zeros have their share of the mean, and agree with nothing"},
    ),
    "tsv": Method(
        summary="the adapters' singular directions, made orthogonal to each other",
        paper="TSV-M, arXiv:2412.00081",
        function="jaxmerge.methods.orthogonal:tsv",
        averages=True,
        equivariant=True,
        ranked=True,
        spaces=_WHOLE_CHANGES,
        elsewhere=_NO_DIRECTIONS,
    ),
    "iso_c": Method(
        summary="the sum, with all singular values equal to their mean",
        paper="Iso-C, arXiv:2502.04959",
        function="jaxmerge.methods.singular_values:iso_c",
        averages=True,
        equivariant=True,
        ranked=True,
        spaces=_WHOLE_CHANGES,
        elsewhere=_NO_DIRECTIONS,
        breaks=_FLATTENED,
    ),
    "iso_cts": Method(
        summary="directions of the sum and of each adapter beside it, orthogonal, all of one size",
        paper="Iso-CTS, arXiv:2502.04959",
        function="jaxmerge.methods.orthogonal:iso_cts",
        averages=True,
        equivariant=True,
        ranked=True,
        spaces=_WHOLE_CHANGES,
        elsewhere=_NO_DIRECTIONS,
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
        equivariant=True,
        ranked=True,
        spaces=_WHOLE_CHANGES,
        elsewhere=_NO_DIRECTIONS,
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
        equivariant=True,
        ranked=True,
        spaces=_WHOLE_CHANGES,
        elsewhere=_NO_DIRECTIONS,
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
        equivariant=True,
        ranked=True,
        spaces=_WHOLE_CHANGES,
        elsewhere=_NO_DIRECTIONS,
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

SPACES: Mapping[str, Space] = {
    "full": Space(
        summary="the weight change scale·B·A itself, as the papers have it",
        exact="what commutes with rotations is exact and never forms it; other methods form it and are cut to --rank",
        paper="Task arithmetic, arXiv:2212.04089",
        attribute="jaxmerge.spaces.plain:FULL",
        rotated="jaxmerge.spaces.plain:FULL_ROTATED",
    ),
    "factors": Space(
        summary="A and B each on their own, as PEFT's plain combination types have it",
        exact="an approximation for more than one adapter: products Bᵢ·Aⱼ of different adapters come in",
        paper="PEFT, add_weighted_adapter",
        attribute="jaxmerge.spaces.plain:FACTORS",
        units="jaxmerge.spaces.plain:UNITS",
    ),
    "knots": Space(
        summary="the changes side by side along the left singular basis that they share",
        exact="lossless, of rank R; entries are those of S·Vᵢ, so that entrywise methods differ from full on purpose",
        paper="KnOTS, arXiv:2410.19735",
        attribute="jaxmerge.spaces.aligned:KNOTS",
        rotated="jaxmerge.spaces.plain:FULL_ROTATED",
    ),
    "core": Space(
        summary="the R×R cores of the changes in the singular bases of all B and of all A",
        exact="lossless, of rank R, and tiny; entrywise methods differ from full on purpose",
        paper="Core Space, arXiv:2509.17786",
        attribute="jaxmerge.spaces.aligned:CORE",
        rotated="jaxmerge.spaces.plain:FULL_ROTATED",
        hyperparameters=(
            Hyperparameter(
                "basis",
                "the bases of the factors as stored, of evenly split changes, or of the changes themselves",
                "choice",
                default="reference",
                choices=("reference", "balanced", "hosvd"),
            ),
        ),
    ),
    "ctm": Space(
        summary="r×r cores in rank-r subspaces that the tasks share, so that the result has rank r",
        exact="compresses before it merges: an approximation that keeps most of the tasks; nothing is cut after it",
        paper="Compress-then-Merge, arXiv:2606.03723",
        attribute="jaxmerge.spaces.compressed:CTM",
        hyperparameters=(
            Hyperparameter(
                "own_norm",
                "how far tasks keep their own norms where the subspaces are found: 1 wholly, 0 gives all the same",
                "number",
                default=0.25,
                least=0,
                most=1,
            ),
        ),
    ),
}

COMBINATION_TYPES: Mapping[str, CombinationType] = {
    "cat": CombinationType("linear", "full", "sum"),
    "svd": CombinationType("linear", "full", "max"),
    "linear": CombinationType("linear", "factors", "equal"),
    "ties": CombinationType("ties", "factors", "equal"),
    "ties_svd": CombinationType("ties", "full", "max"),
    "dare_linear": CombinationType("dare_linear", "factors", "equal"),
    "dare_linear_svd": CombinationType("dare_linear", "full", "max"),
    "dare_ties": CombinationType("dare_ties", "factors", "equal"),
    "dare_ties_svd": CombinationType("dare_ties", "full", "max"),
    "magnitude_prune": CombinationType("magnitude_prune", "factors", "equal"),
    "magnitude_prune_svd": CombinationType("magnitude_prune", "full", "max"),
}

# In the order in which they are told; a merge may go through any of them in any order.
STAGES: Mapping[str, Stage] = {
    "isotropize": Stage(
        summary="replace a module's singular values by their mean",
        paper="Iso-C, arXiv:2502.04959",
        function="jaxmerge.stages:isotropize",
    ),
    "calibrate": Stage(
        summary="take out of each singular value how often adapters were counted in it",
        paper="Singular Value Calibration, arXiv:2602.05536",
        function="jaxmerge.stages:calibrate",
        hyperparameters=(
            Hyperparameter("floor", "the least that an adapter counts in a direction", "number", default=0.1, above=0),
        ),
    ),
    "norm_restore": Stage(
        summary="scale to the adapters' mean norm",
        paper="Pico, arXiv:2604.16826",
        function="jaxmerge.stages:norm_restore",
        hyperparameters=(
            Hyperparameter(
                "scope",
                "one factor for each module, or one for the whole model",
                "choice",
                default="module",
                choices=("module", "whole"),
            ),
        ),
    ),
    "lines": Stage(
        summary="scale by depth: alpha at the first layer, alpha + beta at the last",
        paper="LiNeS, arXiv:2410.17146",
        function="jaxmerge.stages:lines_factors",
        hyperparameters=(
            Hyperparameter("alpha", "factor at the first layer", "number", default=1.0),
            Hyperparameter("beta", "what is added to it at the last layer", "number", default=1.0),
        ),
    ),
    "truncate": Stage(
        summary="keep a module's leading singular values, as many as a rule finds",
        paper="resize_lora in kohya's sd-scripts, https://github.com/kohya-ss/sd-scripts",
        function="jaxmerge.stages:truncate",
        one_of=True,
        hyperparameters=(
            Hyperparameter("rank", "how many, of those that there are", "number", least=1, whole=True),
            Hyperparameter("energy", "the fewest that keep this fraction of Σσ²", "number", above=0, most=1),
            Hyperparameter("sv_ratio", "those of at least the largest / sv_ratio", "number", least=1),
            Hyperparameter("sv_fro", "the fewest that keep this fraction of √Σσ²", "number", above=0, most=1),
            Hyperparameter("sv_cumulative", "the fewest that keep this fraction of Σσ", "number", above=0, most=1),
        ),
    ),
    "scale": Stage(
        summary="multiply by a number",
        paper="Task arithmetic, arXiv:2212.04089",
        function="jaxmerge.stages:scale",
        hyperparameters=(Hyperparameter("factor", "what to multiply by", "number"),),
    ),
}


def all_hyperparameters() -> list[Hyperparameter]:
    """Of all methods and spaces; where several share a name, the first one's."""
    rows = [*METHODS.values(), *SPACES.values()]
    return list({h.name: h for row in reversed(rows) for h in row.hyperparameters}.values())[::-1]


# What adapters can be written as, whatever they came as.
FORMATS = ("peft", "tunix", "maxtext", "maxtext-unscanned", "qwix", "nnx", "gemma", "openpi", "keras")

# Of a merge, without data: see `jaxmerge.scores`.
SCORES = ("energy_kept", "worst_cosine", "norm")

# How the factors in a Flax tree are called.
TREES = ("nnx", "qwix", "gemma", "openpi", "maxtext-legacy", "keras")
