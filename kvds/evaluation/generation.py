"""Greedy completions of held-out prompts: each row has the tokens that its own prompt leaves it, and is said to be cut
where they did not suffice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvds.data.encoding import EncodedSample, prompt_length
from kvds.data.text_fidelity import decode_texts
from kvds.models.generation import greedy_generation


@dataclass(frozen=True)
class Completion:
    """What a model wrote.

    Attributes:
        text: Without special tokens.
        cut: Whether it had not ended when its tokens were used up.
    """

    text: str
    cut: bool


def generation_budget(model: Any, sample: EncodedSample, max_new_tokens: int) -> int:
    """``max_new_tokens``, or what the row's own prompt leaves of the model's positions."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return max_new_tokens if limit is None else max(1, min(max_new_tokens, limit - prompt_length(sample)))


@contextlib.contextmanager
def greedy_defaults(model: Any, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Within it, the model generates as it is judged (:mod:`kvds.models.generation`)."""
    own = model.generation_config
    model.generation_config = greedy_generation(model, tokenizer)
    try:
        yield
    finally:
        model.generation_config = own


def generate_completions(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[EncodedSample], pad: int, max_new_tokens: int
) -> list[Completion]:
    """The completion of each row's prompt, within :func:`greedy_defaults`.

    Rows of one budget are generated together: beside a row with more, one with few would be asked for positions that a
    model may not have.
    """
    completions: dict[int, Completion] = {}
    budgets = [generation_budget(model, row, max_new_tokens) for row in rows]
    for budget, places in groupby(sorted(range(len(rows)), key=budgets.__getitem__), budgets.__getitem__):
        alike = list(places)
        found = _generate(model, tokenizer, [rows[place] for place in alike], pad, budget)
        completions |= dict(zip(alike, found, strict=True))
    return [completions[place] for place in range(len(rows))]


def _generate(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[EncodedSample], pad: int, budget: int
) -> list[Completion]:
    generated = generated_tokens(model, rows, pad, budget)
    ends = torch.tensor(model.generation_config.eos_token_id, device=generated.device)
    ended = torch.isin(generated, ends).any(1).tolist()
    texts = decode_texts(tokenizer, generated.tolist())
    return [Completion(text, not end) for text, end in zip(texts, ended, strict=True)]


def generated_tokens(model: Any, rows: Sequence[EncodedSample], pad: int, budget: int, **options: Any) -> Tensor:
    """``[B, tokens]`` ids behind the prompts of ``rows``, of a row that has ended filled up with padding.

    Prompts are padded on the left; ``generate`` counts positions by the mask.

    Args:
        model: A whole causal language model.
        rows: With their prompts.
        pad: In front of shorter prompts.
        budget: Tokens at most.
        options: Of ``generate``.
    """
    device = next(model.parameters()).device
    prompts = [row.input_ids[: prompt_length(row)] for row in rows]
    width = max(map(len, prompts))
    input_ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    written: Tensor = model.generate(input_ids=input_ids, attention_mask=mask, max_new_tokens=budget, **options)
    return written[:, width:]
