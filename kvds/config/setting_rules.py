"""Rules of one setting by itself, and the one form that all rules have."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kvds.config.all_settings import AllSettings
from kvds.errors import InputError, near_miss, one_line

Rule = tuple[bool, str, object, str]
"""Whether it holds, the setting, its value, and what was expected: a rule is a generator that yields these.

A generator goes on where its last rule holds, so that what comes later may rely on it. An expectation without a flag or
a bracket gets the way back to the default.
"""

_KIND_NAMES = {
    int: "a whole number", float: "a number", str: "a text, in a recipe quoted", bool: "true or false",
    tuple: "a list of texts", types.NoneType: "nothing",
}  # fmt: skip


def check(rules: Iterable[Rule], place: str = "") -> None:
    """Raise for the first rule that does not hold.

    Args:
        rules: Of one or more settings.
        place: Stands in front of the message.

    Raises:
        InputError: naming the setting, its value, what was expected and how to get there.
    """
    for holds, name, value, expected in rules:
        if not holds:
            shown = shown_value(value) if isinstance(value, bool | None) else one_line(value)
            remedy = "" if "(" in expected or "--" in expected else f" ({_way_back(name)})"
            raise InputError(f"{place}{name}={shown}: expected {expected}{remedy}")


def _way_back(name: str) -> str:
    [default] = [field.default for field in dataclasses.fields(AllSettings) if field.name == name]
    if default is dataclasses.MISSING:
        return f"for example --{name} outputs/NAME"
    return f"the default is --{name} {shown_value(default) or repr('')}"


def shown_value(value: object) -> str:
    """A value as a flag takes it."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool | None) else str(value)


@functools.cache
def hints() -> dict[str, Any]:
    """Types of all settings by name."""
    return typing.get_type_hints(AllSettings)


def setting_rules(settings: AllSettings) -> Iterator[Rule]:
    """Kind, choices and bounds of every setting."""
    for field in dataclasses.fields(settings):
        yield from kind_rules(field, getattr(settings, field.name))
    yield from range_rules(settings)


def kind_rules(field: dataclasses.Field[Any], value: Any) -> Iterator[Rule]:
    """Kind and choices of one setting's value."""
    name, hint = field.name, hints()[field.name]
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = tuple(typing.get_origin(kind) or kind for kind in allowed)
    widened = (*kinds, int) if float in kinds else kinds
    wrong_bool = isinstance(value, bool) and bool not in kinds
    yield isinstance(value, widened) and not wrong_bool, name, value, " or ".join(_KIND_NAMES[kind] for kind in kinds)
    if isinstance(value, int | float):
        yield abs(value) < 2**63, name, value, "a finite number"
    if kinds == (tuple,) and typing.get_args(hint)[0] is float:
        numbers = all(isinstance(entry, int | float) and not isinstance(entry, bool) for entry in value)
        yield numbers, name, " ".join(map(one_line, value)), "numbers"
        return
    texts = value if isinstance(value, tuple) else (value,) if isinstance(value, str) and value else ()
    readable = all(isinstance(text, str) and text.strip() and text.isprintable() for text in texts)
    yield readable, name, value, "visible text on one line"
    choices = field.metadata["choices"]
    for text in texts if isinstance(value, tuple) else (value,):
        if choices and text is not None and text not in choices:
            yield False, name, text, f"one of {', '.join(choices)}{near_miss(text, choices)}"


def range_rules(settings: Any) -> Iterator[Rule]:
    """The bounds of every number that is given.

    Args:
        settings: A section, or all of them: a dataclass with fields of :func:`kvds.config.settings.setting`.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value is not None:
            leave = f" (or leave --{field.name} away)" if field.default is None else ""
            for holds, expected in _bounds(value, field.metadata, leave):
                yield holds, field.name, value, field.metadata.get("expected") or expected


def _bounds(value: Any, facts: Mapping[str, Any], leave: str) -> Iterator[tuple[bool, str]]:
    least, above, most, below = (facts.get(side) for side in ("least", "above", "most", "below"))
    if least is not None:
        # Weights and counts alike begin at 0; what begins at 1 is a count.
        kind = "" if leave else "a finite number, " if least == 0 else "a whole number, "
        yield least <= value < math.inf, f"{kind}at least {least}{leave}"
    if above is not None:
        yield above < value < math.inf, f"above {above}{leave}"
    if most is not None:
        yield value <= most, f"at most {most}"
    if below is not None:
        yield value < below, f"below {below}"
