"""Captured query rows and keys give the attention probabilities that the model itself computes, for every family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig, Qwen2Config

from kvds.kv import KVCapture, ObservingRows
from kvds.kv.families import backbone
from kvds.kv.observed import attention_rows, last_rows
from tests.kv.test_capture import CONFIGS, FAMILIES, PADDINGS, hook_count, inputs, make_model, same

ROWS = torch.tensor([[2, 5, 6], [3, 4, 5]])


def eager(model: nn.Module) -> nn.Module:
    again = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager")
    again.load_state_dict(model.state_dict())
    return again.eval()


def check(model: nn.Module, batch: dict[str, Tensor], rope: str = "pre") -> None:
    """Rows at ROWS of each layer's attention against the eager model's, which returns the whole matrix."""
    real = batch["attention_mask"].bool()
    rows = ObservingRows(ROWS, real.gather(1, ROWS))
    with torch.no_grad():
        expected = eager(model)(**batch, output_attentions=True, use_cache=False).attentions
        with KVCapture(model, rope=rope, query_rows=ROWS) as capture:
            model(**batch, use_cache=False)
    assert len(capture.observed) == len(expected) == len(capture.states.keys)
    for layer, whole in zip(capture.observed, expected, strict=True):
        found = attention_rows(layer, layer.keys(), rows, real)  # [B, H, G, Q, T]
        wanted = whole.gather(2, ROWS[:, None, :, None].expand(-1, whole.shape[1], -1, whole.shape[3]))
        wanted = torch.where(rows.mask[:, None, :, None], wanted, 0.0)
        torch.testing.assert_close(found.flatten(1, 2), wanted, rtol=1e-4, atol=1e-6)
        assert layer.queries().shape[:3] == (2, model.config.num_attention_heads, 3)
        torch.testing.assert_close(found.sum(-1), rows.mask[:, None, None].float().expand_as(found[..., 0]))
        wrong = attention_rows(replace(layer, scaling=1.5 * layer.scaling), layer.keys(), rows, real)
        assert float((wrong - found).abs().max()) > 1e-3  # far enough from uniform for a wrong scaling to show


@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_of_query_rows_equals_eager(family: str, padding: str, rope: str) -> None:
    check(make_model(family), inputs(padding), rope)


SPECIAL = {
    "mistral window": MistralConfig(**{**CONFIGS["mistral"].to_dict(), "sliding_window": 3}),
    "qwen2 window": Qwen2Config(
        **{**CONFIGS["qwen2"].to_dict(), "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0,
           "layer_types": None}
    ),
    "gpt2 unscaled": GPT2Config(**{**CONFIGS["gpt2"].to_dict(), "scale_attn_weights": False}),
    "gpt2 by layer": GPT2Config(**{**CONFIGS["gpt2"].to_dict(), "scale_attn_by_inverse_layer_idx": True}),
    "yarn": Qwen2Config(
        **{**CONFIGS["qwen2"].to_dict(), "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "rope_theta": 100.0, "original_max_position_embeddings": 8}}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECIAL)
def test_windows_and_scalings_of_the_model_count(name: str) -> None:
    torch.manual_seed(3)
    model: Any = AutoModelForCausalLM.from_config(SPECIAL[name])
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if "embed" not in n and "w" in n):
            parameter.mul_(4 if "gpt2" not in name else 3)
    check(model.eval(), inputs("right"))
    check(model, inputs("left"))


@pytest.mark.parametrize("family", FAMILIES)
def test_query_rows_change_no_key_and_no_value(family: str) -> None:
    model, batch = make_model(family), inputs("right")
    captured = []
    for rows in (None, ROWS):
        with torch.no_grad(), KVCapture(model, query_rows=rows) as capture:
            model(**batch)
        captured.append(capture)
    assert captured[0].observed == ()
    for one, other in zip(captured[0].states, captured[1].states, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert hook_count(model) == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_query_rows_carry_a_gradient(checkpointing: bool) -> None:
    model, batch = make_model("qwen3").train(), inputs("right")

    def gradient(rows: Tensor, pick: bool) -> dict[str, Tensor]:
        model.zero_grad()
        with KVCapture(model, query_rows=rows) as capture:
            backbone(model)(**batch, use_cache=False)
        queries = [layer.queries() for layer in capture.observed]
        if pick:
            queries = [q.gather(2, ROWS[:, None, :, None].expand(-1, 4, -1, q.shape[-1])) for q in queries]
        weights = torch.linspace(0.5, 2, queries[0].numel()).view_as(queries[0])
        torch.stack([(q * weights).sum() * (i + 1) for i, q in enumerate(queries)]).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    everything = torch.arange(batch["input_ids"].shape[1]).expand(2, -1)
    expected = gradient(everything, pick=True)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradient(ROWS, pick=False)
    assert found.keys() == expected.keys() and any("q_proj" in name for name in found)
    for name in expected:
        same(found[name], expected[name])


def test_last_rows() -> None:
    candidates = torch.tensor([[0, 1, 1, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0, 0], [0] * 7], dtype=torch.bool)
    rows = last_rows(candidates, 3)
    assert [row[mask].tolist() for row, mask in zip(rows.positions, rows.mask, strict=True)] == [[2, 4, 5], [3], []]
    assert rows.at(7).nonzero().tolist() == [[0, 2], [0, 4], [0, 5], [1, 3]]
    assert last_rows(candidates, 50).positions.shape == (3, 7)
    assert last_rows(candidates, 0).positions.shape == (3, 0)
