"""The launch files on a real Slurm cluster, on two hosts and from a folder of wheels: each part of ``tests/cluster``.

A part that this machine does not allow is skipped with the reason that ``tests/cluster/run.sh`` gives.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
# What each part prints when a case of it has ended well begins like this.
PARTS = {
    "slurm": [
        "rank.sbatch, one rank per task",
        "ab_array.sbatch: an array of four",
        "node.sbatch, one launcher per node",
    ],
    "namespaces": ["deepspeed --no_ssh on two hosts", "a cut cable: both sides ended with a reason"],
    "wheelhouse": ["wheelhouse: installed and imported without a network"],
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """Where the first part leaves the run that others compare theirs with."""
    return tmp_path_factory.mktemp("cluster") / "host"


@pytest.mark.multiprocess
@pytest.mark.parametrize("part", PARTS)
def test_all_cases_end_well(part, reference):
    # Runs of other tests in this process have made it a rank.
    left_out = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment["KVDS_REFERENCE"] = str(reference)
    done = subprocess.run(
        ["bash", "tests/cluster/run.sh", part], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    if skipped:
        pytest.skip(skipped[0])
    assert done.returncode == 0, done.stdout + done.stderr
    for case in PARTS[part]:
        assert f"PASSED {case}" in done.stdout, done.stdout
