"""Rows whose completion the student writes itself: which of a step's samples they are, and what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch

from kvds.data.encoding import EncodedSample, prompt_length
from kvds.data.example import Example, Segment
from kvds.errors import InputError
from kvds.kv import row_draws


def replaced_rows(ids: Sequence[int], share: float, *, before: int, seed: int, step: int) -> list[int]:
    """The samples of a step that are replaced, a function of seed, step and samples alone.

    Of the first n samples of a run ⌊share · n⌋ have been, after each step: the share is kept whatever a step holds.

    Args:
        ids: Of the step over all ranks; -1 fills up.
        share: From 0 to 1.
        before: Samples of all steps before.
        seed: Of the run.
        step: Optimizer step.

    Returns:
        Ascending.
    """
    real = [i for i in ids if i >= 0]
    exact = Fraction(str(share))  # the decimal that was given
    count = int(exact * (before + len(real))) - int(exact * before)
    drawn = row_draws(seed, step, torch.tensor(real, dtype=torch.int64)).tolist()
    return sorted(i for _, i in sorted(zip(drawn, real, strict=True))[:count])


def with_completion(sample: EncodedSample, completion: Sequence[int]) -> EncodedSample:
    """The prompt of ``sample`` with what the student wrote behind it; all before that, earlier turns too, is prompt.

    Args:
        sample: A row of the data.
        completion: Token ids, the end token included where there is one.
    """
    prompt = prompt_length(sample)
    ids = (*sample.input_ids[:prompt], *completion)
    segments = (int(Segment.PROMPT),) * prompt + (int(Segment.ANSWER),) * len(completion)
    return EncodedSample(ids, segments, sample.example, sampled=True)


def check_prompts(samples: Sequence[EncodedSample], examples: Sequence[Example], share: float) -> None:
    """Refuse rows to which there is nothing to write.

    Args:
        samples: To train on.
        examples: The rows that they were made of.
        share: ``--on_policy_share``, for the message.

    Raises:
        InputError: naming the first row without a prompt, or without a completion.
    """
    for sample in samples:
        row = examples[sample.example]
        if row.form == "text" or not 0 < prompt_length(sample) < len(sample.input_ids):
            raise InputError(
                f"on_policy_share={share}: {row.corpus} {row.place} has no prompt that a completion could follow; "
                "expected rows with prompts alone (or --on_policy_share 0)"
            )
