"""One row, how it is written as text, and how its answer is read back from text.

A row of reasoning is ``prompt⏎ rationale⏎ #### answer``; without rationale it goes straight from prompt to answer. A
prompt with its completion is the two as they stand, a text is itself, and a conversation is what a chat template makes
of it (:mod:`kvds.data.chat_template`).
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal
from enum import IntEnum

ANSWER_MARK = "####"

# Letters that nobody sees, beside blanks: zero-width spaces and joiners, byte order mark, soft hyphen, directions.
INVISIBLE = "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0"
_UNSEEN = re.compile(rf"[\s{INVISIBLE}]*")
_EDGES = re.compile(rf"\A[\s{INVISIBLE}]+|[\s{INVISIBLE}]+\Z")
LINE_END = re.compile(r"\r\n|\r|\n")
_TRACE = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_AMOUNT = re.compile(r"([-+]?)(?:\s*\$\s*)?(.*?)(?:\s*[$%])?")
_NUMBER = re.compile(r"[-+]?(\d{1,3}(,\d{3})+|\d+)?(\.\d*)?(e[-+]?\d{1,3})?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: ``"system"``, ``"user"`` or ``"assistant"``.
        content: What is said, without the reasoning.
        reasoning: An assistant's reasoning before it; empty = none.
        counted: Whether an assistant's turn is learned from.
    """

    role: str
    content: str
    reasoning: str = ""
    counted: bool = True


class Segment(IntEnum):
    """What a token belongs to."""

    PAD = 0
    PROMPT = 1
    RATIONALE = 2
    ANSWER = 3


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as its chat template writes it, up to the last letter that counts.

    Attributes:
        text: All turns, with the template's own special tokens.
        spans: Begin, end and :class:`Segment` of what the task loss counts, ascending; all else is prompt.
    """

    text: str
    spans: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Example:
    """A prompt with what shall follow it.

    Attributes:
        prompt: What is asked; of a conversation all that the user says, of a text nothing.
        rationale: The steps to the answer; may be empty. In a row of reasoning it never holds the answer mark.
        answer: The answer alone, in one line or several; the completion; the last turn; or the whole text.
        corpus: Name of the corpus it came from.
        place: Where it stood, such as ``"train.jsonl:12"``.
        teacher_rationale: What the teacher reads in place of ``rationale`` where steps, not positions, are matched;
            None = the same text.
        form: ``"reasoning"``, ``"completion"``, ``"messages"`` or ``"text"`` (:mod:`kvds.data.row_formats`).
        messages: The turns of a conversation.
        rendered: Those as text; None until a tokenizer's template has written them.
        ends: Whether the text is whole, so that an end-of-text token follows it.
    """

    prompt: str
    rationale: str
    answer: str
    corpus: str
    place: str
    teacher_rationale: str | None = None
    form: str = "reasoning"
    messages: tuple[Message, ...] = ()
    rendered: RenderedChat | None = None
    ends: bool = True


def question(example: Example) -> str:
    """What two rows have in common that ask the same: the prompt, or a whole text."""
    return example.answer if example.form == "text" else example.prompt


def is_blank(text: str) -> bool:
    """Whether there is nothing to be seen in ``text``."""
    return _UNSEEN.fullmatch(text) is not None


def prompt_text(example: Example) -> str:
    """What the model is given: the question and a line end, or the prompt as it stands."""
    return f"{example.prompt}\n" if example.form == "reasoning" else example.prompt


def rationale_text(example: Example) -> str:
    """The reasoning and a line end; empty where the row has none."""
    return f"{example.rationale}\n" if example.rationale else ""


def answer_text(example: Example) -> str:
    """The answer, in a row of reasoning behind its mark; an end-of-text token follows it."""
    return f"{ANSWER_MARK} {example.answer}" if example.form == "reasoning" else example.answer


def completion_text(example: Example) -> str:
    """What the model shall write: reasoning and answer."""
    return rationale_text(example) + answer_text(example)


def plain_number(text: str) -> str | None:
    """``"1,080.50"`` → ``"1080.5"``, ``"51.0"`` → ``"51"``, exact at any size; None where the text is no number."""
    if not _NUMBER.fullmatch(text) or not any(letter.isdigit() for letter in re.split("[eE]", text)[0]):
        return None
    digits = format(Decimal(text.replace(",", "")), "f")
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    return "0" if digits in ("-0", "") else digits


def normalise_answer(answer: str) -> str:
    """An answer in the form in which two are compared, without what nobody sees around it; ``""`` for that alone.

    Numbers lose ``$`` before and ``$`` or ``%`` behind them, thousands commas, trailing zeros and a full stop:
    ``"$1,080.00."`` → ``"1080"``. Other texts of one line, among them digits behind a leading zero, lose case, repeated
    and outer blanks, and a full stop. Texts of several lines, such as code, keep all but blanks at the ends of lines.
    """
    answer = _EDGES.sub("", unicodedata.normalize("NFC", answer))
    lines = LINE_END.split(answer.strip())
    if len(lines) > 1:
        return "\n".join(line.rstrip() for line in lines)
    text = " ".join(unicodedata.normalize("NFC", answer.lower()).replace("\N{MINUS SIGN}", "-").split())
    text = text.rstrip(". ") or text  # "..." is an answer, if a strange one, and no answer is not it
    amount = _AMOUNT.fullmatch(text)
    bare = "".join(amount.groups()) if amount else text
    if re.match(r"[-+]?0\d", bare, re.ASCII):  # a code, or reversed digits as in the built-in problems
        return text
    return plain_number(bare) or text


def extract_answer(completion: str, *, whole: bool = False) -> str:
    """The normalised answer of a completion, or ``""`` where there is none.

    Args:
        completion: What a model wrote.
        whole: Whether the answer is all that stands behind the first mark; otherwise it is the first line there.
    """
    _, mark, behind = completion.partition(ANSWER_MARK)
    return normalise_answer(behind if whole else LINE_END.split(behind.strip())[0]) if mark else ""


def split_trace(text: str) -> tuple[str, str]:
    """Reasoning between ``<think>`` and ``</think>`` in front of a text, and the rest; without it, ``""`` and the text.

    A completion whose prompt ends in ``<think>`` begins behind it.
    """
    found = _TRACE.match(text)
    if found:
        return found[1].strip(), text[found.end() :]
    before, end, behind = text.partition("</think>")
    return (before.strip(), behind.lstrip()) if end and "<think>" not in before else ("", text)


def written_answer(example: Example, completion: str) -> str:
    """The normalised answer that ``completion`` gives to ``example``: behind the mark in a row of reasoning, else all
    of it, less a reasoning trace.
    """
    if example.form == "reasoning":
        return extract_answer(completion, whole=LINE_END.search(example.answer.strip()) is not None)
    return normalise_answer(split_trace(completion)[1])
