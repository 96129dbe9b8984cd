"""Readers of public corpora, one function each: rows in the publishers' own form → :class:`Example`.

A reader takes a parsed row and raises :class:`BadRow` with what is wrong; where rows come from is :mod:`kvds.data.reasoning`'s
business. Both the publishers' files and the hub's copies (``openai/gsm8k``, ``ChilleD/SVAMP``, ``ChilleD/StrategyQA``,
``allenai/ai2_arc``) are understood.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class BadRow(ValueError):
    """A row that is not what its corpus promises; the text says which field and why."""


Parts = tuple[str, str, str]
_ANNOTATION = re.compile(r"<<[^<>]*>>")


def _text(row: dict[str, Any], *keys: str, empty: bool = False) -> str:
    for key in keys:
        if key in row:
            value = row[key]
            if not isinstance(value, str) or not (empty or value.strip()):
                raise BadRow(f"{key!r} is {value!r:.60}; expected a text")
            return value.strip()
    raise BadRow(f"{keys[0]!r} is missing; found {sorted(map(str, row))[:6]}")


def _plain_number(value: Any, key: str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise BadRow(f"{key!r} is {value!r:.60}; expected a number")
    try:
        number = float(str(value).replace(",", ""))
    except ValueError:
        raise BadRow(f"{key!r} is {value!r:.60}; expected a number") from None
    if number in (float("inf"), float("-inf")) or number != number:
        raise BadRow(f"{key!r} is {value!r:.60}; expected a finite number")
    return f"{number:.10g}"


def gsm8k(row: dict[str, Any]) -> Parts:
    """Question; steps without calculator annotations; the number behind ``####``."""
    solution = _text(row, "answer")
    steps, mark, answer = solution.rpartition("####")
    if not mark or not answer.strip():
        raise BadRow("'answer' has no '#### NUMBER' at its end")
    return _text(row, "question"), _ANNOTATION.sub("", steps).strip(), answer.strip().replace(",", "")


def svamp(row: dict[str, Any]) -> Parts:
    """Body and question; the equation with its result; the number."""
    body, question = _text(row, "Body"), _text(row, "Question")
    answer = _plain_number(row.get("Answer"), "Answer")
    equation = re.sub(r"\.0\b", "", _text(row, "Equation")).strip()
    if equation.startswith("(") and equation.endswith(")"):
        equation = equation[1:-1].strip()
    joined = f"{body} {question}" if body.endswith((".", "?", "!", ",")) else f"{body}. {question}"
    return joined, f"{equation} = {answer}", answer


def strategyqa(row: dict[str, Any]) -> Parts:
    """Question; its facts; yes or no."""
    facts, answer = row.get("facts"), row.get("answer")
    if isinstance(facts, str):
        facts = [facts]
    if not isinstance(facts, list) or not all(isinstance(fact, str) for fact in facts):
        raise BadRow(f"'facts' is {facts!r:.60}; expected a list of texts")
    if not isinstance(answer, bool):
        raise BadRow(f"'answer' is {answer!r:.60}; expected true or false")
    return _text(row, "question"), "\n".join(" ".join(fact.split()) for fact in facts), "yes" if answer else "no"


def arc(row: dict[str, Any]) -> Parts:
    """Question with its lettered choices; no rationale; the letter. Labels 1-5 become A-E."""
    question = row.get("question")
    if isinstance(question, dict):  # the publisher's files
        stem, raw = _text(question, "stem"), question.get("choices")
        if not isinstance(raw, list) or not all(isinstance(choice, dict) for choice in raw):
            raise BadRow("'choices' is no list of label and text")
        choices = [(str(choice.get("label")), _text(choice, "text")) for choice in raw]
    else:  # the hub's copy
        stem, raw = _text(row, "question"), row.get("choices")
        if not isinstance(raw, dict) or not isinstance(raw.get("label"), list) or not isinstance(raw.get("text"), list):
            raise BadRow("'choices' has no lists 'label' and 'text'")
        choices = [(str(label), str(text).strip()) for label, text in zip(raw["label"], raw["text"], strict=False)]
    if not 2 <= len(choices) <= 5:
        raise BadRow(f"{len(choices)} choices; expected 3 to 5")
    letters = {label: "ABCDE"[position] for position, (label, _) in enumerate(choices)}
    expected = ("ABCDE"[: len(choices)], "12345"[: len(choices)])
    if "".join(label for label, _ in choices) not in expected:
        raise BadRow(f"labels {[label for label, _ in choices]}; expected A-E or 1-5 in order")
    key = row.get("answerKey")
    if not isinstance(key, str | int) or str(key) not in letters:
        raise BadRow(f"'answerKey' is {key!r}; expected one of {list(letters)}")
    listed = "\n".join(f"{letters[label]}. {text}" for label, text in choices)
    return f"{stem}\n{listed}", "", letters[str(key)]


def plain(row: dict[str, Any]) -> Parts:
    """A row that already has ``prompt``, ``rationale`` (may be empty or missing) and ``answer``."""
    rationale = _text(row, "rationale", empty=True) if row.get("rationale") is not None else ""
    answer = row.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        row = {**row, "answer": _plain_number(answer, "answer")}
    return _text(row, "prompt"), rationale, _text(row, "answer")


@dataclass(frozen=True)
class Corpus:
    """Where a corpus lies and how its rows read.

    Attributes:
        read: Row → prompt, rationale, answer.
        files: Split → files below ``data_dir``.
        hub: Hub name, configuration and split → hub split.
        skip: Split → positions of the file that belong to it; None = all.
    """

    read: Callable[[dict[str, Any]], Parts]
    files: dict[str, str]
    hub: tuple[str, str | None, dict[str, str]]
    skip: Callable[[str, int], bool] | None = None


def _svamp_other_split(split: str, position: int) -> bool:
    # The publisher's one file of 1000: the hub's copy trains on the first 700.
    return (position < 700) != (split == "train")


CORPORA: dict[str, Corpus] = {
    "gsm8k": Corpus(
        gsm8k, {"train": "gsm8k/train.jsonl", "eval": "gsm8k/test.jsonl"}, ("openai/gsm8k", "main", {"train": "train", "eval": "test"})
    ),
    "svamp": Corpus(
        svamp, {"train": "svamp/SVAMP.json", "eval": "svamp/SVAMP.json"}, ("ChilleD/SVAMP", None, {"train": "train", "eval": "test"}),
        _svamp_other_split,
    ),
    "strategyqa": Corpus(
        strategyqa, {"train": "strategyqa/train.json", "eval": "strategyqa/dev.json"},
        ("ChilleD/StrategyQA", None, {"train": "train", "eval": "test"}),
    ),
    "arc_easy": Corpus(
        arc, {"train": "arc/ARC-Easy-Train.jsonl", "eval": "arc/ARC-Easy-Dev.jsonl"},
        ("allenai/ai2_arc", "ARC-Easy", {"train": "train", "eval": "validation"}),
    ),
    "arc_challenge": Corpus(
        arc, {"train": "arc/ARC-Challenge-Train.jsonl", "eval": "arc/ARC-Challenge-Dev.jsonl"},
        ("allenai/ai2_arc", "ARC-Challenge", {"train": "train", "eval": "validation"}),
    ),
}  # fmt: skip
