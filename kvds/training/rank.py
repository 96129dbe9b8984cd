"""One rank of a run from its flags to its exit code; ``launch/distill.py`` and ``kvds ab`` have launchers start it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvds.distributed.preemption import EXIT_CODE, PREEMPTED_FILE, Preempted, StopRequest, leave_at_once
from kvds.durable_files import full_disk
from kvds.errors import InputError, RunError
from kvds.identity.folder_owner import living_owner

if TYPE_CHECKING:
    from kvds.config import RunConfig

Train = Callable[["RunConfig", StopRequest], object]


def run_rank(flags: Sequence[str], train: Train | None = None) -> int:
    """Run, or with ``--dry_run`` only check.

    Args:
        flags: Of the run, and what a launcher adds.
        train: What trains; None: :func:`kvds.training.run.train`.

    Returns:
        The exit code: 0 done, 1 failed, 2 for a fault in the input, 85 stopped with a checkpoint.
    """
    stop = StopRequest().install(leave_at_once)  # before all that takes a while to import
    from kvds.config.recipe import parse_run_config
    from kvds.data.mixture import check_rows
    from kvds.distributed.rank_environment import adopt_slurm_ranks

    try:
        adopt_slurm_ranks()
        cfg = parse_run_config(list(flags))
        check_rows(cfg, cfg.seed)
        if cfg.dry_run:
            from kvds.training.dry_run import dry_run

            dry_run(cfg)
            return 0
        from kvds.distributed.process_group import leave_distributed
        from kvds.training import run as training

        (train or training.train)(cfg, stop)
        leave_distributed()
    except SystemExit:  # of --help: this process may have more to do
        stop.remove()
        raise
    except Preempted:
        with contextlib.suppress(RunError):  # what there was to save is saved
            leave_distributed()
        return EXIT_CODE
    except (InputError, RunError) as error:
        if isinstance(error, InputError):
            _forget_preemption(flags)
        return _tell(str(error), 2 if isinstance(error, InputError) else 1)
    except Exception as error:
        if not (fault := full_disk(error)):
            raise
        return _tell(f"{fault} (make room, then start again)", 1)
    return 0


def _forget_preemption(flags: Sequence[str]) -> None:
    """Remove what an earlier start left in the output folder to say that it was preempted: whoever looks for it asks
    about this one, which would be put into the queue for ever. Another job's word in its folder stays.
    """
    from kvds.config.recipe import named_output_dir

    folder = named_output_dir(flags)
    if folder is None or "--dry_run" in flags or os.environ.get("RANK", "0") != "0":
        return
    with contextlib.suppress(OSError):
        if living_owner(folder) is None:
            (folder / PREEMPTED_FILE).unlink(missing_ok=True)


def _tell(message: str, code: int) -> int:
    if os.environ.get("RANK", "0") == "0":
        print(f"kvds: error: {message}", file=sys.stderr, flush=True)
    return code
