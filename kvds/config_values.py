"""Texts that stand for values in flags, recipes and messages: numbers, dataset weights, config.json changes."""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Iterable
from typing import Any

from kvds.errors import InputError


# A file of a few lines can hold lists within lists that would fill the memory if they were written out.
class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        return one_line(x)


_SHORT = _Short()
_SHORT.maxlevel, _SHORT.maxstring = 2, 60


def one_line(value: object) -> str:
    """A value as an error message can show it: one line, not endless, never invisible."""
    if isinstance(value, int) and abs(value) >= 10**60:  # Python itself refuses to write out some thousand digits
        return "a number of more than 60 digits"
    text = _SHORT.repr(value) if isinstance(value, list | tuple | dict | set) else str(value)
    visible = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(visible.split())[:200] or "''"


def number(text: str) -> int | float | str:
    """An int or a float as the text spells it, or the text itself."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def near_miss(name: str, known: Iterable[str]) -> str:
    """``, did you mean X?`` for the known name most like ``name``, or nothing."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f", did you mean {near[0]}?" if near else ""


def split_dataset_weight(spec: str) -> tuple[str, float]:
    """``"gsm8k:0.5"`` → ``("gsm8k", 0.5)``; without a weight, 1.

    Raises:
        InputError: the weight is no number above 0.
    """
    name, colon, text = spec.rpartition(":")
    if not colon:
        return spec, 1.0
    weight = number(text)
    if not name or isinstance(weight, str) or not math.isfinite(weight) or weight <= 0:
        raise InputError(f"datasets={spec}: expected NAME or NAME:WEIGHT with a weight above 0, such as gsm8k:0.5")
    return name, float(weight)


def parse_overrides(text: str, *, flag: str = "config_overrides") -> dict[str, Any]:
    """``"num_hidden_layers=4,rope_theta=1e4,tie=true"`` → typed values.

    Raises:
        InputError: a part that is not ``key=value``, or a key given twice.
    """
    result: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key.isidentifier() or not value:
            raise InputError(
                f"{flag}={text}: {part!r} is not key=value; expected a list such as num_hidden_layers=4,hidden_size=128"
            )
        if key in result:
            raise InputError(f"{flag}={text}: {key} stands there twice; expected each key once")
        result[key] = {"true": True, "false": False}.get(value.lower(), number(value))
    return result
