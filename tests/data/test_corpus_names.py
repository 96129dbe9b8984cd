"""Corpora are called by different names, whatever their files are called."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvds.data.corpora import CORPORA
from kvds.data.corpus_names import corpus_names
from kvds.data.mixture import load_mixture
from kvds.errors import InputError
from tests.harness.small_run_data import load

PARTS = st.lists(st.sampled_from(["a", "b", "all", "gsm8k", "a.b"]), max_size=3).map(tuple)
FILES = st.tuples(
    PARTS, st.sampled_from(["a", "b", "all", "gsm8k", "arc", "a.json"]), st.sampled_from([".json", ".jsonl"])
)


@given(st.lists(FILES, max_size=8, unique=True), st.lists(st.sampled_from(sorted(CORPORA)), max_size=3, unique=True))
def test_every_corpus_has_a_name_of_its_own(files, known):
    names = [*known, *("/".join(["/x", *parts, stem]) + suffix for parts, stem, suffix in files)]
    called = corpus_names(names, None)
    assert list(called) == names and len(set(called.values())) == len(names)
    assert "all" not in called.values()  # the mean over all corpora
    assert all(called[name] == name for name in known)


def test_a_file_alone_is_called_by_its_stem_and_two_by_what_tells_them_apart():
    assert corpus_names(["/d/rows.jsonl", "gsm8k"], None) == {"/d/rows.jsonl": "rows", "gsm8k": "gsm8k"}
    both = corpus_names(["/d/rows.jsonl", "/e/rows.jsonl", "/e/more.jsonl"], None)
    assert list(both.values()) == ["d/rows.jsonl", "e/rows.jsonl", "more"]
    assert list(corpus_names(["/d/a.json", "/d/a.jsonl"], None).values()) == ["a.json", "a.jsonl"]
    assert corpus_names(["/d/gsm8k.jsonl"], None) == {"/d/gsm8k.jsonl": "gsm8k.jsonl"}


def rows(path: Path, count: int) -> str:
    path.parent.mkdir(exist_ok=True)
    made = [{"prompt": f"{path.parent.name} {n} ?", "rationale": "so", "answer": str(n)} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


def test_one_file_by_two_names_is_refused(tmp_path, monkeypatch):
    path = rows(tmp_path / "a/rows.jsonl", 30)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    for other in ("a/rows.jsonl", str(tmp_path / "b/rows.jsonl")):
        with pytest.raises(InputError, match=rf"datasets={other}: the same file as {path}; expected each corpus once"):
            load_mixture([path, other], "train")


def test_each_file_of_one_stem_has_its_own_held_out_rows(tmp_path):
    from transformers import AutoTokenizer

    from kvds.data.tokenizer import train_problem_tokenizer

    train_problem_tokenizer(tmp_path / "tokenizer")
    files = [rows(tmp_path / name / "rows.jsonl", 200) for name in ("one", "other")]
    data = load(AutoTokenizer.from_pretrained(tmp_path / "tokenizer"), tmp_path, datasets=" ".join(files))
    assert Counter(row.corpus for row in data.eval_examples) == {"one/rows.jsonl": 5, "other/rows.jsonl": 5}
