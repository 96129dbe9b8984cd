"""Signals to any process of a launcher's tree end all ranks in the same step, and leave none behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
RANKS = ["tests/harness/stop_ranks.py"]
PORT = str(20000 + os.getpid() % 20000)
LAUNCHERS = {
    "deepspeed": ["bash", "-c", "trap '' USR1; exec \"$@\"", "bash", str(BIN / "deepspeed"), "--num_accelerators", "2",
                  "--master_port", PORT],
    "torchrun": [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", PORT],
    "srun": [],
}  # fmt: skip
# Launcher, which process gets which signal, the launcher's exit code. The ranks' own is 85 each time; torchrun has one
# code for any failure, and deepspeed's outer process says 0 where a signal has ended the inner one (None: not asked).
CASES = [
    ("deepspeed", "rank 1", signal.SIGUSR1, 85),
    ("deepspeed", "launcher", signal.SIGTERM, -signal.SIGTERM),
    ("deepspeed", "inner launcher", signal.SIGKILL, None),
    ("torchrun", "rank 0", signal.SIGUSR1, 1),
    ("torchrun", "launcher", signal.SIGKILL, -signal.SIGKILL),
    ("srun", "rank 1", signal.SIGTERM, 85),
]


def launch(launcher: str, folder: Path) -> list[subprocess.Popen]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:{os.environ['PATH']}"}

    def start(command: list[str], **variables: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*command, *RANKS, str(folder)], cwd=REPOSITORY, env={**environment, **variables},
            stdout=(folder / "out").open("a"), stderr=subprocess.STDOUT,
        )  # fmt: skip

    if launcher != "srun":
        return [start(LAUNCHERS[launcher])]
    ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT}
    return [start([sys.executable], RANK=str(rank), LOCAL_RANK=str(rank), **ranks) for rank in range(2)]


def wait_for(folder: Path, name: str, seconds: float = 120.0) -> list[str]:
    deadline = time.monotonic() + seconds
    while True:
        found = [path.read_text() for path in sorted(folder.glob(f"{name}-*"))]
        if len(found) == 2 and all(found):
            return found
        assert time.monotonic() < deadline, f"{name} of two ranks: {found}; {(folder / 'out').read_text()[-2000:]}"
        time.sleep(0.1)


@pytest.mark.multiprocess
@pytest.mark.parametrize(("launcher", "target", "number", "code"), CASES)
def test_a_signal_anywhere_stops_all_ranks_together(launcher, target, number, code, tmp_path):
    processes = launch(launcher, tmp_path)
    try:
        ranks = [psutil.Process(int(pid)) for pid in wait_for(tmp_path, "pid")]
        victims = {
            "rank 0": ranks[0].pid, "rank 1": ranks[1].pid, "launcher": processes[0].pid,
            "inner launcher": ranks[0].ppid(),
        }  # fmt: skip
        os.kill(victims[target], number)
        left = wait_for(tmp_path, "left", 30)
        steps, reasons = zip(*(text.split(" ", 1) for text in left), strict=True)
        assert steps[0] == steps[1]  # both after the same step
        name = signal.Signals(number).name
        told = f"{name} arrived" if target.startswith("rank") else "is gone"
        assert any(told in reason for reason in reasons), reasons
        codes = [process.wait(60) for process in processes]
        assert code is None or codes == [code] * len(codes)
        assert not psutil.wait_procs(ranks, timeout=30)[1]  # whoever is still there was left behind
    finally:
        for process in processes:
            process.kill()
            process.wait()
