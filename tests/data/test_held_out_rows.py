"""No row is trained on that a run is judged by, whichever file or corpus holds it; what is taken of each is said."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvds.data.mixture import load_mixture, prompt_key
from kvds.data.token_files import rows_identity
from kvds.errors import InputError
from tests.harness.small_run_data import load
from tests.harness.text_tokenizers import made


def write(path: Path, prompts: list[str]) -> str:
    rows = [{"prompt": prompt, "rationale": "r", "answer": "a"} for prompt in prompts]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def gsm8k(folder: Path, train: list[str], test: list[str]) -> None:
    for name, prompts in (("train", train), ("test", test)):
        path = folder / "gsm8k" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"question": q, "answer": "s #### 1"}) + "\n" for q in prompts))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return made("bytes")


def test_a_file_that_repeats_a_public_test_set_is_not_trained_on(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gsm8k(tmp_path, [f"train {i}" for i in range(20)], [f"How many  apples {i}?" for i in range(8)])
    own = write(tmp_path / "own.jsonl", ["mine 1", "HOW MANY apples 3?", "mine 2", " how many apples 7?\n"])
    write(tmp_path / "own.eval.jsonl", ["mine 1", "train 4"])
    with caplog.at_level(logging.INFO, "kvds"):
        data = load(tokenizer, tmp_path, datasets=f"gsm8k {own}", data_dir=tmp_path, eval_subset_size=1)
    # Held out is the whole of it, though one row of each is judged.
    assert len(data.loader.samples) == 19 + 1 and len(data.eval_examples) == 2
    assert "data: gsm8k: 1 of 20 rows ask what a held-out row asks and were left out of training" in caplog.text
    assert f"data: {own}: 3 of 4 rows ask what a held-out row asks" in caplog.text
    assert "data: gsm8k: 19 of 19 rows" in caplog.text
    caplog.clear()
    # Somebody judges later, with `kvds eval`: the rows are the same ones.
    unjudged = load(tokenizer, tmp_path, datasets=f"gsm8k {own}", data_dir=tmp_path, eval_subset_size=0)
    assert rows_identity(unjudged.loader.samples) == rows_identity(data.loader.samples)
    assert unjudged.eval_examples == [] and "left out of training" in caplog.text


def test_held_out_rows_that_are_not_here_are_told_of(tokenizer: Any, tmp_path: Path, caplog: Any) -> None:
    own = write(tmp_path / "own.jsonl", ["a", "b"])
    (tmp_path / "own.eval.jsonl").write_text("no row\n")
    with caplog.at_level(logging.WARNING, "kvds"):
        assert len(load(tokenizer, tmp_path, datasets=own, eval_subset_size=0).loader.samples) == 2
    assert "what held-out ones ask are not left out of training: " in caplog.text and "own.eval.jsonl:1" in caplog.text
    with pytest.raises(InputError, match=r"own\.eval\.jsonl:1"):
        load(tokenizer, tmp_path, datasets=own, eval_subset_size=1)


def test_a_file_judged_by_itself_is_an_error(tokenizer: Any, tmp_path: Path) -> None:
    own = write(tmp_path / "own.jsonl", ["a", "b"])
    write(tmp_path / "own.eval.jsonl", ["B", "A "])
    for size in (5, 0):
        with pytest.raises(InputError, match=r"the prompts of all 2 training rows are held out; expected other rows"):
            load(tokenizer, tmp_path, datasets=own, eval_subset_size=size)


def test_what_is_left_out_is_made_up_for_within_a_subset(tmp_path: Path) -> None:
    own = write(tmp_path / "own.jsonl", [f"p {i}" for i in range(10)])
    write(tmp_path / "own.eval.jsonl", [f"P {i}" for i in range(6)])
    held_out = load_mixture([own], "eval").examples
    mixture = load_mixture([own], "train", subset_size=4, held_out=held_out)
    assert sorted(row.prompt for row in mixture.examples) == [f"p {i}" for i in range(6, 10)]
    assert (mixture.counts, mixture.available, mixture.held_out) == ({own: 4}, {own: 4}, {own: 6})


PROMPT = st.text(st.sampled_from("abAB é\u0301\N{LATIN SMALL LETTER E WITH ACUTE}ﬁ \t"), min_size=1, max_size=4).filter(
    str.strip
)


@settings(max_examples=60, deadline=None)
@given(files=st.lists(st.tuples(st.lists(PROMPT, min_size=1), st.lists(PROMPT, min_size=1)), min_size=1, max_size=3))
def test_nothing_asked_is_trained_on(tmp_path_factory: pytest.TempPathFactory, files: list[tuple]) -> None:
    folder = tmp_path_factory.mktemp("files")
    names = []
    for number, (train, held_out) in enumerate(files):
        names.append(write(folder / f"{number}.jsonl", train))
        write(folder / f"{number}.eval.jsonl", held_out)
    asked = {prompt_key(prompt) for _, held_out in files for prompt in held_out}
    rest = [[p.strip() for p in train if prompt_key(p) not in asked] for train, _ in files]
    held_out_rows = load_mixture(names, "eval").examples
    if all(rest):
        mixture = load_mixture(names, "train", held_out=held_out_rows)
        assert [row.prompt for row in mixture.examples] == [prompt for rows in rest for prompt in rows]
        assert sum(mixture.held_out.values()) == sum(len(t) for t, _ in files) - sum(map(len, rest))
    else:
        with pytest.raises(InputError, match="are held out"):
            load_mixture(names, "train", held_out=held_out_rows)


def test_the_same_question_in_other_letters_is_the_same() -> None:
    same = ("How many\n cafés? ", "how MANY  cafe\u0301s?")
    assert prompt_key(same[0]) == prompt_key(same[1])
    for other in (
        "How ma\u200bny caf\N{LATIN SMALL LETTER E}\u0301s?",
        "\ufeffHow many\u00a0cafés?",
        "Ｈow many cafés?",
    ):
        assert prompt_key(other) == prompt_key(same[0])
    assert prompt_key("ﬁve ①") == prompt_key("five ①") != prompt_key("five 1")
    # A power, an index or a half is not the digits beside each other.
    for one, other in (("2²", "22"), ("x₁2", "x12"), ("1½", "11⁄2"), ("3①", "31")):
        assert prompt_key(one) != prompt_key(other)
    assert prompt_key("2 - 1?") != prompt_key("2 + 1?") and prompt_key("1 2") != prompt_key("12")


def test_what_is_taken_of_each_corpus_is_said(tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    a, b = (write(tmp_path / f"{name}.jsonl", [f"{name} {i}" for i in range(20)]) for name in "ab")
    for name in "ab":
        write(tmp_path / f"{name}.eval.jsonl", ["q"])
    with caplog.at_level(logging.INFO, "kvds"):
        load(tokenizer, tmp_path, datasets=f"{a} {b}:3", subset_size=24)
    told = {record.getMessage(): record.levelname for record in caplog.records}
    assert told[f"data: {a}: 6 of 20 rows"] == "WARNING" and told[f"data: {b}: 18 of 20 rows"] == "INFO"
    with pytest.raises(InputError, match=rf"subset_size=3: leaves {b} no row beside 1 others; .*--subset_size 101"):
        load(tokenizer, tmp_path, datasets=f"{a}:100 {b}", subset_size=3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "<|im_start|>user\nHow many?<|im_end|>"}, "holds '<|im_start|>', as if rendered with a chat"),
        ({"prompt": "[INST] How many? [/INST]"}, "holds '[INST]'"),
        ({"rationale": "<|start_header_id|>assistant<|end_header_id|>"}, "holds '<|start_header_id|>'"),
        ({"answer": "<start_of_turn>model\n2"}, "holds '<start_of_turn>'"),
        ({"answer": "2<|im_end|>"}, "holds '<|im_end|>'"),
        ({"answer": "2<|eot_id|>"}, "holds '<|eot_id|>'"),
        ({"prompt": "<|header_start|>user<|header_end|>How many?"}, "holds '<|header_start|>'"),
        ({"prompt": "<|start_of_role|>user<|end_of_role|>How many?"}, "holds '<|start_of_role|>'"),
        ({"prompt": "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>How many?"}, "holds '<|START_OF_TURN_TOKEN|>'"),
        ({"prompt": "<|start|>user<|message|>How many?"}, "holds '<|start|>'"),
        ({"answer": "1 + 1\n#### 2"}, "the answer holds '####', which announces the answer; expected it nowhere else"),
    ],
)  # fmt: skip
def test_a_row_that_is_rendered_already_is_refused(tmp_path: Path, row: dict[str, str], message: str) -> None:
    good = {"prompt": "p", "rationale": "r", "answer": "a"}
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (good, good | row)))
    (tmp_path / "own.eval.jsonl").write_text(json.dumps(good))
    with pytest.raises(InputError) as error:
        load_mixture([str(path)], "train")
    assert f"own.jsonl:2: {message}" in str(error.value) and "--on_bad_row skip" in str(error.value)
    mixture = load_mixture([str(path)], "train", on_bad_row="skip")
    assert len(mixture.examples) == 1 and mixture.skipped == {str(path): 1}
    text = json.dumps(good | {"prompt": "What is <|endoftext|> or <im_start>?"})  # a special token is mere text
    path.write_text(text)
    assert len(load_mixture([str(path)], "train").examples) == 1
