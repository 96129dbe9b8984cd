"""Rows are compared with what their tokens say, whatever the tokenizer knows, composes, folds or drops."""

from __future__ import annotations

import logging
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvds.data.encoding import compare_rows, encode_examples
from kvds.data.example import Example
from kvds.data.text_fidelity import TextFidelity, check_texts
from kvds.data.token_files import TokenFiles, encode_once
from kvds.errors import InputError
from tests.harness.small_run_data import load
from tests.harness.text_tokenizers import KINDS, LETTERS, NORMALIZERS, TEXT, fuzzed, made


def row(prompt: str, rationale: str = "", answer: str = "1", **more: Any) -> Example:
    return Example(prompt, rationale, answer, "own", "own.jsonl:1", **more)


def fidelity(rows: list[Example], tokenizer: Any, **options: Any) -> TextFidelity:
    return compare_rows(encode_examples(rows, tokenizer, 10**6, **options).samples, rows, tokenizer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@fuzzed
@given(rows=st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=4))
def test_a_row_is_lossy_where_its_tokens_say_another_text(kind: str, normalizer: str, rows: list[tuple]) -> None:
    tokenizer = made(kind, normalizer)
    form = {
        "none": lambda text: text,
        "nfc": lambda text: unicodedata.normalize("NFC", text),
        "nfkc": lambda text: unicodedata.normalize("NFKC", text),
        "lower": tokenizer.backend_tokenizer.normalizer.normalize_str if normalizer == "lower" else None,
    }[normalizer]
    lossy = other = 0
    for parts in rows:
        text = "\n".join(parts)
        written = form(text)
        known = kind in ("bytes", "byte_fallback") or set(written) <= set(LETTERS)
        same = unicodedata.normalize("NFC", written) == unicodedata.normalize("NFC", text)
        lossy += not (known and same)
        other += known and same and written != text
    found = fidelity([row(*parts) for parts in rows], tokenizer)
    assert (found.rows, found.lossy, found.other_form) == (len(rows), lossy, other)
    assert TextFidelity.from_json(found.to_json()) == found
    assert (found.first >= 0) == bool(lossy) and (not lossy or found.before != found.after)


def test_what_is_lost_is_named_with_an_example() -> None:
    tokenizer = made("letters")
    found = fidelity([row("a b?"), row("Is it $5.00 or 2*3?"), row("c", "x\n$")], tokenizer)
    assert found.lossy == 3 and found.lost[:2] == ("?", "$") and set(found.lost) == {"$", "*", "?"}
    assert (found.first, found.before, found.after) == (0, "a b?\n", "a b\n")
    teachers = [row("a", "b", teacher_rationale="b"), row("a", "b", teacher_rationale="$")]
    assert [fidelity([r], tokenizer, reasoning_steps=True).lossy for r in teachers] == [0, 1]
    assert [fidelity([r], tokenizer).lossy for r in teachers] == [0, 0]  # nobody reads it


def test_special_tokens_that_a_row_spells_out_are_text_and_told_of(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = made("letters")
    rows = [row("a <|end|> b"), row("a")]
    found = fidelity(rows, tokenizer)
    assert found.lossy == 0 and found.spelled == 1 and found.special == ("<|end|>",)
    with caplog.at_level(logging.WARNING, "kvds"):
        check_texts(found, rows, what="training", most=0.0, tokenizer=tokenizer)
    assert "1 of 2 training rows spell out special tokens (<|end|>), which are read as ordinary text" in caplog.text


def test_more_lossy_rows_than_allowed_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = made("letters")
    rows = [row("a")] * 19 + [row("a $5.00 hat")]
    found = fidelity(rows, tokenizer)
    with caplog.at_level(logging.WARNING, "kvds"):
        check_texts(found, rows, what="training", most=0.05, tokenizer=tokenizer)
    assert (
        "1 of 20 training rows lose characters: '$' (own.jsonl:1: 'a $5.00 hat\\n' becomes 'a 5.00 hat\\n')"
        in caplog.text
    )
    with pytest.raises(InputError, match=r"^max_lossy_rows=0.04: .*1 of 20 training rows .*--max_lossy_rows to go on"):
        check_texts(found, rows, what="training", most=0.04, tokenizer=tokenizer)


def test_whoever_reads_the_tokens_is_told_the_same(tmp_path: Path) -> None:
    tokenizer = made("letters", "nfc")
    rows = [row("a $"), row("e\u0301"), row("<|end|>")]
    expected = fidelity(rows, tokenizer)
    assert (expected.lossy, expected.other_form, expected.spelled) == (1, 1, 1)
    for _ in range(2):  # written, then read
        corpus = encode_once(rows, tokenizer, 99, files=TokenFiles(tmp_path))
        assert corpus.fidelity == expected
    assert encode_once(rows, tokenizer, 99, files=TokenFiles()).fidelity == expected


def test_a_run_refuses_and_warns_each_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = made("letters")
    lines = [f'{{"prompt": "p {i}", "answer": "{"$" * (i == 3)}1"}}\n' for i in range(12)]
    (tmp_path / "own.jsonl").write_text("".join(lines))
    (tmp_path / "own.eval.jsonl").write_text('{"prompt": "q", "answer": "1"}\n')
    options = {"datasets": tmp_path / "own.jsonl", "data_cache": tmp_path / "cache"}
    for _ in range(2):
        with pytest.raises(InputError, match=r"max_lossy_rows=0.05: .*1 of 12 training rows lose characters: '\$'"):
            load(tokenizer, tmp_path, **options)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "kvds"):
            load(tokenizer, tmp_path, max_lossy_rows=0.1, **options)
        assert "1 of 12 training rows lose characters: '$' (own.jsonl:4:" in caplog.text
    (tmp_path / "own.eval.jsonl").write_text('{"prompt": "q", "answer": "$1"}\n')
    with pytest.raises(InputError, match="1 of 1 held-out rows lose"):
        load(tokenizer, tmp_path, max_lossy_rows=0.1, **options)
