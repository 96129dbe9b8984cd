"""The benchmark of a fixed order of sums on tiny models: every arm in both orders, the same bits on a CPU."""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from benchmarks.bench_deterministic import main


def test_arms_are_timed_in_both_orders_and_written(tmp_path: Path) -> None:
    file = tmp_path / "deterministic.csv"
    flags = ["--pair", "tiny", "--rounds", "1", "--batch_size", "2", "--max_length", "64", "--data_dir", str(tmp_path)]
    found = main([*flags, "--arms", "task_only", "kvds_structured_packed", "--output", str(file)])
    with file.open() as stream:
        written = list(csv.DictReader(stream))
    assert [row["arm"] for row in written] == ["task_only"] * 2 + ["kvds_structured_packed"] * 2
    assert [row["order"] for row in written] == ["any", "fixed"] * 2
    assert [row["ratio"] for row in written][::2] == ["1.000", "1.000"] and all(float(row["ms"]) > 0 for row in written)
    if not torch.cuda.is_available():
        assert all(row["same_bits"] for row in found)
    assert not torch.are_deterministic_algorithms_enabled()
