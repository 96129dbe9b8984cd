"""Rows of every form are judged: a chat's last turn behind the template's own prompt, a text by itself."""

import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Qwen2Config

from kvds.cli import main
from kvds.data.encoding import compare_rows, encode_examples, prompt_length
from kvds.data.example import Example, written_answer
from kvds.data.mixture import load_mixture
from kvds.data.ready_rows import ready_rows
from kvds.evaluation.model import evaluate_model
from tests.harness.chat_tokenizers import chat_tokenizer, qwen2_tokenizer, turns

CHAT = turns("system: S", "user: a", "assistant: b", "user: c?", "assistant: d e", reasoning="r")
ROWS = [{"messages": CHAT}, {"messages": turns("user: x", "assistant: y")}]
# Tokens of what is said would swallow the line end before it.
BLANKS = [{"messages": turns("user: a", "assistant: \n\n\n  b\n")}]


@pytest.fixture
def tokenizer():
    return chat_tokenizer()


def examples_of(folder, rows: list, tokenizer) -> list[Example]:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "rows.eval.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ready_rows(load_mixture([str(folder / "rows.jsonl")], "eval").examples, tokenizer, 200).examples


def model_of(tokenizer):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("which", ["bytes", "qwen2"])
def test_the_prompt_of_generation_is_the_templates(tmp_path, which):
    tokenizer = qwen2_tokenizer() if which == "qwen2" else chat_tokenizer()
    rows = ROWS + BLANKS
    examples = examples_of(tmp_path, rows, tokenizer)
    samples = encode_examples(examples, tokenizer, 200).samples
    assert compare_rows(samples, examples, tokenizer).lossy == 0
    for row, sample in zip(rows, samples, strict=True):
        asked = [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"][:-1]]
        expected = tokenizer.apply_chat_template(asked, tokenize=True, add_generation_prompt=True)["input_ids"]
        assert list(sample.input_ids[: prompt_length(sample)]) == expected


def test_an_answer_is_compared_without_its_trace():
    chat = Example("p", "r", "D e.", "c", "f:1", form="messages")
    assert {written_answer(chat, said) for said in ("<think>\nr\n</think>\n\nD  E", "x</think>d e", "d e.")} == {"d e"}
    assert written_answer(Example("p", "", "1,000", "c", "f:1", form="completion"), " $1000\n") == "1000"
    assert written_answer(Example("p", "", "5", "c", "f:1"), "x\n#### 5\ny") == "5"


def test_a_right_completion_is_an_exact_match(tmp_path, tokenizer, monkeypatch):
    examples = examples_of(tmp_path, ROWS, tokenizer)
    samples = encode_examples(examples, tokenizer, 200).samples
    known = {s.input_ids[: prompt_length(s)]: s.input_ids[prompt_length(s) :] for s in samples}
    model = model_of(tokenizer)

    def generate(input_ids, attention_mask, max_new_tokens):
        end, rows = model.generation_config.eos_token_id[0], []
        for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            prompt = tuple(token for token, real in zip(ids, mask, strict=True) if real)
            rows.append([*ids, *known[prompt]])
        width = max(map(len, rows))
        return torch.tensor([row + [end] * (width - len(row)) for row in rows])

    monkeypatch.setattr(model, "generate", generate)
    predictions = tmp_path / "predictions.jsonl"
    results = evaluate_model(
        model, tokenizer, examples, batch_size=2, max_new_tokens=9, max_length=200, progress=False,
        predictions_path=predictions,
    )  # fmt: skip
    assert results["all"]["exact_match"] == 1 and results["all"]["judged"] == 2
    assert [json.loads(line)["expected"] for line in predictions.read_text().splitlines()] == ["d e", "y"]


def test_a_text_has_a_cross_entropy_and_no_answer(tmp_path, tokenizer, caplog):
    examples = examples_of(tmp_path, [{"text": "abc def"}, {"text": "ghi"}], tokenizer)
    model = model_of(tokenizer)
    results = evaluate_model(
        model, tokenizer, examples, batch_size=2, max_new_tokens=4, max_length=200, progress=False,
        predictions_path=tmp_path / "predictions.jsonl",
    )["rows"]  # fmt: skip
    assert results["samples"] == 2 and results["judged"] == 0 and math.isnan(results["exact_match"])
    assert results["cut_completions"] == 0 and "cannot be written" not in caplog.text
    losses = []
    for row in encode_examples(examples, tokenizer, 200).samples:
        ids = torch.tensor(row.input_ids)
        with torch.no_grad():
            losses.append(cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum"))
    tokens = len("abc def") + len("ghi")  # and the end, without the first
    assert results["cross_entropy"] == pytest.approx(float(sum(losses)) / tokens, rel=1e-5)
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 2


def test_kvds_eval_reads_them(tmp_path, tokenizer, capsys):
    examples_of(tmp_path, ROWS, tokenizer)
    model_of(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    values = {"model": "model", "tokenizer": "tokenizer", "datasets": "rows.jsonl"}
    flags = ["eval", "--max_length", "200"]
    flags += [token for name, file in values.items() for token in (f"--{name}", str(tmp_path / file))]
    assert main(flags) == 2 and "has no chat template" in capsys.readouterr().err
    (tmp_path / "chat.jinja").write_text(chat_tokenizer().chat_template)
    flags += ["--chat_template", str(tmp_path / "chat.jinja"), "--max_new_tokens", "2"]
    assert main(flags) == 0
    assert "rows" in capsys.readouterr().out
    assert main([*flags, "--assistant_turns", "first"]) == 2
    assert "assistant_turns=first: expected one of all, last" in capsys.readouterr().err
