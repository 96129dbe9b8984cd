"""A small teacher and student, samples of four lengths, and one step of the module that is trained."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

from kvds.align import build_aligner
from kvds.align.fitting import AlignmentMoments
from kvds.data.batches import TokenBatch, collate
from kvds.data.encoding import EncodedSample
from kvds.data.labels import LabelledPositions
from kvds.distillation.module import DistillationModule
from kvds.distillation.step import LossWeights, StepInput
from kvds.kv import KVShape, open_capture, select_tokens, selected_count
from kvds.kv.families import backbone
from kvds.teacher.teacher import Teacher
from tests.harness.kv_settings import both_parts

VOCAB = 50
CPU = torch.device("cpu")


def qwen2(seed: int, layers: int, hidden: int, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=kwargs.pop("vocab_size", VOCAB), hidden_size=hidden, intermediate_size=2 * hidden,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.15, **kwargs,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def gpt2(seed: int, layers: int, hidden: int) -> Any:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(
        GPT2Config(
            vocab_size=VOCAB, n_embd=hidden, n_layer=layers, n_head=2, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, initializer_range=0.15,
        )
    )  # fmt: skip


def samples() -> list[EncodedSample]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number, (prompt, rationale, answer) in enumerate([(4, 5, 2), (3, 0, 2), (6, 7, 3), (2, 3, 1)]):
        ids = torch.randint(1, VOCAB, (prompt + rationale + answer,), generator=generator).tolist()
        rows.append(EncodedSample(tuple(ids), (1,) * prompt + (2,) * rationale + (3,) * answer, number))
    return rows


SELECTION: dict[str, Any] = {"method": "full", "budget": None}


def counts(rows: list[EncodedSample], how: dict[str, Any]) -> tuple[float, float]:
    positions = sum(selected_count(how["method"], how["budget"], len(row.input_ids)) for row in rows)
    return float(sum(row.label_count for row in rows)), float(positions)


def batch_of(rows: list[EncodedSample | None], normalizers: tuple[float, float]) -> TokenBatch:
    return collate(rows, [-1 if row is None else row.example for row in rows], 0, *normalizers)


def padded(batch: TokenBatch, extra: int, content: int = 0) -> TokenBatch:
    return dataclasses.replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, extra), value=content),
        attention_mask=F.pad(batch.attention_mask, (0, extra)),
        labels=F.pad(batch.labels, (0, extra), value=-100),
        segment_ids=F.pad(batch.segment_ids, (0, extra)),
    )


def step_input(
    batch: TokenBatch,
    teacher: Teacher | None,
    weights: LossWeights,
    *,
    how: dict[str, Any] = SELECTION,
    watch: bool = False,
) -> StepInput:
    selection = select_tokens(how["method"], how["budget"], batch.segment_ids, batch.attention_mask)
    output = None if teacher is None else teacher(batch)
    head = None if teacher is None else teacher.head
    return StepInput(batch, LabelledPositions.from_labels(batch.labels), selection, output, head, weights, watch)


@dataclasses.dataclass
class Setup:
    module: DistillationModule
    teacher: Teacher
    teacher_model: nn.Module


def setup(family: str = "qwen2", rope: str = "pre", **kwargs: Any) -> Setup:
    make = {"qwen2": qwen2, "gpt2": gpt2}[family]
    student, teacher_model = make(1, 2, 16), make(2, 3, 24)
    cfg = both_parts(**{"impl": "reference", **kwargs})
    aligner = build_aligner(KVShape.from_config(student.config), KVShape.from_config(teacher_model.config), cfg)
    teacher = Teacher(teacher_model, device=CPU, rope=rope, wants_hidden=True, reads=aligner.teacher_reads)
    module = DistillationModule(student, aligner, rope=rope, head_chunks=2, kd_temperature=2.0)
    moments = AlignmentMoments(aligner)
    calibration = batch_of(list(samples()), (1.0, 1.0))
    with torch.no_grad(), open_capture(student, aligner.reads, rope=rope) as capture:
        backbone(student)(input_ids=calibration.input_ids, attention_mask=calibration.attention_mask)
    selection = select_tokens("full", None, calibration.segment_ids, calibration.attention_mask)
    states = teacher(calibration).states
    assert states is not None
    moments.update(capture.states, states, selection)
    moments.apply()
    return Setup(module, teacher, teacher_model)


def results(module: nn.Module, steps: list[StepInput]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a global step: the mean over its micro-batches, as DeepSpeed takes it."""
    module.zero_grad(set_to_none=True)
    total = 0.0
    for step in steps:
        loss, _ = module(step)
        (loss / len(steps)).backward()
        total += float(loss.detach()) / len(steps)
    return total, {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def same(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    largest = max(float(g.abs().max()) for g in expected[1].values())
    for name, gradient in expected[1].items():
        assert torch.isfinite(gradient).all()
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=2e-6 * largest, msg=name)
