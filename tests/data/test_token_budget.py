"""One row per micro-batch: the same samples a step, few rows, none over the budget, equal work on every rank."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvds.data.batches import RowWidth
from kvds.data.encoding import EncodedSample
from kvds.data.grouping import deal_to_rows
from kvds.data.loader import BatchLoader
from kvds.kv.row_attention import ROW_ATTENTION
from tests.data.test_packing import same, setup


@given(st.data(), st.integers(1, 4), st.integers(20, 90))
def test_every_sample_is_dealt_once_and_no_row_is_over_the_capacity(data: Any, ranks: int, capacity: int) -> None:
    lengths = data.draw(st.lists(st.integers(1, 20), max_size=40))
    ids = random.Random(0).sample(range(len(lengths)), len(lengths)) + [-1] * data.draw(st.integers(0, 5))
    rows = deal_to_rows(ids, lengths, capacity, ranks)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert len(rows) % ranks == 0 and max(filled) <= capacity and filled == sorted(filled, reverse=True)
    assert rows == deal_to_rows(sorted(ids), lengths, capacity, ranks)  # whatever the order they come in


def test_by_hand() -> None:
    lengths = [9, 2, 7, 3, 8, 1]
    assert deal_to_rows(range(6), lengths, 30, 1) == [[0, 4, 2, 3, 1, 5]]
    assert deal_to_rows(range(6), lengths, 15, 2) == [[0, 3, 1, 5], [4, 2]]
    assert deal_to_rows([-1, -1], lengths, 15, 2) == [[], []]


def samples(count: int) -> list[EncodedSample]:
    draw = random.Random(1)
    lengths = [min(400, int(draw.lognormvariate(5, 0.4))) for _ in range(count)]
    return [EncodedSample((7,) * n, (1,) + (2,) * (n - 1), i) for i, n in enumerate(lengths)]


def loaders(rows: list[EncodedSample], world_size: int, **options: Any) -> list[BatchLoader]:
    settings = {"batch_size": 8, "gradient_accumulation_steps": 4, "seed": 0, "pad_token_id": 0, **options}
    return [
        BatchLoader(rows, rank=rank, world_size=world_size, position_count=lambda length: length - 1, **settings)
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_has_its_samples_in_few_rows_of_equal_work(world_size: int) -> None:
    rows = samples(300)
    budget = 3000
    plain = loaders(rows, world_size)
    ours = loaders(rows, world_size, tokens_per_batch=budget, width=RowWidth(64, budget))
    for step in range(plain[0].steps_per_epoch):
        made = [loader.step(step) for loader in ours]
        expected = [i for i in plain[0].sample_ids(step) if i >= 0]
        real = sum(len(rows[i].input_ids) for i in expected)
        counts = {len(batches) for batches in made}
        assert counts == {-(-real // (budget * world_size))}  # as few as hold them, on every rank
        batches = [batch for of_rank in made for batch in of_rank]
        assert sorted(i for batch in batches for i in batch.sample_ids.tolist()) == sorted(expected)
        assert all(batch.input_ids.shape[0] == 1 and batch.input_ids.shape[1] <= budget for batch in batches)
        for at_once in zip(*made, strict=True):  # ranks that compute at the same time
            tokens = [int((batch.segment_ids != 0).sum()) for batch in at_once]
            assert max(tokens) - min(tokens) < 0.01 * max(tokens)
        # Micro-batches' shares of the step's mean add up to the whole.
        labels = sum(rows[i].label_count for i in expected)
        assert all(batch.label_normalizer * len(batches) == pytest.approx(labels) for batch in batches)
        padded = sum(batch.input_ids.numel() for batch in batches)
        assert padded < 1.03 * real


def test_an_epochs_rest_gives_every_rank_as_many_forwards() -> None:
    rows = samples(33)
    made = [loader.step(0) for loader in loaders(rows[:1], 2, tokens_per_batch=500)]
    assert [len(batches) for batches in made] == [1, 1]
    assert made[0][0].sample_ids.tolist() == [0] and made[1][0].sample_ids.tolist() == [-1]
    assert int((made[1][0].labels != -100).sum()) == 0


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
@pytest.mark.parametrize("budget", [64, 24])
def test_losses_and_gradients_of_a_step_are_those_of_padded_rows(family: str, budget: int) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for number, length in enumerate((4, 9, 12, 7, 20, 5, 11, 3)):
        ids = torch.randint(1, 50, (length,), generator=generator).tolist()
        rows.append(EncodedSample(tuple(ids), (1, 2) + (3,) * (length - 2), number))
    options = {"batch_size": 4, "gradient_accumulation_steps": 2}
    [plain] = loaders(rows, 1, **options)
    [ours] = loaders(rows, 1, tokens_per_batch=budget, **options)
    made = setup(family, "structured", "post", ROW_ATTENTION)
    for method, share in (("full", None), ("right_crop", 0.5)):
        batches = [loader.step(0) for loader in (plain, ours)]
        assert len(batches[0]) == 2 and len(batches[1]) == {64: 2, 24: 3}[budget]
        found = [made.run(of, method, share) for of in batches]
        for (losses, gradients), of in zip(found, batches, strict=True):  # means over micro-batches, as an engine takes
            losses[:] = [loss / len(of) for loss in losses]
            for gradient in gradients.values():
                gradient /= len(of)
        same(found[1], found[0])
