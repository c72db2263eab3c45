"""What argparse lacks: the word that may have been meant, a short usage, and help that ends with examples."""

import argparse
import itertools
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from jaxmerge.words import nearest


class Parser(argparse.ArgumentParser):
    """The parser of the program, and of each command."""

    def __init__(self, **settings: Any) -> None:
        """Takes what `argparse.ArgumentParser` takes."""
        super().__init__(**{"formatter_class": HelpFormatter, **settings})

    @property
    def commands(self) -> dict[str, argparse.ArgumentParser]:
        """The parsers of the commands, by name."""
        groups = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return {name: parser for group in groups for name, parser in group.choices.items()}

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Refuses what argparse hands on to the parser above, which knows less of what may have been meant."""
        given = sys.argv[1:] if args is None else list(args)
        # Before argparse asks for an option that is there, but misspelt.
        if problems := self._unknown_options(given):
            self.error("; ".join(problems))
        found, rest = super().parse_known_args(given, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest

    def _unknown_options(self, given: Sequence[str]) -> list[str]:
        own = itertools.takewhile(lambda text: text != "--", given)
        if self._subparsers is not None:  # What comes after the command is the command's.
            own = itertools.takewhile(lambda text: text.startswith("-"), own)
        # As in argparse, there are no spaces in options, and a beginning is enough.
        options = [text.partition("=")[0] for text in own if text.startswith("--") and " " not in text]
        known = [name for name in self._option_string_actions if name.startswith("--")]
        unknown = [option for option in options if not any(name.startswith(option) for name in known)]
        # Without the dashes, by which all are alike.
        names = [name[2:] for name in known]
        return [f"there is no option {option}{_meant(option[2:], names, '--')}" for option in unknown]

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            meant = _meant(value, known) or f": there {'are' if len(known) > 1 else 'is'} {', '.join(known)}"
            raise argparse.ArgumentError(action, f"there is no {value}{meant}")
        super()._check_value(action, value)

    def error(self, message: str) -> Any:
        """Ends the program with the usage, the problem, and where to read more."""
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help says more\n")


def _meant(word: str, known: Iterable[str], before: str = "") -> str:
    meant = nearest(word, known)
    return f"; did you mean {before}{meant}?" if meant else ""


class HelpFormatter(argparse.HelpFormatter):
    """Tells of what must be given in the usage, and leaves the indented lines of descriptions as they are."""

    def _format_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any) -> str:
        groups = [group for group in groups if group.required]
        one_of = [action for group in groups for action in group._group_actions]
        needed = [a for a in actions if a.required or not a.option_strings or a in one_of]
        text = super()._format_usage(usage, needed, groups, prefix)
        more = any(a not in needed and not isinstance(a, argparse._HelpAction) for a in actions)
        return text if usage or not more else f"{text.rstrip()} [options]\n\n"

    def add_argument(self, action: argparse.Action) -> None:
        """Leaves room for the names of commands, whose indentation argparse forgets."""
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            self._action_max_length += self._indent_increment

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = []
        for indented, block in itertools.groupby(text.splitlines(), key=lambda line: line.startswith(" ") or not line):
            kept = list(block)
            lines += kept if indented else textwrap.wrap(" ".join(kept), width)
        return "\n".join(indent + line for line in lines)
