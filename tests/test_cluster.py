"""A launch file on a Slurm cluster of two nodes that is started for it: the shortest case of ``tests/cluster``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.multiprocess
def test_a_requeued_slurm_job_resumes_and_ends_as_a_run_on_one_host():
    # Runs of other tests in this process have made it a rank.
    left_out = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "tests/cluster/run.sh", "short"], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    if skipped:
        pytest.skip(skipped[0])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED rank.sbatch" in done.stdout
