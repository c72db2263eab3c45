"""The spaces that methods work in."""

from collections.abc import Mapping

from jaxmerge.catalog.rows import Hyperparameter, Space

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
