"""Run experiments, arms × seeds of plans, and report them; an interrupted one goes on where it stopped."""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from kvds.commands.output_folder import check_output
from kvds.config.extras import need
from kvds.config.values import number
from kvds.errors import InputError
from kvds.experiment.checks import check_jobs
from kvds.experiment.plan import PREPARE, Job, load_plan, parse_seeds
from kvds.experiment.runner import KEEP, Experiment, Runner, Work, needs_preparation, prepare
from kvds.identity.folder_owner import FolderOwner

log = logging.getLogger("kvds")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("plans", nargs="+", type=Path, metavar="PLAN.yaml", help="arms, seeds, the primary metric")
    parser.add_argument("--output", type=Path, default=Path("outputs/ab"), metavar="DIR",
                        help="results go to DIR/PLAN/ (default: outputs/ab)")  # fmt: skip
    parser.add_argument("--tune", action="store_true", help="first choose each arm's values on the tuning seeds")
    parser.add_argument("--tuned", type=Path, metavar="FILE", help="values that an earlier tuning chose")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="run these arms alone")
    parser.add_argument("--seeds", metavar="0-9|0,1", help="of the plan's seeds run these alone")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument("--ranks", type=int, default=1, metavar="N",
                        help="ranks per run, which the deepspeed launcher starts (default: 1)")  # fmt: skip
    parser.add_argument("--in_process", action="store_true",
                        help="train inside the workers: no launcher, 10 to 20 s less per run; one rank")  # fmt: skip
    parser.add_argument("--devices", metavar="cpu|0,1,…",
                        help="GPUs dealt out to workers, --ranks to each in turn, or cpu")  # fmt: skip
    parser.add_argument("--keep", choices=KEEP, default="metrics",
                        help="what stays of a run's folder: metrics (its row alone), student, all")  # fmt: skip
    parser.add_argument("--max_minutes", type=float, metavar="M", help="stop then; finished runs are kept")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings on top of every arm's")
    parser.add_argument("--report_only", action="store_true", help="run nothing; report what there is")
    parser.add_argument("--track", action="store_true",
                        help="also write MLflow records: one parent run, the runs nested in it")  # fmt: skip
    parser.add_argument("--dry_run", action="store_true", help="list the runs that are still to be done")


def run(arguments: argparse.Namespace) -> int:
    """Prepare, tune, train and report."""
    for name in ("workers", "ranks"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} {getattr(arguments, name)}: expected at least 1")
    if arguments.in_process and arguments.ranks > 1:
        raise InputError(f"--in_process --ranks {arguments.ranks}: expected one rank (or no --in_process)")
    if arguments.track:
        need("--track", "mlflow")
    minutes = arguments.max_minutes
    if minutes is not None and not minutes > 0:
        raise InputError(f"--max_minutes {minutes}: expected above 0 (or no --max_minutes)")
    if not (arguments.report_only or arguments.dry_run):
        check_output(arguments.output)
    overrides = _overrides(arguments.set)
    plans = [load_plan(path, overrides) for path in arguments.plans]
    names = [plan.name for plan in plans]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name}.yaml: named twice; expected each plan once (its results go to --output/{name})")
    arms = {arm: None for plan in plans for arm in plan.arms}
    for name in arguments.only or []:
        if name not in arms:
            raise InputError(f"--only {name}: expected arms of the plan, {', '.join(arms)}")
    experiments = [
        Experiment(plan, arguments.output / plan.name, arguments.tuned, to_read=arguments.report_only) for plan in plans
    ]
    if arguments.dry_run:
        return _list(experiments, arguments)
    if not arguments.report_only:
        runner = Runner(
            arguments.output / "logs",
            workers=arguments.workers,
            devices=arguments.devices.split(",") if arguments.devices else (),
            ranks=arguments.ranks,
            in_process=arguments.in_process,
            keep=arguments.keep,
            deadline=None if minutes is None else time.monotonic() + 60 * minutes,
        )
        with contextlib.ExitStack() as owned, _sigterm_leaves(), runner:
            for experiment in experiments:
                owned.enter_context(FolderOwner(experiment.folder, flag="output"))
            needed = {id(experiment) for experiment in _needing(experiments)}
            work = [(e, j) for e, j in _to_come(experiments, arguments) if j.phase != PREPARE or id(e) in needed]
            check_jobs(work, ranks=arguments.ranks)
            if not _train(experiments, runner, arguments):
                log.warning("stopped early: what has finished is reported (the same command goes on)")
    return max([_report(experiment, arguments) for experiment in experiments])


@contextlib.contextmanager
def _sigterm_leaves() -> Iterator[None]:
    """Within it SIGTERM leaves as Ctrl-C does, so that workers are ended; only the main thread can arrange it."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        log.warning("stopped: what has finished is kept (the same command goes on)")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _train(experiments: Sequence[Experiment], runner: Runner, arguments: argparse.Namespace) -> bool:
    """All phases, each over all experiments at once, so that workers idle at its end only; False: out of time."""
    if not prepare(_needing(experiments), runner):
        return False
    if arguments.tune:
        tuning = _tuning(experiments, arguments)
        if not tuning:
            raise InputError("--tune: no arm has values to choose from; expected `tune:` below an arm of a plan")
        in_time = runner.run(tuning, "tune")
        for experiment in experiments:
            if jobs := [job for e, job in tuning if e is experiment]:
                experiment.save_choice(jobs, in_time=in_time)
        if not in_time:
            return False
    work = [(e, job) for e in experiments for job in _reported(e, arguments)]
    # The first seeds of all plans before the second ones of any: what there is when the time ends is balanced.
    return runner.run(sorted(work, key=lambda item: item[1].seed), "train")


def _needing(experiments: Sequence[Experiment]) -> list[Experiment]:
    return [e for e in experiments if needs_preparation(e, [*e.plan.tuning_jobs(), *_untuned(e)])]


def _untuned(experiment: Experiment) -> list[Job]:
    return experiment.plan.report_jobs({arm: {} for arm in _sources(experiment)})


def _sources(experiment: Experiment) -> list[str]:
    return [arm.tuned_as or arm.name for arm in experiment.plan.arms.values()]


def _tuning(experiments: Sequence[Experiment], arguments: argparse.Namespace) -> list[Work]:
    return [(e, job) for e in experiments for job in _wanted(e.plan.tuning_jobs(), arguments.only, None)]


def _reported(experiment: Experiment, arguments: argparse.Namespace) -> list[Job]:
    return _wanted(experiment.report_jobs(), arguments.only, arguments.seeds)


def _wanted(jobs: Sequence[Job], only: Sequence[str] | None, seeds: str | None) -> list[Job]:
    try:
        chosen = None if seeds is None else parse_seeds(seeds)
    except ValueError as error:
        raise InputError(f"--seeds {seeds}: expected whole numbers, such as 0-9 or 0,1") from error
    return [j for j in jobs if (not only or j.arm in only) and (chosen is None or j.seed in chosen)]


def _overrides(pairs: Sequence[str]) -> dict[str, Any]:
    from kvds.config.recipe import checked_settings

    content: dict[Any, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise InputError(f"--set {pair}: expected KEY=VALUE, such as data_dir=DATA")
        content[key] = {"true": True, "false": False, "none": None}.get(text.lower(), number(text))
    return checked_settings(content, "--set")


def _to_come(experiments: Sequence[Experiment], arguments: argparse.Namespace) -> list[Work]:
    """All runs that the command asks for, finished or not."""
    work: list[Work] = [(e, job) for e in experiments for job in e.plan.preparation_jobs()]
    if arguments.tune:
        work += _tuning(experiments, arguments)
    for e in experiments:
        try:
            jobs = e.report_jobs()
        except InputError:
            if not arguments.tune:
                raise
            jobs = _untuned(e)  # as many, of values that tuning is yet to choose
        work += [(e, job) for job in _wanted(jobs, arguments.only, arguments.seeds)]
    return work


def _list(experiments: Sequence[Experiment], arguments: argparse.Namespace) -> int:
    work = _to_come(experiments, arguments)
    done = 0
    for experiment, job in work:
        finished = bool(experiment.store.finished([job]))
        done += finished
        print(f"{'done ' if finished else 'to do'}  {experiment.plan.name}/{job.name}")
    print(f"{len(work) - done} of {len(work)} runs are still to be done")
    return 0


def _report(experiment: Experiment, arguments: argparse.Namespace) -> int:
    from kvds.experiment.report import write_ab_report

    store = experiment.store
    try:
        jobs = experiment.report_jobs()
    except InputError as error:  # the time ended before a value was chosen
        log.warning("%s: %s", experiment.plan.name, error)
        return 1
    rows, failed = list(store.finished(jobs).values()), store.failed(jobs)
    if arguments.report_only and (told := store.left_out(jobs)):
        log.warning("%s", told)
    if not rows:
        reason = f": {failed[0]['error']}" if failed else ""
        log.warning("%s: no run has finished%s (logs: %s)", store.path, reason, arguments.output / "logs")
        return 1
    written = write_ab_report(experiment.plan, rows, failed, experiment.folder)
    if arguments.track:
        from kvds.experiment.tracking import track_experiment

        track_experiment(experiment.plan, rows, experiment.folder)
    print((experiment.folder / "report.md").read_text(encoding="utf-8"))
    print("written:", *written)
    return 1 if failed else 0
