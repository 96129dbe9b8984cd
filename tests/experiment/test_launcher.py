"""Runs of an experiment through the launcher: on which GPUs, what is checked before, how a failure is told."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvds.cli import main
from kvds.distributed.preemption import Preempted
from kvds.distributed.rank_environment import quiet_port
from kvds.errors import InputError, RunError
from kvds.experiment import launcher
from kvds.experiment.launcher import failure_text, launcher_command, launcher_environment
from kvds.experiment.worker_process import train_job
from kvds.experiment.workers import device_groups, worker_environment
from tests.harness.ab_plans import write_plan

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


# A rank that only says where it is, in a file of its own: two at once would write into each other's lines.
PLACE = """
import os, pathlib
place = " ".join(os.environ[name] for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "WORLD_SIZE"))
pathlib.Path(__file__).with_name("place-" + os.environ["RANK"]).write_text(place)
"""
# DeepSpeed's launcher on a machine that seems to have four GPUs.
FOUR_GPUS = """
import sys
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.launcher import runner
CPU_Accelerator.device_count = lambda self: 4
runner.main(sys.argv[1:])
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize(("group", "places"), [("3", ["3 0 1"]), ("1,3", ["1,3 0 2", "1,3 1 2"])])
def test_deepspeed_takes_them_at_their_word(monkeypatch, tmp_path, group, places):
    (tmp_path / "place.py").write_text(PLACE)
    monkeypatch.setattr(launcher, "RANK_MODULE", "place")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    environment = worker_environment(0, [group])
    command = launcher_command(Path("run.yaml"), len(places), 12345, environment)
    done = subprocess.run(
        [sys.executable, "-c", FOUR_GPUS, *command[3:]], capture_output=True, text=True, timeout=120,
        env={**launcher_environment(environment), "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert [path.read_text() for path in sorted(tmp_path.glob("place-*"))] == places


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
