"""A teacher in 8 and 4 bits on a GPU: less memory, and keys and values that are near those of its own weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from kvds.data.batches import collate
from kvds.data.encoding import EncodedSample
from kvds.models.loading import load_model
from kvds.models.quantized import quantization_config
from kvds.teacher.teacher import Teacher

pytestmark = pytest.mark.gpu
QUANTIZED = ("qwen2",)


@pytest.mark.parametrize(("bits", "bound"), [("8bit", 0.05), ("4bit", 0.3)])
def test_keys_and_values_are_near_those_of_the_whole_weights(bits: str, bound: float, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, num_hidden_layers=2, hidden_size=256, intermediate_size=512, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, initializer_range=0.05,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    device, row = torch.device("cuda"), EncodedSample(tuple(range(2, 18)), (1,) * 4 + (2,) * 11 + (3,), 0)
    batch = collate([row], [0], 0, 12.0, 16.0).to(device)
    states, sizes = [], []
    for quantization in (None, quantization_config(bits, torch.bfloat16)):
        model = load_model(
            str(tmp_path), config, init="pretrained", dtype=torch.bfloat16, attn_implementation="sdpa", seed=0,
            flag="teacher", quantization=quantization,
        )  # fmt: skip
        teacher = Teacher(model, device=device, wants_hidden=True)
        states.append(teacher(batch).states)
        sizes.append(sum(p.numel() * p.element_size() for p in model.model.layers.parameters()))
        assert torch.isfinite(teacher.head(torch.zeros(1, 256, dtype=torch.bfloat16, device=device))).all()
    assert sizes[1] < 0.6 * sizes[0]
    for part, own in zip(states[1], states[0], strict=True):
        for found, expected in zip(part, own, strict=True):
            assert float((found - expected).float().norm()) < bound * float(expected.float().norm())
