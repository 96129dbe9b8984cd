"""A worker of ``kvds ab``: reads jobs from standard input, a JSON line each, trains them one after the other in this
process, and answers each with a JSON line. Started by ``kvds.experiment.ab``, not by hand.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from kvds.config import RunConfig
from kvds.errors import InputError
from kvds.experiment.report import read_run
from kvds.experiment.results import FAILED, FINISHED, summarise
from kvds.preemption import EXIT_CODE, Preempted

# Parameters of the map; 0 without one.
ALIGNER_COUNT = "parameters/aligner"


def train_job(settings: dict[str, Any], ranks: int) -> dict[str, Any]:
    """Train one run and return its numbers.

    Args:
        settings: All of the run, its ``output_dir`` among them.
        ranks: 1: in this process; more: through the ``deepspeed`` launcher.
    """
    fields: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in settings.items()}
    cfg = RunConfig(**fields)
    cfg.check_paths()
    begun, begun_cpu = time.perf_counter(), time.process_time()
    if ranks == 1:
        from kvds.train import train

        train(cfg, draw_report=False)
    else:
        _launch(cfg, ranks)
    seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - begun_cpu
    row = summarise(read_run(cfg.output_dir))
    row |= {"train_wall_seconds": seconds, "train_cpu_seconds": cpu_seconds if ranks == 1 else None}
    return row | {ALIGNER_COUNT: _aligner_parameters(Path(cfg.output_dir))}


def _launch(cfg: RunConfig, ranks: int) -> None:
    recipe = Path(cfg.output_dir).with_suffix(".yaml")
    recipe.parent.mkdir(parents=True, exist_ok=True)
    cfg.save(recipe)
    script = Path(__file__).resolve().parents[2] / "launch" / "distill.py"
    with socket.socket() as probe:  # workers side by side must not meet at the launcher's default port
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    command = [*launcher, "--master_port", port, str(script), "--config", str(recipe)]
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    if done.returncode:
        raise InputError(f"the launcher ended with status {done.returncode} (its output is in this worker's log)")
    recipe.unlink()


def _aligner_parameters(folder: Path) -> int:
    from kvds.checkpoint import ALIGNER_FILE, load_aligner

    path = folder / ALIGNER_FILE
    return sum(parameter.numel() for parameter in load_aligner(path).parameters()) if path.is_file() else 0


def serve(jobs: TextIO, answers: TextIO) -> None:
    """Answer every job until the input ends."""
    for line in jobs:
        job = json.loads(line)
        try:
            answer = {"status": FINISHED, **train_job(job["settings"], job["ranks"])}
        except Preempted as reason:  # SIGTERM: the experiment ends this process
            raise SystemExit(EXIT_CODE) from reason
        except Exception as error:  # whatever it is, the others go on
            import traceback

            traceback.print_exc()
            answer = {"status": FAILED, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        gc.collect()  # engines hold themselves in cycles
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    # Libraries print to standard output: only answers may stand there.
    answer_stream = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin, answer_stream)
