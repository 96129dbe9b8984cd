"""One reasoning row, how it is written as text, and how its answer is read back from text."""

from __future__ import annotations

import re
from dataclasses import dataclass

ANSWER_MARK = "####"


@dataclass(frozen=True)
class Example:
    """A question with its reasoning and answer.

    Attributes:
        prompt: What is asked.
        rationale: The steps to the answer; may be empty.
        answer: The answer alone.
        corpus: Name of the corpus it came from.
        place: Where it stood, such as ``"train.jsonl:12"``.
    """

    prompt: str
    rationale: str
    answer: str
    corpus: str
    place: str


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


def normalise_answer(answer: str) -> str:
    """An answer in the form in which two are compared: no case, no outer blanks, ``$``, ``%``, thousands commas or full stop."""
    text = " ".join(answer.lower().split()).strip("$% .")
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    return re.sub(r"^(-?\d+)\.0+$", r"\1", text)


def extract_answer(completion: str) -> str:
    """The normalised answer of a generated completion: the line behind the first mark, or ``""`` where there is none."""
    _, mark, behind = completion.partition(ANSWER_MARK)
    lines = behind.strip().splitlines()
    return normalise_answer(lines[0]) if mark and lines else ""
