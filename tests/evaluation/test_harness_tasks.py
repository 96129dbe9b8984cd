"""``kvds eval --tasks`` judges a student by lm-evaluation-harness, here on a task of three rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvds.cli import main
from kvds.config import extras

MODEL = Path(__file__).resolve().parents[2] / "launch/quickstart_teacher"
ROWS = [
    {"question": "2 + 3 = ", "choices": ["5", "9"], "label": 0},
    {"question": "4 + 4 = ", "choices": ["1", "8"], "label": 1},
    {"question": "7 - 6 = ", "choices": ["1", "3"], "label": 0},
]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the task ``three_sums``."""
    pytest.importorskip("lm_eval", reason="pip install 'kvds[tasks]'")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = {
        "task": "three_sums", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{folder}/rows.jsonl"}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "label", "target_delimiter": "", "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (folder / "three_sums.yaml").write_text(json.dumps(task))  # JSON is YAML
    return folder


@torch.no_grad()
def right_choices() -> float:
    """The share of rows whose right choice the model finds the likeliest, by hand."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL).eval(), AutoTokenizer.from_pretrained(MODEL)
    right = 0
    for row in ROWS:
        prompt, scores = tokenizer(row["question"])["input_ids"], []
        for choice in row["choices"]:  # type: ignore[attr-defined]
            ids = tokenizer(row["question"] + choice)["input_ids"]  # type: ignore[operator]
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(float(logs[place - 1, ids[place]]) for place in range(len(prompt), len(ids))))
        right += scores.index(max(scores)) == row["label"]
    return right / len(ROWS)


def test_a_task_of_ones_own_is_judged_and_written(tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    argv = ["eval", "--model", str(MODEL), "--tasks", "three_sums", "--include_path", str(tasks), "--batch_size", "2"]
    assert main([*argv, "--output", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out/tasks.json").read_text())
    assert found["three_sums"]["acc"] == pytest.approx(right_choices())
    assert f"three_sums  acc                           {right_choices():.4f}" in capsys.readouterr().out


def test_what_the_harness_cannot_do_is_told_in_one_line(tasks: Path, capsys: pytest.CaptureFixture) -> None:
    argv = ["eval", "--model", str(MODEL)]
    for more, told in (
        (["--tasks", "three_sum", "--include_path", str(tasks)], "--tasks three_sum: no task of lm-evaluation-harness"),
        (["--tasks", "x", "--include_path", "/nowhere"], "--include_path /nowhere: no such folder"),
        (["--tasks", "x", "--num_fewshot", "-1"], "--num_fewshot -1: expected at least 0"),
        (["--num_fewshot", "2"], "--num_fewshot 2: expected it with --tasks alone"),
    ):
        assert main([*argv, *more]) == 2
        assert told in capsys.readouterr().err


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda package: None)
    assert main(["eval", "--model", str(MODEL), "--tasks", "gsm8k"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kvds: error: kvds eval --tasks: lm_eval is not installed (pip install 'kvds[tasks]')")
