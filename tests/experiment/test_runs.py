"""Real runs of an experiment: the same numbers through the launcher and inside a worker, and nothing outlives them."""

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from transformers import AutoModelForCausalLM

from kvds.cli import main
from kvds.experiment.results import ResultStore
from tests.harness.ab_plans import REPOSITORY, write_plan


def numbers(row: dict) -> dict:
    """What training has made of a run, without what a clock or the allocator says."""
    return {key: item for key, item in row.items() if "seconds" not in key and not key.startswith("perf/")}


@pytest.mark.multiprocess
def test_launcher_and_worker_give_the_same_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    argv = ["ab", str(write_plan(tmp_path)), "--devices", "cpu", "--output"]
    assert main([*argv, str(tmp_path / "launched")]) == 0, capsys.readouterr()
    assert main([*argv, str(tmp_path / "inside"), "--in_process"]) == 0, capsys.readouterr()
    launched, inside = (ResultStore(tmp_path / name / "tiny").rows for name in ("launched", "inside"))
    assert [row["arm"] for row in launched] == ["task", "flat"]
    for one, other in zip(launched, inside, strict=True):
        assert numbers(one) == numbers(other) and one.keys() == other.keys()
        assert one["status"] == "finished" and len(one["curves"]["loss/task"][0]) == 2
        for row in (one, other):
            assert row["train_cpu_seconds"] > 0 and 0 < row["train_wall_seconds"] < row["wall_seconds"]
            assert row["perf/peak_memory_bytes"] > 2**20
        # The launcher's start is in the seconds of the job, not in those of training.
        assert one["train_cpu_seconds"] < 3 * other["train_cpu_seconds"] + 3
    assert launched[1]["parameters/aligner"] > 0 == launched[0]["parameters/aligner"]
    assert not list((tmp_path / "launched" / "tiny" / "runs").iterdir())


@pytest.mark.multiprocess
def test_a_run_on_two_ranks(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    path = write_plan(tmp_path, config="zero3_cpu", arms="task: {alignment_mode: flat, kv_weight: 1.0}")
    argv = ["ab", str(path), "--output", str(tmp_path), "--devices", "cpu", "--ranks", "2", "--keep", "all"]
    runs = tmp_path / "tiny" / "runs"
    assert main(argv) == 0, (runs / "report-task-seed3.log").read_text()[-2000:]
    [row] = ResultStore(tmp_path / "tiny").rows
    assert row["status"] == "finished" and row["final/cross_entropy"] > 0 and row["parameters/aligner"] > 0
    assert row["train_cpu_seconds"] > 0
    student = AutoModelForCausalLM.from_pretrained(runs / "report-task-seed3" / "student")
    assert row["parameters/student"] == student.num_parameters()
    shards = (runs / "report-task-seed3" / "checkpoints" / "step-000002").glob("*_optim_states.pt")
    assert len(list(shards)) == 2


class Running:
    """``kvds ab`` with one run of many steps, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        path = write_plan(folder, steps=100_000, arms="task: {alignment_mode: none}")
        command = [sys.executable, "-m", "kvds.cli", "ab", str(path), "--output", str(folder), "--devices", "cpu"]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True,
            # A shell's background jobs, and what they start, ignore Ctrl-C; this one is at a terminal.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        self.folder = folder / "tiny"
        self.seen: dict[int, psutil.Process] = {}

    def find(self, *words: str) -> psutil.Process:
        """Wait for the process below it whose command has all ``words``; remembers all that it saw."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self.seen[child.pid] = child
                with contextlib.suppress(psutil.Error):
                    if all(word in child.cmdline() for word in words):
                        return child
            time.sleep(0.1)
        raise AssertionError(f"no process {words}")

    def train(self) -> psutil.Process:
        """Wait until steps are logged, and return the rank."""
        rank = self.find("kvds.experiment.rank_process", "--local_rank=0", "-u", "--config")
        while not list(self.folder.glob("runs/*/metrics.jsonl")):
            assert self.process.poll() is None and rank.is_running()
            time.sleep(0.1)
        return self.find("kvds.experiment.rank_process", "--local_rank=0", "--config", "-m")

    def end(self, seconds: float) -> tuple[int, str]:
        """Exit status and error output; nothing that it started is left after so many seconds."""
        _, error = self.process.communicate(timeout=seconds)
        _, alive = psutil.wait_procs(list(self.seen.values()), timeout=seconds)
        assert [process for process in alive if process.status() != "zombie"] == []
        return self.process.returncode, error


@pytest.fixture
def running(tmp_path):
    found = Running(tmp_path)
    yield found
    for process in (*found.seen.values(), found.process):
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            process.kill()
    found.process.wait()


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("moment", "number", "status"),
    [
        ("launch", signal.SIGINT, 130),
        ("train", signal.SIGTERM, 143),
        ("train", signal.SIGKILL, -9),
    ],
)
def test_nothing_outlives_an_experiment_that_is_stopped(running, moment, number, status):
    if moment == "launch":
        running.find("deepspeed.launcher.runner")
    else:
        running.train()
        # Worker, both launchers, rank; what libraries start and wait for on the way is over.
        assert len([child for child in running.seen.values() if child.is_running()]) == 4
    running.process.send_signal(number)
    code, error = running.end(20)
    assert code == status and "Traceback" not in error
    assert number == signal.SIGKILL or "what has finished is kept" in error
    assert ResultStore(running.folder).rows == []


@pytest.mark.multiprocess
def test_a_run_that_is_asked_to_stop_is_left_for_the_next_time(running):
    running.train().send_signal(signal.SIGUSR1)
    code, error = running.end(60)
    assert code == 1 and "stopped early" in error and ResultStore(running.folder).rows == []


@pytest.mark.multiprocess
def test_a_launcher_that_is_killed_is_a_failed_run_and_takes_its_ranks_along(running):
    running.train()
    running.find("deepspeed.launcher.runner").kill()
    code, error = running.end(60)
    [row] = ResultStore(running.folder).rows
    log = running.folder / "runs" / "report-task-seed3.log"
    assert code == 1 and row["status"] == "failed" and log.is_file()
    assert row["error"].startswith(f"RunError: the launcher ended with status -9 (see {log})") and row["error"] in error
