"""A teacher on disk before a GPU: the states of a CPU, no wait for the device, no memory written over too early.

python -m pytest tests/teacher/test_stored_batches_gpu.py -m gpu
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvds.config import RunConfig
from kvds.distillation.step import LossWeights, StepInput
from kvds.distillation.step_input_builder import StepInputBuilder
from kvds.teacher.cached import CachedTeacher
from kvds.teacher.token_selection import TokenChoice
from kvds.training.input_feed import InputFeed, MicroBatch, make_ready
from kvds.training.meters import PhaseTimer
from tests.teacher.test_stored_batches import alone, batches, chosen, write

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CPU, MADE_OF = torch.device("cpu"), {"parts": "keys values"}
# Long beside all that a host does for one of these micro-batches.
LATE = 100_000_000


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def unwaiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", ["full", "right_crop"])
@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "on a stream of its own"])
def test_states_are_those_of_a_cpu_and_nothing_waits(
    tmp_path: Path, device: torch.device, unwaiting: None, method: str, ahead: bool
) -> None:
    budget = None if method == "full" else 3
    write(tmp_path / "cache", "bf16", method, budget)
    stored, expected = (
        CachedTeacher(tmp_path / "cache", dtype=torch.bfloat16, device=where, fingerprint=MADE_OF)
        for where in (device, CPU)
    )
    cfg = RunConfig(
        output_dir="outputs/none", teacher_name="t", student_name="s", kv_method=method, kv_budget=budget,
        kv_weight=1.0, kv_parts="kv",
    )  # fmt: skip
    make = StepInputBuilder(cfg, [stored], TokenChoice(cfg, cfg.seed), device)
    own = [batches()[name] for name in ("padded", "packed", "one row, wide", "one row")]

    def micro() -> Iterator[MicroBatch]:
        for batch in make_ready(own, [stored], device):
            yield MicroBatch(0, 0, batch)

    def built(given: MicroBatch) -> StepInput:
        torch.cuda._sleep(LATE // 10)
        return make(given.batch, step=given.step)

    feed, found = InputFeed(micro(), built, PhaseTimer(device), device=device, ahead=ahead), []
    for _ in own:
        _, inputs = feed.take(LossWeights(1.0, 1.0), watch=False)
        assert inputs.teacher is not None and inputs.teacher.states is not None
        found.append([layer + 0 for part in inputs.teacher.states for layer in part])  # as a student would read them
        feed.make_next()
    torch.cuda.set_sync_debug_mode("default")
    for batch, layers in zip(own, found, strict=True):
        selection = chosen(batch, method, budget)
        states = expected(batch, selection).states
        assert states is not None
        counts = torch.ones(()) if selection.index is None else selection.mask[:, None, :, None]
        for layer, wanted in zip(layers, [*states.keys, *states.values], strict=True):
            assert torch.equal(layer.cpu() * counts, wanted * counts)


def test_host_memory_is_not_written_over_before_it_has_been_copied(tmp_path: Path, device: torch.device) -> None:
    write(tmp_path / "cache", "bf16", "full", None)
    stored = CachedTeacher(tmp_path / "cache", dtype=torch.bfloat16, device=device, fingerprint=MADE_OF)
    expected = CachedTeacher(tmp_path / "cache", dtype=torch.bfloat16, device=CPU, fingerprint=MADE_OF)
    order = [0, 1, 2, 3, 4, 5] * 4
    side, found = torch.cuda.Stream(device), []
    with torch.cuda.stream(side):
        torch.cuda._sleep(LATE)  # every copy stands behind this one, while the thread reads on
        for number in order:
            stored.read_ahead(alone(number))
        for number in order:
            found.append(stored(alone(number)).states)
    torch.cuda.synchronize()
    for number, states in zip(order, found, strict=True):
        wanted = expected(alone(number)).states
        assert states is not None and wanted is not None
        for layer, other in zip([*states.keys, *states.values], [*wanted.keys, *wanted.values], strict=True):
            assert torch.equal(layer.cpu(), other)
