"""The exceptions that mean "here is what went wrong, in one line": the user's input, or what befell a run."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Sequence


class InputError(ValueError):
    """A fault in a flag, file, model or data row that the user can mend.

    The text is one line that names the place, the value, what was expected and the remedy. Entry points print it
    without a traceback and exit with code 2.
    """


class RunError(RuntimeError):
    """A run that cannot go on though its input was right: a full disk, numbers that are not finite, a lost rank.

    The text is one line that says what happened, what is still whole and what to do. Entry points print it without a
    traceback and exit with code 1.
    """


# A file of a few lines can hold lists within lists that would fill the memory if they were written out.
class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        return one_line(x)


_SHORT = _Short()


def one_line(value: object) -> str:
    """A value as an error message can show it: one line, not endless, never invisible."""
    if isinstance(value, int) and abs(value) >= 10**60:  # Python itself refuses to write out some thousand digits
        return "a number of more than 60 digits"
    text = _SHORT.repr(value) if isinstance(value, list | tuple | dict | set) else str(value)
    visible = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(visible.split())[:200] or "''"


def near_miss(name: str, known: Iterable[str]) -> str:
    """``, did you mean X?`` for the known name most like ``name``, or nothing."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f", did you mean {near[0]}?" if near else ""


def listed(names: Sequence[str], between: str) -> str:
    """``"a, b or c"`` of names and the word before the last."""
    return f" {between} ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
