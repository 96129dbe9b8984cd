"""Kernels are cross-compiled for the launches of training, without a GPU: no error, shared memory within the chip's,
spills no more than recorded.

Every launch of the nine problems that ``compile_gate.problems`` gives is compiled for sm_80 and sm_90.
The full enumeration (``python -m tests.ops.compile_gate --slow``) takes long and runs where ``KVDS_COMPILE_GATE=slow``
is set. After a change of the kernels that is known to be good, ``python -m tests.ops.compile_gate --record`` writes
spills and registers down anew, for the installed version of Triton; what it writes belongs into the commit that changes
them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

RECORD = Path(__file__).resolve().with_name("compile_gate.json")
SHARED_LIMIT = {80: 166_912, 90: 232_448}
SLOW = os.environ.get("KVDS_COMPILE_GATE") == "slow"


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    # A process of its own: this one interprets kernels, and that is decided when triton is imported.
    command = [sys.executable, "-m", "tests.ops.compile_gate", *(["--slow"] if SLOW else [])]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.timeout(14400 if SLOW else 900)
def test_every_launch_compiles_for_both_architectures(compiled: list[dict]) -> None:
    seen = {(row["arch"], row["launch"]) for row in compiled}
    for arch in SHARED_LIMIT:
        for mode in ("loss", "store", "given"):
            assert (arch, f"map_projection_kernel {mode}") in seen
        for small in ("weights_kernel", "sum_kernel", "scale_kernel", "fold_kernel", "count_kernel"):
            assert (arch, small) in seen
        assert {(arch, "mix_kernel store"), (arch, "unmix_kernel given")} <= seen
    for kernel in ("fused_kernel", "project_kernel"):
        assert (90, kernel) in seen
        assert (80, kernel) not in seen


def test_shared_memory_fits_the_chip(compiled: list[dict]) -> None:
    too_much = [row for row in compiled if row["shared"] > SHARED_LIMIT[row["arch"]]]
    assert not too_much


def test_states_are_written_sixteen_bytes_at_a_time(compiled: list[dict]) -> None:
    kernels = ("map_projection_kernel", "mix_kernel", "unmix_kernel", "fused_kernel", "project_kernel")
    large = [row for row in compiled if row["launch"].startswith(kernels)]
    assert large and not [row for row in large if row["narrow"]]


def test_spills_are_no_more_than_recorded(compiled: list[dict]) -> None:
    import triton

    record = json.loads(RECORD.read_text())
    version = ".".join(triton.__version__.split(".")[:2])
    if version not in record:
        pytest.skip(f"no record for Triton {version}: python -m tests.ops.compile_gate --record")
    # What only the full enumeration holds and nobody has recorded may not spill.
    found: dict[tuple[str, str], int] = {}
    for row in compiled:
        at = (row["problem"], str(row["arch"]))
        found[at] = max(found.get(at, 0), row["spills"])
    nothing = {"spills": 0}
    known = {at: record[version].get(at[0], {}).get(at[1], nothing)["spills"] for at in found}
    assert not {at: (spills, known[at]) for at, spills in found.items() if spills > known[at]}
