"""Evaluation equals a plain Hugging Face computation, whatever the batch size and the number of ranks."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, Qwen2Config

from kvds.data.encoding import Segment, encode_examples
from kvds.data.example import Example, extract_answer
from kvds.data.synthetic import synthetic_examples
from kvds.data.tokenizer import train_problem_tokenizer
from kvds.evaluation.model import evaluate_model
from tests.harness.scaled_families import SCALED, small_scaled_config

LIMITS = {"max_new_tokens": 24, "max_length": 64, "progress": False}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_problem_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def tiny(family: str, vocab_size: int, positions: int = 128) -> nn.Module:
    torch.manual_seed(0)
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=vocab_size, n_layer=2, n_embd=32, n_head=2, n_positions=positions, initializer_range=0.3
        )  # fmt: skip
    elif family in SCALED:
        config = small_scaled_config(family, vocab_size=vocab_size)
    else:
        config = Qwen2Config(
            vocab_size=vocab_size, num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=positions, tie_word_embeddings=True, initializer_range=0.3,
        )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """Problems of several lengths, of two corpora."""
    problems = synthetic_examples("eval", problems=1, seed=0)[:13]
    renamed = [replace(e, corpus="other") if i % 3 == 0 else e for i, e in enumerate(problems)]
    return [*renamed, Example("Lee has 6 8 balls . ?", "", "6 8", "other", "short:1")]


def overfit(model: nn.Module, tokenizer, rows: list[Example]) -> nn.Module:
    """A model that knows the completions of ``rows`` by heart and of nothing else."""
    samples = encode_examples(rows, tokenizer, 64).samples
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    width = max(len(sample.input_ids) for sample in samples)
    ids = torch.full((len(samples), width), tokenizer.pad_token_id)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, sample in enumerate(samples):
        row = torch.tensor(sample.input_ids)
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
        labels[i, : len(row)] = torch.where(torch.tensor(sample.segment_ids) >= Segment.RATIONALE, row, -100)
    for _ in range(300):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.01:
            break
    return model.eval()


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "granite", "gemma2"])
def test_cross_entropy_is_the_mean_per_token_of_a_plain_computation(tokenizer, examples, family):
    model = tiny(family, len(tokenizer)).eval()
    expected: dict[str, list[torch.Tensor]] = {}
    for sample in encode_examples(examples, tokenizer, 64).samples:  # one row at a time, no padding, full logits
        ids, segments = torch.tensor(sample.input_ids), torch.tensor(sample.segment_ids)
        logits = model(ids[None]).logits[0, :-1].double()
        losses = F.cross_entropy(logits, ids[1:], reduction="none")[segments[1:] >= Segment.RATIONALE].detach()
        for corpus in (examples[sample.example].corpus, "all"):
            expected.setdefault(corpus, []).append(losses)
    results = evaluate_model(model, tokenizer, examples, batch_size=4, **LIMITS)
    assert set(results) == {"synthetic", "other", "all"}
    for corpus, losses in expected.items():
        mean = torch.cat(losses).mean().item()
        assert results[corpus]["cross_entropy"] == pytest.approx(mean, rel=1e-5)
        assert results[corpus]["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
        assert results[corpus]["samples"] == len(losses)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_generation_equals_one_row_without_padding_and_a_full_forward_per_token(tokenizer, examples, family, tmp_path):
    """Left padding, position ids and the cache change nothing: checked against argmax over growing unpadded rows."""
    model = tiny(family, len(tokenizer)).eval()
    evaluate_model(model, tokenizer, examples, batch_size=7, predictions_path=tmp_path / "p.jsonl", **LIMITS)
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [line["place"] for line in lines] == [example.place for example in examples]
    compared = 0
    for sample, line in zip(encode_examples(examples, tokenizer, 64).samples, lines, strict=True):
        prompt = sample.input_ids[: sample.segment_ids.count(Segment.PROMPT)]
        ids = list(prompt)
        while len(ids) < len(prompt) + LIMITS["max_new_tokens"]:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert line["completion"] == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        compared += len(ids) - len(prompt)
    assert compared > 100  # a random model babbles: there was something to compare


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_exact_match_counts_the_problems_known_by_heart(tokenizer, examples, family, tmp_path):
    known = examples[:5]
    model = overfit(tiny(family, len(tokenizer)), tokenizer, known)
    on_known = evaluate_model(model, tokenizer, known, batch_size=2, **LIMITS)
    assert on_known["all"]["exact_match"] == 1.0 and on_known["all"]["cross_entropy"] < 0.05
    # Answers that no completion of these rows holds: the same texts with an answer that is not the learned one.
    rows = [*known, *(replace(e, answer="9 9 9", corpus="wrong") for e in known[:2])]
    mixed = evaluate_model(model, tokenizer, rows, batch_size=3, predictions_path=tmp_path / "p.jsonl", **LIMITS)
    assert mixed["wrong"]["exact_match"] == 0.0 and mixed["all"]["exact_match"] == pytest.approx(5 / 7)
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [line["correct"] for line in lines] == [True] * 5 + [False] * 2
    assert lines[0]["predicted"] == lines[0]["expected"] == extract_answer(f"#### {known[0].answer}")
    # Too few tokens to reach the answer: nothing is right.
    cut = evaluate_model(model, tokenizer, known, batch_size=2, max_new_tokens=2, max_length=64, progress=False)
    assert cut["all"]["exact_match"] == 0.0


def test_batch_size_changes_nothing(tokenizer, examples):
    model = overfit(tiny("qwen2", len(tokenizer)), tokenizer, examples[:6])  # some right, some wrong
    one, seven = (evaluate_model(model, tokenizer, examples, batch_size=size, **LIMITS) for size in (1, 7))
    assert 0 < one["all"]["exact_match"] < 1
    for corpus, values in one.items():
        assert seven[corpus]["exact_match"] == values["exact_match"] and seven[corpus]["samples"] == values["samples"]
        assert seven[corpus]["cross_entropy"] == pytest.approx(values["cross_entropy"], rel=1e-6)


@pytest.mark.parametrize("world_size", [2, 9])
def test_ranks_together_give_what_one_gives(tokenizer, examples, world_size):
    rows = examples[:7]  # with 9 ranks two have nothing to do
    model = overfit(tiny("qwen2", len(tokenizer)), tokenizer, rows[:3])
    shares: list[torch.Tensor] = []

    def judge(rank: int, all_reduce) -> dict[str, dict[str, float]]:
        ranks = {"rank": rank, "world_size": world_size, "all_reduce": all_reduce}
        return evaluate_model(model, tokenizer, rows, batch_size=2, **ranks, **LIMITS)

    for rank in range(world_size):
        judge(rank, lambda sums: shares.append(sums.clone()))
    total = torch.stack(shares).sum(0)
    together = judge(world_size - 1, lambda sums: sums.copy_(total))
    alone = evaluate_model(model, tokenizer, rows, batch_size=2, **LIMITS)
    for corpus, values in alone.items():
        assert together[corpus] == pytest.approx(values, rel=1e-6)


def test_neither_modes_nor_random_states_nor_defaults_change(tokenizer, examples):
    model = tiny("gpt2", len(tokenizer)).train()
    model.transformer.h[1].eval()
    model.generation_config = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=3.0)
    modes = {name: module.training for name, module in model.named_modules()}
    weights, defaults = copy.deepcopy(model.state_dict()), copy.deepcopy(model.generation_config)
    state = torch.get_rng_state()
    first = evaluate_model(model, tokenizer, examples, batch_size=3, **LIMITS)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.generation_config.to_dict() == defaults.to_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    plain = tiny("gpt2", len(tokenizer)).eval()  # no dropout, and the sampling defaults above had no effect
    assert evaluate_model(plain, tokenizer, examples, batch_size=3, **LIMITS) == first


def test_rows_that_do_not_fit_are_left_out_and_counted(tokenizer, examples, caplog):
    model = tiny("qwen2", len(tokenizer)).eval()
    lengths = sorted(len(sample.input_ids) for sample in encode_examples(examples, tokenizer, 64).samples)
    limit = lengths[-1] - 1
    fitting = sum(length <= limit for length in lengths)
    caplog.set_level("WARNING", logger="kvds")
    options = {"batch_size": 4, "max_new_tokens": 4, "progress": False}
    results = evaluate_model(model, tokenizer, examples, max_length=limit, **options)
    assert 0 < results["all"]["samples"] == fitting < len(examples)
    assert f"{len(examples) - fitting} rows are longer than --max_length {limit}" in caplog.text
    nothing = evaluate_model(model, tokenizer, examples, max_length=3, **options)["all"]
    assert nothing["samples"] == 0 and math.isnan(nothing["cross_entropy"]) and math.isnan(nothing["exact_match"])


def test_generation_stays_within_learned_positions(tokenizer, examples):
    """GPT-2 has a row per position: asking for more tokens than are left must not index beyond the table."""
    samples = encode_examples(examples, tokenizer, 64).samples
    longest = max(len(sample.input_ids) for sample in samples)
    model = tiny("gpt2", len(tokenizer), positions=longest).eval()
    limits = {"max_new_tokens": 1000, "max_length": longest, "progress": False}
    results = evaluate_model(model, tokenizer, examples, batch_size=5, **limits)
    assert results["all"]["samples"] == len(examples)


def test_a_large_vocabulary_goes_through_the_head_in_chunks(tokenizer, examples, monkeypatch):
    import kvds.evaluation.model

    model = tiny("qwen2", len(tokenizer)).eval()
    whole = evaluate_model(model, tokenizer, examples, batch_size=7, **LIMITS)
    monkeypatch.setattr(kvds.evaluation.model, "_CHUNK_ELEMENTS", 5 * len(tokenizer))
    chunks: list[int] = []

    def record(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if output.dim() == 2:  # rows of counted positions; generation asks for [batch, 1, vocabulary]
            chunks.append(output.shape[0])

    hook = model.lm_head.register_forward_hook(record)
    chunked = evaluate_model(model, tokenizer, examples, batch_size=7, **LIMITS)
    hook.remove()
    assert max(chunks) == 5 and chunked["all"] == pytest.approx(whole["all"], rel=1e-6)


def test_predictions_of_several_ranks_are_files_of_their_own(tokenizer, examples, tmp_path):
    model = tiny("qwen2", len(tokenizer)).eval()
    path = tmp_path / "p.jsonl"
    for rank in range(2):
        evaluate_model(
            model, tokenizer, examples, batch_size=4, rank=rank, world_size=2, predictions_path=path, **LIMITS
        )  # fmt: skip
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["p-rank0.jsonl", "p-rank1.jsonl"]
    places = [json.loads(line)["place"] for file in files for line in file.read_text().splitlines()]
    assert sorted(places) == sorted(example.place for example in examples)
