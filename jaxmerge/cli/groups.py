"""Options that several commands have, and what they say as arguments of the library."""

import argparse
import re
from collections.abc import Iterator
from typing import Any

from jaxmerge.catalog import (
    COMBINATION_TYPES,
    DTYPES,
    FORMATS,
    METHODS,
    SPACES,
    STAGES,
    TREES,
    Hyperparameter,
    all_hyperparameters,
)
from jaxmerge.cli import values
from jaxmerge.layouts import LAYOUTS


def add_adapters(
    parser: argparse.ArgumentParser, action: Any = "store", text: str = "adapter folders, in order"
) -> None:
    """The adapters to work on, in order."""
    # Weights may be negative and in scientific notation, which argparse takes for options.
    parser._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", action=action, help=text)


def add_input_and_output(parser: argparse.ArgumentParser) -> None:
    """The one adapter to read, and where to write."""
    parser.add_argument("input", metavar="IN", help="adapter folder")
    parser.add_argument("output", metavar="OUT", help="folder to write")


def add_how(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """How to merge, but for numbers: those are one each in a merge, and several in a sweep."""
    how = parser.add_argument_group("how to merge")
    how.add_argument("--method", choices=list(METHODS), metavar="M", help=f"{', '.join(METHODS)} (linear)")
    how.add_argument("--space", choices=list(SPACES), metavar="S", help=f"{', '.join(SPACES)} (the method's own)")
    how.add_argument(
        "--combination-type",
        choices=list(COMBINATION_TYPES),
        metavar="T",
        help=f"one of PEFT's, in place of method and space: {', '.join(COMBINATION_TYPES)}",
    )
    how.add_argument("--rank", type=int, metavar="R", help="rank of the result (exact where there is such a rank)")
    how.add_argument(
        "--stage",
        action="append",
        default=[],
        type=values.stage,
        dest="stages",
        metavar="NAME[:KEY=VALUE,...]",
        help="what is done to the merge before it is cut to its rank; may be given repeatedly, and is done in that "
        f"order: {', '.join(map(values.stage_usage, STAGES))}",
    )
    for hyperparameter, about in _hyperparameters():
        if hyperparameter.kind == "choice":
            how.add_argument(_flag(hyperparameter), choices=hyperparameter.choices, help=about)
        if hyperparameter.kind == "count":
            how.add_argument(_flag(hyperparameter), type=values.count, metavar="N", help=about)
    return how


def add_numbers(group: argparse._ArgumentGroup, **settings: Any) -> None:
    """The numeric hyperparameters of all methods and spaces."""
    for hyperparameter, about in _hyperparameters():
        if hyperparameter.traceable:
            group.add_argument(_flag(hyperparameter), type=float, help=about, **settings)


def _hyperparameters() -> Iterator[tuple[Hyperparameter, str]]:
    """All options of methods and spaces, with what they are and who has them."""
    rows = {**METHODS, **{f"space {name}": row for name, row in SPACES.items()}}
    for h in all_hyperparameters():
        users = (user for user, row in rows.items() if h.name in {own.name for own in row.hyperparameters})
        yield h, f"{h.help} [{', '.join(users)}]"


def _flag(hyperparameter: Hyperparameter) -> str:
    return f"--{hyperparameter.name.replace('_', '-')}"


def add_rules(group: argparse._ActionsContainer) -> None:
    """How the singular values σ of a module find its rank."""
    group.add_argument("--energy", type=float, metavar="E", help="the smallest rank that keeps this fraction of Σσ²")
    group.add_argument("--sv-ratio", type=float, metavar="X", help="keeps the σ of at least the largest / X")
    group.add_argument("--sv-fro", type=float, metavar="X", help="keeps this fraction of the Frobenius norm √Σσ²")
    group.add_argument("--sv-cumulative", type=float, metavar="X", help="keeps this fraction of Σσ")


def rules(options: argparse.Namespace) -> dict[str, Any]:
    """The rule for ranks, as arguments of `jaxmerge.resize`."""
    return {
        name: getattr(options, name) for name in ("rank", "energy", "sv_ratio", "sv_fro", "sv_cumulative", "max_rank")
    }


def add_machine(parser: argparse.ArgumentParser) -> None:
    """What a merge runs on; `jaxmerge.cli.actions.machine` sees to it."""
    machine = parser.add_argument_group("what it runs on")
    machine.add_argument(
        "--memory",
        type=values.memory,
        metavar="SIZE",
        help="to work in, such as 2GB; the result is the same (a sixteenth of what there is)",
    )
    which = machine.add_mutually_exclusive_group()
    which.add_argument("--devices", type=values.count, metavar="N", help="how many devices to spread the work over (1)")
    which.add_argument(
        "--mesh",
        type=values.mesh,
        metavar="AXIS=N,...",
        help="the same with names, by which arrays of an Orbax checkpoint are spread",
    )
    machine.add_argument(
        "--distributed",
        nargs="*",
        metavar="HOST:PORT N I",
        help="this is one of several processes that work together, on all their devices; under Slurm, Open MPI and on "
        "TPU pods they find each other, elsewhere give the first one's address, how many there are, and which this is",
    )
    machine.add_argument(
        "--no-compilation-cache", action="store_true", help="keep no compiled programs in the user's cache folder"
    )


def add_dtype(group: argparse._ArgumentGroup, otherwise: str) -> None:
    """The dtype of what is written."""
    group.add_argument("--dtype", choices=DTYPES, help=f"of the result ({otherwise})")


def add_format(group: argparse._ArgumentGroup, required: bool) -> None:
    """The format of what is written."""
    group.add_argument(
        "--format",
        choices=FORMATS,
        metavar="F",
        required=required,
        help=f"of the result: {', '.join(FORMATS)}" + ("" if required else " (that of the first adapter)"),
    )
    group.add_argument(
        "--layout",
        metavar="MODEL|TABLE.json",
        help=f"what modules are called in the other format: {', '.join(LAYOUTS)}, or a table of your own",
    )
    group.add_argument("--head-dim", type=int, metavar="N", help="size of one attention head, to cut heads apart")
    group.add_argument(
        "--layers", type=int, metavar="N", help="of the model, for formats that stack them (as many as there are)"
    )


def conversion(options: argparse.Namespace) -> dict[str, Any]:
    """What the output's format is, as arguments of `jaxmerge.save`."""
    return {name: getattr(options, name) for name in ("format", "layout", "head_dim", "layers")}


def add_report(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """A report of what was done."""
    group = parser.add_argument_group("what is reported")
    group.add_argument(
        "--report",
        metavar="FILE",
        help="write a report: .html, a page with charts; .md, for a model card; .json, all of its numbers",
    )
    return group


def add_force(group: argparse._ArgumentGroup) -> None:
    """Whether what lies at the output may be replaced."""
    group.add_argument("--force", action="store_true", help="replace OUT if it is an adapter")


def add_reading(parser: argparse.ArgumentParser) -> None:
    """How adapters are read."""
    reading = parser.add_argument_group("how Flax checkpoints are read")
    reading.add_argument(
        "--alpha",
        nargs="+",
        type=values.alpha,
        metavar="A",
        help="of formats that do not store it, one for all or one per adapter; rank where it is each module's rank",
    )
    reading.add_argument(
        "--scan-axis", type=values.scan_axis, metavar="N|none", help="where the layers of a scan lie in the factors"
    )
    reading.add_argument("--item", help="which item of a step that has several")
    naming = reading.add_mutually_exclusive_group()
    naming.add_argument(
        "--tree",
        choices=TREES,
        metavar="T",
        help=f"how factors are called, where it could be several: {', '.join(TREES)}",
    )
    naming.add_argument(
        "--pattern",
        nargs=2,
        metavar=("A", "B"),
        help="regular expressions of the paths of all A and of all B, with a group (?P<module>...), for any other tree",
    )


def reading(options: argparse.Namespace, index: int = 0, count: int = 1) -> dict[str, Any]:
    """How the adapter at a position is read, as arguments of `jaxmerge.load`.

    Args:
        options: With those of `add_reading`.
        index: The adapter's position.
        count: How many adapters there are.

    Returns:
        The arguments.

    Raises:
        ValueError: If the alphas are neither one nor one per adapter.
    """
    alphas = options.alpha
    if alphas is not None and len(alphas) not in (1, count):
        raise ValueError(f"{len(alphas)} alphas for {count} adapters: give one for all, or one per adapter")
    return {
        "alpha": None if alphas is None else alphas[index if len(alphas) > 1 else 0],
        "scan_axis": options.scan_axis,
        "item": options.item,
        "layout": options.tree,
        "pattern": None if options.pattern is None else tuple(options.pattern),
    }


def add_json(parser: argparse.ArgumentParser) -> None:
    """Whether the answer is for machines."""
    parser.add_argument("--json", action="store_true", help="print JSON for machines")


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Whether people are told nothing but problems."""
    parser.add_argument("-q", "--quiet", action="store_true", help="print problems alone, and what --json asks for")
