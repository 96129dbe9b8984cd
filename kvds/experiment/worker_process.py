"""A worker of ``kvds ab``: reads jobs from standard input, a JSON line each, trains them one after the other, through
the ``deepspeed`` launcher or in this process, and answers each with a JSON line. Started by
``kvds.experiment.runner``, not by hand.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from kvds.config import RunConfig
from kvds.config.recipe import checked_settings
from kvds.distributed.preemption import EXIT_CODE, Preempted
from kvds.durable_files import json_text
from kvds.experiment.launcher import launch
from kvds.experiment.rank_process import MEASURED_FILE, train_measured
from kvds.experiment.results import FAILED, FINISHED, summarise
from kvds.tracking.run_report import read_run


def train_job(settings: dict[str, Any], ranks: int, *, in_process: bool = False) -> dict[str, Any]:
    """Train one run and return its numbers, the same ones either way.

    Args:
        settings: All of the run, its ``output_dir`` among them; checked before anything is started.
        ranks: Of the run.
        in_process: Train here, on one rank, instead of through the launcher.

    Raises:
        InputError, Preempted, RunError: see :func:`kvds.training.run.train`.
    """
    cfg = RunConfig(**checked_settings(dict(settings), "job"))
    cfg.check_before_start(settings)
    if in_process:
        train_measured(cfg)
    else:
        launch(cfg, ranks)
    measured = json.loads((Path(cfg.output_dir) / MEASURED_FILE).read_text(encoding="utf-8"))
    return summarise(read_run(cfg.output_dir)) | measured


def serve(jobs: TextIO, answers: TextIO) -> None:
    """Answer every job until the input ends."""
    for line in jobs:
        job = json.loads(line)
        try:
            answer = {"status": FINISHED, **train_job(job["settings"], job["ranks"], in_process=job["in_process"])}
        except Preempted as reason:  # neither finished nor failed; what is left of it ends with this process
            print(f"stopped: {reason}", file=sys.stderr)
            raise SystemExit(EXIT_CODE) from reason
        except Exception as error:  # whatever it is, the others go on
            import traceback

            traceback.print_exc()
            answer = {"status": FAILED, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        gc.collect()  # engines hold themselves in cycles
        answers.write(json_text(answer) + "\n")
        answers.flush()


def _end_with(parent: int) -> None:
    """End this process and all it has started once ``parent``, which nobody could ask to do so, is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    # Libraries print to standard output: only answers may stand there.
    answer_stream = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin, answer_stream)
