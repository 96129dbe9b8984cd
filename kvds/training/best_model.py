"""The best evaluation of a run: which it was, its student, kept beside, and when there was no better for too long."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvds.checkpoint.aligner_file import ALIGNER_FILE
from kvds.checkpoint.export import STUDENT_FOLDER
from kvds.config import RunConfig
from kvds.distributed.process_group import from_first_rank
from kvds.durable_files import UNFINISHED, put_in_place
from kvds.models.adapters import ADAPTER_FOLDER

log = logging.getLogger("kvds")

BEST_FOLDER = "best"
Results = dict[str, dict[str, float]]


class BestModel:
    """The best evaluation so far; the same on all ranks, which call the same methods.

    Args:
        cfg: ``metric_for_best_model``, ``load_best_model_at_end`` and ``early_stopping_patience`` are read.
        output_dir: The run's folder; ``best/step-NNNNNN/`` in it holds the student of the best evaluation.
        main_rank: Whether this rank writes.
    """

    def __init__(self, cfg: RunConfig, output_dir: Path, *, main_rank: bool) -> None:
        self._cfg, self._folder, self._main_rank = cfg, output_dir / BEST_FOLDER, main_rank
        self._output_dir = output_dir
        self.step: int | None = None
        self._value, self._stale, self._results = math.nan, 0, Results()
        self._saved_step: int | None = None  # what the newest checkpoint takes for the best must stay

    @property
    def exhausted(self) -> bool:
        """Whether as many evaluations in a row as there is patience for were no better than the best."""
        return 0 < self._cfg.early_stopping_patience <= self._stale

    def judge(self, step: int, results: Results, export: Callable[[Path], None]) -> None:
        """Take an evaluation on the way.

        Args:
            step: After how many optimizer steps.
            results: Corpus → metric → value.
            export: Writes student and aligner of this step into a folder.
        """
        if not self._better(results):
            if self.step is None:
                name = self._cfg.metric_for_best_model
                log.warning(
                    "step %d: no held-out row has a %s to judge by, so that no evaluation is the best", step, name
                )
                return
            self._stale += 1
            if self.exhausted:
                log.info("step %d: no better evaluation since step %s, training ends", step, self.step)
            return
        self._value, self.step, self._stale, self._results = self._metric(results), step, 0, results
        if self._cfg.load_best_model_at_end:
            folder = self._of(step)
            if self._main_rank:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            export(folder)
            self._forget({self.step, self._saved_step})

    def settle(self, step: int, results: Results) -> tuple[int, Results]:
        """Leave in the run's folder the student of the best evaluation, the last one among them.

        Args:
            step: The last optimizer step, whose student lies there.
            results: Its evaluation.

        Returns:
            The step of the student that lies there now, and its evaluation.
        """
        if not self._cfg.load_best_model_at_end or self.step is None or self._better(results):
            return step, results
        if self._main_rank:
            for name in (STUDENT_FOLDER, ALIGNER_FILE, ADAPTER_FOLDER):
                kept, target = self._of(self.step) / name, self._output_dir / name
                if kept.exists():
                    unfinished = target.with_name(target.name + UNFINISHED)
                    shutil.rmtree(unfinished, ignore_errors=True)
                    (shutil.copytree if kept.is_dir() else shutil.copy2)(kept, unfinished)
                    put_in_place(unfinished, target)
        name = self._cfg.metric_for_best_model
        log.info("student/ is that of step %d, the best by %s (%.4f)", self.step, name, self._value)
        return self.step, self._results

    @property
    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint that is about to be saved."""
        return {"best": {"step": self.step, "value": self._value, "stale": self._stale, "results": self._results}}

    def saved(self) -> None:
        """A checkpoint with :attr:`state` is there."""
        self._saved_step = self.step
        self._forget({self.step})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from :attr:`state` of an earlier attempt, among other entries of its checkpoint."""
        if best := state.get("best"):  # earlier versions had none
            self.step, self._value, self._stale = best["step"], best["value"], best["stale"]
            self._results, self._saved_step = best["results"], best["step"]
            self._forget({self.step})

    def _better(self, results: Results) -> bool:
        """Decided by the first rank: sums over ranks may differ in their last bits."""
        return from_first_rank(lambda: self._improves(self._metric(results)))

    def _improves(self, value: float) -> bool:
        if math.isnan(value):
            return False
        gain = value - self._value if self._cfg.metric_for_best_model == "exact_match" else self._value - value
        return self.step is None or math.isnan(self._value) or gain > 0

    def _metric(self, results: Results) -> float:
        return float(results["all"].get(self._cfg.metric_for_best_model, math.nan))

    def _of(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}"

    def _forget(self, kept: set[int | None]) -> None:
        """Remove the folders of all other steps."""
        if self._main_rank and self._folder.is_dir():
            names = {self._of(step).name for step in kept if step is not None}
            for folder in self._folder.iterdir():
                if folder.name not in names:
                    shutil.rmtree(folder, ignore_errors=True)
