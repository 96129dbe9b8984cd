"""A step asks the device for nothing: what would make a host wait for a GPU is seen on a CPU, too."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen2Config

from kvds.align import build_aligner
from kvds.config import RunConfig
from kvds.data.encoding import EncodedSample
from kvds.data.loader import BatchLoader
from kvds.distillation.module import DistillationModule
from kvds.distillation.step import LossWeights
from kvds.distillation.step_input_builder import StepInputBuilder
from kvds.kv import KVShape, selected_count
from kvds.kv.row_attention import ROW_ATTENTION
from kvds.teacher.teacher import Teacher
from kvds.teacher.token_selection import TokenChoice

# Operators whose result the host reads, or whose shape it must know.
_WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal.default", "_unique", "bincount")


class HostWaits(TorchDispatchMode):
    """Collects where they are called, as function names from outside in."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[list[str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = args[1] if len(args) > 1 and "index" in str(func) and isinstance(args[1], list | tuple) else ()
        by_mask = any(isinstance(mask, torch.Tensor) and mask.dtype == torch.bool for mask in masks)
        if by_mask or any(f"aten.{name}" in str(func) for name in _WAITING):
            self.found.append([frame.name for frame in traceback.extract_stack()])
        return func(*args, **(kwargs or {}))


def model(layers: int, seed: int) -> Any:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation=ROW_ATTENTION)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("method", ["full", "right_crop", "random"])
def test_a_step_waits_for_nothing(packed: bool, method: str) -> None:
    rows = [EncodedSample((1,) * n, (1, 2) + (3,) * (n - 2), i) for i, n in enumerate((5, 9, 12, 7, 4, 11))]
    budget = None if method == "full" else 0.5
    cfg = RunConfig(
        output_dir="outputs/none", teacher_name="t", student_name="s", kv_method=method, kv_budget=budget,
        kv_weight=1.0, packing=packed, batch_size=6, impl="reference", kv_parts="kv",
    )  # fmt: skip
    loader = BatchLoader(
        rows, batch_size=6, gradient_accumulation_steps=1, rank=0, world_size=1, seed=0, pad_token_id=0,
        position_count=lambda length: selected_count(method, budget, length), pack_to=24 if packed else None,
    )  # fmt: skip
    teacher, student = model(3, 1), model(2, 2)
    aligner = build_aligner(KVShape.from_config(student.config), KVShape.from_config(teacher.config), cfg)
    module = DistillationModule(student.train(), aligner)
    device = torch.device("cpu")
    inputs = StepInputBuilder(cfg, [Teacher(teacher, device=device)], TokenChoice(cfg, cfg.seed), device)
    [batch] = loader.step(0)
    with HostWaits() as waits:
        loss, _ = module(inputs(batch, LossWeights(1.0, 1.0), step=2))
        loss.backward()
    # Labels are counted on the batch's CPU side, on purpose.
    waited = [names for names in waits.found if "from_labels" not in names]
    assert len(waits.found) - len(waited) == 1 and not waited
