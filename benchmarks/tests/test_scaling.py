"""What ``benchmarks/bench_scaling.py`` makes of its runs; the runs themselves are those of any launch."""

import csv
import subprocess
import sys

import pytest

from benchmarks import bench_scaling

SPEED = {1: 100.0, 2: 150.0}  # of a whole teacher, on so many GPUs


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs the script's ``main`` with runs that take no time; the rows of its CSV, and what was asked for."""
    asked, configs = [], []

    def train(gpus, flags, log):
        placement = flags["teacher_placement"]
        asked.append((placement, gpus, flags["pad_to_multiple_of"]))
        configs.append(flags["deepspeed_config"])
        if placement == "zero3":
            raise subprocess.CalledProcessError(7, ["deepspeed", "a", "long", "command"])
        speed = SPEED[gpus] / (1 if placement == "replicated" else 2)
        # The first half of a run is slower: shapes are new.
        return [
            {"step": step, "perf/tokens_per_second": speed * (0.5 if step <= 8 else 1), "perf/peak_memory_bytes": 2**31}
            | {f"perf/seconds_{phase}": 0.4 for phase in bench_scaling.SPENT}
            for step in (4, 8, 12, 16)
        ]

    def run(*words):
        monkeypatch.setattr(bench_scaling, "train", train)
        monkeypatch.setattr(bench_scaling, "make_models", lambda *_: {})
        monkeypatch.setattr(
            sys,
            "argv",
            ["bench_scaling.py", "--questions", "weak", "--output_dir", str(tmp_path), "--name", "x", *words],
        )
        code = bench_scaling.main()
        with (tmp_path / "x.csv").open(newline="") as file:
            return code, list(csv.DictReader(file)), asked

    run.configs = configs
    return run


def test_every_placement_on_every_number_of_gpus_beside_one_gpu(bench):
    code, rows, asked = bench("--gpus", "1", "2", "--placements", "replicated", "zero3_offload", "tensor_parallel")
    assert code == 0
    assert asked == [
        ("replicated", 1, 64), ("replicated", 1, 1), ("replicated", 2, 64),
        ("zero3_offload", 1, 64), ("zero3_offload", 2, 64), ("tensor_parallel", 2, 64),
    ]  # fmt: skip
    linear = [row["percent_of_linear"] for row in rows]
    assert [float(share) if share else None for share in linear] == [100, None, 75, 50, 37.5, 37.5]
    assert float(rows[0]["tokens_per_second"]) == 100  # the second half
    assert float(rows[0]["from_start"]) == pytest.approx(4 / (2 / 50 + 2 / 100))
    assert float(rows[0]["teacher_ms"]) == pytest.approx(100) and float(rows[0]["peak_gib"]) == 2


def test_each_zero_stage_scales_against_itself(bench):
    placements = ("--placements", "replicated", "--pad_to_multiple_of", "64")
    _, rows, asked = bench(
        "--gpus", "1", "2", *placements, "--deepspeed_config", "a.json", "--stages", "zero0", "zero2"
    )
    assert asked == [("replicated", gpus, 64) for _ in range(3) for gpus in (1, 2)]
    assert bench.configs == [
        name for name in ("a.json", "ds_configs/zero0.json", "ds_configs/zero2.json") for _ in "12"
    ]
    assert [float(row["percent_of_linear"]) for row in rows] == [100, 75] * 3


def test_a_run_that_fails_is_told_and_does_not_stop_the_rest(bench):
    code, rows, _ = bench("--gpus", "2", "--placements", "zero3", "tensor_parallel", "--pad_to_multiple_of", "64")
    assert code == 1
    assert [row["note"] for row in rows] == ["failed: exit code 7, see x.log", ""]
    assert rows[0]["tokens_per_second"] == "" and float(rows[1]["tokens_per_second"]) == 75


def test_no_run_is_started_after_its_time(bench):
    code, rows, asked = bench("--gpus", "1", "--placements", "replicated", "--minutes", "0")
    assert code == 0 and asked == [] and {row["note"] for row in rows} == {"not started: out of time"}


def test_a_run_is_ended_once_its_last_step_is_recorded(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 4, "perf/tokens_per_second": 1.0}\n{"step": 8, "perf/tokens_per_second": 2.0}\n')
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        records = bench_scaling._recorded(process, metrics, 8)
        assert [record["step"] for record in records] == [4, 8] and process.poll() is None
    finally:
        process.kill()
        process.wait()
    with pytest.raises(subprocess.CalledProcessError):
        bench_scaling._recorded(process, metrics, 12)
