"""Sampled completions: drawn as the model says, the same in any company, ended where they end, never too long."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, TopPLogitsWarper

from kvds.data.encoding import EncodedSample, prompt_length
from kvds.evaluation.sampling import RowDraws, Sampling, likeliest, sampled_completions
from tests.kv.test_capture import CONFIGS

END, WORDS, MOST = 2, 50, 20
SAMPLING = Sampling(max_new_tokens=8, max_length=MOST, temperature=0.7, top_p=0.9, vocab_size=WORDS)
CPU = torch.device("cpu")
# Sliding windows and learned positions beside the plain ones.
FAMILIES = ("qwen2", "gemma2", "gpt2")


def rows() -> list[EncodedSample]:
    generator = torch.Generator().manual_seed(4)
    made = []
    for number, length in enumerate((3, 15, 6, 17, 2, 19, 9)):
        ids = torch.randint(3, WORDS, (length + 1,), generator=generator).tolist()
        made.append(EncodedSample(tuple(ids), (1,) * length + (3,), number))
    return made


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    attention = "eager" if request.param == "gemma2" else "sdpa"
    made = AutoModelForCausalLM.from_config(CONFIGS[request.param], attn_implementation=attention).eval()
    made.generation_config = GenerationConfig(do_sample=False, eos_token_id=[END, 5], pad_token_id=0)
    for parameter in made.parameters():
        parameter.data.mul_(2)  # neither one token nor all alike
    return made


def seeds(count: int) -> list[int]:
    return [1000 + i for i in range(count)]


@torch.no_grad()
def by_hand(model: Any, row: EncodedSample, seed: int) -> list[int]:
    """One row at a time, the whole text again for each token, no cache and no padding."""
    draws, ids = RowDraws([seed], SAMPLING, CPU), list(row.input_ids[: prompt_length(row)])
    prompt = len(ids)
    while len(ids) < MOST and len(ids) - prompt < SAMPLING.max_new_tokens:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1]
        ids.append(int(draws(torch.tensor([ids]), logits).argmax()))
        if ids[-1] in (END, 5):
            break
    return ids[prompt:]


def test_completions_are_those_of_each_row_alone(model: Any) -> None:
    some = rows()
    found = sampled_completions(model, some, seeds(len(some)), 0, SAMPLING, batch_size=3)
    assert found == [by_hand(model, row, seed) for row, seed in zip(some, seeds(len(some)), strict=True)]
    assert found == sampled_completions(model, some, seeds(len(some)), 0, SAMPLING, batch_size=1)
    assert found != sampled_completions(model, some, seeds(len(some) + 1)[1:], 0, SAMPLING, batch_size=3)


def test_completions_end_at_an_end_token_or_where_the_row_is_full(model: Any) -> None:
    some = rows() * 10
    found = sampled_completions(model, some, seeds(len(some)), 0, SAMPLING, batch_size=8)
    lengths = {len(completion) for completion in found}
    assert max(lengths) == 8 and len(lengths) > 2
    for row, completion in zip(some, found, strict=True):
        ended = [token in (END, 5) for token in completion]
        room = min(8, MOST - prompt_length(row))
        assert not any(ended[:-1]) and (ended[-1] or len(completion) == room) and 1 <= len(completion) <= room
        assert max(completion) < WORDS
    assert any(completion[-1] == END for completion in found) and any(completion[-1] == 5 for completion in found)
    assert sampled_completions(model, [], [], 0, SAMPLING, batch_size=8) == []


def test_draws_follow_the_distribution() -> None:
    torch.manual_seed(0)
    logits, count = torch.randn(1, WORDS + 7) * 2, 20000
    logits[:, WORDS:] = 50.0  # padding of the head
    sampling = Sampling(1, 1, temperature=1.5, top_p=1.0, vocab_size=WORDS)
    draws = RowDraws(seeds(count), sampling, CPU)
    drawn = draws(torch.zeros(count, 1), logits.expand(count, -1).clone()).argmax(-1)
    expected = (logits[0, :WORDS] / 1.5).softmax(-1)
    found = torch.bincount(drawn, minlength=WORDS + 7)
    assert int(found[WORDS:].sum()) == 0
    deviation = (found[:WORDS] / count - expected).abs() / (expected * (1 - expected) / count).sqrt()
    assert float(deviation.max()) < 4.5


def test_the_likeliest_are_those_of_transformers() -> None:
    torch.manual_seed(1)
    scores: Tensor = torch.randn(64, WORDS) * 3
    for top_p in (0.05, 0.5, 0.9, 0.999):
        kept = torch.isfinite(likeliest(scores, top_p))
        assert torch.equal(kept, torch.isfinite(TopPLogitsWarper(top_p)(None, scores)))
        assert bool(kept.any(-1).all()) and not bool(kept.all())
