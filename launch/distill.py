"""Distil a student through a teacher's keys and values: ``deepspeed [launcher flags] launch/distill.py --flag value
…``.

``--help`` lists every flag; ``--config launch/recipes/NAME.yaml`` sets any of them.
"""

import sys
from pathlib import Path

# The launcher starts this file from any folder, with or without kvds installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kvds.training.rank import run_rank


def main() -> int:
    """Run, or with ``--dry_run`` only check, and return the exit code: 0 done, 1 failed, 2 for a fault in the input, 85
    stopped with a checkpoint.
    """
    return run_rank(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
