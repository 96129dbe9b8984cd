"""Rows that the student wrote: which samples they replace, and what counts where of a step that holds some."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from kvds.config import RunConfig
from kvds.data.batches import TokenBatch
from kvds.data.encoding import EncodedSample
from kvds.data.example import Example
from kvds.data.loader import BatchLoader
from kvds.data.on_policy_rows import check_prompts, replaced_rows, with_completion
from kvds.data.run_data import load_run_data
from kvds.data.tokenizer import train_problem_tokenizer
from kvds.errors import InputError

GLOBAL = 6


def sample(number: int, prompt: int, answer: int) -> EncodedSample:
    """Ids that tell the row and the place."""
    segments = (1,) * prompt + (2,) * (answer - 1) + (3,)
    return EncodedSample(tuple(100 * number + i + 1 for i in range(len(segments))), segments, number)


SAMPLES = [sample(i, 2 + i % 3, 1 + i % 4) for i in range(20)]


def loader(rank: int = 0, world_size: int = 1, **options: Any) -> BatchLoader:
    shared = {"gradient_accumulation_steps": 1, "seed": 3, "position_count": lambda length: length - 1}
    return BatchLoader(
        SAMPLES, batch_size=GLOBAL // world_size, rank=rank, world_size=world_size, pad_token_id=0, **shared, **options
    )


@pytest.mark.parametrize("percent", [10, 29, 50, 100])
def test_the_share_is_exact_after_every_step(percent: int) -> None:
    batches, replaced, seen = loader(), 0, 0
    for step in range(40):
        ids = batches.sample_ids(step)
        assert batches.samples_before(step) == seen
        chosen = replaced_rows(ids, percent / 100, before=seen, seed=1, step=step)
        assert chosen == sorted(set(chosen)) and set(chosen) <= set(ids) - {-1}
        replaced, seen = replaced + len(chosen), seen + sum(i >= 0 for i in ids)
        assert replaced == percent * seen // 100


def test_which_rows_is_drawn_by_seed_and_step_alone() -> None:
    ids = list(range(8))

    def chosen(seed: int, step: int, rows: list[int] = ids) -> list[int]:
        return replaced_rows(rows, 0.5, before=0, seed=seed, step=step)

    assert chosen(1, 2) == chosen(1, 2, ids[::-1])
    assert len({tuple(chosen(1, step)) for step in range(20)}) > 10
    assert len({tuple(chosen(seed, 0)) for seed in range(20)}) > 10
    counts = Counter(i for step in range(400) for i in chosen(0, step))
    assert set(counts) == set(ids) and all(abs(count - 200) < 50 for count in counts.values())


def test_a_written_row_is_its_prompt_and_the_completion() -> None:
    turns = EncodedSample((1, 2, 3, 4, 5, 6), (1, 2, 3, 1, 1, 3), 7)  # an answer, and another question
    row = with_completion(turns, [8, 9])
    assert row == EncodedSample((1, 2, 3, 4, 5, 8, 9), (1, 1, 1, 1, 1, 3, 3), 7, sampled=True)
    assert row.label_count == 0 and row.taught_count == 2


FORMS = {
    "padded": {},
    "packed": {"pack_to": 16},
    "one row": {"tokens_per_batch": 40, "longest": 12},
}


def told(batches: list[TokenBatch]) -> tuple[list[int], list[int], list[int]]:
    """Ids of all samples, of those that the task loss counts and of those that only distillation counts."""
    labels = [batch.labels[batch.labels != -100].tolist() for batch in batches]
    sampled = [batch.sampled_labels[batch.sampled_labels != -100].tolist() for batch in batches]  # type: ignore[index]
    real = [batch.input_ids[batch.input_ids > 0].tolist() for batch in batches]
    return tuple(sorted(token for part in parts for token in part) for parts in (real, labels, sampled))  # type: ignore[return-value]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_step_holds_written_rows_in_place_of_the_data_s(form: str, ranks: int) -> None:
    all_ranks = [loader(rank, ranks, **FORMS[form]) for rank in range(ranks)]
    ids = all_ranks[0].sample_ids(1)
    written = {i: with_completion(SAMPLES[i], [5001 + 10 * i, 5002 + 10 * i][: 1 + i % 2]) for i in ids[1:4]}
    per_rank = [one.step_with(1, written) for one in all_ranks]
    rows = [written.get(i, SAMPLES[i]) for i in ids]
    own = [token for row in written.values() for token in row.input_ids if token > 5000]
    data = [t for row in rows if not row.sampled for t, s in zip(row.input_ids, row.segment_ids, strict=True) if s > 1]
    batches = [batch for part in per_rank for batch in part]
    assert told(batches) == (sorted(t for row in rows for t in row.input_ids), sorted(data), sorted(own))
    for batch in batches:  # normalizers are those of the whole step, per micro-batch
        assert batch.label_normalizer == pytest.approx(len(data) / len(batches))
        assert batch.taught_normalizer == pytest.approx((len(data) + len(own)) / len(batches))
        assert batch.position_normalizer == pytest.approx(sum(len(row.input_ids) - 1 for row in rows) / len(batches))


def test_a_step_that_is_written_altogether_has_no_task_loss() -> None:
    batches = loader()
    written = {i: with_completion(SAMPLES[i], [9]) for i in batches.sample_ids(0)}
    [batch] = batches.step_with(0, written)
    assert batch.label_normalizer == 0 and batch.taught_normalizer == GLOBAL and bool((batch.labels == -100).all())


@pytest.mark.parametrize("form", FORMS)
def test_other_steps_stay_as_they_are(form: str) -> None:
    plain, [batch] = loader(**FORMS[form]).step(1), loader(**FORMS[form]).step_with(1, {})
    assert plain[0].sampled_labels is None and plain[0].taught_normalizer is None
    for name in ("input_ids", "labels", "segment_ids", "attention_mask", "label_normalizer", "position_normalizer"):
        assert torch.equal(torch.as_tensor(getattr(plain[0], name)), torch.as_tensor(getattr(batch, name)))
    assert bool((batch.sampled_labels == -100).all()) and batch.taught_normalizer == batch.label_normalizer


def test_rows_without_a_prompt_are_refused(tmp_path: Path) -> None:
    train_problem_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "texts.jsonl").write_text('{"text": "1 + 1 = 2"}\n')

    def load(*datasets: str, **changes: Any) -> None:
        cfg = RunConfig(
            model_name="gpt2", datasets=datasets, synthetic_problems=4, eval_subset_size=0, output_dir="o", **changes
        )
        load_run_data(cfg, tokenizer, rank=0, world_size=1)

    load("synthetic", on_policy_share=0.5)
    load("synthetic", str(tmp_path / "texts.jsonl"))
    with pytest.raises(InputError, match=r"on_policy_share=0.5: texts .*texts.jsonl:1 has no prompt .*expected rows w"):
        load("synthetic", str(tmp_path / "texts.jsonl"), on_policy_share=0.5)


def test_rows_without_a_completion_are_refused() -> None:
    rows = [Example("p", "", "a", "c", "f:1")]
    check_prompts([EncodedSample((1, 2), (1, 3), 0)], rows, 0.5)
    for segments in ((1, 1), (3, 3)):
        with pytest.raises(InputError, match="on_policy_share=0.5: c f:1 has no prompt that a completion could follow"):
            check_prompts([EncodedSample((1, 2), segments, 0)], rows, 0.5)
