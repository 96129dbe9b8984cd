"""How the samples of a step are dealt out to its micro-batches: less padding, no rank waits long, the same step."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvds.data.encoding import EncodedSample
from kvds.data.grouping import deal_by_length
from kvds.data.loader import BatchLoader


def blocks(ids: list[int], size: int) -> list[list[int]]:
    return [ids[i : i + size] for i in range(0, len(ids), size)]


@given(st.data(), st.integers(1, 5), st.integers(1, 6), st.booleans())
def test_every_sample_is_dealt_once_into_batches_of_one_size(data, size, batches, packed):
    count = size * batches
    lengths = data.draw(st.lists(st.integers(1, 50), min_size=count, max_size=count))
    missing = data.draw(st.integers(0, count))
    ids = random.Random(0).sample(range(count), count)[missing:] + [-1] * missing
    dealt = deal_by_length(ids, lengths, size, packed=packed)
    assert sorted(dealt) == sorted(ids)
    if packed and count - missing >= batches:
        assert all(any(i >= 0 for i in batch) for batch in blocks(dealt, size))  # nobody runs on padding alone


def test_by_hand():
    lengths = [9, 2, 7, 3, 8, 1]
    assert deal_by_length([0, 1, 2, 3, 4, 5], lengths, 2, packed=False) == [0, 4, 2, 3, 1, 5]
    # 9, 8, 7 open the batches; 3 joins the 7, 2 the 8, 1 the 9.
    assert deal_by_length([0, 1, 2, 3, 4, 5], lengths, 2, packed=True) == [0, 5, 4, 1, 2, 3]
    assert deal_by_length([1, 0, -1, 2], lengths, 2, packed=False) == [0, 2, 1, -1]


def samples(count: int) -> list[EncodedSample]:
    draw = random.Random(1)
    lengths = [min(400, int(draw.lognormvariate(5, 0.4))) for _ in range(count)]
    return [EncodedSample((7,) * n, (1,) + (2,) * (n - 1), i) for i, n in enumerate(lengths)]


def steps(
    rows: list[EncodedSample], world_size: int, accumulation: int, *, real: bool = False, **how: Any
) -> list[list[list[int]]]:
    """Tokens computed, or those of them that are real: step, micro-batch, rank."""
    ranks = [
        BatchLoader(
            rows, batch_size=8, gradient_accumulation_steps=accumulation, rank=rank, world_size=world_size, seed=0,
            pad_token_id=0, position_count=lambda length: length, **how,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    numbers = range(len(rows) // (8 * world_size * accumulation))
    return [
        [
            [int((b.segment_ids != 0).sum()) if real else b.input_ids.numel() for b in at_once]
            for at_once in zip(*(r.step(n) for r in ranks), strict=True)
        ]
        for n in numbers
    ]


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 8), (4, 4)])
def test_accumulated_batches_hold_little_padding_and_ranks_end_together(world_size, accumulation):
    rows = samples(1024)
    real = sum(len(row.input_ids) for row in rows) / world_size
    computed = sum(max(ranks) for step in steps(rows, world_size, accumulation) for ranks in step)
    alone = BatchLoader(
        rows, batch_size=8, gradient_accumulation_steps=1, rank=0, world_size=1, seed=0, pad_token_id=0,
        position_count=lambda length: length,
    )  # fmt: skip
    as_drawn = sum(alone.step(n)[0].input_ids.numel() for n in range(128)) / world_size
    assert as_drawn > 1.6 * real  # one micro-batch a step: nothing to deal
    assert computed < 1.35 * real


def test_packed_batches_hold_equally_many_tokens():
    # How much longer than the mean the longest of four ranks takes; samples as they are drawn: 14 %.
    longer = [4 * max(ranks) / sum(ranks) - 1 for [ranks] in steps(samples(1024), 4, 1, real=True, pack_to=400)]
    assert sum(longer) / len(longer) < 0.02


def test_the_order_of_rows_that_are_only_evaluated_stays():
    loader = BatchLoader(
        samples(8), batch_size=2, gradient_accumulation_steps=2, rank=0, world_size=2, seed=0, pad_token_id=0,
        position_count=lambda length: length, shuffle=False,
    )  # fmt: skip
    assert [batch.sample_ids.tolist() for batch in loader.step(0)] == [[0, 1], [4, 5]]
