"""Runs several configurations one after the other on the ranks of one launch: ``deepspeed tests/ranked_runs.py
RUNS.json``.

``RUNS.json`` maps a run's name to its flags. One launch for many runs keeps the suite short.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kvds.config_input import parse_run_config
from kvds.engine import leave_distributed
from kvds.train import train

if __name__ == "__main__":
    [runs] = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    for flags in json.loads(Path(runs).read_text()).values():
        train(parse_run_config(flags))
    leave_distributed()
