"""Texts that stand for values in flags, recipes and messages: numbers, dataset weights, config.json changes."""

from __future__ import annotations

import math
from typing import Any

from kvds.errors import _SHORT, InputError

DATA_FORMATS = ("auto", "reasoning", "messages", "completion", "text")
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".arrow")
DATA_COLUMNS = ("prompt", "rationale", "answer", "teacher_rationale", "completion", "messages", "system", "text")

_SHORT.maxlevel, _SHORT.maxstring = 2, 60


def number(text: str) -> int | float | str:
    """An int or a float as the text spells it, or the text itself."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


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


def parse_columns(text: str) -> dict[str, str]:
    """``"prompt=question,answer=answer"`` → what kvds calls a column → what a data set does; ``"auto"`` names none.

    Raises:
        InputError: a part that is not NAME=COLUMN, a name that is none of kvds's, or one given twice.
    """
    if text == "auto":
        return {}
    columns: dict[str, str] = {}
    for part in text.split(","):
        name, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or not column or name not in DATA_COLUMNS or name in columns:
            raise InputError(
                f"columns={text}: {part.strip() or repr(part)} is not NAME=COLUMN with NAME once, one of "
                f"{', '.join(DATA_COLUMNS)}; expected a list such as prompt=question,answer=answer"
            )
        columns[name] = column
    return columns
