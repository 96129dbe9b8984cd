"""Ranks that start in a second: ``launch/distill.py`` forked from a process that has imported everything.

A run that is killed forty times would otherwise spend its time importing. Each rank is a process of its own with the
environment that a launcher would give it; it can be killed, stopped and waited for like any other.

    with RankServer() as server:
        ranks = server.start(flags, ranks=2, log=Path("run.log"))
        os.kill(ranks.pids[1], signal.SIGKILL)
        codes = ranks.wait(60)
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What a run imports, much of it only when the first model or engine is built.
_SLOW_IMPORTS = (
    *("kvds.training.run", "kvds.tracking.run_report", "torch._dynamo", "torch._inductor.compile_fx"),
    *("torch.utils.cpp_extension", "transformers.models.qwen2.tokenization_qwen2"),
    *("transformers.models.qwen2.modeling_qwen2", "transformers.integrations", "transformers.trainer_pt_utils"),
    *("deepspeed.runtime.zero.stage3", "deepspeed.ops.op_builder.all_ops", "scipy.optimize", "mlflow"),
)
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Ranks:
    """Processes of one start, in order of rank."""

    server: RankServer
    pids: list[int]
    log: Path

    def wait(self, seconds: float) -> list[int | None]:
        """Exit codes, negative for a signal; None for a rank that is still there after ``seconds``."""
        return self.server.ask(wait=self.pids, seconds=seconds)["codes"]

    def kill(self) -> None:
        """End all that is left, however deaf."""
        for pid, code in zip(self.pids, self.wait(0), strict=True):
            if code is None:
                os.kill(pid, signal.SIGKILL)
        self.wait(10)


class RankServer:
    """Client's side: starts the server process and asks it for ranks."""

    def __init__(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
        environment["TOKENIZERS_PARALLELISM"] = "false"
        environment["PYTHONPATH"] = str(REPOSITORY)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.harness.forked_ranks"], env=environment, cwd=REPOSITORY, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._started: list[Ranks] = []

    def __enter__(self) -> RankServer:
        return self

    def __exit__(self, *exception: object) -> None:
        for ranks in self._started:
            ranks.kill()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def start(self, flags: list[str], *, ranks: int = 1, log: Path, setup: str = "") -> Ranks:
        """Start ``launch/distill.py`` with ``flags`` on so many ranks.

        Args:
            flags: Its command line.
            ranks: Processes.
            log: File for what they all write.
            setup: Python statements that each rank runs first (a fault to inject).
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        answer = self.ask(start=flags, ranks=ranks, log=str(log), setup=setup, port=port)
        self._started.append(Ranks(self, answer["pids"], log))
        return self._started[-1]

    def ask(self, **question: Any) -> dict[str, Any]:
        """Send one request and return its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise RuntimeError("the process that forks ranks has ended")


def _load_distill() -> Any:
    spec = importlib.util.spec_from_file_location("distill", REPOSITORY / "launch/distill.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _be_rank(rank: int, question: dict[str, Any], distill: Any) -> None:
    code = 1
    try:
        log = os.open(question["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(question["ranks"]), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(question["port"]),
        )  # fmt: skip
        sys.argv = ["distill.py", *question["start"]]
        exec(question["setup"], {"rank": rank})
        code = distill.main()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    distill = _load_distill()
    for module in _SLOW_IMPORTS:
        importlib.import_module(module)
    gc.freeze()  # no rank looks through what was imported, nor copies its pages by doing so

    codes: dict[int, int] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "start" in question:
            pids = []
            for rank in range(question["ranks"]):
                pid = os.fork()
                if pid == 0:
                    _be_rank(rank, question, distill)
                pids.append(pid)
            answer: dict[str, Any] = {"pids": pids}
        else:
            deadline = time.monotonic() + question["seconds"]
            while True:
                for pid in [pid for pid in question["wait"] if pid not in codes]:
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    if ended:
                        codes[pid] = os.waitstatus_to_exitcode(status)
                if all(pid in codes for pid in question["wait"]) or time.monotonic() > deadline:
                    break
                time.sleep(0.02)
            answer = {"codes": [codes.get(pid) for pid in question["wait"]]}
        print("ANSWER " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
