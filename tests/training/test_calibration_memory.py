"""The KV loss's weight is calibrated in the memory of a training step, and without dropout."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from kvds.align import build_aligner
from kvds.data.batches import collate
from kvds.data.encoding import EncodedSample
from kvds.data.labels import LabelledPositions
from kvds.distillation.module import DistillationModule
from kvds.distillation.step import LossWeights, StepInput
from kvds.kv import KVShape, select_tokens
from kvds.plan.live_memory import LiveMemory
from kvds.teacher.teacher import Teacher
from kvds.training import loss_gradients
from kvds.training.loss_gradients import calibrate_kv_weight
from tests.harness.kv_settings import both_parts
from tests.kv.test_row_attention import VOCAB, config_of

LAYERS, TOKENS = 6, 48


class Engine(nn.Module):
    """What calibration asks of an engine, on one rank without shards."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, step: StepInput) -> Any:
        return self.module(step)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def set_gradient_accumulation_boundary(self, boundary: bool | None) -> None:
        pass


@pytest.fixture(autouse=True)
def plain_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def norm(engine: Engine, parameters: list[nn.Parameter]) -> float:
        return float(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm())

    monkeypatch.setattr(loss_gradients, "gradient_norm", norm)
    monkeypatch.setattr(loss_gradients, "discard_gradients", lambda engine: engine.zero_grad())


FAMILIES = ("gemma", "gpt2", "llama", "mistral", "qwen2", "qwen3")


def with_dropout(family: str, layers: int, seed: int) -> Any:
    config = config_of(family, layers, 32, None)
    for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.4)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def run_of(family: str, *, checkpointing: bool) -> tuple[Engine, list[Callable[[], StepInput]]]:
    """An engine, and three micro-batches that the teacher is run for when they are asked for."""
    student, teacher = with_dropout(family, LAYERS, 1), with_dropout(family, LAYERS, 2)
    shapes = [KVShape.from_config(model.config) for model in (student, teacher)]
    torch.manual_seed(3)
    module = DistillationModule(student, build_aligner(*shapes, both_parts(alignment_mode="structured")))
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    runs = Teacher(teacher, device=torch.device("cpu"))

    def make(number: int) -> StepInput:
        draw = torch.Generator().manual_seed(number)
        ids = torch.randint(1, VOCAB, (2, TOKENS), generator=draw).tolist()
        rows = [EncodedSample(tuple(row), (1,) * 4 + (2,) * (TOKENS - 5) + (3,), i) for i, row in enumerate(ids)]
        batch = collate(rows, [0, 1], 0, 90.0, 90.0)
        selection = select_tokens("full", None, batch.segment_ids, batch.attention_mask)
        labelled = LabelledPositions.from_labels(batch.labels)
        return StepInput(batch, labelled, selection, runs(batch, selection), None, LossWeights(1.0, 1.0))

    return Engine(module), [partial(make, number) for number in range(3)]


def peak_of(engine: Engine, work: Callable[[], object]) -> int:
    gc.collect()
    memory = LiveMemory()
    memory.ignore(iter([*engine.parameters(), *engine.buffers()]))
    with memory:
        work()
    engine.zero_grad()
    return memory.peak


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_takes_no_more_than_a_training_step(family: str, checkpointing: bool) -> None:
    engine, inputs = run_of(family, checkpointing=checkpointing)
    engine.train()

    def step(weights: LossWeights) -> None:
        for make in inputs:
            engine.backward(engine(replace(make(), weights=weights))[0])

    # With and without the KV loss, as a schedule has it: layers are recomputed in another order without it.
    training = max(peak_of(engine, partial(step, LossWeights(1.0, kv))) for kv in (1.0, 0.0))
    calibrating = peak_of(engine, lambda: calibrate_kv_weight(engine, inputs, 1.0, 1.0))  # type: ignore[arg-type]
    assert calibrating <= training, (calibrating, training)
    assert all(module.training for module in engine.module.modules())  # as it was


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_dropped(family: str) -> None:
    """The same weight twice, and with and without checkpointing; a training step's losses differ from draw to draw."""
    found = []
    for checkpointing in (True, True, False):
        engine, inputs = run_of(family, checkpointing=checkpointing)
        engine.train()
        found.append(calibrate_kv_weight(engine, inputs, 1.0, 1.0))  # type: ignore[arg-type]
        with torch.no_grad():
            assert float(engine(inputs[0]())[0]) != float(engine(inputs[0]())[0])
    assert found[0] == found[1] == pytest.approx(found[2], rel=1e-5)
