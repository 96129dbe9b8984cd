"""Checks of an experiment's runs before the first is started: each as ``distill.py --dry_run`` would check it, so that
what ends one of them after a day of others is told at once.

Runs that differ in their seed alone are checked once. What a prepared run is yet to leave is stood in for by the
student that it trains, whose architecture and tokenizer are the same.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from kvds.config import RunConfig
from kvds.config.deepspeed_file import load_deepspeed_config
from kvds.errors import InputError
from kvds.experiment.plan import PREPARED
from kvds.experiment.runner import Experiment, Work
from kvds.identity.contents import short_hash

log = logging.getLogger("kvds")


def check_jobs(work: Sequence[Work], *, ranks: int) -> None:
    """Check those of ``work`` that have no finished result.

    Args:
        work: Jobs and their experiments.
        ranks: Of each run.

    Raises:
        InputError: what would end one of the runs; names its plan and arm.
    """
    seen = set()
    for experiment, job in work:
        settings = {**job.settings, "output_dir": str(experiment.folder / "runs" / job.name), "resume": "never"}
        key = short_hash({name: value for name, value in settings.items() if name not in ("seed", "output_dir")})
        if key in seen or experiment.store.finished([job]):
            continue
        seen.add(key)
        try:
            _check(_stood_in(settings, experiment), ranks)
        except InputError as error:
            raise InputError(f"{experiment.plan.name}: {job.arm}: {error}") from error


def _check(settings: dict[str, Any], ranks: int) -> None:
    cfg = RunConfig(**settings)
    cfg.check_before_start(settings)
    from kvds.training.run_checks import check_run  # where all is done already, nothing of torch is imported

    with _warnings_alone():
        # A kernel is tried out by the run, on the GPU that is its own.
        check_run(cfg, load_deepspeed_config(cfg.deepspeed_config), ranks=ranks, kernel=False)


@contextlib.contextmanager
def _warnings_alone() -> Iterator[None]:
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def _stood_in(settings: dict[str, Any], experiment: Experiment) -> dict[str, Any]:
    """``settings`` with ``prepared:NAME`` replaced by its student where that is there, else by what it will train."""
    done = dict(settings)
    for flag in ("model", "teacher", "student", "tokenizer"):
        text = settings.get(f"{flag}_name")
        if not isinstance(text, str) or not text.startswith(PREPARED):
            continue
        name = text.removeprefix(PREPARED)
        if (experiment.prepared(name) / "config.json").is_file():
            done[f"{flag}_name"] = str(experiment.prepared(name))
            continue
        plan = experiment.plan
        maker = RunConfig(**{**plan.common, **plan.prepare[name], "output_dir": "unset"})
        if flag != "tokenizer":
            done[f"{flag}_name"] = maker.student
            for side in ("teacher", "student") if flag == "model" else (flag,):
                done[f"{side}_init"] = maker.student_init
                done[f"{side}_config_overrides"] = maker.student_config_overrides
            if settings.get("tokenizer_name") is not None or (
                flag == "student" and RunConfig(**settings).first_teacher
            ):
                continue  # its own tokenizer is not asked for
        done["tokenizer_name"] = maker.tokenizer_name or maker.first_teacher or maker.student
    return done if done == settings else _stood_in(done, experiment)
