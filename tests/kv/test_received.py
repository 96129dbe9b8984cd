"""Attention received is what transformers' own attention pays, sample by sample; a sample's weights have mean 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvds.config.settings import AlignmentSettings
from kvds.data.batches import TokenBatch
from kvds.kv import Selection
from kvds.kv import attention_chunks as chunks
from kvds.kv.families import backbone
from kvds.kv.observed import ObservedLayer
from kvds.kv.received import ReceivedAttention, attention_weights
from kvds.teacher.teacher import Teacher
from kvds.teacher.token_selection import TokenChoice, weighed
from tests.kv.test_row_attention import model_of, packed, padded, samples

FAMILIES = [("llama", None), ("qwen2", 4), ("gemma2", 4), ("gpt2", None)]


def one_row() -> TokenBatch:
    return packed(capacity=60, one_row=True)


def two_rows() -> TokenBatch:
    return packed(capacity=30)


def masses(model: Any) -> list[Tensor]:
    """Of each sample alone: ``Σ_q A[q, t]``, mean over layers and heads, from the model's own probabilities."""
    found = []
    for sample in samples():
        with torch.no_grad():
            layers = backbone(model)(input_ids=torch.tensor([sample.input_ids]), output_attentions=True).attentions
        found.append(torch.stack(layers).sum(3).mean((0, 1, 2)))  # [L, 1, heads, q, t]
    return found


def spread(batch: TokenBatch, values: list[Tensor]) -> Tensor:
    """Numbers of each sample's tokens where they lie in ``batch``; ``values`` in the order of the samples."""
    out = torch.zeros(batch.input_ids.shape, dtype=torch.float64)
    for row, numbers in enumerate(batch.row_samples):
        begin = 0
        for number in numbers:
            out[row, begin : begin + len(values[number])] = values[number]
            begin += len(values[number])
    return out


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("family", "window"), FAMILIES)
def test_mass_is_what_the_model_pays(family: str, window: Any, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = masses(model_of(family, 2, 32, 3, window, "eager").double().eval())
    model = model_of(family, 2, 32, 3, window, attention).double().eval()
    for elements in (1, 3000, 2**24):  # one query at a time, some, all
        monkeypatch.setattr(chunks, "_ELEMENTS", elements)
        for hidden in (False, True):  # the last layer's attention is left out where nobody reads the output
            teacher = Teacher(model, device=torch.device("cpu"), wants_hidden=hidden)
            for batch in (padded(), one_row(), two_rows()) if elements == 3000 else (one_row(),):
                found = teacher(batch, received=True).received
                assert found is not None
                order = batch.sample_ids.tolist()
                assert found.shape[0] == len(order)
                for row, number in enumerate(order):
                    own = expected[number]
                    torch.testing.assert_close(found[row, : len(own)], own, rtol=1e-5, atol=1e-7)
                    assert not found[row, len(own) :].any() and float(own.sum()) == pytest.approx(len(own), rel=1e-5)
    assert teacher(batch).received is None


@pytest.mark.parametrize("batch", [padded, one_row, two_rows])
@pytest.mark.parametrize("asked", [{}, {"kv_method": "uniform", "kv_budget": 0.5}, {"mask_first_token": False}])
def test_weights_of_a_sample_are_its_own_whatever_stands_beside_it(batch: Any, asked: Any) -> None:
    model = model_of("qwen2", 2, 32, 3, None, "sdpa").double().eval()
    teacher = Teacher(model, device=torch.device("cpu"))
    choice = TokenChoice(AlignmentSettings(token_weights="attention", **asked), 0)
    rows = batch()
    output, selection = choice.with_teacher(teacher, rows)
    plain = TokenChoice(AlignmentSettings(**asked), 0).with_teacher(teacher, rows)[1]
    assert output.received is None and plain.weight is None and selection.weight is not None
    assert torch.equal(selection.mask, plain.mask)
    assert (selection.index is None) == (plain.index is None)
    assert selection.index is None or torch.equal(selection.index, plain.index)  # type: ignore[arg-type]
    chosen = plain.at(rows.input_ids.shape[1])
    numbers = spread(rows, [torch.full((len(sample.input_ids),), 1.0 + i) for i, sample in enumerate(samples())])
    mass = spread(rows, masses(model_of("qwen2", 2, 32, 3, None, "eager").double().eval()))
    expected = torch.zeros_like(mass)
    for number in range(1, 7):
        own = (numbers == number) & chosen
        if own.any():
            expected[own] = mass[own] / mass[own].mean()
    found = selection.weight
    if selection.index is not None:
        expected = expected.gather(1, selection.index) * selection.mask
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    assert float(found.sum()) == pytest.approx(int(plain.mask.sum()), rel=1e-5)
    assert float(found[selection.mask].std()) > 0.1


def test_methods_that_read_keys_are_weighed_too() -> None:
    choice = TokenChoice(AlignmentSettings(kv_method="rkv", kv_budget=3, token_weights="attention"), 0)
    model = model_of("llama", 2, 32, 3, None, "sdpa")
    teacher = Teacher(model, device=torch.device("cpu"), observe=choice.observing)
    _, selection = choice.with_teacher(teacher, padded())
    assert selection.index is not None and selection.weight is not None
    for weight, mask in zip(selection.weight, selection.mask, strict=True):
        assert not weight[~mask].any() and (not mask.any() or float(weight[mask].mean()) == pytest.approx(1, rel=1e-5))


def test_nothing_received_weighs_all_alike_and_nothing_chosen_nothing() -> None:
    mass = torch.tensor([[0.0, 0.0, 5.0], [1.0, 3.0, 9.0], [1.0, 1.0, 1.0]])
    chosen = torch.tensor([[True, True, False], [True, True, False], [False, False, False]])
    expected = torch.tensor([[1.0, 1.0, 0.0], [0.5, 1.5, 0.0], [0.0, 0.0, 0.0]])
    assert torch.equal(attention_weights(mass, chosen), expected)


def test_a_row_of_padding_is_no_number_that_spreads() -> None:
    model = model_of("llama", 2, 32, 3, None, "sdpa")
    real = torch.zeros(2, 4, dtype=torch.bool)
    real[1] = True
    with torch.no_grad(), ReceivedAttention(backbone(model), real) as looks:
        backbone(model)(input_ids=torch.ones(2, 4, dtype=torch.int64), use_cache=False)
    assert looks.mass.isfinite().all() and not looks.mass[0].any() and looks.mass[1].sum() == pytest.approx(4)


def test_positions_that_count() -> None:
    index, mask = torch.tensor([[0, 2], [1, 1]]), torch.tensor([[True, True], [False, True]])
    assert Selection(index, mask).at(3).tolist() == [[True, False, True], [False, True, False]]
    assert Selection(None, mask).at(2) is mask


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [padded, one_row])
def test_on_a_gpu_without_making_the_host_wait(batch: Any) -> None:
    rows = batch()
    found = []
    for device in ("cpu", "cuda"):
        model = model_of("qwen2", 2, 32, 3, None, "eager").double().eval()
        choice = TokenChoice(AlignmentSettings(token_weights="attention", kv_method="uniform", kv_budget=0.5), 0)
        moved = rows.to(torch.device(device))
        output = Teacher(model, device=torch.device(device))(moved, received=True)
        selection = choice.select(moved, None)
        layer = ObservedLayer(*torch.randn(2, 1, 4, 9, 8, dtype=torch.float64, device=device), None, 0.3, None)
        real = torch.ones(1, 9, dtype=torch.bool, device=device)
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in chunks.attention_chunks(layer, real):
                pass
            assert output.received is not None
            selection = weighed(selection, output.received, moved)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        assert selection.weight is not None
        found.append(selection.weight.cpu())
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-8)
