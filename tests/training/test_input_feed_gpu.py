"""A teacher on a stream of its own: the same losses, also where one of the two streams lags far behind the host.

    python -m pytest tests/training/test_input_feed_gpu.py -m gpu

It needs torch, transformers and deepspeed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from kvds.align import build_aligner
from kvds.config import RunConfig
from kvds.data.encoding import EncodedSample
from kvds.data.loader import BatchLoader
from kvds.distillation.module import DistillationModule
from kvds.distillation.step import LossWeights, StepInput
from kvds.distillation.step_input_builder import StepInputBuilder
from kvds.kv import KVShape, selected_count
from kvds.kv.families import backbone
from kvds.teacher.teacher import Teacher
from kvds.teacher.token_selection import TokenChoice
from kvds.training.input_feed import InputFeed, MicroBatch, micro_batches
from kvds.training.meters import PhaseTimer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS, ACCUMULATED = 4, 2
VOCABULARY = 512
# Long beside a forward pass of these models.
LATE = 100_000_000


def model(layers: int, width: int, seed: int, dropout: float) -> Any:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        attention_dropout=dropout, initializer_range=0.1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def loader(packed: bool) -> BatchLoader:
    draw = random.Random(0)
    rows = []
    for number in range(8 * STEPS * ACCUMULATED):
        length = draw.randrange(40, 100)
        ids = tuple(draw.randrange(VOCABULARY) for _ in range(length))
        rows.append(EncodedSample(ids, (1,) * 10 + (2,) * (length - 16) + (3,) * 6, number))
    return BatchLoader(
        rows, batch_size=8, gradient_accumulation_steps=ACCUMULATED, rank=0, world_size=1, seed=0, pad_token_id=0,
        position_count=lambda length: selected_count("random", 0.5, length), pack_to=256 if packed else None,
    )  # fmt: skip


def losses(
    device: torch.device, *, ahead: bool, packed: bool = False, teacher_first: Callable[[], None] = lambda: None,
    student_between: Callable[[], None] = lambda: None,
) -> list[float]:  # fmt: skip
    """Losses of each micro-batch, with what comes before the teacher's forward and between the student's and its KV
    loss.
    """
    cfg = RunConfig(
        output_dir="outputs/none", teacher_name="t", student_name="s", kv_method="random", kv_budget=0.5, kv_weight=1.0,
        logit_kd_weight=0.5, packing=packed, batch_size=8, gradient_accumulation_steps=ACCUMULATED,
        teacher_overlap=ahead,
    )  # fmt: skip
    student, whole = model(3, 64, 1, 0.1).to(device).train(), model(4, 128, 2, 0.0)
    choice = TokenChoice(cfg, cfg.seed)
    teacher = Teacher(whole, device=device, wants_hidden=True)
    shapes = (KVShape.from_config(config) for config in (student.config, whole.config))
    module = DistillationModule(student, build_aligner(*shapes, cfg).to(device), kd_vocab_size=VOCABULARY)
    backbone(student).register_forward_hook(lambda *_: student_between())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    make_input = StepInputBuilder(cfg, [teacher], choice, device)

    def make(micro: MicroBatch) -> StepInput:
        teacher_first()
        return make_input(micro.batch, step=micro.step)

    def pinned() -> Iterator[MicroBatch]:
        for micro in micro_batches(loader(packed).step, range(STEPS), seed=0, rank=0, world_size=1):
            batch = micro.batch.pin_memory() if device.type == "cuda" else micro.batch
            yield MicroBatch(micro.step, micro.seed, batch)

    timer = PhaseTimer(device)
    feed = InputFeed(pinned(), make, timer, device=device, ahead=ahead)
    found = []
    for _ in range(STEPS):
        for _ in range(ACCUMULATED):
            _, inputs = feed.take(LossWeights(1.0, 1.0, 0.5), watch=False)
            loss, _ = module(inputs)
            feed.make_next()
            loss.backward()
            found.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    phases = timer.read()
    assert phases.keys() == ({"teacher_ahead", "teacher_wait"} if ahead else {"teacher"})
    return [float(loss) for loss in found]


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sums in a fixed order; told only to warn, torch's attention would go on in any."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def late() -> None:
    torch.cuda._sleep(LATE)


LAGS: dict[str, dict[str, Callable[[], None]]] = {
    "no lag": {},
    "the teacher lags": {"teacher_first": late},
    # Packed rows ask the device for nothing on the way: the host is a micro-batch or two ahead of the losses.
    "the student lags": {"student_between": late},
}


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("lag", LAGS)
def test_losses_are_those_without_a_stream(lag: str, packed: bool) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    expected = losses(device, ahead=False, packed=packed)
    found = losses(device, ahead=True, packed=packed, **LAGS[lag])
    assert len(set(expected)) == STEPS * ACCUMULATED
    assert found == pytest.approx(expected, rel=1e-6)
