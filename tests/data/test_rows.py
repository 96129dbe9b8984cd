"""Files of rows: line numbers, tolerance, and what no file can make them raise."""

import json

import pytest

from kvds.data.example import Example
from kvds.data.mixture import load_mixture
from kvds.data.rows import BadRow, file_rows
from kvds.errors import InputError

ROW = {"prompt": "p", "rationale": "r", "answer": "a"}


def write(folder, content: bytes | str, name: str = "rows.jsonl"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        '{"a": 1}\n\n{"a": 2}\n',
        '{"a": 1}\r\n\r\n{"a": 2}\r\n',
        '\ufeff{"a": 1}\n   \n  {"a": 2}  ',
        '{"a": 1}\r\r{"a": 2}',
    ],
)
def test_lines_with_crlf_mark_and_blanks(tmp_path, content):
    assert list(file_rows(write(tmp_path, content))) == [(1, {"a": 1}), (3, {"a": 2})]


def test_a_line_separator_within_a_text_ends_no_row(tmp_path):
    assert list(file_rows(write(tmp_path, '{"a": "x\u2028y\x85z"}\n'))) == [(1, {"a": "x\u2028y\x85z"})]


def test_a_list_knows_its_lines(tmp_path):
    content = '\ufeff[\r\n  {"a": 1,\r\n   "b": [1,\r\n 2]},\r\n\r\n  {"a": 2}, 3,\r\n "x"\r\n]\r\n'
    rows = list(file_rows(write(tmp_path, content, "rows.json")))
    assert rows == [(2, {"a": 1, "b": [1, 2]}), (6, {"a": 2}), (6, 3), (7, "x")]
    assert list(file_rows(write(tmp_path, " [ ] ", "empty.json"))) == []


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("", ":1: no JSON list"),
        ('{"a": 1}', ":1: no JSON list"),
        ('[\n{"a": 1},\n{"a": }\n]', ":3: not JSON (Expecting value)"),
        ('[\n{"a": 1}\n{"a": 2}\n]', ":3: not JSON (a comma or ] is missing)"),
        ('[\n{"a": 1}', ":2: not JSON (a comma or ] is missing)"),
        ('[\n{"a": 1},\n', ":3: not JSON (Expecting value)"),
        ("[1]\n\n]", ":1: more text follows"),
        ("[1,\n" + "[" * 100_000, ":2: not JSON (maximum recursion"),
        (b'[\n"\xff"]', ":2: not UTF-8 text (invalid start byte)"),
    ],
)
def test_a_broken_list_names_its_line(tmp_path, content, place):
    path = write(tmp_path, content, "rows.json")
    with pytest.raises(InputError) as caught:
        list(file_rows(path))
    assert str(caught.value).startswith(f"{path}{place}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "p"', "not JSON (Expecting ',' delimiter"),
        (b'{"prompt": "\xe9"}', "not UTF-8 text (invalid continuation byte at byte 12)"),
        ("[" * 100_000, "not JSON (maximum recursion"),
        ("1" * 5000, "not JSON (Exceeds the limit"),
        ("[1, 2]", "holds [1, 2]; expected an object"),
        ("null", "holds None; expected an object"),
        ('{"prompt": "p", "rationale": "a #### b", "answer": "x"}', "the rationale holds '####'"),
        ('{"prompt": "\\ud800", "answer": "x"}', "holds half of a surrogate pair"),
        ('{"prompt": "p"}', "'answer' is missing; found ['prompt']"),
        ('{"prompt": "p", "answer": "1", "answer": "2"}', "'answer' stands there twice; expected it once"),
    ],
)
def test_a_malformed_line_is_named_or_skipped_and_counted(tmp_path, line, message):
    good = json.dumps(ROW).encode()
    other = json.dumps({**ROW, "prompt": "q"}).encode()
    bad = line.encode() if isinstance(line, str) else line
    path = write(tmp_path, b"\r\n".join([good, b"", bad, other, bad]))
    write(tmp_path, good, "rows.eval.jsonl")
    with pytest.raises(InputError) as caught:
        load_mixture([str(path)], "train")
    assert str(caught.value).startswith(f"{path}:3: {message}"), caught.value
    assert "--on_bad_row skip" in str(caught.value) and "\n" not in str(caught.value)
    mixture = load_mixture([str(path)], "train", on_bad_row="skip")
    assert mixture.skipped == {str(path): 2}
    assert mixture.examples == [
        Example("p", "r", "a", "rows", "rows.jsonl:1"), Example("q", "r", "a", "rows", "rows.jsonl:4"),
    ]  # fmt: skip


def test_rows_of_a_list_are_named_by_their_line(tmp_path):
    good = {"ID": "chal-1", "Body": "b", "Question": "q", "Equation": "( 1.0 )", "Answer": 1.0}
    rows = [good, {**good, "Answer": "one"}, {**good, "ID": "x"}, {**good, "ID": "chal-701", "Body": "c"}]
    path = write(tmp_path, json.dumps(rows, indent=1), "svamp/SVAMP.json")
    with pytest.raises(InputError, match="SVAMP.json:9: 'Answer' is 'one'; expected a number"):
        load_mixture(["svamp"], "train", data_dir=str(tmp_path))
    train, held_out = (load_mixture(["svamp"], s, data_dir=str(tmp_path), on_bad_row="skip") for s in ("train", "eval"))
    assert train.skipped == {str(path): 2} and held_out.skipped == {str(path): 1}
    assert [row.prompt for row in train.examples] == ["b. q"]
    assert [row.prompt for row in held_out.examples] == ["c. q"] and held_out.examples[0].place == "SVAMP.json:23"


def test_svamp_is_split_by_number_whatever_the_order(tmp_path):
    row = {"Question": "q", "Equation": "( 1.0 )", "Answer": 1.0}
    rows = [{**row, "ID": f"chal-{number}", "Body": f"{number}."} for number in (701, 700, 1000, 1)]
    write(tmp_path, json.dumps(rows), "svamp/SVAMP.json")
    bodies = {
        s: [e.prompt for e in load_mixture(["svamp"], s, data_dir=str(tmp_path)).examples] for s in ("train", "eval")
    }
    assert bodies == {"train": ["700. q", "1. q"], "eval": ["701. q", "1000. q"]}


@pytest.mark.parametrize("name", ["missing.jsonl", "folder.jsonl", "missing.json", "a\0b.jsonl", "x" * 5000 + ".jsonl"])
def test_a_file_that_cannot_be_read(tmp_path, name):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(InputError, match="expected a data file there"):
        load_mixture([str(tmp_path / name)], "train")


def test_a_row_before_and_after_a_bad_one_is_kept(tmp_path):
    path = write(tmp_path, "nonsense\n" * 3)
    assert all(isinstance(row, BadRow) for _, row in file_rows(path))
    with pytest.raises(InputError, match=r"no usable row in its train split \(3 malformed rows were skipped\)"):
        load_mixture([str(path)], "train", on_bad_row="skip")
