"""Conversations as data sets write them → turns with a role, a text and, of an assistant, the reasoning before it.

Both ``{"role": "user", "content": …}`` and ShareGPT's ``{"from": "human", "value": …}`` are read; a reasoning trace may
be a field of its own (``reasoning_content``, ``reasoning``, ``thinking``) or stand in front of the answer as
``<think>…</think>``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvds.data.example import Message, is_blank, split_trace
from kvds.data.rows import BadRow

_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
}  # fmt: skip
_TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython", "tool_call", "tool_response")
_TOOL_FIELDS = ("tool_calls", "function_call")
_TRACE_FIELDS = ("reasoning_content", "reasoning", "thinking")
_EXAMPLE = "{'role': 'user', 'content': TEXT}"


def conversation(value: Any, name: str, system: Any = None) -> tuple[Message, ...]:
    """The turns of a row, up to the last of an assistant.

    Args:
        value: A list of turns, or the JSON text of one.
        name: Of its column, for messages.
        system: Of a column of its own; used where no turn says one.

    Raises:
        BadRow: what is wrong, in which turn.
    """
    turns = _turns(value, name)
    if isinstance(system, str) and not is_blank(system) and turns[0].role != "system":
        turns = [Message("system", system), *turns]
    return checked(turns, name)


def checked(turns: Sequence[Message], name: str) -> tuple[Message, ...]:
    """Turns that make a conversation to learn from, without those behind the last of an assistant.

    Raises:
        BadRow: a system turn that is not the first, or no turn to learn from or to answer.
    """
    for number, turn in enumerate(turns, 1):
        if turn.role == "system" and number > 1:
            what = "a second system turn" if turns[0].role == "system" else "a system turn behind others"
            raise BadRow(f"{name!r} turn {number} is {what}; expected one at most, as the first")
    spoken = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
    if not any(turns[number].counted for number in spoken):
        raise BadRow(f"{name!r} has no turn of an assistant to learn from; expected one behind a user's")
    if "user" not in [turn.role for turn in turns[: spoken[0]]]:
        raise BadRow(f"{name!r} begins with the assistant; expected a turn of a user before it")
    return tuple(turns[: spoken[-1] + 1])


def as_context(turns: Sequence[Message]) -> list[Message]:
    """Turns of which none is learned from: those of a prompt."""
    return [replace(turn, counted=False) for turn in turns]


def messages_of(value: Any, name: str) -> list[Message]:
    """Turns of a prompt or a completion that is a list of them, not yet :func:`checked`."""
    return _turns(value, name)


def _turns(value: Any, name: str) -> list[Message]:
    if isinstance(value, str):  # columns of tables often hold the JSON of a list
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow(f"{name!r} is {value!r:.60}; expected a list of turns such as {_EXAMPLE}") from None
    if not isinstance(value, list | tuple) or not value:
        raise BadRow(f"{name!r} is {value!r:.60}; expected a list of turns such as {_EXAMPLE}")
    return [_turn(turn, f"{name!r} turn {number}") for number, turn in enumerate(value, 1)]


def _turn(turn: Any, place: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f"{place} is {turn!r:.60}; expected {_EXAMPLE}")
    said = turn.get("role", turn.get("from"))
    if said in _TOOL_ROLES or any(turn.get(field) for field in _TOOL_FIELDS):
        raise BadRow(f"{place} calls or is a tool ({said!r:.40}); expected turns of system, user and assistant alone")
    role = _ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise BadRow(f"{place} has the role {said!r:.40}; expected one of {', '.join(_ROLES)}")
    content = _content(turn.get("content", turn.get("value")), f"{place} ({role})", empty=role == "system")
    if role != "assistant":
        return Message(role, content)
    trace = next((turn[field] for field in _TRACE_FIELDS if turn.get(field)), "")
    if not isinstance(trace, str):
        raise BadRow(f"{place} has the reasoning {trace!r:.60}; expected a text")
    if is_blank(trace):
        opened = content.lstrip().startswith("<think>")
        if opened and "</think>" not in content:
            raise BadRow(f"{place} ({role}) begins with <think>, which never ends; expected </think> and an answer")
        trace, content = split_trace(content) if opened else ("", content)
        if is_blank(content):
            raise BadRow(f"{place} ({role}) says nothing behind </think>; expected an answer there")
    return Message(role, content, trace.strip(), counted=turn.get("weight") not in (0, False))


def _content(value: Any, place: str, *, empty: bool) -> str:
    """A text, also where it is given in parts."""
    if isinstance(value, list | tuple):
        kinds = [part.get("type", "text") if isinstance(part, dict) else type(part).__name__ for part in value]
        texts = [part.get("text") for part in value if isinstance(part, dict)]
        if set(kinds) - {"text"} or not all(isinstance(text, str) for text in texts):
            raise BadRow(f"{place} has parts of the kind {', '.join(map(str, kinds)):.60}; expected texts alone")
        value = "".join(map(str, texts))
    if not isinstance(value, str) or not (empty or not is_blank(value)):
        shown = "null" if value is None else repr(value)[:60]
        raise BadRow(f"{place} has the content {shown}; expected a text")
    return value
