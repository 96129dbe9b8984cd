"""Sampled completions of prompts, each row by random numbers of its own: the same in any company, on any rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from kvds.data.encoding import EncodedSample, prompt_length
from kvds.evaluation.generation import generated_tokens, generation_budget

# Units that probabilities are counted in where they are added up: sums of whole numbers are the same in any order.
_UNITS = 2**40


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Attributes:
        max_new_tokens: Tokens of a completion.
        max_length: Of prompt and completion together.
        temperature: Of the distribution, > 0.
        top_p: Tokens are drawn from the likeliest whose probabilities reach it together; 1: from all.
        vocab_size: Entries that carry tokens; those behind are padding of the head.
    """

    max_new_tokens: int
    max_length: int
    temperature: float
    top_p: float
    vocab_size: int


class RowDraws(LogitsProcessor):
    """Makes the likeliest token one that is drawn: ``argmax_v p_v / e_v`` with exponential ``e_v`` is v with
    probability ``p_v``. Each row has a generator of its own.

    Args:
        seeds: Of the rows, in order.
        sampling: How to draw.
        device: Of the logits.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling, device: torch.device) -> None:
        self._sampling = sampling
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores ``[B, vocab]`` whose largest entry is drawn."""
        own = self._sampling
        scores = scores.float() / own.temperature
        scores[:, own.vocab_size :] = -torch.inf
        if own.top_p < 1:
            scores = likeliest(scores, own.top_p)
        waits = torch.empty_like(scores)
        for row, generator in zip(waits, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores.log_softmax(-1) - waits.log()


def likeliest(scores: Tensor, top_p: float) -> Tensor:
    """``scores [B, vocab]`` with −∞ for all but the fewest tokens whose probabilities are at least ``top_p`` together.

    Source: Holtzman et al., The Curious Case of Neural Text Degeneration (2020), section 3.1.
    """
    ordered, order = scores.sort(-1, descending=True)
    parts = (ordered.softmax(-1).double() * _UNITS).long()
    before = parts.cumsum(-1) - parts
    enough = before >= int(top_p * _UNITS)
    left_out = torch.empty_like(enough).scatter_(-1, order, enough)
    return scores.masked_fill(left_out, -torch.inf)


def sampled_completions(
    model: Any, rows: Sequence[EncodedSample], seeds: Sequence[int], pad: int, sampling: Sampling, batch_size: int
) -> list[list[int]]:
    """Token ids behind each row's prompt, up to its end token or as many as fit.

    Args:
        model: A whole causal language model in evaluation mode, within
            :func:`kvds.evaluation.generation.greedy_defaults`.
        rows: With their prompts.
        seeds: Of each row.
        pad: In front of shorter prompts.
        sampling: How to draw.
        batch_size: Rows that are written together at most.
    """
    ends, device = set(model.generation_config.eos_token_id), next(model.parameters()).device
    budgets = [
        min(generation_budget(model, row, sampling.max_new_tokens), sampling.max_length - prompt_length(row))
        for row in rows
    ]
    found: dict[int, list[int]] = {}
    # Rows of one budget together, see generate_completions; of like prompts, so that little is padding.
    order = sorted(range(len(rows)), key=lambda i: (budgets[i], prompt_length(rows[i])))
    for budget, places in groupby(order, budgets.__getitem__):
        alike = list(places)
        for begin in range(0, len(alike), batch_size):
            some = alike[begin : begin + batch_size]
            written = generated_tokens(
                model, [rows[i] for i in some], pad, budget,
                logits_processor=LogitsProcessorList([RowDraws([seeds[i] for i in some], sampling, device)]),
                synced_gpus=False,  # no rank goes on for another
            )  # fmt: skip
            found |= {i: _ended(ids, ends) for i, ids in zip(some, written.tolist(), strict=True)}
    return [found[i] for i in range(len(rows))]


def _ended(ids: list[int], ends: set[int]) -> list[int]:
    """``ids`` up to the first that ends a text, which belongs to it."""
    last = next((place for place, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: last + 1]
