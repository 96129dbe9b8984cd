"""Selections that look at keys and queries, against plain loops over one sample, written from the formulas, in fp64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvds.data.encoding import Segment
from kvds.kv import Observed, Selection, observing_rows, select_tokens
from kvds.kv.observed import ANSWER_SEGMENT, ObservedLayer, merged_layers
from kvds.kv.scores import SCORES

LAYERS, HEADS, GROUP, DIM = 2, 2, 3, 5
METHODS = sorted(SCORES)


# -- the oracle: one sample without padding, lists and loops --------------------------------------------------------


def dot(a: Tensor, b: Tensor) -> float:
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def cosine(a: Tensor, b: Tensor) -> float:
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def attention(query: Tensor, position: int, keys: Tensor, scaling: float, window: int | None) -> list[float]:
    """Probabilities of one query over all positions."""
    first = 0 if window is None else max(0, position - window + 1)
    seen = softmax([scaling * dot(query, keys[j]) for j in range(first, position + 1)])
    return [0.0] * first + seen + [0.0] * (len(keys) - position - 1)


def mean_similarity(keys: Tensor, spare: bool) -> list[float]:
    n = len(keys)
    similar = [[0.0 if i == j else cosine(keys[i], keys[j]) for j in range(n)] for i in range(n)]
    if spare:
        for row in similar:
            near = [j for j in range(n) if row[j] > 0.5]
            if near:
                row[near[-1]] = 0.0
    return [sum(similar[i][j] for i in range(n)) / n for j in range(n)]


def head_scores(method: str, keys: Tensor, queries: Tensor, observers: list[int], scaling: float, window: Any,
                weight: float) -> list[float]:  # fmt: skip
    """Of one KV head: ``keys [n, D]``, ``queries [G, n, D]``."""
    n = len(keys)
    if method == "keydiff":
        anchor = sum(key / math.sqrt(dot(key, key)) for key in keys) / n
        return [-cosine(key, anchor) for key in keys]
    rows = {
        q: [attention(queries[g, q], q, keys, scaling, window) for g in range(GROUP)] for q in observers
    }  # query → per head of the group
    if method == "rkv":
        important = [
            sum(max(head[i] for head in rows[q]) for q in observers) / max(1, len(observers)) for i in range(n)
        ]
        redundant = softmax(mean_similarity(keys, spare=False))
        return [weight * a - (1 - weight) * b for a, b in zip(important, redundant, strict=True)]
    past = n - len(observers)  # the window: the last positions
    if method == "snapkv":
        mean = [
            sum(head[i] for q in observers for head in rows[q]) / (GROUP * len(observers)) if i < past else 0.0
            for i in range(n)
        ]
        return [sum(mean[max(0, i - 2) : i + 3]) / 5 for i in range(n)]
    important = []
    for i in range(n):
        pooled = [
            max((max(head[j] for head in rows[q]) for j in range(max(0, i - 3), min(past, i + 4))), default=0.0)
            for q in observers
        ]
        important.append(sum(pooled) / len(observers))
    redundant = softmax(mean_similarity(keys, spare=True))
    return [weight * a - (1 - weight) * b for a, b in zip(important, redundant, strict=True)]


def oracle(method: str, budget: Any, segments: list[int], keys: Tensor, queries: Tensor, mask_first: bool,
           count: int, weight: float, window: Any) -> list[int]:  # fmt: skip
    """Positions kept of one sample: ``keys [L, H, n, D]``, ``queries [L, H, G, n, D]``."""
    n = len(segments)
    if n == 0:
        return []
    candidates = [i for i in range(n) if segments[i] == 3] if method == "rkv" else list(range(n))
    observers = candidates[-count:] if method != "keydiff" else []
    scores = [0.0] * n
    for layer in range(LAYERS):
        for head in range(HEADS):
            own = head_scores(
                method, keys[layer, head], queries[layer, head], observers, scaling_of(layer), window, weight
            )
            scores = [total + score / (LAYERS * HEADS) for total, score in zip(scores, own, strict=True)]
    if method in ("snapkv", "rkv_window"):
        scores = [math.inf if i in observers else score for i, score in enumerate(scores)]
    kept = math.ceil(round(budget * n, 9)) if isinstance(budget, float) else budget
    eligible = list(range(1 if mask_first else 0, n))
    return sorted(sorted(eligible, key=lambda i: (scores[i], i), reverse=True)[:kept])


def scaling_of(layer: int) -> float:
    return 0.6 + 0.3 * layer


# -- batches of samples ---------------------------------------------------------------------------------------------


class Sample:
    """Random keys and queries of one row; half of the keys are near others, so that there are duplicates."""

    def __init__(self, seed: int, prompt: int, rationale: int, answer: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.segments = [1] * prompt + [2] * rationale + [3] * answer
        n = len(self.segments)
        self.keys = torch.randn(LAYERS, HEADS, n, DIM, generator=generator, dtype=torch.float64)
        self.queries = torch.randn(LAYERS, HEADS, GROUP, n, DIM, generator=generator, dtype=torch.float64)
        for t in range(1, n, 2):
            other = int(torch.randint(0, t, (1,), generator=generator))
            self.keys[:, :, t] = self.keys[:, :, other] + 0.3 * self.keys[:, :, t]


def stacked(
    samples: list[Sample], tokens: int, left: bool, method: str, count: int | None, window: int | None, junk: float
) -> tuple[Tensor, Tensor, Observed | None]:
    """Padded as the loader pads (or on the left), with ``junk`` wherever there is padding."""
    segments = torch.zeros(len(samples), tokens, dtype=torch.int64)
    mask = torch.zeros_like(segments)
    keys = torch.full((LAYERS, len(samples), HEADS, tokens, DIM), junk, dtype=torch.float64)
    queries = torch.full((LAYERS, len(samples), HEADS * GROUP, tokens, DIM), junk, dtype=torch.float64)
    mask[:, 0] = 1
    for row, sample in enumerate(samples):
        n = len(sample.segments)
        begin = tokens - n if left else 0
        if n:
            mask[row] = 0
        mask[row, begin : begin + n] = 1
        segments[row, begin : begin + n] = torch.tensor(sample.segments, dtype=torch.int64)
        keys[:, row, :, begin : begin + n] = sample.keys
        queries[:, row, :, begin : begin + n] = sample.queries.flatten(1, 2)
    rows = observing_rows(method, segments, mask, observing_tokens=count)
    if rows is None:
        return segments, mask, None
    index = rows.positions[:, None, :, None].expand(-1, HEADS * GROUP, -1, DIM)
    layers = tuple(
        ObservedLayer(queries[i].gather(2, index), keys[i], None, scaling_of(i), window) for i in range(LAYERS)
    )
    return segments, mask, Observed(rows, layers)


def chosen(selection: Selection) -> list[list[int]]:
    assert selection.index is not None
    assert bool((selection.index.diff(dim=1) > 0).all())  # ascending
    return [selection.index[row][selection.mask[row]].tolist() for row in range(selection.mask.shape[0])]


rows_of = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(0, 7), st.integers(0, 8), st.integers(0, 5)), min_size=1, max_size=3
)
budgets = st.one_of(st.integers(1, 12), st.integers(1, 10).map(lambda n: n / 10))
cases = st.fixed_dictionaries(
    {
        "rows": rows_of, "budget": budgets, "left": st.booleans(), "mask_first": st.booleans(),
        "count": st.integers(1, 6), "weight": st.sampled_from([0.0, 0.1, 0.5, 1.0]), "extra": st.integers(0, 4),
        "window": st.sampled_from([None, None, 4]),
    }
)  # fmt: skip


def select(samples: list[Sample], case: dict[str, Any], method: str, extra: int, left: bool, junk: float = 0.0) -> Any:
    tokens = max(1, *(len(sample.segments) for sample in samples)) + extra
    segments, mask, observed = stacked(samples, tokens, left, method, case["count"], case["window"], junk)
    return select_tokens(
        method, case["budget"], segments, mask, mask_first_token=case["mask_first"], observed=observed,
        rkv_lambda=case["weight"], draws=torch.tensor([len(sample.segments) * 7 + 3 for sample in samples]),
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=40)
@given(case=cases)
def test_selection_equals_the_formula_per_sample(method: str, case: dict[str, Any]) -> None:
    samples = [Sample(*row) for row in case["rows"]]
    selection = select(samples, case, method, case["extra"], case["left"], junk=float("nan"))
    tokens = max(1, *(len(sample.segments) for sample in samples)) + case["extra"]
    for row, (sample, positions) in enumerate(zip(samples, chosen(selection), strict=True)):
        expected = oracle(
            method, case["budget"], sample.segments, sample.keys, sample.queries, case["mask_first"], case["count"],
            case["weight"], case["window"],
        )  # fmt: skip
        begin = tokens - len(sample.segments) if case["left"] else 0
        assert [position - begin for position in positions] == expected, row


@pytest.mark.parametrize("method", [*METHODS, "uniform", "random", "right_crop"])
@settings(max_examples=15)
@given(case=cases)
def test_companions_and_padding_change_nothing(method: str, case: dict[str, Any]) -> None:
    samples = [Sample(*row) for row in case["rows"]]
    together = chosen(select(samples, case, method, case["extra"], left=False, junk=9.0))
    backwards = chosen(select(samples[::-1], case, method, 0, left=False))[::-1]
    on_the_left = chosen(select(samples, case, method, 2, left=True, junk=-5.0))
    tokens = max(1, *(len(sample.segments) for sample in samples)) + 2
    for row, sample in enumerate(samples):
        alone = chosen(select([sample], case, method, 0, left=False))[0]
        assert together[row] == backwards[row] == alone
        assert [position - (tokens - len(sample.segments)) for position in on_the_left[row]] == alone
        n = len(sample.segments)
        kept = math.ceil(round(case["budget"] * n, 9)) if isinstance(case["budget"], float) else case["budget"]
        assert len(alone) == min(kept, max(0, n - case["mask_first"]))


def keep(method: str, keys: list[list[float]], budget: int, **kwargs: Any) -> list[int]:
    """One layer, one head, one query head; queries along the first axis, two observing tokens at the end."""
    rows = torch.tensor(keys, dtype=torch.float64)
    segments = torch.tensor([[2] * (len(keys) - 2) + [3] * 2])
    mask = torch.ones_like(segments)
    observers = observing_rows(method, segments, mask, observing_tokens=2)
    assert observers is not None
    queries = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64).expand(1, 1, observers.positions.shape[1], 4)
    layer = ObservedLayer(queries, rows[None, None], None, 1.0, None)
    found = select_tokens(
        method, budget, segments, mask, observed=Observed(observers, (layer,)), mask_first_token=False, **kwargs
    )
    return chosen(found)[0]


X, Y, Z, W = ([float(i == j) for j in range(4)] for i in range(4))


def test_keydiff_and_redundancy_drop_what_repeats() -> None:
    keys = [Y, Y, Y, Z, Y, W]
    assert keep("keydiff", keys, 2) == [3, 5]
    assert keep("rkv", keys, 2, rkv_lambda=0.0) == [3, 5]


def test_importance_keeps_what_is_attended_to() -> None:
    keys = [Y, [4.0, 0, 0, 0], Z, W, Y, Z]
    assert keep("rkv", keys, 1, rkv_lambda=1.0) == [1]
    # Beside the window: of the two whose neighbourhood holds most, the peak and the one behind it, the later.
    assert keep("snapkv", keys, 3) == [2, 4, 5]
    assert keep("rkv_window", [[4.0, 0, 0, 0], *[Y] * 8], 6, rkv_lambda=1.0) == [0, 1, 2, 3, 7, 8]


def test_latest_of_near_duplicates_is_spared() -> None:
    keys = [Y, Y, Y, Z, W, X]
    assert keep("rkv_window", keys, 3, rkv_lambda=0.0) == [3, 4, 5]
    # Of the three equal ones the last has two of its similarities struck out, the others one between them.
    assert keep("rkv_window", keys, 4, rkv_lambda=0.0) == [2, 3, 4, 5]


def test_memory_of_pairs_is_bounded_and_long_rows_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvds.kv import scores

    sample = Sample(5, 20, 30, 9)
    case = {"count": 4, "window": None, "budget": 0.4, "mask_first": True, "weight": 0.3}
    whole = chosen(select([sample], case, "rkv_window", 0, False))
    monkeypatch.setattr(scores, "_PAIR_ROWS", 7)
    assert chosen(select([sample], case, "rkv_window", 0, False)) == whole


@pytest.mark.parametrize("method", METHODS)
def test_layers_scored_together_are_the_same_scores(method: str) -> None:
    sample = Sample(5, 4, 6, 3)
    segments, mask, observed = stacked([sample, Sample(6, 2, 3, 2)], 15, False, method, 3, None, 0.0)
    assert observed is not None
    keys = observed.layers[0].unrotated_keys.numel()
    assert [len(list(merged_layers(observed.layers, most))) for most in (0, keys, 2 * keys, 2**30)] == [2, 2, 1, 1]
    [both] = merged_layers(observed.layers, 2 * keys)
    real = mask.bool() & (segments != 0)
    one_by_one = [SCORES[method](layer, observed.rows, real, 0.3) for layer in observed.layers]
    torch.testing.assert_close(SCORES[method](both, observed.rows, real, 0.3), torch.cat(one_by_one, 1))
    other = replace(observed.layers[1], sliding_window=5)
    assert len(list(merged_layers((observed.layers[0], other), 2**30))) == 2


def test_answer_segment_is_the_data_rooms() -> None:
    assert ANSWER_SEGMENT == Segment.ANSWER


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_reads_must_be_there(method: str) -> None:
    ones = torch.ones(1, 12, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"kv_method={method} reads observed keys"):
        select_tokens(method, 3, ones, ones)


@pytest.mark.parametrize("method", [*METHODS, "uniform", "random"])
def test_selection_asks_its_device_nothing(method: str) -> None:
    # A meta tensor has no values: reading one, or sizing a result by one, raises.
    segments = torch.ones(2, 40, dtype=torch.int64, device="meta")
    rows = observing_rows(method, segments, segments)
    observed = None
    if rows is not None:
        slots = {"keydiff": 0, "rkv": 32}.get(method, 8)
        assert rows.positions.shape == (2, slots)
        queries = torch.empty(2, HEADS * GROUP, slots, DIM, device="meta")
        layer = ObservedLayer(queries, torch.empty(2, HEADS, 40, DIM, device="meta"), None, 1.0, 7)
        observed = Observed(rows, (layer,))
    draws = torch.empty(2, dtype=torch.int64, device="meta")
    selection = select_tokens(method, 10, segments, segments, observed=observed, draws=draws)
    assert selection.mask.shape == (2, 10) and selection.mask.device.type == "meta"
