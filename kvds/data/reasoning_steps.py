"""The reasoning steps of a rationale: where they begin in its text, and which of its tokens belong to each.

A step is a line that is not blank; where the whole rationale is one line, an equation of it: ``68-2=48-1=38`` has two,
each ending behind its result. What follows the last equation belongs to it. Steps are counted from 1; 0 is no step.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvds.data.example import INVISIBLE, LINE_END, is_blank
from kvds.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A line end and the blank lines behind it.
_BREAK = re.compile(rf"(?:\r\n?|\n)(?:(?:[^\S\r\n]|[{INVISIBLE}])*(?:\r\n?|\n))*")
# An equals sign and the number behind it, as corpora write numbers: "= $1,080.50", "=-3%", "=48".
_RESULT = re.compile(r"=\s*[$€£]?[-+]?\d+(?:,\d{3})*(?:\.\d+)?%?", re.ASCII)


def reasoning_step_starts(rationale: str) -> list[int]:
    """Offsets in the text at which its steps begin, ascending; the first is 0. Empty for a text without any.

    Blank lines belong to the step before them.
    """
    if is_blank(rationale):
        return []
    ends = [match.end() for match in _BREAK.finditer(rationale)]
    if sum(not is_blank(line) for line in LINE_END.split(rationale)) == 1:
        ends = [match.end() for match in _RESULT.finditer(rationale)]
        ends = ends[:-1]  # what follows the last result stays with it
    return [0, *(end for end in ends if not is_blank(rationale[end:]) and not is_blank(rationale[:end]))]


def reasoning_step_ids(text: str, offsets: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """The step of each token of ``text``, by where the token begins. Each step owns at least one.

    A step in which no token begins gets the one that reaches into it, where the step before has another. Where it
    cannot have one, it and all that follows are no steps: their numbers would meet others in the teacher's own text.

    Args:
        text: A rationale.
        offsets: Begin and end of each token in it, as a fast tokenizer maps them.

    Returns:
        Numbers from 1 without gaps, not descending, then zeros; all 0 where the text has no step.
    """
    starts = reasoning_step_starts(text)
    ids, last = [], min(1, len(starts))
    for begin, end in offsets:
        if end > begin:  # a token of no letters belongs where the one before it does
            last = max(last, bisect_right(starts, begin))
        ids.append(last)
    for step in sorted(set(range(1, len(starts) + 1)) - set(ids)):
        before = [i for i, own in enumerate(ids) if own == step - 1]
        reach = next((i for i in before[1:] if offsets[i][0] < offsets[i][1] > starts[step - 1]), None)
        if reach is None:
            return tuple(own if own < step else 0 for own in ids)
        ids[reach : before[-1] + 1] = [step] * (before[-1] + 1 - reach)
    return tuple(ids)


def encode_reasoning_steps(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[tuple[int, ...]]]:
    """Token ids of rationales, as tokenising them without special tokens gives them, and the step of each token.

    Raises:
        InputError: the tokenizer cannot say where in the text its tokens stand.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"align_tokens=segment: the tokenizer {tokenizer.name_or_path} maps no token to its place in the text; "
            "expected a fast one, with a tokenizer.json (or --align_tokens position)"
        )
    if not texts:
        return [], []
    encoded = tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    steps = [reasoning_step_ids(text, offsets) for text, offsets in zip(texts, encoded["offset_mapping"], strict=True)]
    return encoded["input_ids"], steps
