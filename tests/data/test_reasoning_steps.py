"""Reasoning steps: lines or equations of the text, numbers on its tokens, and the teacher's own text beside them."""

import dataclasses
import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from kvds.data.batches import collate
from kvds.data.encoding import EncodedSample, Segment, encode_examples
from kvds.data.example import Example, is_blank, rationale_text
from kvds.data.loader import BatchLoader
from kvds.data.mixture import load_mixture
from kvds.data.reasoning_steps import encode_reasoning_steps, reasoning_step_ids, reasoning_step_starts
from kvds.data.synthetic import synthetic_examples
from kvds.data.tokenizer import train_problem_tokenizer
from kvds.errors import InputError
from tests.harness.real_data import data_folder


def steps_of(text: str) -> list[str]:
    starts = reasoning_step_starts(text)
    return [text[begin:end] for begin, end in zip(starts, [*starts[1:], len(text)], strict=False)]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", []),
        (" \n", []),
        ("one line of words\n", ["one line of words\n"]),
        ("a = 1\nb = 2 = c\n", ["a = 1\n", "b = 2 = c\n"]),  # lines win over equations
        ("a\n\n\nb\n", ["a\n\n\n", "b\n"]),
        ("68-2=48-1=38\n", ["68-2=48", "-1=38\n"]),
        ("68-2=48", ["68-2=48"]),
        ("3 * 4 = $12.50, and 12.50 / 2 = 6.25% of it\n", ["3 * 4 = $12.50", ", and 12.50 / 2 = 6.25% of it\n"]),
        ("x = 1,080 and y = -2.\n", ["x = 1,080", " and y = -2.\n"]),
        ("no number = here\n", ["no number = here\n"]),
        ("First\r\n\r\nSecond\r\n \r\nThird", ["First\r\n\r\n", "Second\r\n \r\n", "Third"]),
        ("First\n \nSecond\n\t\n\n", ["First\n \n", "Second\n\t\n\n"]),
        ("a\rb", ["a\r", "b"]),
        ("a\n\u200b\nb\n\ufeff \u2060\n", ["a\n\u200b\n", "b\n\ufeff \u2060\n"]),  # letters that nobody sees
        ("\ufeff\n", []),
        ("\ufeff\n68-2=48-1=38\n\u200b", ["\ufeff\n68-2=48", "-1=38\n\u200b"]),
    ],
)
def test_steps_are_lines_or_the_equations_of_one(text, steps):
    assert steps_of(text) == steps


def test_a_token_belongs_to_the_step_it_begins_in():
    # "a=1", " b", "=2", a token of no letters, "\n" behind the last step
    assert reasoning_step_ids("a=1 b=2\n", [(0, 3), (3, 5), (5, 7), (7, 7), (7, 8)]) == (1, 2, 2, 2, 2)
    # A token over the border: where it begins.
    assert reasoning_step_ids("a=1 b=2", [(0, 0), (0, 4), (4, 7)]) == (1, 1, 2)
    assert reasoning_step_ids("\n", [(0, 1)]) == (0,) and reasoning_step_ids("", []) == ()


def test_a_step_owns_a_token_or_is_none():
    text = "a\nb\nc"
    # The second reaches into b, where none begins.
    assert reasoning_step_ids(text, [(0, 1), (1, 4), (4, 5)]) == (1, 2, 3)
    assert reasoning_step_ids(text, [(0, 1), (1, 4), (4, 4), (4, 5)]) == (1, 2, 2, 3)
    # None is left for b: what stands behind it must not be called the second step.
    assert reasoning_step_ids(text, [(0, 4), (4, 5)]) == (1, 0)
    assert reasoning_step_ids(text, [(2, 4), (4, 5)]) == (0, 0)


PIECES = st.text(st.sampled_from("ab1=+ \r\n\t\u2028é\u200b\ufeff\u00ad"), max_size=30)


@given(text=PIECES, cuts=st.sets(st.integers(1, 29)), dropped=st.sets(st.integers(0, 30), max_size=3))
def test_whatever_the_tokens_are_steps_have_no_gap_and_no_blank_line_is_one(text, cuts, dropped):
    starts = reasoning_step_starts(text)
    assert not any(map(is_blank, steps_of(text))) and "".join(steps_of(text)) in (text, "")
    lines = [line for line in re.split(r"\r\n|\r|\n", text) if line.strip("\u200b\ufeff\u00ad \t\u2028")]
    assert len(lines) < 2 or len(starts) == len(lines)
    borders = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    offsets = [pair for i, pair in enumerate(zip(borders, borders[1:], strict=False)) if i not in dropped]
    ids = reasoning_step_ids(text, offsets)
    numbered = [i for i in ids if i]
    assert numbered == sorted(numbered) and list(ids) == numbered + [0] * (len(ids) - len(numbered))
    assert set(numbered) == set(range(1, max(numbered, default=0) + 1))
    for step in set(numbered):  # each owns a token that stands in it, at least with one letter
        end = starts[step] if step < len(starts) else len(text)
        assert any(own == step and b < end and e > starts[step - 1] for own, (b, e) in zip(ids, offsets, strict=True))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_problem_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def decoded_steps(sample: EncodedSample, tokenizer) -> list[str]:
    count = max(sample.reasoning_step_ids, default=0)
    return [
        tokenizer.decode([i for i, s in zip(sample.input_ids, sample.reasoning_step_ids, strict=True) if s == step])
        for step in range(1, count + 1)
    ]


def check_steps(examples, tokenizer) -> int:
    """Decoding the tokens of each step gives the text of the step; ids are those of encoding without steps."""
    plain, numbered = (
        encode_examples(examples, tokenizer, 2048, reasoning_steps=steps).samples for steps in (False, True)
    )
    several = 0
    for one, sample in zip(plain, numbered, strict=True):
        example = examples[sample.example]
        assert sample.input_ids == one.input_ids and sample.segment_ids == one.segment_ids
        assert one.reasoning_step_ids == ()
        assert decoded_steps(sample, tokenizer) == steps_of(rationale_text(example))
        inside = [segment == Segment.RATIONALE for segment in sample.segment_ids]
        assert inside == [step > 0 for step in sample.reasoning_step_ids]
        several += sample.reasoning_step_count > 1
    return several


def test_steps_of_the_built_in_problems(tokenizer):
    examples = synthetic_examples("train", problems=50, seed=0)
    assert check_steps(examples, tokenizer) == 50
    for example in examples:
        assert len(steps_of(example.rationale)) == example.rationale.count("=")


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_steps_of_real_gsm8k_rows(name):
    folder = data_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizers" / name)
    mixture = load_mixture(("gsm8k",), "eval", data_dir=str(folder))
    examples = mixture.examples[:300]
    assert check_steps(examples, tokenizer) > 250
    for example in examples:
        lines = [line for line in example.rationale.split("\n") if line.strip()]
        assert len(lines) == 1 or len(steps_of(example.rationale)) == len(lines)


class _Slow:
    is_fast, name_or_path = False, "slow"


def test_a_tokenizer_without_offsets_is_explained():
    with pytest.raises(InputError, match="align_tokens=segment: the tokenizer slow .*a fast one"):
        encode_reasoning_steps(["a"], _Slow())


# -- a text of the teacher's own ---------------------------------------------------------------------------------------

LONG = "Lee has 68 balls and eats 2 so 68-2=48\nThen Lee sells 1 so 48-1=38\n38"
ROWS = [
    Example("Lee has 68 balls eats 2 sells 1?", "68-2=48-1=38", "38", "c", "f:1", LONG),
    Example("Ann has 05 cups?", "05+1=15", "15", "c", "f:2"),
    Example("Bob has 05 cups?", "", "05", "c", "f:3"),
]


def test_the_teachers_text_is_encoded_beside_the_rows(tokenizer):
    first, second, third = encode_examples(ROWS, tokenizer, 99, reasoning_steps=True).samples
    assert first.teacher_text is not None and second.teacher_text is None
    assert decoded_steps(first, tokenizer) == ["68-2=48", "-1=38\n"]
    assert decoded_steps(first.teacher_text, tokenizer) == [line + "\n" for line in LONG.split("\n")]
    # The teacher's third step meets none.
    assert [row.reasoning_step_count for row in (first, second, third)] == [2, 1, 0]
    same = dataclasses.replace(ROWS[0], rationale=LONG, teacher_rationale=None)
    assert encode_examples([same], tokenizer, 99).samples[0].input_ids == first.teacher_text.input_ids
    # Too long for the teacher: the row is left out and counted.
    corpus = encode_examples(ROWS, tokenizer, len(first.teacher_text.input_ids) - 1, reasoning_steps=True)
    assert [row.example for row in corpus.samples] == [1, 2] and corpus.too_long == 1
    assert all(row.teacher_text is None for row in encode_examples(ROWS, tokenizer, 99).samples)


def test_batches_hold_both_texts_and_count_common_steps(tokenizer):
    samples = encode_examples(ROWS, tokenizer, 99, reasoning_steps=True).samples
    loader = BatchLoader(
        samples, batch_size=2, gradient_accumulation_steps=2, rank=0, world_size=1, seed=0, pad_token_id=0,
        position_count=lambda length: 1000, shuffle=False,
    )  # fmt: skip
    first, second = loader.step(0)
    assert first.position_normalizer == second.position_normalizer == 3 / 2  # 2 + 1 + 0 steps over two micro-batches
    text = first.teacher_text
    assert text is not None and text.input_ids.shape[1] > first.input_ids.shape[1]
    assert first.num_reasoning_steps == text.num_reasoning_steps == 3
    assert second.num_reasoning_steps == 1 and second.teacher_text is None
    for batch, rows in ((first, samples[:2]), (text, [samples[0].teacher_text, samples[1]])):
        for position, row in enumerate(rows):
            length = len(row.input_ids)
            assert tuple(batch.input_ids[position, :length].tolist()) == row.input_ids
            assert tuple(batch.reasoning_step_ids[position, :length].tolist()) == row.reasoning_step_ids
            assert not batch.reasoning_step_ids[position, length:].any()
            assert not batch.attention_mask[position, length:].any()
    moved = first.to(torch.device("meta"))
    assert moved.reasoning_step_ids.device.type == moved.teacher_text.reasoning_step_ids.device.type == "meta"
    alone = collate([None], [-1], 0, 1.0, 1.0)
    assert alone.reasoning_step_ids is None and alone.teacher_text is None


def test_rows_of_a_file_may_hold_the_teachers_text(tmp_path):
    row = {"prompt": "p?", "rationale": "a", "answer": "1"}
    lines = [row, {**row, "prompt": "q?", "teacher_rationale": "b\nc"}]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "own.eval.jsonl").write_text(json.dumps(row))
    examples = load_mixture((str(tmp_path / "own.jsonl"),), "train", data_dir=None).examples
    assert [example.teacher_rationale for example in examples] == [None, "b\nc"]
    for bad, message in ((3, "'teacher_rationale' is 3"), ("#### 1", "the teacher_rationale holds '####'")):
        (tmp_path / "own.jsonl").write_text(json.dumps({**row, "teacher_rationale": bad}))
        with pytest.raises(InputError, match=f"own.jsonl:1: {message}"):
            load_mixture((str(tmp_path / "own.jsonl"),), "train", data_dir=None)
