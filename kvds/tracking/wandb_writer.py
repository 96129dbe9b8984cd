"""Weights & Biases, written by its own process; ``WANDB_MODE=offline`` keeps all of it in the run's folder."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RUN_ID_FILE = "wandb_run_id"


class WandbWriter:
    """One run of wandb, the same after a resume.

    Args:
        folder: The run's output folder; gets ``wandb/`` and the file ``wandb_run_id``.
        experiment_name: wandb's project.
        run_name: wandb's name of the run.
        params: Settings.
        tags: Facts of this attempt.
        resume_step: Optimizer step that is gone on from; what wandb has of it and of earlier ones stays.
    """

    def __init__(
        self,
        folder: Path,
        *,
        experiment_name: str,
        run_name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        resume_step: int | None,
    ) -> None:
        import wandb

        id_file = folder / RUN_ID_FILE
        known = resume_step is not None and id_file.is_file()
        run_id = id_file.read_text(encoding="utf-8").strip() if known else secrets.token_hex(4)
        self._run: Any = wandb.init(
            project=experiment_name, name=run_name, id=run_id, resume="allow" if known else None, dir=str(folder),
            config=dict(params), settings=wandb.Settings(init_timeout=60, console="off", quiet=True),
        )  # fmt: skip
        id_file.write_text(run_id + "\n", encoding="utf-8")
        # An axis of its own: wandb's counter goes forwards alone, and a step has records of several kinds.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._run.config.update(dict(tags), allow_val_change=True)

    def put_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand over metrics after ``step`` optimizer steps; returns at once."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._run.log({**finite, "step": step})

    def put_tag(self, key: str, value: str) -> None:
        """Hand over a fact."""
        self._run.summary[key] = value

    def put_artifact(self, path: Path) -> None:
        """Hand over a file or folder to copy."""
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        for file in files:
            self._run.save(str(file), base_path=str(path.parent), policy="now")

    def flush(self) -> None:
        """Nothing: wandb's process has it already."""

    def finish(self, status: str) -> None:
        """End the run."""
        self._run.finish(exit_code=0 if status == "FINISHED" else 1)
