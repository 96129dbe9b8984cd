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
from kvds.kv import gather_positions, group_slices, select_tokens, selected_count


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
    with pytest.raises(InputError, match="kv_method=left_crop: expected full or right_crop"):
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
