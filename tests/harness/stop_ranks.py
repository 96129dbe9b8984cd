"""A run without a model: steps until it is asked to stop, then all ranks leave together, each with a line that says so.

``LAUNCHER tests/harness/stop_ranks.py FOLDER``; rank r writes ``FOLDER/pid-r``, then ``FOLDER/left-r`` with why and
when.
"""

import os
import sys
import time
from pathlib import Path

from kvds.distributed.preemption import EXIT_CODE, Preempted, StopRequest

if __name__ == "__main__":
    stop = StopRequest().install()
    [folder] = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    from torch import distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    stop.join()
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    deadline = time.monotonic() + 120  # nothing stays behind where the test itself is killed
    step = 0
    try:
        while time.monotonic() < deadline:
            step += 1
            stop.check()
            time.sleep(0.02)
    except Preempted as reason:
        (folder / f"left-{rank}").write_text(f"{step} {reason}")
        dist.barrier()
        dist.destroy_process_group()
        sys.exit(EXIT_CODE)
