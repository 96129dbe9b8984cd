"""Which positions are distilled, against a loop over rows and positions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvds.errors import InputError
from kvds.kv import gather_positions, group_slices, row_draws, select_tokens, selected_count, selected_shares


def batch(lengths: list[int], tokens: int, left: bool) -> tuple[Tensor, Tensor]:
    """``segment_ids`` and ``attention_mask`` as the loader makes them: a row of padding attends to one token."""
    segments = torch.zeros(len(lengths), tokens, dtype=torch.int64)
    attention = torch.zeros_like(segments)
    attention[:, 0] = 1
    for row, length in enumerate(lengths):
        begin = tokens - length if left else 0
        if length:
            attention[row] = 0
        attention[row, begin : begin + length] = 1
        segments[row, begin : begin + length] = torch.arange(length) % 3 + 1
    return segments, attention


def oracle(method: str, budget: Any, segments: Tensor, attention: Tensor, mask_first: bool) -> list[list[int]]:
    rows = []
    for row in range(segments.shape[0]):
        real = [t for t in range(segments.shape[1]) if attention[row, t] == 1 and segments[row, t] != 0]
        kept = len(real)
        if method == "right_crop":
            kept = math.ceil(round(budget * len(real), 9)) if isinstance(budget, float) else budget
        eligible = real[1:] if mask_first else real
        rows.append(eligible[max(0, len(eligible) - kept) :])
    return rows


def kept_of(budget: Any, length: int) -> int:
    return math.ceil(round(budget * length, 9)) if isinstance(budget, float) else budget


def chosen(selection: Any) -> list[list[int]]:
    index, mask = selection.index, selection.mask
    if index is None:
        index = torch.arange(mask.shape[1]).expand_as(mask)
    return [index[row][mask[row]].tolist() for row in range(mask.shape[0])]


lengths_in = st.integers(1, 12).flatmap(
    lambda tokens: st.tuples(st.just(tokens), st.lists(st.integers(0, tokens), min_size=1, max_size=4))
)
budgets = st.one_of(
    st.tuples(st.just("full"), st.none()),
    st.tuples(st.just("right_crop"), st.integers(1, 15)),
    st.tuples(st.just("right_crop"), st.integers(1, 20).map(lambda n: n / 20)),
)


@given(lengths_in, budgets, st.booleans(), st.booleans())
def test_selection_equals_loop(rows: tuple[int, list[int]], how: tuple[str, Any], left: bool, mask_first: bool) -> None:
    (tokens, lengths), (method, budget) = rows, how
    segments, attention = batch(lengths, tokens, left)
    selection = select_tokens(method, budget, segments, attention, mask_first_token=mask_first)
    assert chosen(selection) == oracle(method, budget, segments, attention, mask_first)
    if selection.index is not None:
        assert selection.index.dtype == torch.int64 and selection.index.shape == selection.mask.shape
        assert bool((selection.index.diff(dim=1) > 0).all())
        assert int(selection.index.min()) >= 0 and int(selection.index.max()) < tokens


@given(lengths_in, budgets, st.booleans(), st.booleans())
def test_selected_count_equals_mask(
    rows: tuple[int, list[int]], how: tuple[str, Any], left: bool, mask_first: bool
) -> None:
    (tokens, lengths), (method, budget) = rows, how
    mask = select_tokens(method, budget, *batch(lengths, tokens, left), mask_first_token=mask_first).mask
    expected = [selected_count(method, budget, length, mask_first_token=mask_first) for length in lengths]
    assert mask.sum(1).tolist() == expected


@given(st.integers(1, 12), budgets, st.booleans())
def test_selection_of_a_row_depends_on_that_row_alone(length: int, how: tuple[str, Any], mask_first: bool) -> None:
    alone = select_tokens(*how, *batch([length], length, False), mask_first_token=mask_first)
    together = select_tokens(*how, *batch([12, length, 0], 17, False), mask_first_token=mask_first)
    assert chosen(together)[1] == chosen(alone)[0]
    assert chosen(together)[2] == []


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (3, [[4, 5, 6], [1, 2], []]),
        (0.5, [[3, 4, 5, 6], [1, 2], []]),
        (1.0, [[1, 2, 3, 4, 5, 6], [1, 2], []]),
        (0.1, [[6], [2], []]),
        (100, [[1, 2, 3, 4, 5, 6], [1, 2], []]),
    ],
)
def test_right_crop_by_hand(budget: Any, expected: list[list[int]]) -> None:
    assert chosen(select_tokens("right_crop", budget, *batch([7, 3, 0], 9, False))) == expected


def test_first_real_token_is_left_out_also_behind_left_padding() -> None:
    segments, attention = batch([3, 5], 6, True)
    assert chosen(select_tokens("full", None, segments, attention)) == [[4, 5], [2, 3, 4, 5]]
    assert chosen(select_tokens("full", None, segments, attention, mask_first_token=False)) == [
        [3, 4, 5],
        [1, 2, 3, 4, 5],
    ]


budgeted = st.one_of(st.integers(1, 15), st.integers(1, 20).map(lambda n: n / 20))


@given(lengths_in, budgeted, st.booleans(), st.booleans())
def test_uniform_takes_the_end_of_equal_stretches(
    rows: tuple[int, list[int]], budget: Any, left: bool, mask_first: bool
) -> None:
    tokens, lengths = rows
    found = chosen(select_tokens("uniform", budget, *batch(lengths, tokens, left), mask_first_token=mask_first))
    for length, positions in zip(lengths, found, strict=True):
        begin = tokens - length if left else 0
        eligible = list(range(begin, begin + length))[1 if mask_first else 0 :]
        kept = min(kept_of(budget, length), len(eligible))
        assert positions == [eligible[math.ceil((i + 1) * len(eligible) / kept) - 1] for i in range(kept)]


def plain_hash(x: int) -> int:
    """splitmix64's last steps with whole numbers of any size."""
    x &= 2**64 - 1
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ x >> shift) * factor % 2**64
    return x ^ x >> 31


@given(lengths_in, budgeted, st.booleans(), st.booleans(), st.integers(0, 99), st.integers(0, 10**6))
def test_random_takes_the_largest_draws_of_seed_step_and_sample(
    rows: tuple[int, list[int]], budget: Any, left: bool, mask_first: bool, seed: int, step: int
) -> None:
    tokens, lengths = rows
    samples = [7 * i - 1 for i in range(len(lengths))]
    draws = row_draws(seed, step, torch.tensor(samples))
    found = chosen(
        select_tokens("random", budget, *batch(lengths, tokens, left), mask_first_token=mask_first, draws=draws)
    )
    for sample, length, positions in zip(samples, lengths, found, strict=True):
        row = plain_hash(plain_hash(sample + seed * 1_000_003 + step))
        draw = {t: plain_hash(row ^ plain_hash(t + 1)) % 2**62 for t in range(length)}
        best = sorted(range(1 if mask_first else 0, length), key=lambda t: -draw[t])[: kept_of(budget, length)]
        assert [t - (tokens - length if left else 0) for t in positions] == sorted(best)


def test_random_is_uniform_over_positions_steps_and_samples() -> None:
    segments, attention = batch([21] * 2000, 21, False)
    masks = []
    for step in (0, 1):
        draws = row_draws(3, step, torch.arange(2000))
        selection = select_tokens("random", 5, segments, attention, draws=draws)
        masks.append(torch.zeros(2000, 21).scatter_(1, selection.index, 1.0))  # type: ignore[arg-type]
    for mask in masks:
        assert float(mask[:, 0].sum()) == 0
        # A quarter of 2000, standard deviation 19; neighbours in a row are chosen together 4/19 of the time.
        assert float((mask[:, 1:].sum(0) - 500).abs().max()) < 5 * 19
        together = float((mask[:, 1:-1] * mask[:, 2:]).mean() / mask[:, 1:].mean())
        assert together == pytest.approx(4 / 19, abs=0.02)
    # Another step, or the next sample, is chosen independently: a quarter of the positions is common.
    assert float((masks[0] * masks[1]).sum(1).mean()) == pytest.approx(5 / 4, abs=0.1)
    assert float((masks[0][1:] * masks[0][:-1]).sum(1).mean()) == pytest.approx(5 / 4, abs=0.1)


def test_random_needs_draws() -> None:
    with pytest.raises(ValueError, match="kv_method=random reads draws"):
        select_tokens("random", 3, *batch([5], 5, False))


def test_shares_are_counts_over_counts() -> None:
    segments = torch.tensor([[1, 1, 2, 2, 2, 3, 0], [1, 2, 2, 3, 0, 0, 0]])
    attention = (segments != 0).long()
    names = {"prompt": 1, "rationale": 2, "answer": 3, "absent": 4}
    crop = selected_shares(select_tokens("right_crop", 3, segments, attention), segments, names)
    assert {key: float(value) for key, value in crop.items()} == pytest.approx(
        {"kv/selected_share": 6 / 10, "kv/selected_share_prompt": 0.0, "kv/selected_share_rationale": 4 / 5,
         "kv/selected_share_answer": 1.0}
    )  # fmt: skip
    full = selected_shares(select_tokens("full", None, segments, attention), segments, names)
    assert float(full["kv/selected_share"]) == pytest.approx(8 / 10)
    assert float(full["kv/selected_share_prompt"]) == pytest.approx(1 / 3)
    assert selected_shares(select_tokens("full", None, segments * 0, attention), segments * 0, names) == {}


@given(
    st.integers(1, 12).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=4)
    ),
    budgets,
    st.booleans(),
)
def test_holes_in_a_row_cost_no_token(rows: list[list[bool]], how: tuple[str, Any], mask_first: bool) -> None:
    segments = torch.tensor(rows).long()
    attention = torch.ones_like(segments)
    selection = select_tokens(*how, segments, attention, mask_first_token=mask_first)
    assert chosen(selection) == oracle(*how, segments, attention, mask_first)
    expected = [selected_count(*how, sum(row), mask_first_token=mask_first) for row in rows]
    assert selection.mask.sum(1).tolist() == expected
    if selection.index is not None:
        assert bool((selection.index.diff(dim=1) > 0).all())


@pytest.mark.parametrize("budget", [None, 0, -3, 0.0, 1.5, float("nan")])
def test_budget_that_keeps_nothing_is_an_input_error(budget: Any) -> None:
    expected = f"kv_budget={budget}: expected at least 1 token"
    with pytest.raises(InputError, match=expected):
        select_tokens("right_crop", budget, *batch([3], 4, False))
    with pytest.raises(InputError, match=expected):
        selected_count("right_crop", budget, 3)


def test_unknown_method_is_an_input_error() -> None:
    with pytest.raises(InputError, match="kv_method=left_crop: expected full, right_crop, uniform, .* or rkv_window"):
        select_tokens("left_crop", 3, *batch([3], 4, False))
    with pytest.raises(InputError, match="kv_method=left_crop"):
        selected_count("left_crop", 3, 3)


def test_selection_stays_on_its_device_and_asks_it_nothing() -> None:
    # A meta tensor has no values: reading one, or sizing a result by one, raises.
    segments = torch.ones(2, 9, dtype=torch.int64, device="meta")
    for method, budget, slots in (("full", None, 9), ("right_crop", 4, 4), ("right_crop", 0.5, 5)):
        selection = select_tokens(method, budget, segments, segments)
        assert selection.mask.shape == (2, slots) and selection.mask.device.type == "meta"


def test_slots_come_from_budget_and_padded_length_alone() -> None:
    for lengths in ([9, 2], [3, 0]):
        assert select_tokens("right_crop", 4, *batch(lengths, 9, False)).mask.shape == (2, 4)
        assert select_tokens("right_crop", 0.5, *batch(lengths, 9, False)).mask.shape == (2, 5)


@given(st.integers(1, 30), st.integers(1, 30))
def test_groups_cover_everything_once_and_evenly(count: int, groups: int) -> None:
    if groups > count:
        with pytest.raises(InputError, match=f"head_groups={groups}"):
            group_slices(count, groups, what="head_groups")
        return
    slices = group_slices(count, groups)
    assert [i for s in slices for i in range(count)[s]] == list(range(count))
    sizes = [s.stop - s.start for s in slices]
    assert len(sizes) == groups and max(sizes) - min(sizes) <= 1


def test_gather_positions() -> None:
    states = torch.randn(2, 3, 5, 4)
    index = torch.tensor([[0, 4], [1, 3]])
    found = gather_positions(states, index)
    for row in range(2):
        for slot in range(2):
            assert torch.equal(found[row, :, slot], states[row, :, index[row, slot]])
    assert gather_positions(states, None) is states
