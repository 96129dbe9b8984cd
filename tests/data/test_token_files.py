"""Rows are tokenised once: every later reader gets the very same samples without the tokenizer; the next steps' batches
are there before they are asked for.
"""

from __future__ import annotations

import dataclasses
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from kvds.data import token_files
from kvds.data.batches import TokenBatch
from kvds.data.encoding import EncodedCorpus, encode_examples
from kvds.data.example import Example
from kvds.data.read_ahead import ReadAhead
from kvds.data.synthetic import synthetic_examples
from kvds.data.token_files import TokenFiles, encode_once, read_corpus, rows_identity
from kvds.data.tokenizer import train_problem_tokenizer
from tests.harness.small_run_data import load

ROWS = [
    *synthetic_examples("train", problems=9, seed=0),
    Example("Ann has 12 pens?", "", "12", "own", "f:1"),
    Example("Bob has 7 cups eats 2?", "7-2=5", "5", "own", "f:2", teacher_rationale="7-1=6-1=5"),
    Example("a very long question " * 30, "", "1", "own", "f:3"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_problem_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of rows with each encoding that files did not spare."""
    counts: list[int] = []

    def counted(examples: Any, *args: Any, **kwargs: Any) -> EncodedCorpus:
        counts.append(len(examples))
        return encode_examples(examples, *args, **kwargs)

    monkeypatch.setattr(token_files, "encode_examples", counted)
    return counts


@pytest.mark.parametrize("steps", [False, True])
def test_what_is_read_is_what_was_encoded(tokenizer: Any, tmp_path: Path, encodings: list[int], steps: bool) -> None:
    files = TokenFiles(tmp_path / "new" / "folder")
    expected = encode_examples(ROWS, tokenizer, 64, reasoning_steps=steps)
    for _ in range(3):
        corpus = encode_once(ROWS, tokenizer, 64, reasoning_steps=steps, files=files)
        assert list(corpus.samples) == list(expected.samples) and corpus.too_long == expected.too_long == 1
    assert encodings == [len(ROWS)] and corpus.samples[-1] == expected.samples[-1]
    assert corpus.samples[2:5] == expected.samples[2:5] and any(row.teacher_text for row in corpus.samples) == steps
    assert [path.suffix for path in (tmp_path / "new" / "folder").iterdir()] == [".safetensors"]
    tokenizer(["a", "a b"], padding=True, truncation=True, max_length=1)  # leaves its mark on the tokenizer
    encode_once(ROWS, tokenizer, 64, reasoning_steps=steps, files=files)
    assert encodings == [len(ROWS)]


def test_anything_else_is_encoded_anew(tokenizer: Any, tmp_path: Path, encodings: list[int]) -> None:
    files = TokenFiles(tmp_path)
    grown = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    grown.add_tokens(["Ann has"])
    moved = [dataclasses.replace(ROWS[0], place="elsewhere:1"), *ROWS[1:]]
    cases: list[tuple[Any, Any, dict[str, Any], int]] = [
        (ROWS, tokenizer, {}, 1), (ROWS[::-1], tokenizer, {}, 2), (ROWS[:-1], tokenizer, {}, 3),
        ([dataclasses.replace(ROWS[0], answer="0"), *ROWS[1:]], tokenizer, {}, 4), (ROWS, grown, {}, 5),
        (ROWS, tokenizer, {"max_length": 63}, 6), (ROWS, tokenizer, {"reasoning_steps": True}, 7),
        (moved, tokenizer, {}, 7),
    ]  # fmt: skip
    for rows, own, changes, count in cases:
        options: dict[str, Any] = {"max_length": 64, "reasoning_steps": False, **changes}
        corpus = encode_once(rows, own, files=files, **options)
        assert list(corpus.samples) == list(encode_examples(rows, own, **options).samples)
        assert len(encodings) == count == len(list(tmp_path.iterdir()))
    assert list(encode_once([], tokenizer, 64, files=files).samples) == []


def test_ranks_that_wait_read_what_the_first_wrote(tokenizer: Any, tmp_path: Path, encodings: list[int]) -> None:
    barrier = threading.Barrier(3, timeout=30)
    found: dict[int, EncodedCorpus] = {}

    def rank(number: int, folder: Path) -> None:
        found[number] = encode_once(ROWS, tokenizer, 64, files=TokenFiles(folder, number == 0, barrier.wait))

    # A folder that cannot be made: a file is in its way. Each rank then encodes for itself.
    (tmp_path / "file").write_text("")
    for folder, count in ((tmp_path / "good", 1), (tmp_path / "file" / "x", 1 + 3)):
        threads = [threading.Thread(target=rank, args=(number, folder)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(encodings) == count
        assert all(list(corpus.samples) == list(found[0].samples) for corpus in found.values()) and len(found) == 3
        found.clear()


def test_the_first_rank_s_error_leaves_nobody_waiting(tokenizer: Any, tmp_path: Path) -> None:
    endless = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    endless.eos_token = None
    waited: list[bool] = []
    with pytest.raises(Exception, match="no end-of-text token"):
        encode_once(ROWS, endless, 64, files=TokenFiles(tmp_path, True, lambda: waited.append(True)))
    assert waited == [True] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"\xff" * 100, None])
def test_a_damaged_file_is_told_of_and_replaced(
    tokenizer: Any, tmp_path: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    files = TokenFiles(tmp_path)
    whole = encode_once(ROWS, tokenizer, 64, files=files)
    [path] = tmp_path.iterdir()
    content = path.read_bytes()
    path.unlink()  # the mapping of what was read stays
    path.write_bytes(content[:-5] if damage is None else damage)
    with caplog.at_level("WARNING", "kvds"):
        again = encode_once(ROWS, tokenizer, 64, files=files)
    assert "cannot be read" in caplog.text and list(again.samples) == list(whole.samples)
    kept = read_corpus(path)
    assert kept is not None and list(kept.samples) == list(whole.samples) and kept.fidelity == whole.fidelity


def test_a_flipped_bit_and_a_file_of_other_rows_are_told_of_and_replaced(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = TokenFiles(tmp_path)
    whole = encode_once(ROWS, tokenizer, 64, files=files)
    [path] = tmp_path.iterdir()
    content = path.read_bytes()
    other = encode_once(ROWS[::-1], tokenizer, 64, files=files)
    assert rows_identity(whole.samples) != rows_identity(other.samples)
    swapped = next(file for file in tmp_path.iterdir() if file != path).read_bytes()
    begin = content.index(b"too_long")
    draw = random.Random(0)
    for place in (None, *(draw.randrange(begin, len(content)) for _ in range(60))):
        written = bytearray(swapped if place is None else content)
        if place is not None:
            written[place] ^= 1 << draw.randrange(8)
        path.unlink()
        path.write_bytes(written)
        caplog.clear()
        with caplog.at_level("WARNING", "kvds"):
            again = encode_once(ROWS, tokenizer, 64, files=files)
        assert ("holds the rows of" if place is None else "cannot be read") in caplog.text
        assert list(again.samples) == list(whole.samples) and path.read_bytes() == content


def test_rows_are_the_same_in_a_file_and_out_of_it(tokenizer: Any, tmp_path: Path) -> None:
    kept = encode_once(ROWS, tokenizer, 64, files=TokenFiles(tmp_path))
    again = encode_once(ROWS, tokenizer, 64, files=TokenFiles(tmp_path))
    plain = encode_examples(ROWS, tokenizer, 64)
    assert len({rows_identity(corpus.samples) for corpus in (kept, again, plain)}) == 1
    assert rows_identity(again.samples).startswith(f"{len(plain.samples)} rows ")
    for changed in (plain.samples[:-1], plain.samples[::-1]):
        assert rows_identity(changed) != rows_identity(plain.samples)


def same(a: TokenBatch, b: TokenBatch) -> bool:
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(a)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def test_a_run_s_batches_are_those_of_rows_just_tokenised(
    tokenizer: Any, tmp_path: Path, encodings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    plain = load(tokenizer, tmp_path, data_cache="never")
    assert not (tmp_path / "hf").exists() and len(encodings) == 2  # training and held-out rows
    load(tokenizer, tmp_path)
    assert len(list((tmp_path / "hf" / "kvds").iterdir())) == 2
    del encodings[:]
    kept = load(tokenizer, tmp_path)
    load(tokenizer, tmp_path, data_cache=tmp_path / "named")
    assert len(encodings) == 2 == len(list((tmp_path / "named").iterdir()))
    steps = range(3, 3 + 2 * plain.loader.steps_per_epoch)
    finished: list[int] = []

    def finish(batches: list[TokenBatch]) -> list[TokenBatch]:
        finished.append(len(batches))
        return batches

    with kept.loader.read_ahead(steps, finish):
        for step in steps:
            [expected], [found] = plain.loader.step(step), kept.loader.step(step)
            assert same(found, expected)
    assert len(finished) == len(steps)
    assert same(plain.loader.step(0)[0], kept.loader.step(0)[0]) and len(finished) == len(steps)
    assert plain.eval_loader is not None and kept.eval_loader is not None
    assert same(*(data.eval_loader.step(0)[0] for data in (plain, kept) if data.eval_loader is not None))


def test_the_next_steps_are_made_while_one_runs() -> None:
    made = [threading.Event() for _ in range(9)]

    def make(step: int) -> int:
        made[step].set()
        return 10 * step

    with ReadAhead(make, range(4, 9), depth=2) as ahead:
        assert ahead.take(4) == 40
        assert made[6].wait(30)  # without being asked for
        assert not made[8].wait(0.05)  # no more than depth and the one at hand
        with pytest.raises(RuntimeError, match="step 7 was asked for, and 5 is next"):
            ahead.take(7)
    assert threading.active_count() == 1 or not any("read-ahead" in t.name for t in threading.enumerate())


def test_an_error_arrives_where_its_step_is_asked_for() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise ValueError("row 2 is broken")
        return step

    with ReadAhead(make, range(5)) as ahead:
        assert [ahead.take(0), ahead.take(1)] == [0, 1]
        with pytest.raises(ValueError, match="row 2 is broken"):
            ahead.take(2)
