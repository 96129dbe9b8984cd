"""Distil a student through a teacher's keys and values: ``deepspeed [launcher flags] launch/distill.py --flag value
…``.

``--help`` lists every flag; ``--config launch/recipes/NAME.yaml`` sets any of them.
"""

import errno
import os
import sys
from pathlib import Path

# The launcher starts this file from any folder, with or without kvds installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kvds.config import parse_run_config
from kvds.data.reasoning import check_rows
from kvds.errors import InputError, RunError
from kvds.preemption import EXIT_CODE, Preempted, StopRequest
from kvds.rank_environment import adopt_slurm_ranks


def main() -> int:
    """Run, or with ``--dry_run`` only check, and return the exit code: 0 done, 1 failed, 2 for a fault in the input, 85
    stopped with a checkpoint.
    """
    stop = StopRequest().install()
    try:
        adopt_slurm_ranks()
        cfg = parse_run_config(sys.argv[1:])
        check_rows(cfg, cfg.seed)
        if cfg.dry_run:
            from kvds.dry_run import dry_run

            dry_run(cfg)
            return 0
        from kvds.engine import leave_distributed
        from kvds.train import train

        train(cfg, stop)
        leave_distributed()
    except Preempted:
        leave_distributed()
        return EXIT_CODE
    except (InputError, RunError) as error:
        return _tell(str(error), 2 if isinstance(error, InputError) else 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        return _tell(f"{error.filename or 'output_dir'}: {error.strerror} (make room, then start again)", 1)
    return 0


def _tell(message: str, code: int) -> int:
    if os.environ.get("RANK", "0") == "0":
        print(f"kvds: error: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
