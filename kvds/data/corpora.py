"""Readers of public corpora, one function each: a row in its publisher's form → prompt, rationale, answer.

A reader takes a parsed row and raises :class:`BadRow` with what is wrong. Both the publishers' own files, below
``--data_dir``, and the copies on the hub are understood:

====================== ================================ =====================================================
name                   hub                              training rows; held-out rows
====================== ================================ =====================================================
gsm8k                  openai/gsm8k (main)              train; test
svamp                  ChilleD/SVAMP                    files: chal-1 … chal-700; chal-701 … chal-1000.
                                                        hub: its own train; test, not the same rows
strategyqa             ChilleD/StrategyQA               train; dev (hub: its own test)
arc_easy,              allenai/ai2_arc (ARC-Easy,       train; dev (hub: validation). The test rows are left
arc_challenge          ARC-Challenge)                   for a final judgement
====================== ================================ =====================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvds.data.example import LINE_END, is_blank, plain_number
from kvds.data.rows import BadRow

# Prompt, rationale, answer, and where there is one the teacher's own rationale.
Parts = tuple[str, str, str] | tuple[str, str, str, str]

SVAMP_TRAINING_ROWS = 700
_ANNOTATION = re.compile(r"<<[^<>]*>>")


def _text(row: dict[str, Any], key: str, *, empty: bool = False) -> str:
    if key not in row:
        raise BadRow(f"{key!r} is missing; found {sorted(map(str, row))[:6]}")
    value = row[key]
    if not isinstance(value, str) or not (empty or not is_blank(value)):
        raise BadRow(f"{key!r} is {value!r:.60}; expected a text")
    return value.strip()


def _number(value: Any, key: str) -> str:
    text = value.strip() if isinstance(value, str) else repr(value)
    number = None if isinstance(value, bool) else plain_number(text)
    if number is None:
        raise BadRow(f"{key!r} is {value!r:.60}; expected a number")
    return number


def gsm8k(row: dict[str, Any]) -> Parts:
    """Question; steps without calculator annotations; the number behind ``####``, without commas."""
    steps, mark, answer = _text(row, "answer").rpartition("####")
    if not mark or not answer.strip():
        raise BadRow("'answer' has no '#### NUMBER' at its end")
    return _text(row, "question"), _ANNOTATION.sub("", steps).strip(), _number(answer, "answer")


def svamp(row: dict[str, Any]) -> Parts:
    """Body and question; the equation with its result; the number.

    The publisher's answer stands as it is, also in chal-680, where it is not what the equation gives.
    """
    body, question = _text(row, "Body"), _text(row, "Question")
    answer = _number(row.get("Answer"), "Answer")
    equation = _without_outer_parentheses(re.sub(r"\.0+\b", "", _text(row, "Equation")))
    joined = f"{body} {question}" if body.endswith((".", "?", "!", ",")) else f"{body}. {question}"
    return joined, f"{equation} = {answer}", answer


def _without_outer_parentheses(equation: str) -> str:
    """``"( 76 - 25 )"`` → ``"76 - 25"``, but ``"( 1 + 2 ) * ( 3 + 4 )"`` as it is."""
    inner = equation[1:-1]
    if equation[:1] + equation[-1:] != "()":
        return equation
    depth = 0
    for letter in inner:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth < 0:
            return equation
    return inner.strip()


def _svamp_split(row: dict[str, Any]) -> str:
    match = re.fullmatch(r"chal-(\d{1,9})", str(row.get("ID")), re.ASCII)
    if not match:
        raise BadRow(f"'ID' is {row.get('ID')!r:.60}; expected chal-NUMBER, which decides about training or held out")
    return "train" if int(match[1]) <= SVAMP_TRAINING_ROWS else "eval"


def strategyqa(row: dict[str, Any]) -> Parts:
    """Question; its facts, one a line; yes or no."""
    facts, answer = row.get("facts"), row.get("answer")
    if isinstance(facts, str):  # the hub's copy
        facts = [facts]
    if not isinstance(facts, list) or not all(isinstance(fact, str) for fact in facts):
        raise BadRow(f"'facts' is {facts!r:.60}; expected a list of texts")
    if not isinstance(answer, bool):
        raise BadRow(f"'answer' is {answer!r:.60}; expected true or false")
    lines = filter(None, (" ".join(fact.split()) for fact in facts))
    return _text(row, "question"), "\n".join(lines), "yes" if answer else "no"


def arc(row: dict[str, Any]) -> Parts:
    """Question with its lettered choices; no rationale; the letter. Labels 1-5 become A-E."""
    stem, choices = _arc_choices(row)
    labels = "".join(label for label, _ in choices)
    if not 3 <= len(choices) <= 5:
        raise BadRow(f"{len(choices)} choices; expected 3 to 5")
    if labels not in ("ABCDE"[: len(choices)], "12345"[: len(choices)]):
        raise BadRow(f"labels {[label for label, _ in choices]!r:.60}; expected A-E or 1-5 in order")
    key = row.get("answerKey")
    if isinstance(key, bool) or not isinstance(key, str | int) or str(key) not in tuple(labels):
        raise BadRow(f"'answerKey' is {key!r:.60}; expected one of {list(labels)}")
    letters = "ABCDE"
    listed = "\n".join(f"{letter}. {text}" for letter, (_, text) in zip(letters, choices, strict=False))
    return f"{stem}\n{listed}", "", letters[labels.index(str(key))]


def _arc_choices(row: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """Stem, and label and text of each choice."""
    question = row.get("question")
    if isinstance(question, dict):  # the publisher's files: a list of choices within the question
        stem, choices = _text(question, "stem"), question.get("choices")
    else:  # the hub's copy: a list of labels and a list of texts
        stem, lists = _text(row, "question"), row.get("choices")
        labels, texts = (lists.get("label"), lists.get("text")) if isinstance(lists, dict) else (None, None)
        if not isinstance(labels, list) or not isinstance(texts, list) or len(labels) != len(texts):
            raise BadRow(f"'choices' is {lists!r:.60}; expected equally long lists 'label' and 'text'")
        choices = [{"label": label, "text": text} for label, text in zip(labels, texts, strict=True)]
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise BadRow(f"'choices' is {choices!r:.60}; expected a list of label and text")
    return stem, [(str(choice.get("label")), _text(choice, "text")) for choice in choices]


def plain(row: dict[str, Any], called: dict[str, str] | None = None) -> Parts:
    """A row that already has ``prompt``, ``rationale`` (may be empty or missing) and ``answer`` (text or number).

    An answer of several lines, such as code, keeps them, with line feeds between them, and its blanks.
    With ``teacher_rationale``, too, the teacher reads that where steps are matched (``--align_tokens segment``).

    Args:
        row: By those names.
        called: Name → what the file calls it, for messages.
    """
    names = {name: (called or {}).get(name, name) for name in ("prompt", "rationale", "answer", "teacher_rationale")}
    row = {names.get(name, name): value for name, value in row.items()}
    rationale = _text(row, names["rationale"], empty=True) if row.get(names["rationale"]) is not None else ""
    answer = row.get(names["answer"])
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = _number(answer, names["answer"])
    else:
        answer = "\n".join(LINE_END.split(_text(row, names["answer"])))
    parts = _text(row, names["prompt"]), rationale, answer
    teachers = names["teacher_rationale"]
    return parts if row.get(teachers) is None else (*parts, _text(row, teachers))


@dataclass(frozen=True)
class Corpus:
    """Where a corpus lies and how its rows read.

    Attributes:
        read: Row → prompt, rationale, answer.
        files: Split (train, eval) → file below ``data_dir``.
        hub_name: Name on the hub.
        hub_config: Configuration there.
        hub_splits: Split → the hub's name for it.
        split_of: Row of a file that holds both splits → its split.
    """

    read: Callable[[dict[str, Any]], Parts]
    files: dict[str, str]
    hub_name: str
    hub_config: str | None
    hub_splits: dict[str, str]
    split_of: Callable[[dict[str, Any]], str] | None = None


CORPORA: dict[str, Corpus] = {
    "gsm8k": Corpus(
        read=gsm8k,
        files={"train": "gsm8k/train.jsonl", "eval": "gsm8k/test.jsonl"},
        hub_name="openai/gsm8k",
        hub_config="main",
        hub_splits={"train": "train", "eval": "test"},
    ),
    "svamp": Corpus(
        read=svamp,
        files={"train": "svamp/SVAMP.json", "eval": "svamp/SVAMP.json"},
        hub_name="ChilleD/SVAMP",
        hub_config=None,
        hub_splits={"train": "train", "eval": "test"},
        split_of=_svamp_split,
    ),
    "strategyqa": Corpus(
        read=strategyqa,
        files={"train": "strategyqa/train.json", "eval": "strategyqa/dev.json"},
        hub_name="ChilleD/StrategyQA",
        hub_config=None,
        hub_splits={"train": "train", "eval": "test"},
    ),
    "arc_easy": Corpus(
        read=arc,
        files={"train": "arc/ARC-Easy-Train.jsonl", "eval": "arc/ARC-Easy-Dev.jsonl"},
        hub_name="allenai/ai2_arc",
        hub_config="ARC-Easy",
        hub_splits={"train": "train", "eval": "validation"},
    ),
    "arc_challenge": Corpus(
        read=arc,
        files={"train": "arc/ARC-Challenge-Train.jsonl", "eval": "arc/ARC-Challenge-Dev.jsonl"},
        hub_name="allenai/ai2_arc",
        hub_config="ARC-Challenge",
        hub_splits={"train": "train", "eval": "validation"},
    ),
}
