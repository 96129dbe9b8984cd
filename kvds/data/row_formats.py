"""Formats of one's own rows, recognised by their columns or said, and the reader of each.

========== ========================================= ============================================================
format     columns                                   what the model learns
========== ========================================= ============================================================
reasoning  prompt, answer; rationale,                rationale and ``#### answer``, behind the prompt and a line end
           teacher_rationale
messages   messages (conversations, conversation);   the assistant's turns, in the tokenizer's chat template
           system
completion prompt, completion (response)             the completion, directly behind the prompt
text       text                                      all of it
========== ========================================= ============================================================

Where several fit, the first does. A prompt and a completion that are lists of turns are a conversation whose completion
is learned; ``messages`` may be said of any prompt with its completion or answer: a turn of a user and one of the
assistant, whose reasoning is the rationale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvds.config.values import DATA_COLUMNS, parse_columns
from kvds.data.conversation import as_context, checked, conversation, messages_of
from kvds.data.corpora import Parts, plain
from kvds.data.example import Example, Message, is_blank
from kvds.data.rows import BadRow
from kvds.errors import InputError, near_miss, one_line

Row = Mapping[str, Any]

FORMS = ("reasoning", "messages", "completion", "text")
_NEEDED = {
    "reasoning": ("prompt", "answer"), "messages": ("messages",), "completion": ("prompt", "completion"),
    "text": ("text",),
}  # fmt: skip
_MAY = {"reasoning": ("rationale", "teacher_rationale"), "messages": ("system",), "completion": (), "text": ()}
# What a column may be called, too.
_ALSO = {"messages": ("conversations", "conversation"), "completion": ("response",)}
# What it is called elsewhere: never taken by itself, as it may mean something else, but proposed.
_ELSEWHERE = {
    "prompt": ("question", "instruction", "query", "problem", "input", "inputs", "user", "source"),
    "answer": ("solution", "final_answer", "label"),
    "completion": ("output", "response", "target", "targets", "assistant", "generation", "chosen"),
    "messages": ("dialog", "dialogue", "chat", "turns", "history"),
    "text": ("content", "document", "body", "story"),
}


@dataclass(frozen=True)
class RowReader:
    """The reader of one data set's rows.

    Attributes:
        form: Their format.
        columns: What kvds calls a column → what the data set does.
        why: How that was found, for the log.
        optional: Of the columns, those that a row may lack.
    """

    form: str
    columns: Mapping[str, str]
    why: str
    optional: tuple[str, ...] = ()

    def __call__(self, row: Row) -> Parts | Example:
        """Read a row.

        Raises:
            BadRow: it is not what its format promises.
        """
        values: dict[str, Any] = {}
        for name, column in self.columns.items():
            parts = _parts(column, row)
            missing = next((part for part in parts if part not in row), None)
            if missing is None:
                values[name] = row[column] if len(parts) == 1 else _joined(parts, row)
            elif name not in self.optional:
                raise BadRow(f"{missing!r} is missing; found {sorted(map(str, row))[:6]}")
        return _READERS[self.form](values, self.columns)


def _parts(column: str, row: Row) -> list[str]:
    """The columns that ``"instruction+input"`` names, where no column is called just that."""
    return [column] if column in row else column.split("+")


def _joined(columns: list[str], row: Row) -> str:
    """Texts of several columns with a blank line between, less those that are empty."""
    for column in columns:
        if not isinstance(row[column], str | None):
            raise BadRow(f"{column!r} is {row[column]!r:.60}; expected a text, to be joined with others")
    return "\n\n".join(row[column] for column in columns if row[column] and not is_blank(row[column]))


def recognise(row: Row, source: str, *, form: str = "auto", columns: str = "auto") -> RowReader:
    """The reader of a data set by one of its rows.

    Args:
        row: One of them.
        source: Where it stands, for messages.
        form: ``--data_format``.
        columns: ``--columns`` of this data set.

    Raises:
        InputError: no format fits, or a column that was named is not there.
    """
    named = parse_columns(columns)
    for column in (part for whole in named.values() for part in _parts(whole, row)):
        if column not in row:
            raise InputError(
                f"columns={columns}: {source} has no column {one_line(column)}{near_miss(column, map(str, row))}; "
                f"expected one of {_shown(row)} (--columns prompt=COLUMN,answer=COLUMN)"
            )
    found = named or _by_name(row)
    for one in FORMS if form == "auto" else (form,):
        used = _used(one, found, row, said=form != "auto")
        if used is None:
            continue
        how = "--columns" if named else "by its columns" if form == "auto" else "--data_format"
        shown = ", ".join(name if name == column else f"{column} as {name}" for name, column in used.items())
        if not named:  # a later row may have what this one lacks
            used = {**{name: name for name in _MAY[one]}, **used}
        return RowReader(one, used, f"{one} ({how}: {shown})", (*_MAY[one], "rationale"))
    raise InputError(_unknown(row, source, form, found))


def _by_name(row: Row) -> dict[str, str]:
    names = {name: next((one for one in (name, *_ALSO.get(name, ())) if one in row), None) for name in DATA_COLUMNS}
    return {name: column for name, column in names.items() if column is not None}


def _used(form: str, found: Mapping[str, str], row: Row, *, said: bool) -> dict[str, str] | None:
    """The columns that a format reads, or None where it does not fit."""
    needed: tuple[str, ...] = _NEEDED[form]
    may = _MAY[form]
    turns = isinstance(row.get(found.get("prompt", "")), list)  # of a conversation, which is no text
    if form == "messages" and (said or turns) and "messages" not in found:
        needed, may = ("prompt", "completion" if "completion" in found else "answer"), ("rationale", "system")
    if form != "messages" and turns:
        return None
    if not set(needed) <= set(found):
        return None
    return {name: found[name] for name in (*needed, *may) if name in found}


def _shown(row: Row) -> str:
    names = sorted(map(one_line, row))
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "no column at all"


def _unknown(row: Row, source: str, form: str, found: Mapping[str, str]) -> str:
    asked = FORMS if form == "auto" else (form,)
    wanted = "; ".join(f"{one}: {' and '.join(_NEEDED[one])}" for one in asked)
    guesses = {
        name: found.get(name) or next((str(column) for column in row if str(column).lower() in (name, *names)), "")
        for name, names in _ELSEWHERE.items()
    }
    proposed = "prompt=COLUMN,answer=COLUMN"
    for one in asked:
        if all(guesses[name] for name in _NEEDED[one]):
            proposed = ",".join(f"{name}={guesses[name]}" for name in _NEEDED[one])
            break
    return (
        f"{source}: its columns ({_shown(row)}) are those of no format ({wanted}); expected to be told which is which "
        f"(--columns {proposed})"
    )


def _message_example(messages: tuple[Message, ...]) -> Example:
    last = messages[-1]
    asked = "\n".join(message.content.strip() for message in messages if message.role == "user")
    return Example(asked, last.reasoning, last.content.strip(), "", "", form="messages", messages=messages)


def _read_messages(values: Row, columns: Mapping[str, str]) -> Example:
    system = values.get("system")
    if "messages" in values:
        return _message_example(conversation(values["messages"], columns["messages"], system))
    target = "completion" if "completion" in columns else "answer"
    if isinstance(values["prompt"], list):
        turns = as_context(messages_of(values["prompt"], columns["prompt"]))
        answers = values[target]
        learned = (
            [Message("assistant", _plain_text(values, target, columns))]
            if isinstance(answers, str)
            else messages_of(answers, columns[target])
        )
        return _message_example(checked([*turns, *learned], columns[target]))
    rationale = values.get("rationale") or ""
    if not isinstance(rationale, str):
        raise BadRow(f"{columns['rationale']!r} is {rationale!r:.60}; expected a text")
    asked = Message("user", _plain_text(values, "prompt", columns))
    said = Message("assistant", _plain_text(values, target, columns), rationale.strip())
    first = [Message("system", system)] if isinstance(system, str) and not is_blank(system) else []
    return _message_example(checked([*first, asked, said], columns["prompt"]))


def _plain_text(values: Row, name: str, columns: Mapping[str, str]) -> str:
    """A text as it stands, with its blanks; a number as it is written."""
    value = values[name]
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        value = str(value)
    if not isinstance(value, str) or is_blank(value):
        shown = "null" if value is None else repr(value)[:60]
        raise BadRow(f"{columns[name]!r} is {shown}; expected a text")
    return value


def _read_completion(values: Row, columns: Mapping[str, str]) -> Example:
    prompt, completion = (_plain_text(values, name, columns) for name in ("prompt", "completion"))
    return Example(prompt, "", completion, "", "", form="completion")


def _read_text(values: Row, columns: Mapping[str, str]) -> Example:
    return Example("", "", _plain_text(values, "text", columns), "", "", form="text")


_READERS: dict[str, Callable[[Row, Mapping[str, str]], Parts | Example]] = {
    "reasoning": lambda values, columns: plain(dict(values), dict(columns)),
    "messages": _read_messages,
    "completion": _read_completion,
    "text": _read_text,
}
