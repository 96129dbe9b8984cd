"""The benchmark of the head on a small vocabulary: every arm makes the same losses and gradients."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks.bench_head import COLUMNS, main


def test_arms_agree_and_are_written(tmp_path: Path) -> None:
    file = tmp_path / "head.csv"
    flags = ["--tokens", "40", "--rows", "300", "--vocab_size", "1000", "--rounds", "1", "--output", str(file)]
    found = main(flags)
    with file.open() as stream:
        written = list(csv.DictReader(stream))
    assert len(found) == len(written) == 6 and set(COLUMNS) <= set(written[0])
    for rows in (found[:3], found[3:]):
        assert [row["arm"] for row in rows] == ["recomputed", "small chunks", "large chunks"]
        for row in rows:
            assert float(str(row["loss"])) == pytest.approx(float(str(rows[0]["loss"])), rel=1e-6)
            assert float(str(row["gradient_off"])) < 1e-5 and float(str(row["ms"])) > 0
    assert found[3]["loss"] != found[0]["loss"]
