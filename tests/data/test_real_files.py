"""The publishers' files themselves: how many rows, what they say, how they tokenise."""

import ast
import operator
from collections import Counter

import pytest
from transformers import AutoTokenizer

from kvds.data.corpora import CORPORA
from kvds.data.encoding import Segment, encode_examples
from kvds.data.example import Example, answer_text, extract_answer, prompt_text, rationale_text
from kvds.data.mixture import load_mixture
from kvds.data.rows import file_rows
from tests.harness.real_data import data_folder

ROWS = {
    "gsm8k": (7473, 1319), "svamp": (700, 300), "strategyqa": (2061, 229), "arc_easy": (2251, 570),
    "arc_challenge": (1119, 299), "arc": (3370, 869),
}  # fmt: skip


def load(name: str, split: str = "train") -> list[Example]:
    mixture = load_mixture([name], split, data_dir=str(data_folder()))
    assert mixture.skipped == {}
    return mixture.examples


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_read_and_no_prompt_is_in_both_splits(name):
    train, held_out = load(name, "train"), load(name, "eval")
    assert (len(train), len(held_out)) == ROWS[name]
    places = [(example.corpus, example.place) for example in (*train, *held_out)]
    assert len(set(places)) == len(places)
    assert not {example.prompt for example in train} & {example.prompt for example in held_out}


def test_gsm8k():
    train = load("gsm8k")
    assert train[0].prompt.startswith("Natalia sold clips to 48 of her friends") and train[0].answer == "72"
    assert train[0].rationale == (
        "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May."
    )
    for example in (*train, *load("gsm8k", "eval")):
        assert "<<" not in example.rationale and ">>" not in example.rationale and example.rationale
        assert example.answer.removeprefix("-").isdigit()
    assert sum(len(example.answer) > 6 for example in train) == 16
    assert "109200000" in {example.answer for example in train}  # written 109,200,000


OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def value(node: ast.expr) -> float:
    if isinstance(node, ast.BinOp):
        return OPERATIONS[type(node.op)](value(node.left), value(node.right))
    assert isinstance(node, ast.Constant)
    return float(node.value)


def test_svamp_equations_give_their_answers():
    """All but the publisher's chal-680, which is wrong in itself."""
    wrong = []
    for example in (*load("svamp"), *load("svamp", "eval")):
        equation, _, result = example.rationale.rpartition(" = ")
        assert result == example.answer and ".0" not in equation
        if value(ast.parse(equation, mode="eval").body) != pytest.approx(float(result)):
            wrong.append(example.rationale)
    assert wrong == ["( 4 - 2 ) + 3 = 1"]
    assert load("svamp")[1].prompt == (
        "Dan had $ 3 left with him after he bought a candy bar. If he had $ 4 at the start. "
        "How much did the candy bar cost?"
    )


def test_strategyqa():
    train = load("strategyqa")
    assert Counter(example.answer for example in train) == {"no": 1097, "yes": 964}
    assert train[0].rationale.splitlines()[:2] == [
        "Julius Caesar had three children.",
        "Genghis Khan had sixteen children.",
    ]
    assert {len(example.rationale.splitlines()) for example in train} == {2, 3, 4, 5}


def test_arc_labels():
    rows = [
        example
        for name in ("arc_easy", "arc_challenge")
        for split in ("train", "eval")
        for example in load(name, split)
    ]
    choices = Counter(
        "".join(line[0] for line in example.prompt.splitlines()[-5:] if line[1:3] == ". ") for example in rows
    )
    assert choices == {"ABCD": 4071 + 149, "ABC": 10 + 1, "ABCDE": 8}  # lettered + numbered in the files
    assert all(example.rationale == "" and f"\n{example.answer}. " in example.prompt for example in rows)


def test_arc_answers_are_the_publishers_choices():
    """The letter names the text that the publisher's key names, also where the key is a number."""
    numbered = 0
    for name in ("arc_easy", "arc_challenge"):
        raw = [row for _, row in file_rows(data_folder() / CORPORA[name].files["train"])]
        for row, example in zip(raw, load(name), strict=True):
            text = next(c["text"] for c in row["question"]["choices"] if c["label"] == row["answerKey"])
            assert f"\n{example.answer}. {text.strip()}" in example.prompt
            numbered += row["answerKey"].isdigit()
    assert numbered == 101 + 1 + 23


@pytest.mark.parametrize("name", ["gsm8k", "svamp", "strategyqa", "arc"])
def test_every_answer_is_found_in_its_own_text(name):
    for example in load(name, "eval"):
        assert extract_answer(rationale_text(example) + answer_text(example)) == example.answer.lower()


def test_places_are_lines_of_the_file():
    lines = (data_folder() / "strategyqa/train.json").read_text(encoding="utf-8").splitlines()
    for example in load("strategyqa")[::97]:
        line = int(example.place.removeprefix("train.json:"))
        assert lines[line - 1].strip() == "{"
        assert any(example.prompt[:20] in text for text in lines[line : line + 6])


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_segments_of_real_text_decode_back(name):
    folder = data_folder() / "tokenizers" / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = [example for corpus in ("gsm8k", "svamp", "strategyqa", "arc") for example in load(corpus)[::53]]
    corpus = encode_examples(examples, tokenizer, 2048)
    assert corpus.too_long == 0 and len(corpus.samples) == len(examples)
    for sample in corpus.samples:
        example = examples[sample.example]
        texts = {segment: [] for segment in Segment}
        for token, segment in zip(sample.input_ids, sample.segment_ids, strict=True):
            texts[Segment(segment)].append(token)
        decoded = [tokenizer.decode(texts[s], clean_up_tokenization_spaces=False) for s in list(Segment)[1:]]
        assert decoded == [prompt_text(example), rationale_text(example), answer_text(example) + tokenizer.eos_token]


def test_long_rows_are_left_out_and_counted():
    tokenizer = AutoTokenizer.from_pretrained(data_folder() / "tokenizers/gpt2")
    examples = load("gsm8k")[:300]
    lengths = [len(sample.input_ids) for sample in encode_examples(examples, tokenizer, 9999).samples]
    corpus = encode_examples(examples, tokenizer, 128)
    assert corpus.too_long == sum(length > 128 for length in lengths) > 50
    assert [len(s.input_ids) for s in corpus.samples] == [length for length in lengths if length <= 128]


def test_a_mix_of_four_corpora():
    names = ["gsm8k:0.5", "svamp:0.2", "strategyqa:0.2", "arc:0.1"]
    mixture = load_mixture(names, "train", data_dir=str(data_folder()), subset_size=1000)
    assert mixture.counts == {"gsm8k": 500, "svamp": 200, "strategyqa": 200, "arc": 100}
    counted = Counter(example.corpus for example in mixture.examples)
    assert counted["gsm8k"] == 500 and 50 < counted["arc_easy"] < 85  # arc's two parts by their size
    whole = load_mixture(names, "train", data_dir=str(data_folder()))
    assert whole.counts == {"gsm8k": 1750, "svamp": 700, "strategyqa": 700, "arc": 350}
