"""The command line: parse and call. Nothing heavy is imported before a command needs it."""

import argparse
import importlib
import importlib.metadata
import logging
import os
import re
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmerge.catalog import (
    COMBINATION_TYPES,
    FORMATS,
    METHODS,
    SCORES,
    SPACES,
    STAGES,
    TREES,
    Hyperparameter,
    all_hyperparameters,
)
from jaxmerge.layouts import LAYOUTS


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Those of the process if None.

    Returns:
        The exit code: 0, or 1 for a problem with the inputs. A usage error exits with 2.
    """
    _use_any_output()
    options = build_parser().parse_args(arguments)
    # Orbax warns at length, and from threads of its own, of what we tell in a line.
    for name in ("absl", "asyncio", "root"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    threading.excepthook = sys.unraisablehook = lambda _: None
    try:
        code = importlib.import_module(f"jaxmerge.cli.{options.command}").run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader went away, as in `jaxmerge inspect A | head`: nobody is left to tell, and the work is done.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # Commands tell of their own files themselves: this is standard output.
        sys.stderr.write(f"jaxmerge: the report cannot be printed: {error.strerror}; what is written stays\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("jaxmerge: interrupted; nothing was written\n")
        return 130
    return code


def _use_any_output() -> None:
    """Makes do with outputs that are closed, or that know fewer characters than the tables have."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - for as long as the process lives
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def build_parser() -> argparse.ArgumentParser:
    """The parser, with the methods' own options from their rows."""
    parser = argparse.ArgumentParser(
        prog="jaxmerge", description="Merge LoRA adapters exactly, without the base model."
    )
    version = importlib.metadata.version("jaxmerge")
    parser.add_argument("--version", action="version", version=f"jaxmerge {version}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_merge(commands.add_parser("merge", help="merge adapters into one", description=_MERGE))
    _add_sweep(commands.add_parser("sweep", help="score many settings of a merge, without data", description=_SWEEP))
    inspect = commands.add_parser("inspect", help="say what is in adapters", description=_INSPECT)
    inspect.add_argument("adapters", nargs="+", metavar="PATH", help="adapter folders")
    _add_compare(commands.add_parser("compare", help="say how adapters interfere", description=_COMPARE))
    _add_convert(commands.add_parser("convert", help="write an adapter in another format", description=_CONVERT))
    _add_resize(commands.add_parser("resize", help="give an adapter smaller ranks", description=_RESIZE))
    methods = commands.add_parser("methods", help="list methods, spaces and PEFT's combination types")
    _add_reading(inspect)
    for command in (inspect, methods):
        _add_json(command)
    methods.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    return parser


_MERGE = (
    "Merge LoRA adapters of one base model into one adapter. Without options the result is the exact mean of "
    "their weight changes."
)
_SWEEP = (
    "Score every combination of weights, scales, densities and seeds, without data: the energy that truncation keeps, "
    "the smallest cosine between the merge and a task, and the norm of the merge. Nothing is written. Example: "
    "jaxmerge sweep a b c --method ties --density 0.1 0.2 0.5 --scale 0.5 1 --plot sweep.png"
)
_CONVERT = (
    "Write an adapter in another format, exactly: PEFT to and from Tunix, MaxText and others. Example: "
    "jaxmerge convert my-adapter for-tunix --format tunix --layout llama3 --head-dim 128"
)
_RESIZE = (
    "Give an adapter smaller ranks: the best approximation of each module, of the rank that a rule finds for it. "
    "Example: jaxmerge resize merged small --energy 0.95 --max-rank 32"
)
_INSPECT = "Say what is in adapters: modules, ranks, scales, dtypes, norms; what cannot be merged, and why."
_COMPARE = (
    "Say how adapters interfere, from their factors alone and in seconds: cosines, norms, overlap of subspaces, signs "
    "that differ, the energy of their sum by rank; and what that says about how to merge them."
)


def _add_merge(parser: argparse.ArgumentParser) -> None:
    _add_adapters(parser)
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="folder to write")
    how = _add_how(parser)
    how.add_argument("--weights", nargs="+", type=float, metavar="W", help="one per adapter, any sign (equal)")
    how.add_argument("--seed", type=_seed, metavar="N", help="for methods that draw; N is jax.random.key(N)")
    for name, hyperparameter, users in _hyperparameters():
        if hyperparameter.traceable:
            how.add_argument(_flag(name), type=float, help=f"{hyperparameter.help} [{users}]")
    cut = parser.add_argument_group("how each module is cut at the end, by its singular values σ, in place of --rank")
    _add_rules(cut)
    cut.add_argument("--max-rank", type=_count, metavar="M", help="the most that such a rule may find")
    how.add_argument(
        "--density-scope",
        choices=("module", "model"),
        default="module",
        help="whether a density is of each module, as in PEFT, or of the whole model, as in the TIES paper (module)",
    )
    what = parser.add_argument_group("what is written")
    what.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the result (the sources')")
    _add_format(what, required=False)
    what.add_argument(
        "--extras",
        default="same",
        metavar="same|average|ADAPTER",
        help="tensors that are not LoRA factors, where adapters differ: refuse, average, or take those of one "
        "adapter, named as on the command line or by its number from 1 (same)",
    )
    what.add_argument("--allow-different-bases", action="store_true", help="merge across base models")
    what.add_argument("--force", action="store_true", help="replace OUT if it is an adapter")
    _add_machine(parser)
    _add_reading(parser)
    _add_json(parser)


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    _add_adapters(parser)
    _add_how(parser)
    grid = parser.add_argument_group("the grid: every combination of these is a setting")
    grid.add_argument(
        "--weights",
        nargs="+",
        type=float,
        action="append",
        metavar="W",
        help="one per adapter; may be given repeatedly",
    )
    grid.add_argument("--scale", nargs="+", type=float, metavar="X", help="what the merge is multiplied by (1)")
    grid.add_argument("--seed", nargs="+", type=_seed, metavar="N", help="for methods that draw")
    for name, hyperparameter, users in _hyperparameters():
        if hyperparameter.traceable:
            grid.add_argument(_flag(name), nargs="+", type=float, metavar="X", help=f"{hyperparameter.help} [{users}]")
    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--sort", choices=SCORES, default="worst_cosine", help="best first by this score (worst_cosine)")
    shown.add_argument("--plot", metavar="FILE.png", help="draw the scores; .svg and .pdf too (needs matplotlib)")
    _add_machine(parser)
    _add_reading(parser)
    _add_json(parser)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    _add_adapters(parser, _AtLeastTwo)
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="of the sum, one per adapter (equal)")
    parser.add_argument("--allow-different-bases", action="store_true", help="compare across base models")
    _add_reading(parser)
    _add_json(parser)


class _AtLeastTwo(argparse.Action):
    """Refuses fewer than two values."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        if len(values) < 2:
            raise argparse.ArgumentError(self, "at least two adapters are compared")
        setattr(namespace, self.dest, values)


def _stage_usage(name: str) -> str:
    return ":".join([name, *filter(None, [",".join(f"{h.name}=" for h in STAGES[name].hyperparameters)])])


def _stage(text: str) -> tuple[str, dict[str, float | str]]:
    name, _, values = text.partition(":")
    if name not in STAGES:
        raise argparse.ArgumentTypeError(f"there is no stage {name}: there are {', '.join(STAGES)}")
    own = [h.name for h in STAGES[name].hyperparameters]
    given = {}
    for part in filter(None, values.split(",")):
        key, found, value = part.partition("=")
        if not found and len(own) == 1:
            key, value = own[0], part
        if key not in own or key in given:
            raise argparse.ArgumentTypeError(f"stage {name} is given as {_stage_usage(name)}, not {text}")
        try:
            given[key] = float(value)
        except ValueError:
            given[key] = value
    return name, given


def _add_adapters(parser: argparse.ArgumentParser, action: Any = "store") -> None:
    # Weights may be negative and in scientific notation, which argparse takes for options.
    parser._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", action=action, help="adapter folders, in order")


def _add_how(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
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
        type=_stage,
        dest="stages",
        metavar="NAME[:KEY=VALUE,...]",
        help="what is done to the merge before it is cut to its rank; may be given repeatedly, and is done in that "
        f"order: {', '.join(map(_stage_usage, STAGES))}",
    )
    for name, hyperparameter, users in _hyperparameters():
        if hyperparameter.kind == "choice":
            how.add_argument(_flag(name), choices=hyperparameter.choices, help=f"{hyperparameter.help} [{users}]")
        if hyperparameter.kind == "count":
            how.add_argument(_flag(name), type=_count, metavar="N", help=f"{hyperparameter.help} [{users}]")
    return how


def _hyperparameters() -> list[tuple[str, Hyperparameter, str]]:
    """All options of methods and spaces, with those that have them."""
    rows = {**METHODS, **{f"space {name}": row for name, row in SPACES.items()}}
    return [
        (
            h.name,
            h,
            ", ".join(user for user, row in rows.items() if h.name in {own.name for own in row.hyperparameters}),
        )
        for h in all_hyperparameters()
    ]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _add_machine(parser: argparse.ArgumentParser) -> None:
    machine = parser.add_argument_group("what it runs on")
    machine.add_argument(
        "--memory", type=_memory, metavar="SIZE", help="to work in, such as 2GB; the result is the same (a sixteenth)"
    )
    which = machine.add_mutually_exclusive_group()
    which.add_argument("--devices", type=_count, metavar="N", help="how many devices to spread the work over (1)")
    which.add_argument(
        "--mesh",
        type=_mesh,
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


def _memory(text: str) -> str:
    if not re.fullmatch(r"(\d+\.?\d*|\.\d+) *([kKmMgGtT][iI]?)?[bB]?", text):
        raise argparse.ArgumentTypeError(f"memory is a size like 2GB or 500MiB, got {text}")
    return text


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 is wanted, got {text}")
    return int(text)


def _mesh(text: str) -> list[tuple[str, int]]:
    axes = [axis.partition("=") for axis in text.split(",")]
    if len({name for name, _, _ in axes}) < len(axes) or not all(
        name.isidentifier() and size.isdecimal() and int(size) > 0 for name, _, size in axes
    ):
        raise argparse.ArgumentTypeError(f"a mesh is like data=2,model=4, got {text}")
    return [(name, int(size)) for name, _, size in axes]


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN", help="adapter folder")
    parser.add_argument("output", metavar="OUT", help="folder to write")
    what = parser.add_argument_group("what is written")
    _add_format(what, required=True)
    what.add_argument("--force", action="store_true", help="replace OUT if it is an adapter")
    _add_reading(parser)
    _add_json(parser)


def _add_rules(group: argparse._ActionsContainer) -> None:
    group.add_argument("--energy", type=float, metavar="E", help="the smallest rank that keeps this fraction of Σσ²")
    group.add_argument("--sv-ratio", type=float, metavar="X", help="keeps the σ of at least the largest / X")
    group.add_argument("--sv-fro", type=float, metavar="X", help="keeps this fraction of the Frobenius norm √Σσ²")
    group.add_argument("--sv-cumulative", type=float, metavar="X", help="keeps this fraction of Σσ")


def _add_resize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN", help="adapter folder")
    parser.add_argument("output", metavar="OUT", help="folder to write")
    how = parser.add_argument_group("the rank of each module; σ are its singular values")
    rule = how.add_mutually_exclusive_group(required=True)
    rule.add_argument("--rank", type=_count, metavar="R", help="the same for all that have as much")
    _add_rules(rule)
    how.add_argument("--max-rank", type=_count, metavar="M", help="the most that a rule other than --rank may find")
    what = parser.add_argument_group("what is written")
    what.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the result (the adapter's)")
    _add_format(what, required=False)
    what.add_argument("--force", action="store_true", help="replace OUT if it is an adapter")
    _add_reading(parser)
    _add_json(parser)


def _add_format(group: argparse._ArgumentGroup, required: bool) -> None:
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


def _add_reading(parser: argparse.ArgumentParser) -> None:
    reading = parser.add_argument_group("how Flax checkpoints are read")
    reading.add_argument(
        "--alpha",
        nargs="+",
        type=_alpha,
        metavar="A",
        help="of formats that do not store it, one for all or one per adapter; rank where it is each module's rank",
    )
    reading.add_argument(
        "--scan-axis", type=_scan_axis, metavar="N|none", help="where the layers of a scan lie in the factors"
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


def _alpha(text: str) -> float | str:
    try:
        return text if text == "rank" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"alpha is a number, or rank, got {text}") from None


def _scan_axis(text: str) -> int | str:
    if text != "none" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a scan axis is a whole number from 0, or none, got {text}")
    return text if text == "none" else int(text)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for machines")


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"a seed is a whole number from 0 to 2**32 - 1, got {text}")
    return int(text)
