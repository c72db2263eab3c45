"""The stages that a merge may go through once it is made."""

from collections.abc import Mapping

from jaxmerge.catalog.rows import Hyperparameter, Stage

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
