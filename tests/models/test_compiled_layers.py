"""Layers in compiled pieces: losses, gradients, captures and what is watched are those of plain layers."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, GPT2Config, Qwen2Config

from kvds.align import build_aligner
from kvds.config.alignment_modes import ALIGNMENT_MODES
from kvds.config.settings import AlignmentSettings
from kvds.data.batches import TokenBatch
from kvds.data.labels import LabelledPositions
from kvds.data.model_inputs import model_inputs, repacked, unpacked
from kvds.distillation.module import DistillationModule
from kvds.distillation.step import LossWeights, StepInput
from kvds.errors import InputError
from kvds.handoff.continuation import Continuation, continue_from
from kvds.handoff.reading import read_states
from kvds.kv import KVCapture, KVShape, KVStates, select_tokens
from kvds.kv.families import backbone
from kvds.kv.row_attention import ROW_ATTENTION
from kvds.models.compiled_layers import COMPILED_FAMILIES, compile_as_asked, compile_layers, why_not_compiled
from kvds.teacher.teacher import Teacher
from tests.kv.test_row_attention import model_of, packed, padded, same

Result = tuple[list[float], dict[str, torch.Tensor], dict[str, float]]


class Setup:
    """A student and a teacher, whose layers may be compiled, and one step on a batch."""

    def __init__(
        self, family: str, backend: str | None, *, window: int | None = None, rope: str = "post",
        mode: str = "structured", method: str = "right_crop", checkpointing: bool = False,
    ) -> None:  # fmt: skip
        self.student = model_of(family, 2, 32, 1, window, ROW_ATTENTION).train()
        teacher = model_of(family, 3, 48, 2, window, ROW_ATTENTION)
        if checkpointing:
            self.student.gradient_checkpointing_enable({"use_reentrant": False})
        for model in (self.student, teacher):
            if backend is not None:
                assert why_not_compiled(model.config) == ""
                assert compile_layers(model, backend=backend) == model.config.num_hidden_layers
        shapes = [KVShape.from_config(model.config) for model in (self.student, teacher)]
        torch.manual_seed(9)
        settings = AlignmentSettings(alignment_mode=mode, kv_parts="kv" if mode == "structured" else "auto")
        self.module = DistillationModule(self.student, build_aligner(*shapes, settings), rope=rope)
        self.teacher = Teacher(teacher, device=torch.device("cpu"), rope=rope, reads=ALIGNMENT_MODES[mode].reads)
        self.method = method

    def input(self, batch: TokenBatch, watch: bool = False) -> StepInput:
        rows = unpacked(batch)
        budget = None if self.method == "full" else 0.5
        selection = repacked(select_tokens(self.method, budget, rows.segment_ids, rows.attention_mask), batch)
        labelled = LabelledPositions.from_labels(batch.labels)
        return StepInput(
            batch, labelled, selection, self.teacher(batch, selection), None, LossWeights(0.7, 1.5), watch=watch
        )

    def step(self, batch: TokenBatch) -> Result:
        self.module.zero_grad(set_to_none=True)
        loss, metrics = self.module(self.input(batch, watch=True))
        loss.backward()
        watch = self.module.gradient_watch
        assert watch is not None
        squares = {name: float(value) for name, value in watch.squares().items()}
        losses = [float(metrics[name].detach()) for name in ("loss/task", "loss/kv")]
        return losses, {n: p.grad.clone() for n, p in self.module.named_parameters() if p.grad is not None}, squares


def equal(found: Result, expected: Result) -> None:
    same(found[:2], expected[:2])
    assert found[2] == pytest.approx(expected[2], rel=1e-4) and min(expected[2].values()) > 0


def batches() -> list[TokenBatch]:
    return [padded(), packed(capacity=64, one_row=True)]


@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("family", COMPILED_FAMILIES)
def test_losses_gradients_and_the_watch_are_those_of_plain_layers(family: str, rope: str) -> None:
    window = None if family == "llama" else 4
    plain, ours = (Setup(family, backend, rope=rope, window=window) for backend in (None, "aot_eager"))
    for batch in batches():
        equal(ours.step(batch), plain.step(batch))


@pytest.mark.parametrize("mode", ["structural_kv", "hidden"])
def test_what_else_is_captured(mode: str) -> None:
    plain, ours = (Setup("qwen2", backend, mode=mode, method="full") for backend in (None, "eager"))
    equal(ours.step(padded()), plain.step(padded()))


def test_checkpointed_layers_are_recomputed_in_pieces() -> None:
    plain, ours = (Setup("qwen2", backend, checkpointing=on) for backend, on in ((None, False), ("aot_eager", True)))
    calls: list[int] = []
    ours.student.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(0))
    ours.student.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    equal(ours.step(packed(capacity=64, one_row=True)), plain.step(packed(capacity=64, one_row=True)))
    assert calls == [1, 1]  # forward and recomputation, and the MLP is no module there


def test_forwards_without_a_capture_in_between_change_nothing() -> None:
    """As evaluation and calibration run them: no capture, or one without gradient, in evaluation mode."""
    plain, ours = (Setup("qwen2", backend) for backend in (None, "aot_eager"))
    for made in (plain, ours):
        made.step(padded())
    inputs = model_inputs(padded(), ours.student.config, torch.float32)
    found = []
    for made in (plain, ours):
        model = made.student.eval()
        with torch.no_grad():
            hidden = backbone(model)(**inputs, use_cache=False).last_hidden_state
            with KVCapture(model, rope="post") as capture:
                backbone(model)(**inputs, use_cache=False)
        model.train()
        found.append((hidden, *capture.states.keys, *capture.states.values))
    for ours_is, plain_is in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours_is, plain_is, rtol=1e-5, atol=1e-5)
    for batch in batches():
        equal(ours.step(batch), plain.step(batch))


@pytest.mark.parametrize("family", COMPILED_FAMILIES)
def test_a_cache_is_read_as_by_plain_layers(family: str) -> None:
    """As ``--handoff_weight`` runs the student, after a forward without one; hidden states and gradients."""
    batch, found = padded(), []
    row = Continuation.from_batch(batch)
    for backend in (None, "aot_eager"):
        student = Setup(family, backend, window=None if family == "llama" else 4).student
        read = read_states(student, batch.input_ids, batch.attention_mask.bool())
        states = [tuple(layer.requires_grad_() for layer in part) for part in row.prompt_states(read)]
        hidden = continue_from(student, KVStates(*states), row, batch.input_ids)[row.mask]
        leaves = [*student.model.layers.parameters(), *states[0], *states[1]]
        found.append((hidden, *torch.autograd.grad(hidden.square().sum(), leaves)))
    for ours, plain in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_one_piece_serves_all_layers_and_lengths() -> None:
    ours = Setup("qwen2", "eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for batch in batches():
        ours.step(batch)
    before = dict(torch._dynamo.utils.counters["stats"])
    for batch in (packed(capacity=64, one_row=True, width=lambda longest: longest + 7), padded()):
        ours.step(batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GPT2Config(), "gpt2 has layers of another structure"),
        (Gemma2Config(), "gemma2 has layers of another structure"),
        (Qwen2Config(hidden_act="gelu"), "its activation is gelu"),
    ],
)
def test_what_does_not_fit_is_told(config: Any, reason: str) -> None:
    assert reason in why_not_compiled(config)


def test_on_refuses_and_auto_says_why_not(caplog: pytest.LogCaptureFixture) -> None:
    gpu = torch.device("cuda")
    model = model_of("gpt2", 2, 32, 1, None, ROW_ATTENTION)
    with pytest.raises(InputError, match="compile=on: the student cannot be compiled: gpt2 has layers"):
        compile_as_asked(model, "on", torch.device("cpu"), flag="student")
    with caplog.at_level(logging.INFO, "kvds"):
        assert not compile_as_asked(model, "auto", gpu, flag="student")
        eager = model_of("qwen2", 2, 32, 1, None, "eager")
        assert not compile_as_asked(eager, "auto", gpu, flag="teacher")
        model = model_of("qwen2", 2, 32, 1, None, ROW_ATTENTION)
        assert not compile_as_asked(model, "auto", gpu, flag="student", layers=[])
        assert not compile_as_asked(model, "auto", torch.device("cpu"), flag="student")
        assert not compile_as_asked(model, "off", gpu, flag="student")
    told = [record.getMessage() for record in caplog.records if record.name == "kvds"]
    assert [line.split(": ")[1] for line in told] == [
        f"the {m} stays as it is" for m in ("student", "teacher", "student")
    ]
    assert "another structure" in told[0] and "its attention is eager" in told[1] and "in parts" in told[2]
    assert compile_as_asked(model, "auto", gpu, flag="student", layers=[model.model.layers[1]])
    assert [type(layer).__mro__[1].__name__ == "Qwen2DecoderLayer" for layer in model.model.layers] == [False, True]
