"""``kvds quickstart``: the three runs it starts, and what becomes of one that fails."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from kvds.cli import main
from kvds.commands import quickstart
from kvds.config.recipe import parse_run_config


def settings_of(command: list[str], tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return parse_run_config(command[command.index("distill") + 1 :])


@pytest.mark.parametrize(("gpus", "ranks", "file"), [(0, 2, "zero3_cpu"), (1, 1, "zero3_fp32"), (8, 2, "zero3_fp32")])
def test_an_arm_is_a_run_of_16_rows_a_step_from_any_folder(tmp_path, monkeypatch, gpus, ranks, file):
    command = quickstart.arm_command("flat", tmp_path / "out", gpus)
    assert command[command.index("--num_accelerators") + 1] == str(ranks)
    cfg = settings_of(command, tmp_path, monkeypatch)
    assert (cfg.alignment_mode, cfg.batch_size * ranks, cfg.deepspeed_config) == ("flat", 16, file)
    assert cfg.synthetic_problems == 1000 and cfg.output_dir == str(tmp_path / "out/flat")


@pytest.fixture
def launched(monkeypatch):
    """The runs as they would be started: each leaves one record, and the second ends with the status given."""
    calls: list[dict] = []

    def stand_in(status: int = 0):
        def run(command, env):
            output = Path(command[command.index("--output_dir") + 1])
            output.mkdir(parents=True)
            (output / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss/task": 1.0}) + "\n")
            calls.append({"command": command, "env": env})
            return status if len(calls) == 2 else 0

        monkeypatch.setattr(quickstart, "_ended", run)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        return calls

    return stand_in


def test_three_runs_and_their_report(launched, tmp_path, capsys):
    calls = launched()
    assert main(["quickstart", str(tmp_path / "out")]) == 0
    modes = [call["command"][call["command"].index("--alignment_mode") + 1] for call in calls]
    assert modes == ["none", "flat", "structured"] and calls[0]["command"][0] == sys.executable
    assert {call["env"]["DS_ACCELERATOR"] for call in calls} == {"cpu"}
    printed = capsys.readouterr().out
    assert "== structured ==" in printed and "| task_only " in printed and "mlflow ui --backend-store-uri" in printed
    assert (tmp_path / "out/loss_curves.png").is_file() and (tmp_path / "out/report.md").is_file()


def test_the_first_run_that_fails_ends_it(launched, tmp_path, capsys):
    calls = launched(status=3)
    assert main(["quickstart", str(tmp_path / "out")]) == 1
    assert len(calls) == 2 and "kvds: error: flat: its launcher ended with status 3" in capsys.readouterr().err


def test_who_ends_it_ends_the_ranks_too(tmp_path):
    """The launcher's own children are in its group: none is left when SIGTERM has ended the quickstart."""
    rank = "import pathlib, time; pathlib.Path('rank').touch(); time.sleep(600)"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    code = (
        "import os, sys; from kvds.commands.quickstart import _ended\n"
        f"_ended([sys.executable, '-c', {launcher!r}], dict(os.environ))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "KVDS_MARK": str(tmp_path)}
    )
    try:
        wait_until(lambda: (tmp_path / "rank").exists() or process.poll() is not None)
        assert len(marked(tmp_path)) == 3
        process.terminate()
        assert process.wait(120) == 128 + signal.SIGTERM
        wait_until(lambda: not marked(tmp_path))
        assert not marked(tmp_path)
    finally:
        for number in marked(tmp_path):
            os.kill(number, signal.SIGKILL)


def wait_until(holds, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)


def marked(folder: Path) -> list[int]:
    """Processes that run with the mark of a test, zombies not counted."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("KVDS_MARK") == str(folder):
                found.append(process.pid)
    return found
