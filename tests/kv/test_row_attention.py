"""Attention told where samples begin: losses, gradients and keys are those of rows of their own under a mask."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from kvds.align import build_aligner
from kvds.data.batches import TokenBatch, collate, collate_packed
from kvds.data.encoding import EncodedSample
from kvds.data.labels import LabelledPositions
from kvds.data.model_inputs import model_inputs, repacked, unpacked
from kvds.distillation.module import DistillationModule
from kvds.distillation.step import LossWeights, StepInput
from kvds.kv import KVShape, select_tokens
from kvds.kv.families import FAMILIES, backbone
from kvds.kv.row_attention import ROW_ATTENTION
from kvds.teacher.teacher import Teacher
from tests.harness.kv_settings import both_parts

VOCAB = 50
LENGTHS = (11, 5, 18, 6, 9, 1)
WITH_WINDOW = ("gemma2", "gemma3_text", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "smollm3")
WINDOWED = [(family, 4) for family in WITH_WINDOW]
# What a family says beside sizes.
OWN: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 12, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 3.0},
    "gemma3_text": {"query_pre_attn_scalar": 12, "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e4},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}},
    "gpt_neox": {"hidden_dropout": 0.0, "attention_dropout": 0.0, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "granite": {"attention_multiplier": 0.3, "logits_scaling": 2.0, "embedding_multiplier": 2.0},
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "phi3": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "stablelm": {"qk_layernorm": True, "use_qkv_bias": True, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
}  # fmt: skip
ALTERNATING = ("gemma2", "gemma3_text")
CASES = [(family, None) for family in sorted(FAMILIES)] + WINDOWED


def samples() -> list[EncodedSample]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(1, VOCAB, (length,), generator=generator).tolist()
        prompt = length // 3
        rows.append(EncodedSample(tuple(ids), (1,) * prompt + (2,) * (length - prompt - 1) + (3,), number))
    return rows


def config_of(family: str, layers: int, hidden: int, window: int | None) -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    if family == "gpt2":
        sizes = {"n_embd": hidden, "n_layer": layers, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.0,
                 "resid_pdrop": 0.0, "embd_pdrop": 0.0, "pad_token_id": 0}  # fmt: skip
    if family in ("mistral", "mixtral", "phi3") or window is not None:
        sizes["sliding_window"] = window
    if family in ("qwen2", "qwen3") and window is not None:
        sizes |= {"use_sliding_window": True, "layer_types": ["sliding_attention"] * layers}
    if family == "smollm3" and window is not None:
        sizes |= {"use_sliding_window": True, "layer_types": _alternating(layers)}
    if family in ALTERNATING:
        sizes["layer_types"] = _alternating(layers) if window is not None else ["full_attention"] * layers
    if family in ("gpt_neox", "stablelm"):
        sizes |= {"hidden_size": 32}  # of which a head is a part
    if family == "gpt_neox":
        del sizes["num_key_value_heads"]
    if family == "smollm3":
        sizes["no_rope_layers"] = [1, 0, 1, 1][:layers]
    sizes = {**OWN.get(family, {}), **sizes}
    return AutoConfig.for_model(family, vocab_size=VOCAB, initializer_range=0.15, **sizes)


def _alternating(layers: int) -> list[str]:
    return ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)]


def model_of(family: str, layers: int, hidden: int, seed: int, window: int | None, attention: str) -> Any:
    torch.manual_seed(seed)
    if family == "gemma2" and attention == "sdpa":
        attention = "eager"  # transformers has no other that caps
    return AutoModelForCausalLM.from_config(config_of(family, layers, hidden, window), attn_implementation=attention)


def padded() -> TokenBatch:
    rows = samples()
    return collate(rows, [row.example for row in rows], 0, 30.0, 40.0)


def masked() -> TokenBatch:
    """The same rows as if nobody knew where their padding is."""
    return dataclasses.replace(padded(), pads_right=False)


def packed(**options: Any) -> TokenBatch:
    rows = samples()
    return collate_packed(rows, [row.example for row in rows], 0, 30.0, 40.0, longest=18, **options)


Result = tuple[list[float], dict[str, Tensor]]


def train_module(student: Any, shapes: list[KVShape], **options: Any) -> DistillationModule:
    """The student with a structured map of keys and values, the same in each call."""
    torch.manual_seed(9)
    return DistillationModule(student, build_aligner(*shapes, both_parts(alignment_mode="structured")), **options)


def train(family: str, window: int | None, rope: str, attention: str, batch: TokenBatch, budget: Any = 0.5) -> Result:
    """Losses and gradients of one step: task, keys and values, logits."""
    student, teacher = (model_of(family, n, 16 * n, n, window, attention) for n in (2, 3))
    module = train_module(student, [KVShape.from_config(model.config) for model in (student, teacher)], rope=rope)
    runs = Teacher(teacher, device=torch.device("cpu"), rope=rope, wants_hidden=True)
    rows = unpacked(batch)
    selection = repacked(select_tokens("right_crop", budget, rows.segment_ids, rows.attention_mask), batch)
    labelled = LabelledPositions.from_labels(batch.labels)
    weights = LossWeights(task=0.7, kv=1.5, logit_kd=0.4)
    loss, metrics = module(StepInput(batch, labelled, selection, runs(batch, selection), runs.head, weights))
    loss.backward()
    losses = [float(metrics[name].detach()) for name in ("loss/task", "loss/kv", "loss/logit_kd")]
    return losses, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def same(found: Result, expected: Result) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6) and min(expected[0]) > 0
    assert found[1].keys() == expected[1].keys()
    largest = max(float(gradient.abs().max()) for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6 * largest, msg=name)


@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize(("family", "window"), CASES)
def test_losses_and_gradients_need_no_mask(family: str, window: int | None, rope: str) -> None:
    expected = train(family, window, rope, "sdpa", masked())
    for attention in ("sdpa", "eager", ROW_ATTENTION):
        same(train(family, window, rope, attention, padded()), expected)
    if window is not None:  # it is seen at all
        unseen = train(family, None, rope, "sdpa", masked())
        assert unseen[0] != pytest.approx(expected[0], rel=1e-3)


@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize(("family", "window"), CASES)
def test_samples_that_share_rows_are_told_apart_by_bounds(family: str, window: int | None, rope: str) -> None:
    expected = train(family, window, rope, "sdpa", masked())
    shared, single = packed(capacity=20), packed(capacity=64, one_row=True)
    assert single.input_ids.shape == (1, sum(LENGTHS)) and shared.input_ids.shape[0] > 1
    for batch in (shared, single):
        same(train(family, window, rope, ROW_ATTENTION, batch), expected)
        for attention in ("sdpa", "eager"):  # by a mask, with the window
            same(train(family, window, rope, attention, batch), expected)


@pytest.mark.parametrize(("family", "window"), CASES)
def test_what_stands_left_of_a_sample_keeps_its_mask(family: str, window: int | None) -> None:
    model = model_of(family, 2, 32, 1, window, ROW_ATTENTION).eval()
    plain = model_of(family, 2, 32, 1, window, "eager").eval()
    batch = padded()
    moved = {name: torch.zeros_like(batch.input_ids) for name in ("input_ids", "attention_mask", "position_ids")}
    for row, length in enumerate(LENGTHS):
        moved["input_ids"][row, -length:] = batch.input_ids[row, :length]
        moved["attention_mask"][row, -length:] = 1
        moved["position_ids"][row, -length:] = torch.arange(length)
    left = dataclasses.replace(
        batch, input_ids=moved["input_ids"], attention_mask=moved["attention_mask"], pads_right=False
    )
    inputs = model_inputs(left, model.config, torch.float32)
    assert torch.equal(inputs["attention_mask"], moved["attention_mask"])
    real = moved["attention_mask"].bool()
    with torch.no_grad():
        own = backbone(plain)(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        found = backbone(model)(**inputs, position_ids=moved["position_ids"]).last_hidden_state
    torch.testing.assert_close(found[real], own[batch.attention_mask.bool()], rtol=1e-4, atol=1e-5)


def test_generation_goes_on_as_with_sdpa() -> None:
    made = []
    for attention in ("sdpa", ROW_ATTENTION):
        model = model_of("mistral", 2, 32, 1, 4, attention).eval()
        batch = padded()
        ids, mask = batch.input_ids.flip(1), batch.attention_mask.flip(1)
        made.append(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False))
    assert torch.equal(*made)


def test_bounds_hold_every_token_and_no_stretch_is_longer_than_the_longest_sample() -> None:
    for batch in (packed(capacity=20), packed(capacity=64, one_row=True, width=lambda n: 64 if n > 18 else n)):
        packing = batch.packing
        assert packing is not None and packing.longest == 18 and packing.bounds.dtype == torch.int32
        bounds = packing.bounds.tolist()
        assert bounds[0] == 0 and bounds[-1] == batch.input_ids.numel() and max(packing.bounds.diff()) <= 18
        numbers = packing.document_ids.flatten()
        for begin, end in zip(bounds, bounds[1:], strict=False):
            assert end > begin and len(numbers[begin:end].unique()) == 1
        assert set(packing.bounds.diff().tolist()) >= set(LENGTHS)
