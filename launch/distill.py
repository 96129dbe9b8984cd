"""Distil a student through a teacher's keys and values: ``deepspeed [launcher flags] launch/distill.py --flag value
…``.

``--help`` lists every flag; ``--config launch/recipes/NAME.yaml`` sets any of them.
"""

import os
import sys
from pathlib import Path

# The launcher starts this file from any folder, with or without kvds installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kvds.config import parse_run_config
from kvds.errors import InputError
from kvds.rank_environment import adopt_slurm_ranks


def main() -> int:
    """Run and return the exit code: 0 done, 2 for a fault in the input."""
    try:
        adopt_slurm_ranks()
        cfg = parse_run_config(sys.argv[1:])
        from kvds.engine import leave_distributed
        from kvds.train import train

        train(cfg)
        leave_distributed()
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"kvds: error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
