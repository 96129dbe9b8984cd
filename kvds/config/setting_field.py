"""The field of one setting, with all that is true of it by itself."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import MISSING, field
from typing import Any

SHARE_BELOW_ONE = "a share from 0 to below 1"


def setting(
    doc: str,
    default: Any = MISSING,
    *,
    choices: Collection[str] = (),
    form: str = "",
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    expected: str = "",
    may_change: bool = False,
    identity: bool = True,
    common: bool = False,
) -> Any:
    """A dataclass field that carries all that is true of one setting by itself.

    Args:
        doc: Its meaning and unit, for ``--help``.
        default: Its value where it is not given; without one it must be given.
        choices: The texts that it may be; none: any.
        form: What its text is: ``"model"`` (a folder or hub name), ``"overrides"`` (key=value,key=value), or any.
        least: The smallest number it may be; ``above``: the number it must exceed.
        most: The largest number it may be; ``below``: the number it must stay under.
        expected: What a number out of range is answered with; unset: the bound that it breaks.
        may_change: Whether a resumed run may have another value than its checkpoint. A setting that does not say so is
            fixed: another value would make it another run.
        identity: Whether it says what an experiment's run computes, so that a stored result with another value is not
            the one asked for. A setting that does not deny it is: where a run lives and what it records are no part.
        common: Whether most runs need it, so that the short ``--help`` shows it.
    """
    metadata = {
        "help": doc, "choices": choices, "form": form, "least": least, "above": above, "most": most, "below": below,
        "expected": expected, "may_change": may_change, "identity": identity, "common": common,
    }  # fmt: skip
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)
