"""The command line: parse and call. Nothing heavy is imported before a command needs it."""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jaxmerge.cli.commands import COMMANDS
from jaxmerge.cli.parser import Parser

DESCRIPTION = """\
Merge LoRA adapters exactly, without the base model. To start with: what is in one, whether several go together, and
all of them in one.

  jaxmerge inspect tests/adapters/sms
  jaxmerge compare tests/adapters/sms tests/adapters/movie
  jaxmerge merge tests/adapters/sms tests/adapters/movie -o merged
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Those of the process if None.

    Returns:
        The exit code: 0, or 1 for a problem with the inputs. A command line that is not understood exits with 2, and
        an interruption with 130.
    """
    interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    with _on_interruption(interrupt):
        try:
            return _main(arguments)
        except BaseException:
            # Libraries make other errors of it, such as an ImportError of one that was interrupted while it was loaded.
            if interrupted:
                _stop()
            raise


def _stop(*_: object) -> NoReturn:
    """Ends the process at once: XLA's threads may be at work, and would be while the interpreter is taken down."""
    os.write(2, b"jaxmerge: interrupted; nothing was written\n")
    os._exit(130)


@contextlib.contextmanager
def _on_interruption(handler: Callable[..., object]) -> Iterator[None]:
    """Handles Ctrl-C in another way than Python, where it would be handled by Python."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, signal.SIG_DFL, None):
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _main(arguments: Sequence[str] | None) -> int:
    _use_any_output()
    parser, given = build_parser(), list(sys.argv[1:] if arguments is None else arguments)
    if not given:
        parser.print_help(sys.stderr)
        parser.exit(2)
    # `jaxmerge help merge` is what some try first.
    options = parser.parse_args([*given[1:2], "--help"] if given[0] == "help" else given)
    # Orbax warns at length, and from threads of its own, of what we tell in a line.
    for name in ("absl", "asyncio", "root"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    threading.excepthook = sys.unraisablehook = lambda _: None
    with _on_interruption(_stop):  # There is nothing yet to leave in order.
        from jaxmerge.cli import console

        if importlib.util.find_spec(actions := f"jaxmerge.cli.actions.{options.command}") is not None:
            importlib.import_module(actions)

    console.out.quiet = getattr(options, "quiet", False)
    try:
        code = _command(options.command).run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader went away, as in `jaxmerge inspect A | head`: nobody is left to tell, and the work is done.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is not None:
            sys.stderr.write(f"jaxmerge: {error.filename}: {error.strerror}\n")
            return 1
        # Commands tell of what they write themselves: this is standard output.
        sys.stderr.write(f"jaxmerge: what there is to tell cannot be printed: {error.strerror}\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _use_any_output() -> None:
    """Makes do with outputs that are closed, or that know fewer characters than the tables have."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - for as long as the process lives
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def build_parser() -> Parser:
    """The parser of all commands, with the methods' own options from their rows."""
    parser = Parser(
        prog="jaxmerge",
        usage="jaxmerge COMMAND ...",
        description=DESCRIPTION,
        epilog="jaxmerge COMMAND --help says more of one, with examples.",
    )
    version = importlib.metadata.version("jaxmerge")
    parser.add_argument("--version", action="version", version=f"jaxmerge {version}")
    commands = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", required=True, prog=parser.prog
    )
    for name in COMMANDS:
        _command(name).add_parser(commands)
    return parser


def _command(name: str) -> Any:
    return importlib.import_module(f"jaxmerge.cli.commands.{name}")
