"""What a run makes of its rows, with tokenizers that have no pad token and beside a model's own configuration."""

import json

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config

from kvds.data.tokenizer import train_problem_tokenizer
from kvds.errors import InputError
from kvds.kv import select_tokens
from tests.harness.real_data import data_folder
from tests.harness.small_run_data import load


def rows_file(folder, prompts: list[str], name: str = "own.jsonl") -> str:
    rows = [{"prompt": prompt, "rationale": "r", "answer": "a"} for prompt in prompts]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


@pytest.fixture(scope="module")
def problem_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_problem_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def gpt2():
    tokenizer = AutoTokenizer.from_pretrained(data_folder() / "tokenizers/gpt2")
    tokenizer.pad_token = None
    return tokenizer


def test_without_a_pad_token_the_end_token_pads_and_still_counts_once_per_row(gpt2, tmp_path):
    assert gpt2.pad_token_id is None
    data = load(gpt2, tmp_path, max_length=200)
    for step in range(data.loader.steps_per_epoch):
        [batch] = data.loader.step(step)
        real = batch.sample_ids >= 0
        assert (batch.labels == gpt2.eos_token_id).sum(1).tolist() == real.long().tolist()
        assert (batch.input_ids[batch.segment_ids == 0] == gpt2.eos_token_id).all()
        assert (batch.labels[batch.segment_ids <= 1] == -100).all()


@pytest.mark.parametrize("mask_first", [True, False])
def test_rows_of_padding_select_nothing_and_the_normalizer_counts_the_rest(problem_tokenizer, tmp_path, mask_first):
    first = "true" if mask_first else "false"
    data = load(problem_tokenizer, tmp_path, kv_method="right_crop", kv_budget=7, mask_first_token=first)
    [last] = data.loader.step(data.loader.steps_per_epoch - 1)
    assert last.sample_ids.tolist()[1:] == [-1, -1, -1]  # 21 rows, 4 a step
    selection = select_tokens("right_crop", 7, last.segment_ids, last.attention_mask, mask_first_token=mask_first)
    counts = selection.mask.sum(1)
    assert counts[1:].sum() == 0
    assert int(counts.sum()) == last.position_normalizer == 7


def test_long_rows_are_counted_in_the_log(problem_tokenizer, tmp_path, caplog):
    path = rows_file(tmp_path, ["Lee has 12 balls?", "Ann has 34 pens?" * 40, "Bob has 56 cups?"])
    rows_file(tmp_path, ["Eva has 78 nuts?"], "own.eval.jsonl")
    with caplog.at_level("INFO", "kvds"):
        data = load(problem_tokenizer, tmp_path, datasets=path)
    assert "1 rows are longer than --max_length 64" in caplog.text and "2 rows to train on" in caplog.text
    assert data.loader.steps_per_epoch == 1
    assert [example.prompt for example in data.eval_examples] == ["Eva has 78 nuts?"]


def test_nothing_short_enough_is_an_error(problem_tokenizer, tmp_path):
    with pytest.raises(
        InputError, match=r"--datasets synthetic: no usable row is left \(21 longer than --max_length 9\)"
    ):
        load(problem_tokenizer, tmp_path, max_length=9)


def test_evaluation_takes_its_share_of_each_corpus_in_order(problem_tokenizer, tmp_path):
    for name in ("a", "b"):
        rows_file(tmp_path, ["p"], f"{name}.jsonl")
        rows_file(tmp_path, [f"{name}{i}" for i in range(3)], f"{name}.eval.jsonl")
    names = f"{tmp_path / 'a.jsonl'} {tmp_path / 'b.jsonl'}"
    data = load(problem_tokenizer, tmp_path, datasets=names, eval_subset_size=2)
    assert [example.prompt for example in data.eval_examples] == ["a0", "a1", "b0", "b1"]
    assert data.eval_loader.sample_ids(0) == [0, 1, 2, 3]
    nothing = load(problem_tokenizer, tmp_path, datasets=names, eval_subset_size=0)
    assert nothing.eval_examples == [] and nothing.eval_loader is None


def test_the_problem_tokenizer_reads_the_same_beside_a_model(problem_tokenizer, tmp_path):
    """transformers chooses a tokenizer's kind by the config.json beside it."""
    Qwen2Config(vocab_size=len(problem_tokenizer)).save_pretrained(tmp_path)
    problem_tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen2"
    beside = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Lee has 68 balls eats 2 sells 1?\n68-2=48-1=38\n#### 38", "  a\n\nb\tc Zoë", "123 4", ""):
        assert beside(text)["input_ids"] == problem_tokenizer(text)["input_ids"]
    assert (beside.eos_token_id, beside.pad_token_id) == (
        problem_tokenizer.eos_token_id,
        problem_tokenizer.pad_token_id,
    )
    assert torch.equal(
        *(t(["a", "a b"], padding=True, return_tensors="pt")["input_ids"] for t in (beside, problem_tokenizer))
    )


@pytest.mark.parametrize(("multiple", "expected"), [(1, 64), (96, 96)])
def test_one_row_is_a_multiple_and_within_its_budget(problem_tokenizer, tmp_path, multiple, expected):
    budget = {"tokens_per_batch": 200, "pad_to_multiple_of": multiple, "gradient_accumulation_steps": 4}
    data = load(problem_tokenizer, tmp_path, max_length=100, **budget)
    padded = load(problem_tokenizer, tmp_path, max_length=100, gradient_accumulation_steps=4)
    for step in range(data.loader.steps_per_epoch):
        rows = [batch.input_ids.shape for batch in data.loader.step(step)]
        assert all(height == 1 and width <= 200 and (width % expected == 0 or width == 200) for height, width in rows)
        assert data.loader.sample_ids(step) == padded.loader.sample_ids(step)
        assert all(batch.packing.longest == 100 for batch in data.loader.step(step))
    assert data.eval_loader is None or all(b.packing is None for b in data.eval_loader.step(0))  # judged in padded rows
