"""``launch/smoke.sh``: both alignments on both families, with the real tokenizers and real text, through the
launcher.
"""

import os
import subprocess
from pathlib import Path

import pytest

from tests.harness.real_data import data_folder

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.multiprocess
def test_smoke_script_passes(tmp_path):
    folder = data_folder()
    done = subprocess.run(
        ["bash", "launch/smoke.sh", str(folder), str(tmp_path / "smoke")],
        cwd=REPOSITORY,
        env={**os.environ},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    passed = [line for line in done.stdout.splitlines() if line.startswith("smoke: ")]
    assert [line.split(" in ")[0] for line in passed] == [
        f"smoke: {family} {mode}" for family in ("gpt2", "qwen2") for mode in ("flat", "structured")
    ]
