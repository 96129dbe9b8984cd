"""A launch file on a Slurm cluster of two nodes that is started for it: the shortest case of ``tests/cluster``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.multiprocess
def test_a_requeued_slurm_job_resumes_and_ends_as_a_run_on_one_host():
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "tests/cluster/run.sh", "short"], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    if skipped:
        pytest.skip(skipped[0])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED rank.sbatch" in done.stdout
