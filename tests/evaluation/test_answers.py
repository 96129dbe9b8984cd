"""Answers as they are judged: a student that writes a row's own tokens is right, one that was cut is said to be."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig

from kvds.data.encoding import EncodedSample, encode_examples, prompt_length
from kvds.data.example import Example, is_blank
from kvds.errors import InputError
from kvds.evaluation import model as evaluation
from kvds.evaluation.generation import generation_budget
from kvds.evaluation.model import evaluate_model, in_words
from tests.harness.text_tokenizers import KINDS, LETTERS, NORMALIZERS, TEXT, fuzzed, made

LIMITS = {"batch_size": 3, "max_new_tokens": 10**4, "max_length": 10**4, "progress": False}


class Parrot(nn.Module):
    """A student that continues a prompt with what it was given for it, position by position within its limits."""

    def __init__(self, samples: list[EncodedSample], pad: int, positions: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = PreTrainedConfig(max_position_embeddings=positions)
        self.generation_config = GenerationConfig()
        self._known = {s.input_ids[: prompt_length(s)]: s.input_ids[prompt_length(s) :] for s in samples}
        self._pad = pad

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        rows = []
        for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            prompt = ids[mask.index(1) :]
            limit = self.config.max_position_embeddings
            assert limit is None or len(prompt) + max_new_tokens <= limit
            rows.append(self._known[tuple(prompt)][:max_new_tokens])
        longest = max(map(len, rows))
        return torch.tensor(
            [
                ids + [*row, *[self._pad] * (longest - len(row))]
                for ids, row in zip(input_ids.tolist(), rows, strict=True)
            ]
        )


@pytest.fixture(autouse=True)
def no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parrot has no logits."""
    monkeypatch.setattr(evaluation, "completion_losses", lambda model, rows, pad: [0.0] * len(rows))
    monkeypatch.setattr(evaluation, "check_own_logits", lambda model, ids: None)


def judged(rows: list[Example], tokenizer: Any, positions: int | None = None, **options: Any) -> dict[str, float]:
    samples = encode_examples(rows, tokenizer, 10**4).samples
    parrot = Parrot(list(samples), tokenizer.pad_token_id, positions)
    return evaluate_model(parrot, tokenizer, rows, **LIMITS | options)["all"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@fuzzed
@given(rows=st.lists(st.tuples(TEXT, TEXT.map(lambda t: t.replace("#", ""))), min_size=1, max_size=4))
def test_a_perfect_student_is_right_on_every_row(kind: str, normalizer: str, rows: list[tuple[str, str]]) -> None:
    tokenizer = made(kind, normalizer)
    examples = [Example(f"{i}", rationale, answer or "1", "c", "f:1") for i, (answer, rationale) in enumerate(rows)]
    results = judged(examples, tokenizer)
    assert results["samples"] == len(rows) and results["cut_completions"] == 0
    # Only what the tokenizer leaves nothing of cannot be judged.
    known = kind in ("bytes", "byte_fallback")
    assert results["judged"] == len(rows) or any(
        is_blank(answer) or not (known or set(answer) <= set(LETTERS)) for answer, _ in rows
    )
    assert results["judged"] == 0 or results["exact_match"] == 1.0


def test_answers_in_another_unicode_form_are_right() -> None:
    rows = [Example(f"{i}", "", "Ce\u0301sar \N{ANGSTROM SIGN}", "c", "f:1") for i in range(3)]
    for normalizer in ("nfc", "nfkc"):
        assert judged(rows, made("bytes", normalizer))["exact_match"] == 1.0


def test_code_is_judged_by_all_its_lines(tmp_path: Path) -> None:
    tokenizer = made("bytes")
    code = "def f(x):\n    return x"
    right = [Example("f", "", code, "c", "f:1"), Example("g", "think", "g = 1\n\ng += 1", "c", "f:2")]
    results = judged(right, tokenizer, predictions_path=tmp_path / "p.jsonl")
    assert results["exact_match"] == 1.0
    assert json.loads((tmp_path / "p.jsonl").read_text().splitlines()[0])["expected"] == code
    parrot = Parrot(list(encode_examples(right[:1], tokenizer, 99).samples), tokenizer.pad_token_id)
    for other in ("def f(x):\n  return x", "def f(x):\n    return X", "def f(x): return x"):
        rows = [Example("f", "", other, "c", "f:1")]
        assert evaluate_model(parrot, tokenizer, rows, **LIMITS)["all"]["exact_match"] == 0.0


def test_a_row_whose_answer_cannot_be_written_is_not_judged(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = made("letters")
    rows = [Example("a", "", "\N{SNOWMAN}", "c", "f:1"), Example("b", "", ".", "c", "f:2")]
    with caplog.at_level(logging.WARNING, "kvds"):
        results = judged(rows, tokenizer)
    assert (results["samples"], results["judged"], results["exact_match"]) == (2, 1, 1.0)
    assert "the answers of 1 of 2 rows cannot be written" in caplog.text
    silent = Parrot([], 0)
    silent.generate = lambda input_ids, **_: torch.cat([input_ids, torch.zeros_like(input_ids[:, :1])], 1)
    assert evaluate_model(silent, tokenizer, rows, **LIMITS)["all"]["exact_match"] == 0.0  # "." is no missing answer


def test_one_long_prompt_shortens_nobody_else_s_completion(tmp_path: Path) -> None:
    tokenizer = made("bytes")
    rows = [Example(f"p{i}", "some thought", f"{i}", "c", "f:1") for i in range(12)]
    longest = max(len(sample.input_ids) for sample in encode_examples(rows, tokenizer, 999).samples)
    long = Example("x" * 60, "", "12345", "c", "f:2")
    fits = len(encode_examples([long], tokenizer, 999).samples[0].input_ids)
    assert fits > longest
    results = judged([*rows, long], tokenizer, positions=fits, max_length=fits, predictions_path=tmp_path / "p.jsonl")
    assert results["exact_match"] == 1.0 and results["cut_completions"] == 0
    # The long one's completion is what the model has no positions for: it is cut, the others are not.
    endless = [*rows, Example(long.prompt, "and on " * 9, "1", "c", "f:2")]
    samples = encode_examples(endless, tokenizer, 999).samples
    parrot = Parrot(list(samples), tokenizer.pad_token_id, fits)
    options = LIMITS | {"max_length": fits, "predictions_path": tmp_path / "p.jsonl"}
    results = evaluate_model(parrot, tokenizer, [*rows, long], **options)
    assert results["all"]["cut_completions"] == 1 and results["all"]["exact_match"] == pytest.approx(12 / 13)
    assert "1 of 13 completions cut" in in_words(results)
    cut = [json.loads(line)["cut"] for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert cut == [False] * 12 + [True]


def test_too_few_new_tokens_cut_and_are_counted_per_corpus() -> None:
    tokenizer = made("bytes")
    rows = [Example("p", "", "1", "short", "f:1"), Example("q", "a long thought", "2", "long", "f:2")]
    parrot = Parrot(list(encode_examples(rows, tokenizer, 999).samples), tokenizer.pad_token_id)
    results = evaluate_model(parrot, tokenizer, rows, **LIMITS | {"max_new_tokens": 9})
    assert [results[name]["cut_completions"] for name in ("short", "long", "all")] == [0, 1, 1]


@given(positions=st.none() | st.integers(2, 99), prompt=st.integers(1, 98), most=st.integers(1, 99))
def test_a_row_s_budget_is_its_own(positions: int | None, prompt: int, most: int) -> None:
    sample = EncodedSample((0,) * (prompt + 1), (1,) * prompt + (3,), 0)
    if positions is None or prompt < positions:
        budget = generation_budget(
            SimpleNamespace(config=SimpleNamespace(max_position_embeddings=positions)), sample, most
        )
        assert budget == (most if positions is None else min(most, positions - prompt)) >= 1


def test_more_tokens_than_positions_are_refused() -> None:
    tokenizer = made("bytes")
    with pytest.raises(
        InputError, match="max_length=512: the model has 64 positions; expected --max_length 64 or less"
    ):
        judged([Example("p", "", "1", "c", "f:1")], tokenizer, positions=64, max_length=512)
