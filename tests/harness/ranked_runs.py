"""Runs several configurations one after the other on the ranks of one launch: ``deepspeed tests/harness/ranked_runs.py
RUNS.json``.

``RUNS.json`` maps a run's name to its flags. One launch for many runs keeps the suite short. ``fetched.json`` beside it
says for each run how often ZeRO-3 gathered weights for modules of which class.
"""

import gc
import json
import os
import sys
from collections import Counter
from pathlib import Path

from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from kvds.config.recipe import parse_run_config
from kvds.distillation import head_chunks
from kvds.distributed.process_group import leave_distributed
from kvds.models import compiled_layers
from kvds.training.run import train

if __name__ == "__main__":
    [runs] = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    fetch, fetched = PartitionedParameterCoordinator.fetch_sub_module, {}

    def noted(self, module, *arguments, **keywords):
        fetched[name][type(module).__name__] += 1
        return fetch(self, module, *arguments, **keywords)

    PartitionedParameterCoordinator.fetch_sub_module = noted
    head_chunks._CHUNK_BYTES = 2**14  # several chunks at the head, of most micro-batches not as many on each rank
    compiled_layers.BACKEND = "aot_eager"  # the pieces and their gradients, without a compiler's minute
    gc.freeze()  # a run collects garbage between its models: half of a small one's time went over what was imported
    for name, flags in json.loads(Path(runs).read_text()).items():
        fetched[name] = Counter()
        cfg = parse_run_config(flags)
        train(cfg, draw_report=cfg.report_to != "none")  # a picture of each would be a quarter of its time
    gc.unfreeze()
    if os.environ["RANK"] == "0":
        Path(runs).with_name("fetched.json").write_text(json.dumps(fetched))
    leave_distributed()
