"""Run log: what a run tells on its way, as lines on the screen, records, tags and artifacts."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import nn
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers.utils import logging as transformers_logging

from kvds.config import RunConfig
from kvds.config.extras import installed
from kvds.distillation.module import DistillationModule
from kvds.evaluation.model import in_words
from kvds.tracking.provenance import collect_versions, git_revision, write_provenance
from kvds.tracking.tracker import UI_PAGE, Tracker, ui_command
from kvds.training.nonfinite_steps import NonfiniteSteps

log = logging.getLogger("kvds")


def quiet_logs(*, main_rank: bool) -> None:
    """Rank 0 speaks; DeepSpeed and transformers only when something is wrong."""
    level = logging.INFO if main_rank else logging.ERROR
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S", force=True)
    log.setLevel(level)
    for name in ("DeepSpeed", "deepspeed", "transformers", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch is about to drop.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def lines_above_bars() -> Iterator[None]:
    """Within it, log lines and Python's warnings stand above progress bars, not in them."""
    logging.captureWarnings(True)
    try:
        with logging_redirect_tqdm():
            yield
    finally:
        logging.captureWarnings(False)


def parameter_count(module: nn.Module | None) -> int:
    """Parameters of a module, whether they lie here or in ZeRO-3's shards; 0 for none."""
    return 0 if module is None else sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())


class RunLog:
    """The log of one run. Every rank has one and calls the same methods; rank 0 alone writes.

    Construction tells what the run is and writes ``provenance.json``.

    Args:
        cfg: The run.
        module: Student and aligner, whose parameters are counted.
        nonfinite_steps: The steps that were left out.
        rank: This rank.
        world_size: Number of ranks.
        kv_weight: Of the KV loss, when this attempt begins.
        total_steps: Optimizer steps of the run.
        resume_step: The optimizer step that a checkpoint was loaded from; None for a new run.
        mlflow_run_id: MLflow's run to go on with; None: see :class:`kvds.tracking.tracker.Tracker`.
    """

    def __init__(
        self,
        cfg: RunConfig,
        module: DistillationModule,
        nonfinite_steps: NonfiniteSteps,
        *,
        rank: int,
        world_size: int,
        kv_weight: float,
        total_steps: int,
        resume_step: int | None = None,
        mlflow_run_id: str | None = None,
    ) -> None:
        self._cfg, self._output_dir, self._nonfinite_steps = cfg, Path(cfg.output_dir), nonfinite_steps
        self._total_steps = total_steps
        self._tracker: Tracker | None = None
        student, aligner = parameter_count(module.student), parameter_count(module.aligner)
        log.info(
            "mode %s | kv_method %s | kv_weight %.4g | student %s parameters, aligner %s | %d steps of %d rows on %d "
            "ranks",
            cfg.alignment_mode if cfg.uses_kv else "none", cfg.kv_method, kv_weight, f"{student:,}", f"{aligner:,}",
            total_steps, cfg.batch_size * cfg.gradient_accumulation_steps * world_size, world_size,
        )  # fmt: skip
        if rank == 0:
            tags = {**collect_versions(), "world_size": str(world_size), "kv_weight": f"{kv_weight:.6g}"}
            write_provenance(self._output_dir, {"git_revision": git_revision() or "unknown", **tags})
            self._tracker = Tracker(
                self._output_dir, report_to=cfg.report_to, tracking_uri=cfg.tracking_uri,
                experiment_name=cfg.experiment_name, run_name=cfg.run_name or self._output_dir.name,
                params={**cfg.to_dict(), "parameters_student": student, "parameters_aligner": aligner},
                tags=tags, run_id=mlflow_run_id, resume_step=resume_step,
            )  # fmt: skip

    @property
    def mlflow_run_id(self) -> str | None:
        """MLflow's id of the run; None where there is none yet, and on other ranks than 0."""
        return None if self._tracker is None else self._tracker.run_id

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record ``metrics`` after ``step`` optimizer steps."""
        if self._tracker is not None:
            self._tracker.log(step, metrics)

    def record_starts(
        self,
        start_r2: Sequence[Mapping[str, Sequence[float]]],
        start_outputs: Sequence[Mapping[str, Sequence[float]]] = (),
    ) -> None:
        """Tell and record, at step 0, how much of held-out states the fitted maps explain, and what the maps change of
        the output of attention.

        Args:
            start_r2: As :attr:`kvds.training.build.RunModels.start_r2`.
            start_outputs: As :attr:`kvds.training.build.RunModels.start_outputs`.
        """
        metrics: dict[str, float] = {}
        for number, parts in enumerate(start_r2):
            teacher = f"teacher_{number + 1}_" if len(start_r2) > 1 else ""
            for part, layers in parts.items():
                mean = sum(layers) / len(layers)
                metrics[f"kv/start_r2/{teacher}{part}s"] = mean
                metrics |= {f"kv/start_r2/{teacher}{part}s_layer_{i:02d}": value for i, value in enumerate(layers)}
                log.info(
                    "maps of %s%ss start at held-out R² %.3f, by layer: %s",
                    teacher.replace("_", " "), part.replace("_", " "), mean, " ".join(f"{r2:.2f}" for r2 in layers),
                )  # fmt: skip
        for number, measures in enumerate(start_outputs):
            teacher = f"teacher_{number + 1}_" if len(start_outputs) > 1 else ""
            means = {measure: sum(layers) / len(layers) for measure, layers in measures.items()}
            for measure, layers in measures.items():
                key = f"kv/start_attention_output_{measure}/{teacher}"
                metrics[f"{key}mean"] = means[measure]
                metrics |= {f"{key}layer_{i:02d}": value for i, value in enumerate(layers)}
            if means:
                log.info(
                    "attention output of %smapped states starts at relative error %.3f, cosine %.3f, by layer: %s",
                    teacher.replace("_", " "), means["relative_error"], means["cosine"],
                    " ".join(f"{error:.2f}" for error in measures["relative_error"]),
                )  # fmt: skip
        if metrics:
            self.record(0, metrics)

    def record_evaluation(self, step: int, results: dict[str, dict[str, float]]) -> None:
        """Tell and record what an evaluation gave: corpus → metric → value."""
        log.info("step %d of %d, held-out: %s", step, self._total_steps, in_words(results))
        self.record(step, {f"eval/{corpus}/{k}": v for corpus, values in results.items() for k, v in values.items()})

    def warn(self, step: int, warnings: Mapping[str, str]) -> None:
        """Tell of what turned up at ``step``: short name → one line, in the log and as the tag ``warning/NAME``."""
        for name, text in warnings.items():
            log.warning("step %d: %s", step, text)
            if self._tracker is not None:
                self._tracker.set_tag(f"warning/{name}", f"step {step}: {text}")

    def record_nonfinite_steps(self, *, wait: bool = True) -> None:
        """Record the steps left out since the last call; without ``wait`` only where the host knows of them by itself.
        All ranks call it.

        Raises:
            RunError: there were too many of them in a row.
        """
        for step, count in self._nonfinite_steps.read(wait=wait):
            self.record(step, {"bad_steps": count})

    def conclude(self, *, draw_report: bool = True) -> None:
        """Say where everything is; with ``draw_report`` draw ``report/`` and hand it to the tracker."""
        if self._tracker is not None and draw_report:
            self._log_artifacts(self._tracker)
        log.info("student, aligner and records are in %s", self._output_dir)
        cfg = self._cfg
        if (
            "mlflow" in cfg.report_to and installed("mlflow") and (cfg.tracking_uri or "sqlite:").startswith("sqlite:")
        ):  # no server yet
            page = f", then {UI_PAGE}" if cfg.tracking_uri is None else ""  # of a shared one the number is not known
            log.info("look through them: %s%s", ui_command(self._output_dir, cfg.tracking_uri), page)

    def _log_artifacts(self, tracker: Tracker) -> None:
        from kvds.tracking.run_report import write_report

        folder = self._output_dir
        tracker.flush()
        for path in [*write_report([folder], folder / "report"), folder / "config.yaml"]:
            tracker.log_artifact(path)

    def close(self, status: str) -> None:
        """Say to the tracker how the run ended: ``FINISHED``, ``KILLED`` or ``FAILED``."""
        if self._tracker is not None:
            self._tracker.finish(status)
