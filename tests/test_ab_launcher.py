"""Runs of an experiment through the launcher: on which GPUs, with which numbers, and that nothing outlives them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from kvds.cli import main
from kvds.commands.ab_worker import train_job
from kvds.errors import InputError, RunError
from kvds.experiment import launcher
from kvds.experiment.launcher import failure_text, launcher_command, launcher_environment
from kvds.experiment.results import ResultStore
from kvds.experiment.workers import device_groups, worker_environment
from kvds.preemption import Preempted
from kvds.rank_environment import quiet_port

REPOSITORY = Path(__file__).resolve().parent.parent
PLAN = f"""
base: {REPOSITORY}/launch/recipes/quickstart.yaml
settings: {{batch_size: 2, max_steps: STEPS, eval_steps: 2, logging_steps: 1, eval_subset_size: 4, max_new_tokens: 2,
           synthetic_problems: 16, calibration_batches: 1, deepspeed_config: ds_configs/CONFIG.json}}
primary: final/cross_entropy
better: lower
seeds: [3]
baseline: task
arms: {{ARMS}}
"""
ARMS = "task: {alignment_mode: none}, flat: {alignment_mode: flat, kv_weight: 1.0}"


def write_plan(folder: Path, *, steps: int = 2, config: str = "zero0_fp32", arms: str = ARMS) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(PLAN.replace("STEPS", str(steps)).replace("CONFIG", config).replace("ARMS", arms))
    return path


# -- which GPUs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "ranks", "groups"),
    [
        ("0,1,3", 1, ["0", "1", "3"]),
        ("cpu", 1, ["cpu"]),
        ("cpu", 4, ["cpu"]),
        ("0,cpu", 1, ["0", "cpu"]),
        ("0,1,2,3", 2, ["0,1", "2,3"]),
        ("2, 5", 2, ["2,5"]),
    ],
)
def test_devices_are_dealt_out_in_groups_of_ranks(devices, ranks, groups):
    assert device_groups(devices.split(","), ranks) == groups


@pytest.mark.parametrize(
    ("devices", "ranks", "message"),
    [
        ("0,1,2", 2, "--devices 0,1,2 --ranks 2: expected 2 GPUs, or a multiple of it (or cpu alone)"),
        ("3", 2, "--devices 3 --ranks 2: expected 2 GPUs"),
        ("0,cpu", 2, "--devices 0,cpu --ranks 2: expected 2 GPUs"),
        ("1,1", 2, "--devices 1,1: expected 2 different GPUs for a run of --ranks 2"),
        ("GPU-5e", 1, "--devices GPU-5e: GPU-5e is no number; expected GPUs such as 0,1"),
        ("0,,1", 1, "--devices 0,,1: an empty name; expected such as 0,1 or cpu"),
    ],
)
def test_devices_that_cannot_be_dealt_out_are_refused(devices, ranks, message, tmp_path, capsys):
    argv = ["ab", str(write_plan(tmp_path)), "--output", str(tmp_path / "out"), "--devices", devices]
    assert main([*argv, "--ranks", str(ranks)]) == 2
    assert f"kvds: error: {message}" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.log"))


def test_workers_without_a_launcher_take_any_device_and_one_rank(tmp_path, capsys):
    assert device_groups(["GPU-5e", "MIG-1"], 1, in_process=True) == ["GPU-5e", "MIG-1"]
    argv = ["ab", str(write_plan(tmp_path)), "--output", str(tmp_path / "out"), "--in_process", "--ranks", "2"]
    assert main(argv) == 2
    assert "kvds: error: --in_process --ranks 2: expected one rank (or no --in_process)" in capsys.readouterr().err


def where(monkeypatch, number: int, groups: list[str], ranks: int, **variables: str) -> tuple[list[str], dict]:
    """What tells the launcher of a worker where to start, and the environment that it is started in."""
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    for name, item in variables.items():
        monkeypatch.setenv(name, item)
    environment = worker_environment(number, groups)
    command = launcher_command(Path("run.yaml"), ranks, 12345, environment)
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert command[7:] == ["--master_port", "12345", "--module", launcher.RANK_MODULE, "--config", "run.yaml"]
    return command[3:7], launcher_environment(environment)


def test_the_launcher_starts_on_the_gpus_of_its_worker(monkeypatch):
    # The launcher counts the GPUs that it sees, refuses numbers beyond, and hands ranks those that it was given.
    flags, environment = where(monkeypatch, 1, ["0", "3"], 1)
    assert flags == ["--hostfile", os.devnull, "--include", "localhost:3"]
    assert "CUDA_VISIBLE_DEVICES" not in environment
    assert where(monkeypatch, 1, ["0,1", "2,3"], 2)[0][3] == "localhost:2,3"
    # No --devices: those that the caller may see, else the first of the machine.
    flags, environment = where(monkeypatch, 0, [], 2, CUDA_VISIBLE_DEVICES="4,6,7")
    assert flags[2:] == ["--include", "localhost:4,6"] and "CUDA_VISIBLE_DEVICES" not in environment
    assert where(monkeypatch, 0, [], 2)[0][2:] == ["--num_accelerators", "2"]


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_hidden_gpus_stay_hidden(monkeypatch, hidden):
    flags, environment = where(monkeypatch, 0, [], 1, CUDA_VISIBLE_DEVICES=hidden)
    assert flags[2:] == ["--num_accelerators", "1"] and environment["CUDA_VISIBLE_DEVICES"] == ""


def test_a_worker_on_the_cpu_keeps_its_ranks_there(monkeypatch):
    flags, environment = where(monkeypatch, 5, ["cpu"], 2, CUDA_VISIBLE_DEVICES="0,1")
    assert flags[2:] == ["--num_accelerators", "2"]
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["DS_ACCELERATOR"]) == ("", "cpu")
    # The launcher writes rank numbers into the variable all the same: the rank empties it before torch is imported.
    done = subprocess.run(
        [sys.executable, "-c", "import os, runpy, sys\nsys.argv = ['rank', '--help']\n"
         f"try: runpy.run_module('{launcher.RANK_MODULE}', run_name='__main__')\n"
         "except SystemExit: print('visible', repr(os.environ['CUDA_VISIBLE_DEVICES']), 'torch' in sys.modules)"],
        capture_output=True, text=True, env={**environment, "CUDA_VISIBLE_DEVICES": "0"}, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "visible '' False"


def test_the_environment_s_gpus_are_checked_before_a_worker_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-7")
    assert main(["ab", str(write_plan(tmp_path)), "--output", str(tmp_path / "out")]) == 2
    assert "kvds: error: CUDA_VISIBLE_DEVICES is MIG-7: MIG-7 is no number" in capsys.readouterr().err


# -- how it ends -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch, tmp_path) -> Callable[[str], dict]:
    """Settings of a run whose launcher is the given script instead."""

    def settings(script: str, **changes: object) -> dict:
        file = tmp_path / "launcher.py"
        file.write_text(f"import pathlib, sys\ncount = pathlib.Path({str(tmp_path / 'starts')!r})\n"
                        "with count.open('a') as starts: starts.write('.')\n" + script)  # fmt: skip
        monkeypatch.setattr(launcher, "launcher_command", lambda *_: [sys.executable, str(file)])
        return {
            "output_dir": str(tmp_path / "v1.5-seed0"), "model_name": "gpt2", "datasets": ["synthetic"],
            "deepspeed_config": "ds_configs/zero0_fp32.json", **changes,
        }  # fmt: skip

    return settings


def starts(folder: Path) -> int:
    return len((folder / "starts").read_text()) if (folder / "starts").exists() else 0


def test_a_launcher_that_fails_names_its_log_and_the_reason(fake, tmp_path):
    with pytest.raises(RunError) as error:
        train_job(fake("print('[rank1]: torch.OutOfMemoryError: CUDA out of memory.')\nsys.exit(7)"), 2)
    log = tmp_path / "v1.5-seed0.log"
    told = f"the launcher ended with status 7 (see {log}): torch.OutOfMemoryError: CUDA out of memory."
    assert str(error.value) == told and "OutOfMemoryError" in log.read_text()
    assert not (tmp_path / "v1.5-seed0.yaml").exists()
    with pytest.raises(InputError, match=r"status 2 \(see .*log\): lr=0: expected more$"):
        train_job(fake("print('kvds: error: lr=0: expected more')\nsys.exit(2)"), 1)
    with pytest.raises(Preempted):
        train_job(fake("sys.exit(85)"), 1)


def test_a_port_that_was_taken_is_exchanged(fake, tmp_path):
    script = "print('The server socket has failed to listen: EADDRINUSE')\nsys.exit(len(count.read_text()) < {})"
    with contextlib.suppress(FileNotFoundError):  # of what a real rank would have left
        train_job(fake(script.format(2)), 2)
    assert starts(tmp_path) == 2
    with pytest.raises(RunError, match="status 1"):
        train_job(fake(script.format(99)), 2)
    assert starts(tmp_path) == 5
    with pytest.raises(RunError, match="status 1"):
        train_job(fake("sys.exit(1)"), 2)
    assert starts(tmp_path) == 6
    assert all(12000 <= quiet_port() < 32000 for _ in range(20))


def test_settings_are_checked_before_a_launcher_is_started(fake, tmp_path):
    with pytest.raises(InputError, match="deepspeed_config=no.json"):
        train_job(fake("", deepspeed_config="no.json"), 1)
    with pytest.raises(InputError, match="lr=-1"):
        train_job(fake("", lr=-1.0), 1)
    assert starts(tmp_path) == 0


def test_what_ranks_say_last_is_the_reason():
    assert failure_text("a\nValueError: x\nkvds: error: y: z\nmore\n") == ": y: z"
    assert failure_text("Traceback\n  File\n[rank0]: a.b.OddError: one\n[2026] [ERROR] exits with return code = 1") == (
        ": a.b.OddError: one"
    )
    assert failure_text("nothing\n") == ""


# -- for real ----------------------------------------------------------------------------------------------------------


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
    shards = (runs / "report-task-seed3" / "checkpoints" / "step-000002").glob("*_optim_states.pt")
    assert len(list(shards)) == 2


class Running:
    """``kvds ab`` with one run of many steps, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        path = write_plan(folder, steps=100_000, arms="task: {alignment_mode: none}")
        command = [sys.executable, "-m", "kvds.cli", "ab", str(path), "--output", str(folder), "--devices", "cpu"]
        self.process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
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
        rank = self.find("kvds.commands.ab_rank", "--local_rank=0", "-u", "--config")
        while not list(self.folder.glob("runs/*/metrics.jsonl")):
            assert self.process.poll() is None and rank.is_running()
            time.sleep(0.1)
        return self.find("kvds.commands.ab_rank", "--local_rank=0", "--config", "-m")

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
        assert len(running.seen) == 4  # worker, both launchers, rank
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
