"""What is logged per interval: means over micro-batches and ranks, real tokens per second, the slowest rank's time."""

import threading
from types import SimpleNamespace

import pytest
import torch

import kvds.training.meters
from kvds.training.meters import IntervalMeter, PhaseTimer, memory_bytes

CPU = torch.device("cpu")


class TwoRanks:
    """Collectives between two threads, each of which is a rank."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=30)
        self._thread = threading.local()
        self._given: list[object] = [None, None]

    def exchange(self, value: object) -> list[object]:
        self._given[self._thread.rank] = value
        self._barrier.wait()
        values = list(self._given)
        self._barrier.wait()
        return values

    def all_reduce_sum(self, tensor: torch.Tensor) -> None:
        tensor.copy_(torch.stack(self.exchange(tensor.clone())).sum(0))

    def all_reduce_max(self, tensor: torch.Tensor) -> None:
        tensor.copy_(torch.stack(self.exchange(tensor.clone())).amax(0))

    def all_gather_object(self, gathered: list, value: object) -> None:
        gathered[:] = self.exchange(value)

    def run(self, *ranks) -> list:
        results: list = [None, None]

        def work(number: int) -> None:
            self._thread.rank = number  # a thread's identifier may come again, or not, in the next two threads
            results[number] = ranks[number]()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.fixture
def two_ranks(monkeypatch) -> TwoRanks:
    ranks = TwoRanks()
    for name in ("all_reduce_sum", "all_reduce_max"):
        monkeypatch.setattr(kvds.training.meters, name, getattr(ranks, name))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", ranks.all_gather_object)
    return ranks


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(kvds.training.meters.time, "perf_counter", lambda: clock.now)
    return clock


def test_an_interval_is_the_mean_over_micro_batches_and_ranks(two_ranks, clock, monkeypatch):
    memory = {0: (500, 90), 1: (400, 300)}
    meters = [IntervalMeter(CPU), IntervalMeter(CPU)]
    meters[0].update({"loss/task": torch.tensor(1.0), "kv/norm_keys": torch.tensor(5.0)}, tokens=70)
    meters[0].update({"loss/task": torch.tensor(2.0)}, tokens=30)
    meters[1].update({"loss/task": torch.tensor(3.0)}, tokens=50)  # this rank's watched micro-batch was padding alone
    meters[1].update({"loss/task": torch.tensor(6.0)}, tokens=0)
    clock.now += 4.0
    local = threading.local()
    monkeypatch.setattr(kvds.training.meters, "memory_bytes", lambda device: memory[local.rank])

    def rank(number: int, phases: dict[str, float]):
        def read() -> dict[str, float]:
            local.rank = number
            return meters[number].read(phases)

        return read

    read = two_ranks.run(rank(0, {"teacher": 0.5, "forward": 2.0}), rank(1, {"teacher": 0.75, "forward": 1.0}))
    assert (
        read[0]
        == read[1]
        == {
            "loss/task": pytest.approx(3.0),
            "kv/norm_keys": pytest.approx(5.0),
            "perf/tokens_per_second": pytest.approx(150 / 4.0),
            "perf/peak_memory_bytes": 500,
            "perf/memory_bytes": 300,
            "perf/seconds_teacher": 0.75,
            "perf/seconds_forward": 2.0,
        }
    )
    # A new interval: nothing of the last is left, and time counts from the reading on.
    for meter in meters:
        meter.update({"loss/task": torch.tensor(0.5)}, tokens=5)
    clock.now += 1.0
    again = two_ranks.run(rank(0, {}), rank(1, {}))[0]
    assert again["loss/task"] == 0.5 and again["perf/tokens_per_second"] == 10.0 and "kv/norm_keys" not in again


def test_time_outside_training_is_not_counted(two_ranks, clock):
    meters = [IntervalMeter(CPU), IntervalMeter(CPU)]
    clock.now += 60.0  # an evaluation
    for meter in meters:
        meter.restart()
        meter.update({}, tokens=8)
    clock.now += 2.0
    assert two_ranks.run(*(lambda m=m: m.read({}) for m in meters))[0]["perf/tokens_per_second"] == 8.0


def test_phases_add_up_and_are_forgotten_once_read(clock):
    timer = PhaseTimer(CPU)
    for seconds in (1.0, 2.0):
        with timer.phase("teacher"):
            clock.now += seconds
        with timer.phase("forward"):
            clock.now += 10 * seconds
    assert timer.read() == {"teacher": 3.0, "forward": 30.0}
    assert timer.read() == {}


def test_peak_memory_sees_what_was_freed():
    before = memory_bytes(CPU)[1]
    block = torch.ones(64 * 2**20 // 4)
    held = memory_bytes(CPU)[1]
    del block
    peak, current = memory_bytes(CPU)
    slack = 2**21  # the kernel counts pages per thread and adds them up late
    assert held >= before + 62 * 2**20 and peak >= held - slack > current
