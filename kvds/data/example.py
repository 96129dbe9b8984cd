"""One reasoning row, how it is written as text, and how its answer is read back from text.

The text is ``prompt⏎ rationale⏎ #### answer``; a row without rationale goes straight from prompt to answer.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal

ANSWER_MARK = "####"

# Letters that nobody sees, beside blanks: zero-width spaces and joiners, byte order mark, soft hyphen, directions.
INVISIBLE = "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0"
_UNSEEN = re.compile(rf"[\s{INVISIBLE}]*")
LINE_END = re.compile(r"\r\n|\r|\n")
_AMOUNT = re.compile(r"([-+]?)(?:\s*\$\s*)?(.*?)(?:\s*[$%])?")
_NUMBER = re.compile(r"[-+]?(\d{1,3}(,\d{3})+|\d+)?(\.\d*)?(e[-+]?\d{1,3})?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Example:
    """A question with its reasoning and answer.

    Attributes:
        prompt: What is asked.
        rationale: The steps to the answer; may be empty. Never holds the answer mark.
        answer: The answer alone, in one line or several. Never holds the answer mark.
        corpus: Name of the corpus it came from.
        place: Where it stood, such as ``"train.jsonl:12"``.
        teacher_rationale: What the teacher reads in place of ``rationale`` where steps, not positions, are matched;
            None = the same text.
    """

    prompt: str
    rationale: str
    answer: str
    corpus: str
    place: str
    teacher_rationale: str | None = None


def is_blank(text: str) -> bool:
    """Whether there is nothing to be seen in ``text``."""
    return _UNSEEN.fullmatch(text) is not None


def prompt_text(example: Example) -> str:
    """What the model is given: the question and a line end."""
    return f"{example.prompt}\n"


def rationale_text(example: Example) -> str:
    """The reasoning and a line end; empty where the row has none."""
    return f"{example.rationale}\n" if example.rationale else ""


def answer_text(example: Example) -> str:
    """The answer behind its mark; an end-of-text token follows it."""
    return f"{ANSWER_MARK} {example.answer}"


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
    """An answer in the form in which two are compared; ``""`` for blanks alone.

    Numbers lose ``$`` before and ``$`` or ``%`` behind them, thousands commas, trailing zeros and a full stop:
    ``"$1,080.00."`` → ``"1080"``. Other texts of one line, among them digits behind a leading zero, lose case, repeated
    and outer blanks, and a full stop. Texts of several lines, such as code, keep all but blanks at the ends of lines.
    """
    answer = unicodedata.normalize("NFC", answer)
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
