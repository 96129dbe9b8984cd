"""Which rows a run gets: splits, weights, subsets, hub and files."""

import hashlib
import json
import logging
import sys
import types
from collections import Counter

import pytest

from kvds.data.corpora import CORPORA
from kvds.data.mixture import load_mixture
from kvds.errors import InputError


def own_file(folder, name: str, count: int, label: str = "p") -> str:
    path = folder / name
    path.write_text("".join(json.dumps({"prompt": f"{label} {i}", "answer": str(i)}) + "\n" for i in range(count)))
    return str(path)


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Three corpora of 100, 50 and 20 training rows with held-out rows beside them."""
    names = []
    for name, count in (("a", 100), ("b", 50), ("c", 20)):
        names.append(own_file(tmp_path, f"{name}.jsonl", count, name))
        own_file(tmp_path, f"{name}.eval.jsonl", 7, f"{name} held out")
    return names


def counts(mixture) -> dict[str, int]:
    found = Counter(example.corpus for example in mixture.examples)
    assert list(found.values()) == list(mixture.counts.values())
    return dict(found)


def test_equal_weights_take_every_row(files):
    assert counts(load_mixture(files, "train")) == {"a": 100, "b": 50, "c": 20}
    assert counts(load_mixture([f"{file}:0.3" for file in files], "train")) == {"a": 100, "b": 50, "c": 20}


def test_unequal_weights_take_as_many_as_the_proportion_allows(files):
    a, b, c = files
    assert counts(load_mixture([f"{a}:0.5", f"{b}:0.2"], "train")) == {"a": 100, "b": 40}
    assert counts(load_mixture([a, f"{c}:2"], "train")) == {"a": 10, "c": 20}
    assert counts(load_mixture([f"{a}:1000", c], "train")) == {"a": 100, "c": 1}


def test_a_subset_is_shared_out_by_weight(files):
    a, b, c = files
    assert counts(load_mixture([f"{a}:0.5", f"{b}:0.2"], "train", subset_size=70)) == {"a": 50, "b": 20}
    assert counts(load_mixture(files, "train", subset_size=10)) == {"a": 3, "b": 4, "c": 3}
    assert load_mixture([a], "train", subset_size=1).counts == {a: 1}


def test_too_few_rows_give_all_they_have_and_say_so(files, caplog):
    a, _, c = files
    with caplog.at_level(logging.WARNING, "kvds"):
        mixture = load_mixture([a, f"{c}:3"], "train", subset_size=100)
    assert mixture.counts == {a: 25, c: 20}
    assert f"{c} has 20 of the 75 rows asked for" in caplog.text


def test_eval_rows_are_not_thinned_out(files):
    mixture = load_mixture([f"{files[0]}:9", files[1]], "eval", subset_size=3)
    assert counts(mixture) == {"a": 7, "b": 7}
    assert mixture.examples[0].prompt == "a held out 0" and mixture.examples[0].place == "a.eval.jsonl:1"


def test_a_subset_is_drawn_by_seed(files):
    def draw(seed: int) -> list[str]:
        return [example.prompt for example in load_mixture(files, "train", subset_size=30, seed=seed).examples]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert len(set(draw(3))) == 30
    positions = [int(prompt[2:]) for prompt in draw(3) if prompt.startswith("a ")]
    assert positions == sorted(positions) and positions != list(range(len(positions)))


def test_a_file_without_held_out_rows_beside_it_is_split_by_content(tmp_path):
    path = own_file(tmp_path, "own.jsonl", 1000)
    train, held_out = (load_mixture([path], split).examples for split in ("train", "eval"))
    prompts = [{example.prompt for example in rows} for rows in (train, held_out)]
    assert not prompts[0] & prompts[1] and len(prompts[0] | prompts[1]) == 1000
    expected = {f"p {i}" for i in range(1000) if int(hashlib.sha256(f"p {i}".encode()).hexdigest(), 16) % 10 == 0}
    assert prompts[1] == expected and 70 < len(expected) < 130
    # Neither more rows nor another order, nor a repeated prompt, moves one across.
    lines = (tmp_path / "own.jsonl").read_text().splitlines()
    (tmp_path / "own.jsonl").write_text("\n".join([*reversed(lines), *lines, '{"prompt": "new", "answer": "1"}']))
    again = load_mixture([path], "eval").examples
    assert {example.prompt for example in again} - {"new"} == expected and len(again) >= 2 * len(expected)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_small_file_gives_rows_to_both_splits(tmp_path, count):
    for label in ("x", "y", "z", "w"):
        path = own_file(tmp_path, "small.jsonl", count, label)
        sizes = [len(load_mixture([path], split).examples) for split in ("train", "eval")]
        assert min(sizes) >= 1 and sum(sizes) == count


def test_one_prompt_trains_but_cannot_be_held_out(tmp_path):
    path = own_file(tmp_path, "one.jsonl", 1)
    assert len(load_mixture([path], "train").examples) == 1
    with pytest.raises(InputError, match=r"none can be held out.*one\.eval\.jsonl.*--eval_subset_size 0"):
        load_mixture([path], "eval")


def test_a_file_may_lie_in_data_dir(tmp_path):
    own_file(tmp_path, "own.jsonl", 20)
    assert load_mixture(["own.jsonl:2"], "train", data_dir=str(tmp_path)).examples[0].corpus == "own"


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        (["gsm8l"], "datasets=gsm8l: unknown corpus, did you mean gsm8k?; expected one of gsm8k, svamp,"),
        (["ARC"], "datasets=ARC: unknown corpus"),
        (["arc", "arc_easy"], "datasets=arc_easy: arc holds its rows already"),
        (["gsm8k:much"], "datasets=gsm8k:much: expected NAME or NAME:WEIGHT"),
        (["gsm8k:0"], "a weight above 0"),
        (["gsm8k"], "/gsm8k/train.jsonl: No such file or directory; expected a data file there"),
    ],
)
def test_names_that_lead_nowhere(tmp_path, datasets, message):
    with pytest.raises(InputError) as caught:
        load_mixture(datasets, "train", data_dir=str(tmp_path))
    assert message in str(caught.value)


def test_an_empty_file_is_an_error(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    for split in ("train", "eval"):
        with pytest.raises(InputError, match=f"no usable row in its {split} split"):
            load_mixture([str(tmp_path / "empty.jsonl")], split)


HUB_ROWS = {
    "openai/gsm8k": {"question": "q", "answer": "s <<1=1>> #### 1,000"},
    "ChilleD/SVAMP": {
        "ID": "chal-999", "Body": "b", "Question": "q", "Equation": "( 8.0 - 2.0 )", "Answer": "6.0",
        "question_concat": "b q",
    },
    "ChilleD/StrategyQA": {"qid": "1", "term": "t", "question": "q", "answer": False, "facts": "One. Two."},
    "allenai/ai2_arc": {
        "id": "1", "question": "q", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "2",
    },
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch) -> list[tuple]:
    """A stand-in for the datasets library that records what it is asked for."""
    asked = []

    def load_dataset(name, config, *, split):
        asked.append((name, config, split))
        return [HUB_ROWS[name]] * 2

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_hub_names_and_rows(hub):
    mixture = load_mixture(["gsm8k", "svamp", "strategyqa", "arc"], "train")
    assert hub == [
        ("openai/gsm8k", "main", "train"), ("ChilleD/SVAMP", None, "train"), ("ChilleD/StrategyQA", None, "train"),
        ("allenai/ai2_arc", "ARC-Easy", "train"), ("allenai/ai2_arc", "ARC-Challenge", "train"),
    ]  # fmt: skip
    rows = [(e.prompt, e.rationale, e.answer, e.corpus, e.place) for e in mixture.examples[1::2]]
    assert rows == [
        ("q", "s", "1000", "gsm8k", "openai/gsm8k/train:2"),
        ("b. q", "8 - 2 = 6", "6", "svamp", "ChilleD/SVAMP/train:2"),
        ("q", "One. Two.", "no", "strategyqa", "ChilleD/StrategyQA/train:2"),
        ("q\nA. a\nB. b\nC. c", "", "B", "arc_easy", "allenai/ai2_arc/train:2"),
        ("q\nA. a\nB. b\nC. c", "", "B", "arc_challenge", "allenai/ai2_arc/train:2"),
    ]
    del hub[:]
    load_mixture(["gsm8k", "svamp", "strategyqa", "arc_easy"], "eval")
    assert [split for _, _, split in hub] == ["test", "test", "test", "validation"]


def test_a_malformed_hub_row_is_named(hub, monkeypatch):
    monkeypatch.setitem(HUB_ROWS, "openai/gsm8k", {"question": "q", "answer": "no mark"})
    with pytest.raises(InputError, match="openai/gsm8k/train:1: 'answer' has no '#### NUMBER'"):
        load_mixture(["gsm8k"], "train")


def test_no_internet_says_how_to_use_a_folder(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    for name, corpus in CORPORA.items():
        with pytest.raises(InputError) as caught:
            load_mixture([name], "train")
        assert str(caught.value) == (
            f"datasets={name}: {corpus.hub_name} could not be loaded from the hub or its cache "
            f"(Couldn't reach the Hub); without internet, expected --data_dir FOLDER with {corpus.files['train']}, "
            "or what `kvds prefetch RECIPE --to DIR` brings where there is some"
        )


def test_a_subset_is_the_same_where_the_file_lies_elsewhere(tmp_path):
    def draw(folder) -> list[str]:
        folder.mkdir()
        return [e.prompt for e in load_mixture([own_file(folder, "a.jsonl", 40)], "train", subset_size=10).examples]

    assert draw(tmp_path / "login") == draw(tmp_path / "node")
