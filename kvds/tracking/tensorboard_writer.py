"""TensorBoard's event files in a run's folder, written by TensorBoard's own thread."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"


class TensorboardWriter:
    """Scalars under the keys of ``metrics.jsonl``, settings and tags as text: ``tensorboard --logdir OUTPUT_DIR``.

    Args:
        folder: The run's output folder; the event files lie in ``tensorboard/`` in it.
        params: Settings.
        tags: Facts of this attempt.
        resume_step: Optimizer step that is gone on from; what was written of later ones is hidden.
    """

    def __init__(
        self, folder: Path, *, params: Mapping[str, Any], tags: Mapping[str, str], resume_step: int | None
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard hides the steps from purge_step on, as those of a process that died.
        purge = None if resume_step is None else resume_step + 1
        self._writer: Any = SummaryWriter(str(folder / FOLDER), purge_step=purge)
        rows = "".join(f"| {name} | {value} |\n" for name, value in params.items())
        self._writer.add_text("settings", f"| setting | value |\n| --- | --- |\n{rows}", resume_step or 0)
        for name, value in tags.items():
            self.put_tag(name, value)

    def put_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand over metrics after ``step`` optimizer steps; what is not finite is left out, as no axis holds it."""
        for name, value in metrics.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def put_tag(self, key: str, value: str) -> None:
        """Hand over a fact."""
        self._writer.add_text(f"facts/{key}", value, 0)

    def put_artifact(self, path: Path) -> None:
        """Nothing: the files lie in the run's folder already."""

    def flush(self) -> None:
        """Wait until all is in the file."""
        self._writer.flush()

    def finish(self, status: str) -> None:
        """End the file; how the run ended is a fact in it."""
        self.put_tag("status", status)
        self._writer.close()
