"""A rank that is asked to stop before there is anything to save ends at once, whatever it waits for."""

import os
import signal
import subprocess
import sys
import time

import pytest

# What a rank waits for while its main thread hears no signal, and one that swallows what a handler would raise.
WAITS = {
    "an import that catches everything": """
sys.meta_path.insert(0, Slow())
import slow
""",
    "other ranks": """
from datetime import timedelta
from torch.distributed import TCPStore
ready()
TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=100)).wait(["never"])
""",
    "the owner of a folder": """
from pathlib import Path
from kvds.identity.folder_owner import FolderOwner
FolderOwner(Path(sys.argv[1])).take()
ready()
FolderOwner(Path(sys.argv[1])).take(patience=100.0)
""",
}
RANK = """
import sys, time, types
from kvds.training import rank

def ready():
    print("ready", flush=True)

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "slow":
            ready()
            for _ in range(1000):
                try:
                    time.sleep(0.1)
                except BaseException:
                    pass

rank.StopRequest.install = lambda stop, leave, install=rank.StopRequest.install: (install(stop, leave), wait())[0]

def wait():
    exec(WAIT, globals())

rank.run_rank(["--output_dir", sys.argv[1]])
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("wait", WAITS)
def test_a_rank_that_starts_hears_signals_while_it_waits(wait, number, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-c", f"WAIT = {WAITS[wait]!r}\n{RANK}", str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as rank:
        try:
            assert rank.stdout.readline() == "ready\n"
            time.sleep(0.2)
            begun = time.monotonic()
            rank.send_signal(number)
            assert rank.wait(30) == 85 and time.monotonic() - begun < 10
        finally:
            rank.kill()
        said = rank.stderr.read()
    assert said.strip() == (
        f"kvds: stopped: {number.name} arrived before the first step; nothing is lost, the same command starts again"
    )


def test_handlers_are_there_before_anything_that_takes_long_is_imported():
    code = (
        "import sys, signal; from kvds.training import rank\n"
        "slow = {'torch', 'transformers', 'deepspeed', 'datasets', 'numpy', 'yaml', 'kvds.config'} & set(sys.modules)\n"
        "sys.exit(str(slow) if slow else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_once_there_is_something_to_save_a_signal_is_a_request():
    from kvds.distributed.preemption import StopRequest

    left = []
    before = signal.getsignal(signal.SIGUSR1)
    stop = StopRequest().install(left.append)
    try:
        stop.save_first()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.agreed() == "SIGUSR1 arrived" and not left
    finally:
        stop.remove()
    assert signal.getsignal(signal.SIGUSR1) == before and signal.set_wakeup_fd(-1) == -1


def test_a_cache_that_is_not_being_written_yet_is_left_at_once(monkeypatch):
    """Its process would end in the listener's thread; here that is noted."""
    from kvds.commands import cache

    left = []

    def load(arguments, stop):
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 10
        while not left and time.monotonic() < deadline:
            time.sleep(0.01)
        return 7

    monkeypatch.setattr(cache, "leave_at_once", left.append)
    monkeypatch.setattr(cache, "_write", load)
    assert cache.run(None) == 7 and left == ["SIGTERM arrived"]
