"""``kvds data``: rows as the model reads them, coloured on a terminal and plain elsewhere."""

import json
import sys

import pytest

from kvds.cli import main
from tests.harness.chat_tokenizers import chat_tokenizer, turns


@pytest.fixture
def folder(tmp_path):
    chat_tokenizer().save_pretrained(tmp_path / "tokenizer")
    rows = [{"messages": turns(f"user: {i}", "assistant: yes " * (1 + 9 * (i == 3)))} for i in range(20)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "table.csv").write_text("question,answer\n" + "".join(f"{i}?,{i}\n" for i in range(20)))
    return tmp_path


def data(folder, *flags: str) -> int:
    return main(["data", "--tokenizer_name", str(folder / "tokenizer"), *flags])


def test_rows_counts_and_reasons(folder, capsys, monkeypatch):
    names = [str(folder / "chat.jsonl"), str(folder / "table.csv")]
    how = ["--columns", "auto", "prompt=question,answer=answer", "--max_length", "70", "--show", "1"]
    assert data(folder, "--datasets", *names, *how) == 0
    out, err = capsys.readouterr()
    assert "chat.jsonl:1 (chat, messages)" in out and "[answer 5] yes <|im_end|>" in out
    assert "table.csv:2 (table, reasoning)" in out and "[answer 7] #### 0<|im_end|>" in out
    assert out.count(" tokens, ") == 2 and "\x1b" not in out
    assert "1 rows longer than --max_length 70 left out" in out
    assert "read as messages (by its columns: messages)" in err
    assert "read as reasoning (--columns: question as prompt, answer)" in err
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert data(folder, "--datasets", names[0], "--max-length", "70", "--split", "eval") == 0
    assert "\x1b[32myes <|im_end|>\x1b[0m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert data(folder, "--datasets", names[0], "--max_length", "70") == 0
    assert "\x1b" not in capsys.readouterr().out


def test_a_recipe_says_what_its_run_would_read(folder, capsys):
    recipe = {
        "student_name": "x", "tokenizer_name": str(folder / "tokenizer"), "alignment_mode": "none",
        "datasets": str(folder / "table.csv"), "columns": "prompt=question,completion=answer",
    }  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(recipe))
    assert main(["data", str(folder / "run.yaml"), "--show", "1", "--data_format", "messages"]) == 0
    assert "<|im_start|>user\n0?<|im_end|>" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--datasets", "table.csv"], "its columns (answer, question) are those of no format"),
        (["--datasets", "chat.jsonl", "--show", "-1"], "--show -1: expected at least 0"),
        (["--datasets", "chat.jsonl", "--columns", "messages=chat"], "has no column chat; expected one of messages"),
        (["--datasets", "chat.jsonl", "--eval_subset_size", "0", "--split", "eval"], "eval_subset_size=0: no row"),
        (["--datasets", "chat.jsonl", "--chat_template", "chat.jsonl"], "the chat template"),
        (["--datasets", "nobody.parquet"], "datasets=nobody.parquet: expected an existing file of rows"),
    ],
)
def test_faults_are_one_line(folder, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(folder)
    assert data(folder, *flags) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert message in line


def test_without_a_tokenizer(capsys):
    assert main(["data", "--datasets", "synthetic"]) == 2
    assert "--tokenizer_name is missing" in capsys.readouterr().err
