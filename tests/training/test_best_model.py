"""The student of the best evaluation is left, training ends where there is no better, and a resumed run knows both."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvds.experiment.workers import Worker, worker_environment
from kvds.training.best_model import BestModel

pytestmark = pytest.mark.usefixtures("alone")


def best_of(folder: Path, metric: str = "cross_entropy", patience: int = 0, keep: bool = True) -> BestModel:
    cfg: Any = SimpleNamespace(
        metric_for_best_model=metric, load_best_model_at_end=keep, early_stopping_patience=patience
    )
    return BestModel(cfg, folder, main_rank=True)


def judge(best: BestModel, step: int, value: float, metric: str = "cross_entropy") -> None:
    def export(folder: Path) -> None:
        (folder / "student").mkdir()
        (folder / "student/weights").write_text(str(step))
        (folder / "map_aligner.pt").write_text(str(step))

    best.judge(step, {"all": {metric: value}}, export)


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "best").iterdir())


@pytest.mark.parametrize(("metric", "sign"), [("cross_entropy", 1), ("kv_loss", 1), ("exact_match", -1)])
def test_less_loss_or_more_right_answers_are_better(metric: str, sign: int, tmp_path: Path) -> None:
    best = best_of(tmp_path, metric, patience=2)
    for step, value in enumerate([3.0, 2.0, 2.0, math.nan], start=1):  # as good is no better, nor is what is no number
        assert not best.exhausted
        judge(best, step, sign * value, metric)
    assert best.step == 2 and best.exhausted and kept(tmp_path) == ["step-000002"]
    judge(best, 5, sign * 1.0, metric)
    assert best.step == 5 and not best.exhausted and kept(tmp_path) == ["step-000005"]


def test_without_patience_no_run_ends_and_unasked_nothing_is_kept(tmp_path: Path) -> None:
    best = best_of(tmp_path, keep=False)
    for step in range(1, 9):
        judge(best, step, float(step))
    assert not best.exhausted and not (tmp_path / "best").exists()
    assert best.settle(9, {"all": {"cross_entropy": 9.0}})[0] == 9


def test_the_best_student_is_left_unless_the_last_is_better(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student/weights").write_text("last")
    best = best_of(tmp_path)
    judge(best, 2, 1.0)
    assert best.settle(4, {"all": {"cross_entropy": 0.5}}) == (4, {"all": {"cross_entropy": 0.5}})
    assert (tmp_path / "student/weights").read_text() == "last"
    assert best.settle(4, {"all": {"cross_entropy": 1.5}}) == (2, {"all": {"cross_entropy": 1.0}})
    assert (tmp_path / "student/weights").read_text() == (tmp_path / "map_aligner.pt").read_text() == "2"


def test_evaluations_that_judge_nothing_end_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    best = best_of(tmp_path, "exact_match", patience=2)
    for step in range(1, 5):
        judge(best, step, math.nan, "exact_match")
    assert not best.exhausted and "no held-out row has a exact_match" in caplog.text
    judge(best, 5, 0.5, "exact_match")
    judge(best, 6, math.nan, "exact_match")
    judge(best, 7, 0.4, "exact_match")
    assert best.exhausted and best.step == 5


def test_a_resumed_run_has_the_best_of_its_checkpoint(tmp_path: Path) -> None:
    best = best_of(tmp_path, patience=2)
    judge(best, 1, 2.0)
    judge(best, 2, 3.0)
    state = json.loads(json.dumps(best.state))
    best.saved()
    judge(best, 3, 1.0)  # after the checkpoint: the run is killed here
    assert kept(tmp_path) == ["step-000001", "step-000003"]
    again = best_of(tmp_path, patience=2)
    again.restore(state)
    assert again.step == 1 and not again.exhausted and kept(tmp_path) == ["step-000001"]
    judge(again, 3, 2.5)
    assert again.exhausted and again.step == 1
    best_of(tmp_path).restore({})  # a checkpoint of an earlier version


def test_a_run_ends_early_and_leaves_its_best_student(tmp_path: Path) -> None:
    settings = {
        "model_name": "launch/quickstart_teacher", "alignment_mode": "none", "synthetic_problems": 16, "max_steps": 12,
        "batch_size": 4, "max_length": 64, "eval_subset_size": 4, "max_new_tokens": 2, "eval_steps": 1, "save_steps": 0,
        "lr": 0.02, "load_best_model_at_end": True, "early_stopping_patience": 2, "report_to": "none",
        "deepspeed_config": "ds_configs/zero0_fp32.json", "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    worker = Worker(tmp_path / "log", worker_environment(0, ["cpu"]))
    try:
        for _ in range(2):  # the second finds that nothing is left to do
            answer = worker.ask({"settings": settings, "ranks": 1, "in_process": True}, None)
            assert answer["status"] == "finished", answer
    finally:
        worker.stop()
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = {r["step"]: r["eval/all/cross_entropy"] for r in records if "eval/all/cross_entropy" in r}
    best = min(losses, key=lambda step: losses[step])
    assert list(losses) == list(range(1, best + 3)) and best + 2 < 12, losses  # each step once
    assert json.loads((tmp_path / "run/eval.json").read_text())["all"]["cross_entropy"] == losses[best]
    student, kept_student = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / place).state_dict()
        for place in ("student", f"best/step-{best:06d}/student")
    )
    assert all(torch.equal(student[name], weight) for name, weight in kept_student.items())
    assert f"step {best + 2}: no better evaluation since step {best}, training ends" in (tmp_path / "log").read_text()
