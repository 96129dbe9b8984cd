"""The benchmark of the whole step: equal work in equal arms, counted operations, a table that its CSV repeats."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.train_step import bench as bench
from benchmarks.train_step import forms
from benchmarks.train_step.arms import ARMS, Workbench
from benchmarks.train_step.workbench import Clock, build_model, load_samples, make_loader, make_pair, needed_flops
from kvds.models import compiled_layers
from kvds.teacher.cache_shards import ShardReader
from kvds.teacher.teacher import Teacher

CPU = torch.device("cpu")


def test_table_csv_and_rates_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "trl" else found(name, *more))
    flags = ["--quick", "--no_memory", "--arms", "task_only", "teacher_forward", "kvds_flat", "trl_gkd"]
    assert bench.main([*flags, "--data_dir", str(tmp_path), "--output_dir", str(tmp_path), "--name", "x"]) == 0
    with (tmp_path / "x.csv").open() as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["task_only", "teacher_forward", "kvds_flat", "trl_gkd"]
    assert rows["trl_gkd"]["note"].startswith("not run: trl is not installed")
    assert (tmp_path / "x.png").stat().st_size > 1000
    kvds = rows["kvds_flat"]
    assert kvds["rounds"] == "3" and kvds["data"] == "lengths like gsm8k" and kvds["torch"] == torch.__version__
    # Three steps: their sum is between thrice the fastest and thrice the slowest.
    seconds = int(kvds["real_tokens"]) / float(kvds["tokens_per_second"])
    assert 3 * float(kvds["seconds_p20"]) <= seconds * 1.001 and seconds <= 3.003 * float(kvds["seconds_p80"])
    phases = sum(float(kvds[f"seconds_{name}"]) for name in ("teacher", "forward", "backward", "optimizer"))
    assert phases == pytest.approx(float(kvds["seconds_p50"]), rel=0.3)
    assert float(kvds["ratio_to_floor"]) > 0.9
    table = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[0] for line in table[-4:]] == list(rows)  # the table is printed last


def test_a_profile_says_where_a_step_s_time_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--quick", "--data_dir", str(tmp_path), "--output_dir", str(tmp_path), "--name", "x"]
    assert bench.main([*flags, "--profile", "kvds_structured", "kvds_structured_packed"]) == 0
    told = capsys.readouterr().out
    for name in ("kvds_structured", "kvds_structured_packed"):
        text = (tmp_path / f"x_profile_{name}.txt").read_text()
        assert "scaled_dot_product" in text and "Self CPU" in text
        assert text.splitlines()[0] in told and text.startswith(f"{name}: batches of ")
    assert "ms per step: " in told and not list(tmp_path.glob("*.csv"))


def test_arms_see_the_same_models_and_rows() -> None:
    pair = make_pair("tiny", Path(), None)
    samples, _ = load_samples(None, pair.student.vocab_size, 128, 8)
    [batch] = make_loader(samples, 8).step(0)
    losses = {}
    aligned = ("kvds_structured", "kvds_structured_checkpointing", "kvds_structured_overlap")
    for name in ("task_only", "plain_task", "kvds_structured_values", *aligned):
        own = Workbench(pair, CPU, Clock(CPU))
        losses[name] = float(ARMS[name](own).step(batch))
        assert all(p.grad is None for p in own.student.parameters())
        start = build_model(pair.student, pair.dtype, CPU, 2)
        assert any(not torch.equal(a, b) for a, b in zip(own.student.parameters(), start.parameters(), strict=True))
    assert losses["task_only"] == pytest.approx(losses["plain_task"], rel=1e-5)
    assert losses["kvds_structured"] == pytest.approx(losses["kvds_structured_checkpointing"], rel=1e-6)
    assert losses["kvds_structured"] == losses["kvds_structured_overlap"]
    assert losses["kvds_structured"] > losses["task_only"]
    assert losses["task_only"] < losses["kvds_structured_values"] != losses["kvds_structured"]


def test_a_prepared_step_of_a_teacher_ahead_runs_one_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair("tiny", Path(), None)
    samples, _ = load_samples(None, pair.student.vocab_size, 128, 8)
    batches = [make_loader(samples, 4).step(i)[0] for i in range(2)]
    run: list[object] = []
    call = Teacher.__call__
    monkeypatch.setattr(Teacher, "__call__", lambda self, batch, *rest: run.append(batch) or call(self, batch, *rest))
    arms = {
        name: ARMS[name](Workbench(pair, CPU, Clock(CPU))) for name in ("kvds_structured", "kvds_structured_overlap")
    }
    for batch in (*batches, *batches):
        losses = []
        for arm in arms.values():
            arm.prepare(batch)
            before = len(run)
            losses.append(float(arm.step(batch)))
            assert len(run) == before + 1
        assert losses[0] == losses[1]


def test_a_prepared_step_from_a_cache_finds_it_read(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair("tiny", Path(), None)
    samples, _ = load_samples(None, pair.student.vocab_size, 128, 8)
    batches = [make_loader(samples, 4).step(i)[0] for i in range(2)]
    running, cached = (
        ARMS[name](Workbench(pair, CPU, Clock(CPU), samples=samples))
        for name in ("kvds_structured", "kvds_structured_cached")
    )
    read: list[int] = []
    sample = ShardReader.sample
    monkeypatch.setattr(ShardReader, "sample", lambda self, i: read.append(i) or sample(self, i))
    for batch in (*batches, *batches):
        read.clear()
        cached.prepare(batch)
        assert set(batch.sample_ids.tolist()) <= set(read)
        assert float(cached.step(batch)) == pytest.approx(float(running.step(batch)), rel=1e-5)


@pytest.mark.parametrize("head", [True, False])
def test_needed_flops_are_those_of_the_matrix_products(head: bool) -> None:
    pair = make_pair("tiny", Path(), None)
    samples, _ = load_samples(None, pair.student.vocab_size, 128, 1)
    [batch] = make_loader(samples, 1).step(0)
    model = build_model(pair.teacher, pair.dtype, CPU, 1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        hidden = model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        if head:
            model.lm_head(hidden[batch.labels != -100])
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    tokens, heads = batch.input_ids.shape[1], pair.teacher.num_attention_heads
    attention = 4 * pair.teacher.num_hidden_layers * (tokens * (tokens + 1) // 2) * heads * (32 // heads)
    assert needed_flops(pair.teacher, batch, train=False, head=head) - attention == products
    three = needed_flops(pair.teacher, batch, train=True, head=head)
    assert three == 3 * needed_flops(pair.teacher, batch, train=False, head=head)


def test_padding_needs_no_flops() -> None:
    pair = make_pair("tiny", Path(), None)
    samples, _ = load_samples(None, pair.student.vocab_size, 128, 2)
    [batch] = make_loader(samples, 2).step(0)
    wider = dataclasses.replace(
        batch,
        **{
            name: torch.nn.functional.pad(getattr(batch, name), (0, 9), value=-100 if name == "labels" else 0)
            for name in ("input_ids", "attention_mask", "labels", "segment_ids")
        },
    )
    assert needed_flops(pair.student, wider, train=True, head=True) == needed_flops(
        pair.student, batch, train=True, head=True
    )


def test_forms_of_a_batch_see_the_same_rows_and_losses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_layers, "BACKEND", "eager")
    flags = ["--pair", "tiny", "--rows", "4", "12", "--batches", "2", "--passes", "1", "--tokens_per_batch", "1024"]
    forms.main(
        [
            *flags,
            "--forms",
            *forms.FORMS,
            "--zero_forms",
            "--data_dir",
            str(tmp_path),
            "--output",
            str(tmp_path / "x.csv"),
        ]
    )
    with (tmp_path / "x.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["form"], int(row["rows"])) for row in rows] == [(name, n) for name in forms.FORMS for n in (4, 12)]
    for count in ("4", "12"):
        of_count = [row for row in rows if row["rows"] == count]
        # The first micro-batch of a step that is cut holds part of it; whole steps have one loss.
        whole = [float(row["task"]) for row in of_count if float(row["micro_batches"]) == 1 and row["task"]]
        assert len(whole) >= 2 and whole == pytest.approx([whole[0]] * len(whole), rel=1e-4)
        run = {row["form"]: float(row["tokens_run"]) for row in of_count}
        assert run["one row"] == run["one row, compiled"] < run["padded"] == run["padded, masked"]
    assert max(float(row["micro_batches"]) for row in rows) > 1
    table = capsys.readouterr().out.strip().splitlines()
    assert len(table) == 2 * len(rows) + 2 and table[-1].startswith("| one row, compiled; kv and logits | 12 |")
