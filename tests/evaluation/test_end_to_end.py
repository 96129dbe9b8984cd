"""``kvds eval`` from files to ``eval.json``, with a model that says one text whatever it is asked."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from kvds.cli import main
from kvds.data.encoding import encode_examples
from kvds.data.example import Example
from tests.harness.text_tokenizers import made

POSITIONS = 40


def parrot(folder: Path, tokenizer: Any, row: Example) -> Path:
    """A model that answers a prompt as long as the row's with the row's own completion: its embeddings of tokens and
    its layer are zero, those of positions are the axes, and the head turns each axis into the token after it.
    """
    [sample] = encode_examples([row], tokenizer, POSITIONS).samples
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=POSITIONS, n_embd=POSITIONS, n_layer=1, n_head=1, bos_token_id=0,
        eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.weight.fill_(1.0)
        model.transformer.wpe.weight.copy_(torch.eye(POSITIONS))
        for position, token in enumerate(sample.input_ids[1:]):
            model.lm_head.weight[token, position] = 9.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def no_constant(text: str) -> None:
    raise AssertionError(f"{text} is no JSON")


@pytest.fixture
def judge(tmp_path, capsys):
    """A function: exit code, ``eval.json`` and predictions of rows that the parrot of the first is judged by."""

    def run(
        tokenizer: Any, rows: list[dict[str, str]], *flags: str
    ) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
        first = Example(rows[0]["prompt"], rows[0].get("rationale", ""), rows[0]["answer"], "own", "own.jsonl:1")
        model = parrot(tmp_path / "model", tokenizer, first)
        (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": "never asked", "answer": "1"}) + "\n")
        (tmp_path / "own.eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = ["--datasets", str(tmp_path / "own.jsonl"), "--output", str(tmp_path / "out")]
        code = main(["eval", "--model", str(model), *data, *flags])
        lines = (tmp_path / "out/predictions.jsonl").read_text().splitlines()
        results = json.loads((tmp_path / "out/eval.json").read_text(), parse_constant=no_constant)
        return code, results, [json.loads(line, parse_constant=no_constant) for line in lines]

    return run


@pytest.mark.parametrize("normalizer", ["nfc", "nfkc"])
def test_answers_in_nfd_are_right_where_the_tokenizer_composes(normalizer, judge):
    rows = [{"prompt": f"p{i}", "rationale": "e\u0301", "answer": "Ce\u0301sar"} for i in range(3)]
    code, results, predictions = judge(made("bytes", normalizer), rows)
    assert code == 0 and results["all"]["exact_match"] == 1.0 and results["all"]["cross_entropy"] < 0.1
    assert {row["predicted"] for row in predictions} == {"césar"}


def test_one_long_prompt_cuts_itself_alone(judge):
    rows = [{"prompt": f"p{i}", "rationale": "a thought", "answer": "12"} for i in range(9)]
    rows.append({"prompt": "p" * (POSITIONS - 10), "answer": "12"})
    code, results, predictions = judge(made("bytes"), rows, "--batch_size", "10")
    assert code == 0 and results["all"]["samples"] == 10 and results["all"]["cut_completions"] == 1
    assert [row["correct"] for row in predictions] == [True] * 9 + [False]
    assert [row["cut"] for row in predictions] == [False] * 9 + [True]


def test_numbers_that_there_are_not_are_null_and_nothing_judged_is_no_success(judge, capsys):
    rows = [{"prompt": "p", "rationale": "a", "answer": "\N{SNOWMAN}"}]
    code, results, [row] = judge(made("letters"), rows, "--max_lossy_rows", "1")
    assert code == 1 and results["all"]["exact_match"] is None and results["all"]["judged"] == 0
    assert row["expected"] == "" and not row["correct"]
    assert "the answers of 1 of 1 rows cannot be written with the tokenizer" in capsys.readouterr().err
