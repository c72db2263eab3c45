"""How numbers and paths are told to people, and which word they may have meant."""

import difflib
import math
import re
import reprlib
from collections.abc import Iterable, Sequence

# Its arguments are new in Python 3.12.
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 3, 60, 60


def pattern(path: str) -> str:
    """A module path with its numbers starred, so that layers of one kind share it."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def short(value: object) -> str:
    """A value as Python writes it, cut where it is long."""
    # Whatever is nested deep, or shared in many places, is not written out first.
    text = _REPR.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def shown(word: object) -> str:
    """A word as it is; quoted, and cut, if it is none that can be shown."""
    return word if isinstance(word, str) and word.isprintable() and len(word) <= 60 else short(word)


def folded(problems: Iterable[str]) -> list[str]:
    """What is wrong, where it is the same for the modules of all layers once for all of them.

    Args:
        problems: Lines; those of a module as in ``"module layers.0.q lacks its factor A"``.

    Returns:
        A line for each kind of module and problem, in the order of the first of its modules.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for line in problems:
        found = re.fullmatch(r"module (\S+?)(:? .*)", line)
        groups.setdefault((pattern(found[1]), found[2]) if found else ("", line), []).append(line)
    return [
        lines[0] if len(lines) == 1 or not kind else f"module {kind}{text} ({len(lines)} such modules)"
        for (kind, text), lines in groups.items()
    ]


def percent(fraction: float) -> str:
    """A fraction in percent. Never 100 for something that is less."""
    if fraction >= 1:
        return "100 %"
    return f"{min(100 * fraction, 99.9999):.6g} %" if fraction > 0.999 else f"{100 * fraction:.1f} %"


def kept_span(fractions: Sequence[float]) -> str:
    """One fraction in percent, or the smallest and the largest of several."""
    low, high = percent(min(fractions)), percent(max(fractions))
    return low if math.isclose(min(fractions), max(fractions)) or low == high else f"{low} … {high}"


def span(values: Iterable[float], digits: int = 4) -> str:
    """One number, or the smallest and the largest of several."""
    shown = sorted(set(values))
    ends = [f"{value:.{digits}g}" for value in (shown[0], shown[-1])]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} … {ends[1]}"


def were_given(names: Sequence[str]) -> str:
    """That these were given, and none where there are none."""
    return f"{' and '.join(names) or 'none'} {'were' if len(names) > 1 else 'was'} given"


def by(*sizes: int) -> str:
    """The sizes of axes, as in ``4096×1024``."""
    return "×".join(map(str, sizes))


def counted(count: int, noun: str) -> str:
    """A number of things."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, to two figures."""
    if seconds < 1:
        return "less than a second"
    if seconds < 100:
        return f"about {seconds:.2g} s"
    if seconds < 6000:
        return f"about {seconds / 60:.2g} minutes"
    return f"about {seconds / 3600:.2g} hours"


def nearest(word: object, known: Iterable[str]) -> str | None:
    """The known word that may have been meant, if one is near; capitals do not matter."""
    plain = {name.lower(): name for name in known}
    return next((plain[name] for name in difflib.get_close_matches(str(word).lower(), plain, n=1)), None)
