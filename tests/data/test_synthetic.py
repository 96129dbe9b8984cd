"""The built-in problems and their tokenizer."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from kvds.data.encoding import encode_examples
from kvds.data.example import completion_text, extract_answer, prompt_text
from kvds.data.synthetic import EVAL_PROBLEMS, GAINS, LOSSES, synthetic_examples
from kvds.data.tokenizer import train_problem_tokenizer

SHIPPED = Path(__file__).resolve().parents[2] / "launch" / "quickstart_teacher"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_problem_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def problems(seed: int = 0, count: int = 3000):
    return synthetic_examples("train", problems=count, seed=seed)


def solve(prompt: str) -> tuple[str, str]:
    """Rationale and answer, computed a second way: from the text of the prompt."""
    total = int(re.search(r"has (\d\d)", prompt)[1][::-1])
    rationale = f"{total:02}"[::-1]
    for verb, amount in re.findall(r"(\w+) (\d)(?!\d)", prompt):
        assert verb in (*GAINS, *LOSSES)
        total += int(amount) if verb in GAINS else -int(amount)
        rationale += f"{'+' if verb in GAINS else '-'}{amount}={f'{total:02}'[::-1]}"
        assert 0 <= total <= 99
    return rationale, f"{total:02}"[::-1]


def test_every_problem_is_right():
    for example in [*problems(), *synthetic_examples("eval", problems=1, seed=0)]:
        assert (example.rationale, example.answer) == solve(example.prompt)
        assert example.rationale.count("=") in (2, 3)


def test_the_same_for_a_seed_whatever_the_random_state():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = problems(5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert problems(5) == first
    assert problems(5, 100) == first[:100]
    assert {e.prompt for e in problems(6)} != {e.prompt for e in first}


def test_train_and_held_out_problems_are_disjoint_and_distinct():
    held_out = synthetic_examples("eval", problems=1, seed=0)
    assert held_out == synthetic_examples("eval", problems=500, seed=9)
    assert len({e.prompt for e in held_out}) == len(held_out) == EVAL_PROBLEMS
    for seed in (0, 7, 20_240_601):  # the last is the seed of the held-out problems
        train = problems(seed, 20_000)
        assert len({e.prompt for e in train}) == 20_000
        assert not {e.prompt for e in train} & {e.prompt for e in held_out}


def test_answers_cannot_be_guessed():
    most = Counter(e.answer for e in problems()).most_common(1)[0][1]
    assert most < 0.03 * 3000


def test_tokens(tokenizer):
    """At most 40 tokens, a word or a digit each; nothing unknown."""
    examples = [*problems(), *synthetic_examples("eval", problems=1, seed=0)]
    corpus = encode_examples(examples, tokenizer, 40)
    assert corpus.too_long == 0
    assert max(len(sample.input_ids) for sample in corpus.samples) == 40
    used = {i for sample in corpus.samples for i in sample.input_ids}
    pieces = tokenizer.convert_ids_to_tokens(sorted(used))
    assert all(len(piece.strip("Ġ")) == 1 for piece in pieces if re.search(r"\d", piece))
    assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in used
    assert tokenizer.tokenize("Lee has 68 balls eats 2?") == [
        "Lee", "Ġhas", "Ġ", "6", "8", "Ġballs", "Ġeats", "Ġ", "2", "?",
    ]  # fmt: skip


def test_text_survives_the_tokenizer(tokenizer):
    for example in problems(3, 300):
        text = prompt_text(example) + completion_text(example)
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        completion = [*tokenizer(completion_text(example))["input_ids"], tokenizer.eos_token_id, tokenizer.pad_token_id]
        assert extract_answer(tokenizer.decode(completion, skip_special_tokens=True)) == example.answer
    assert tokenizer.decode(tokenizer("a\n\nb: Zoë #9")["input_ids"]).startswith("a\n\nb")


def test_pad_and_end_differ_and_stay_out_of_text(tokenizer):
    assert None not in (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for example in problems(1, 200):
        ids = tokenizer(prompt_text(example) + completion_text(example))["input_ids"]
        assert not {tokenizer.pad_token_id, tokenizer.eos_token_id} & set(ids)


def test_the_same_tokenizer_each_time_and_after_saving_it_again(folder, tokenizer, tmp_path):
    train_problem_tokenizer(tmp_path / "second")
    for file in sorted(folder.iterdir()):
        assert (tmp_path / "second" / file.name).read_bytes() == file.read_bytes(), file.name
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.get_vocab() == tokenizer.get_vocab()
    text = prompt_text(problems()[0])
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_the_shipped_teacher_was_trained_with_this_tokenizer(tokenizer):
    """Other problems or pieces would ask the shipped weights in a language that they never saw."""
    shipped = AutoTokenizer.from_pretrained(SHIPPED)
    assert shipped.get_vocab() == tokenizer.get_vocab()
    rows = problems(0, 500)
    assert encode_examples(rows, shipped, 64) == encode_examples(rows, tokenizer, 64)
