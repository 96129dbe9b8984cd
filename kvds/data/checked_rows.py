"""Checked rows: what a reader makes of parsed rows, each an example or a fault with its place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvds.data.corpora import Parts
from kvds.data.example import ANSWER_MARK, Example
from kvds.data.rows import BadRow
from kvds.errors import InputError

Read = Callable[[dict[str, Any]], Parts | Example | None]

# What chat templates begin or end a turn with: ChatML, Llama 3 and 4, Zephyr and Phi, Llama 2 and Mistral, Gemma,
# DeepSeek, Granite, Command R, gpt-oss.
_CHAT_MARK = re.compile(
    r"<\|im_(?:start|end)\|>|<\|(?:start_header_id|header_start|eot_id|eot)\|>|<\|(?:system|user|assistant)\|>|"
    r"\[/?INST\]|<(?:start|end)_of_turn>|<\|start_of_role\|>|<\|START_OF_TURN_TOKEN\|>|<\|start\|>|"
    "<\N{FULLWIDTH VERTICAL LINE}(?:User|Assistant)\N{FULLWIDTH VERTICAL LINE}>"
)


def checked_examples(
    read: Read, rows: Iterable[tuple[int, Any]], source: str, corpus: str, on_bad_row: str, skipped: dict[str, int]
) -> Iterator[Example]:
    """Read rows that are this split's (``read`` gives None for others); a malformed one is an error or counted.

    Args:
        read: Of the corpus.
        rows: Number and parsed row.
        source: Where they stand.
        corpus: What they are called in results.
        on_bad_row: ``"error"``, or ``"skip"`` (and count).
        skipped: Source → malformed rows; counted up.

    Raises:
        InputError: a malformed row that is not skipped.
    """
    name = Path(source).name if "." in Path(source).name else source
    for line, row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            if not isinstance(row, dict):
                raise BadRow(f"holds {row!r:.40}; expected an object with named fields")
            found = read(row)
            if found is None:
                continue
            place = f"{name}:{line}"
            if isinstance(found, Example):
                example = replace(found, corpus=corpus, place=place)
            else:
                prompt, rationale, answer, *teachers = found
                example = Example(prompt, rationale, answer, corpus, place, teachers[0] if teachers else None)
            _check_text(example)
        except BadRow as fault:
            if on_bad_row == "error":
                raise InputError(f"{source}:{line}: {fault} (mend the row, or --on_bad_row skip)") from fault
            skipped[source] = skipped.get(source, 0) + 1
            continue
        yield example


def _check_text(example: Example) -> None:
    texts = {"prompt": example.prompt, "rationale": example.rationale, "answer": example.answer}
    if example.teacher_rationale is not None:
        texts["teacher_rationale"] = example.teacher_rationale
    for name, text in texts.items():
        if name != "prompt" and example.form == "reasoning" and ANSWER_MARK in text:
            raise BadRow(f"the {name} holds {ANSWER_MARK!r}, which announces the answer; expected it nowhere else")
    chat = _CHAT_MARK.search("\n".join(texts.values()))
    if chat and example.form != "messages":  # there the special tokens of the very tokenizer are looked for
        raise BadRow(
            f"holds {chat[0]!r}, as if rendered with a chat template, which would be read as ordinary letters; "
            "expected plain text, or the turns themselves in a column messages"
        )
    said = [f"{message.content}{message.reasoning}" for message in example.messages]
    try:
        "".join([*texts.values(), *said]).encode()
    except UnicodeEncodeError as error:
        raise BadRow("holds half of a surrogate pair; expected text that UTF-8 can write") from error
