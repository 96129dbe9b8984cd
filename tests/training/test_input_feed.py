"""A teacher that runs one micro-batch ahead changes no number of a run, and no run rests on what was made ahead."""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kvds.distillation.step import LossWeights, StepInput
from kvds.distributed.preemption import EXIT_CODE
from kvds.kv import KVStates
from kvds.teacher.teacher import TeacherOutput
from kvds.training.input_feed import InputFeed, MicroBatch, micro_batches
from kvds.training.meters import PhaseTimer
from tests.harness.survival_runs import at_step, check_equal, cut, make_models, records, starter

CPU = torch.device("cpu")
KV = LossWeights(kv=2.0)


class Recorded:
    """Two steps of two micro-batches, and what happens in which order; teacher, forward and backward draw numbers."""

    def __init__(self, ahead: bool, device: torch.device = CPU) -> None:
        self.events: list[str] = []
        self.drawn: dict[str, float] = {}
        self.timer = PhaseTimer(CPU)
        batches_of: Any = self._rows
        batches = micro_batches(batches_of, range(3, 5), seed=1, rank=0, world_size=1)
        self.feed = InputFeed(batches, self._make, self.timer, device=device, ahead=ahead)

    def _rows(self, step: int) -> list[str]:
        self.events.append(f"rows {step}")
        return [f"{step}.0", f"{step}.1"]

    def _note(self, event: str) -> None:
        self.events.append(event)
        self.drawn[event] = float(torch.rand(()))

    def _make(self, micro: MicroBatch) -> StepInput:
        self._note(f"teacher {micro.batch}")
        batch: Any = micro.batch
        return StepInput(batch, None, None, None, None, LossWeights())  # type: ignore[arg-type]

    def train(self) -> list[str]:
        for _ in range(4):
            micro, inputs = self.feed.take(KV, watch=True)
            assert inputs.batch is micro.batch and inputs.weights is KV and inputs.watch
            self._note(f"forward {micro.batch}")
            self.feed.make_next()
            self.events.append(f"backward {micro.batch}")
        return self.events


def test_the_next_teacher_runs_before_the_present_backward_pass() -> None:
    plain, ahead = Recorded(False), Recorded(True)
    assert plain.train() == [
        "rows 3", "teacher 3.0", "forward 3.0", "backward 3.0", "teacher 3.1", "forward 3.1", "backward 3.1",
        "rows 4", "teacher 4.0", "forward 4.0", "backward 4.0", "teacher 4.1", "forward 4.1", "backward 4.1",
    ]  # fmt: skip
    assert ahead.train() == [
        "rows 3", "teacher 3.0", "forward 3.0", "teacher 3.1", "backward 3.0", "forward 3.1", "rows 4", "teacher 4.0",
        "backward 3.1", "forward 4.0", "teacher 4.1", "backward 4.0", "forward 4.1", "backward 4.1",
    ]  # fmt: skip
    # Neither teacher nor student notices in what it draws.
    assert plain.drawn == ahead.drawn and len(set(plain.drawn.values())) == 4
    assert plain.timer.read().keys() == {"teacher"} and ahead.timer.read().keys() == {"teacher_ahead", "teacher_wait"}


def test_two_outputs_of_the_teacher_are_there_at_a_time() -> None:
    recorded, made = Recorded(True), []
    make = recorded.feed._make

    def watched(micro: MicroBatch) -> StepInput:
        states = KVStates((torch.zeros(1, 1, 2, 2),), (torch.zeros(1, 1, 2, 2),))
        made.append(weakref.ref(states.keys[0]))
        return replace(make(micro), teacher=TeacherOutput(states, None))

    recorded.feed._make = watched  # type: ignore[method-assign]
    left = []
    for _ in range(4):
        _, inputs = recorded.feed.take(KV, watch=False)
        recorded.feed.make_next()
        left.append(sum(reference() is not None for reference in made))
    assert left == [2, 2, 2, 1] and inputs.teacher is not None


def test_streams_wait_for_what_they_read_and_for_room_and_for_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Stream:
        def __init__(self, name: object) -> None:
            self.name = name if isinstance(name, str) else "side"
            self.marks = 0

        def wait_stream(self, other: Stream) -> None:
            events.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event: str) -> None:
            events.append(f"{self.name} waits for {event}")

        def record_event(self) -> str:
            self.marks += 1
            return f"{self.name} mark {self.marks}"

    main = Stream("main")

    @contextlib.contextmanager
    def use(stream: Stream) -> Iterator[None]:
        events.append(f"on {stream.name}")
        yield
        events.append("on main")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", use)
    recorded = Recorded(True, torch.device("cuda"))
    recorded.events = events
    recorded.train()
    assert events[:14] == [
        "side waits for main",  # the teacher's weights
        "rows 3", "on side", "teacher 3.0", "on main", "main waits for side", "forward 3.0",
        # Memory of the micro-batch before this one is free where the main stream was when this one was taken.
        "side waits for main mark 1", "on side", "teacher 3.1", "on main", "backward 3.0",
        "main waits for side", "forward 3.1",
    ]  # fmt: skip
    assert [event for event in events if "mark" in event] == [f"side waits for main mark {n}" for n in (1, 2, 3)]


# -- whole runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ahead")
    make_models(folder)
    return folder


@pytest.fixture(scope="module")
def start(rank_server: Any, folder: Path) -> Any:
    return starter(rank_server, folder)


HELD = {"kv_weight": "hold:0.5", "kv_weight_schedule": "constant"}
# Students with dropout, two micro-batches per step, a calibrated map and weight, an epoch that ends within a step.
KINDS: dict[str, dict[str, object]] = {
    "random": {
        "kv_method": "random", "kv_budget": 0.5, "gradient_checkpointing": True, "eval_steps": 2,
        "eval_subset_size": 3, "max_new_tokens": 2,
    },
    "rkv": {"kv_method": "rkv", "kv_budget": 0.5, "token_weights": "attention", **HELD},
    "shuffled": {"teacher_kv": "shuffled", "ranks": 2, "gradient_accumulation_steps": 1},
    "logits and packing": {"logit_kd_weight": 0.5, "packing": True},
    "one row": {
        "tokens_per_batch": 64, "kv_method": "random", "kv_budget": 0.5, "logit_kd_weight": 0.5,
        "token_weights": "attention",
    },
    "logits alone": {"logit_kd_weight": 0.5, "alignment_mode": "none"},
    "steps": {"align_tokens": "segment", "map_start": "pca"},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_ends_in_the_same_bits(kind: str, start: Any, folder: Path) -> None:
    settings = {"max_steps": 6, **KINDS[kind]}
    for name, changes in ((kind, {}), (f"{kind} ahead", {"teacher_overlap": True})):
        codes, log = start(name, **settings, **changes)
        assert set(codes) == {0}, log[-3000:]
    if settings.get("alignment_mode") == "none":
        students = [load_file(folder / name / "student/model.safetensors") for name in (kind, f"{kind} ahead")]
        assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])
        assert records(folder / kind) == records(folder / f"{kind} ahead")
    else:
        check_equal(folder / kind, folder / f"{kind} ahead")
    lines = [json.loads(line) for line in (folder / f"{kind} ahead/metrics.jsonl").read_text().splitlines()]
    phases = {key for line in lines for key in line if key.startswith("perf/seconds_teacher")}
    assert phases == {"perf/seconds_teacher_ahead", "perf/seconds_teacher_wait"}


@pytest.mark.parametrize(
    ("kind", "then"), [("random", True), ("random", False), ("one row", True)],
    ids=["on with it", "on without it", "one row"],
)  # fmt: skip
def test_what_was_made_ahead_is_dropped_by_a_stop(kind: str, then: bool, start: Any, folder: Path) -> None:
    settings = {**KINDS[kind], "max_steps": 6}
    if not (folder / kind).exists():
        assert start(kind, **settings)[0] == [0]
    name = f"{kind} stopped {then}"
    # Asked to stop while the rows of step 4 are made ready: those are ahead of the step that is being taken.
    codes, log = start(name, setup=at_step(4, "os.kill(os.getpid(), signal.SIGUSR1)"), **settings, teacher_overlap=True)
    assert codes == [EXIT_CODE], log[-3000:]
    assert (folder / name / "checkpoints/latest").read_text() == "step-000004"
    codes, log = start(name, **settings, teacher_overlap=then)
    assert codes == [0] and "resumed from step 4 of 6" in log, log[-3000:]
    check_equal(folder / kind, folder / name)
    cut(folder / name, folder / f"{name} cut", 3)
    codes, log = start(f"{name} cut", **settings, teacher_overlap=not then)
    assert codes == [0] and "resumed from step 3 of 6" in log, log[-3000:]
    check_equal(folder / kind, folder / f"{name} cut")


def test_without_a_teacher_there_is_nothing_to_run_ahead(start: Any, folder: Path) -> None:
    codes, log = start("none", alignment_mode="none", teacher_overlap=True, max_steps=2, save_steps=0)
    assert codes == [0], log[-3000:]
    [record] = [json.loads(line) for line in (folder / "none/metrics.jsonl").read_text().splitlines()][-1:]
    assert "perf/seconds_teacher" in record and "perf/seconds_teacher_ahead" not in record
