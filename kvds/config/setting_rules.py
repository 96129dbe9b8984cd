"""Rules of one setting by itself: is its number within the range that its field states."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

Rule = tuple[bool, str, object, str]
"""Whether it holds, the setting, its value, and what was expected (see :func:`kvds.config.run_config.require`)."""


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
