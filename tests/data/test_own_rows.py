"""Data of one's own, whatever holds it: the same rows from JSON lines, CSV, parquet, folders and the hub."""

import json
import sys
import types

import datasets
import pytest

from kvds.config.settings import DataSettings
from kvds.data.corpus_names import is_hub_name, is_own, is_own_file, split_names
from kvds.data.mixture import check_rows, load_mixture
from kvds.data.own_rows import Reading
from kvds.errors import InputError

ROWS = [{"prompt": f"What is {i}?", "completion": f'"{i:03d}",\n x'} for i in range(40)]


def write(folder, kind: str, rows=ROWS) -> str:
    """The rows in a file or folder; its name as ``--datasets`` has it."""
    table, path = datasets.Dataset.from_list(rows), folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        table.to_csv(str(path), index=False)
    elif kind == "tsv":
        table.to_csv(str(path), index=False, sep="\t")
    elif kind == "parquet":
        table.to_parquet(str(path))
    elif kind == "saved":
        table.save_to_disk(str(path))
    elif kind == "folder":
        path.mkdir()
        table.to_parquet(str(path / "part-0.parquet"))
    return str(path)


def both(name: str, **how) -> list[set[tuple[str, str]]]:
    loaded = [load_mixture([name], split, **how).examples for split in ("train", "eval")]
    return [{(row.prompt, row.answer) for row in rows} for rows in loaded]


KINDS = ("jsonl", "json", "csv", "tsv", "parquet", "saved", "folder")


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_hold_the_same_rows_and_hold_out_the_same(tmp_path, kind):
    train, held_out = both(write(tmp_path, kind))
    assert train | held_out == {(row["prompt"], row["completion"]) for row in ROWS}
    assert held_out and not train & held_out
    (tmp_path / "again").mkdir()
    assert [train, held_out] == both(write(tmp_path / "again", "jsonl"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_gives_as_many_rows_as_are_asked_for_each_time_the_same(tmp_path, kind):
    name = write(tmp_path, kind)

    def taken(split: str, count: int, seed: int = 0) -> list[str]:
        reading = Reading(streaming=True, held_out_rows=2)
        size = count if split == "train" else None
        return [r.prompt for r in load_mixture([name], split, subset_size=size, seed=seed, reading=reading).examples]

    assert len(set(taken("train", 12))) == 12 and taken("train", 12) == taken("train", 12) != taken("train", 12, seed=1)
    held_out = {prompt for prompt, _ in both(name)[1]}
    assert set(taken("eval", 0)) <= held_out and len(taken("eval", 0)) == min(2, len(held_out))
    assert not set(taken("train", 30)) & held_out


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_means_the_same_as_a_stream(tmp_path, streaming):
    """Texts stay texts, whatever they look like; a bad row is named by its line."""
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"2026-11-{day:02d} 10:00:00", "answer": f"{day:03d}"}) for day in range(1, 29)]
    path.write_text("\n".join(lines))
    reading = Reading(streaming=streaming, held_out_rows=2)
    found = load_mixture([str(path)], "train", subset_size=20, reading=reading).examples
    rows = {(row.prompt, row.answer, row.place) for row in found}
    assert len(rows) == 20
    assert rows <= {(f"2026-11-{day:02d} 10:00:00", f"{day:03d}", f"{path.name}:{day}") for day in range(1, 29)}
    path.write_text("\n".join([*lines[:4], '{"prompt": "a", "prompt": "b", "answer": "1"}', *lines[4:]]))
    with pytest.raises(InputError, match=r"rows.jsonl:5: 'prompt' stands there twice"):
        load_mixture([str(path)], "train", subset_size=29, reading=reading)


def test_a_stream_of_which_no_row_is_held_out_is_told(tmp_path):
    name = write(tmp_path, "parquet", [{"text": "1"}])
    reading = Reading(streaming=True, held_out_rows=2)
    with pytest.raises(InputError, match="none of its rows is held out; .*@TRAIN,EVAL.*--eval_subset_size 0"):
        load_mixture([name], "eval", reading=reading)


def test_values_of_a_table_are_the_text_that_stands_there(tmp_path):
    (tmp_path / "t.csv").write_text('prompt,answer,rationale\r\n"a ""b""\r\nc",007,\r\nNA,null,None\r\n,1,\r\n')
    with pytest.raises(InputError, match=r"t.csv:5: 'prompt' is ''; expected a text"):
        load_mixture([str(tmp_path / "t.csv")], "train")
    mixture = load_mixture([str(tmp_path / "t.csv")], "train", on_bad_row="skip")
    rows = [*mixture.examples, *load_mixture([str(tmp_path / "t.csv")], "eval", on_bad_row="skip").examples]
    found = {(row.prompt.replace("\r\n", "\n"), row.rationale, row.answer, row.place) for row in rows}
    assert found == {('a "b"\nc', "", "007", "t.csv:2"), ("NA", "None", "null", "t.csv:4")}


SPLITS = datasets.DatasetDict(
    {
        "train_sft": datasets.Dataset.from_list(ROWS[:30]),
        "test_sft": datasets.Dataset.from_list(ROWS[30:33]),
        "test": datasets.Dataset.from_list(ROWS[33:]),
    }
)


def test_splits_are_found_or_said(tmp_path):
    SPLITS.save_to_disk(str(tmp_path / "sft"))
    name = str(tmp_path / "sft")
    with pytest.raises(InputError, match=r"has no split train, but test, test_sft and train_sft; .*sft@train_sft"):
        both(name)
    assert [len(rows) for rows in both(f"{name}@train_sft,test_sft")] == [30, 3]
    train, held_out = both(f"{name}@train_sft")
    assert len(train) + len(held_out) == 30 and held_out
    with pytest.raises(InputError, match="has no split tset"):
        both(f"{name}@train_sft,tset")
    datasets.DatasetDict({"train": SPLITS["train_sft"], "test": SPLITS["test"]}).save_to_disk(str(tmp_path / "plain"))
    assert [len(rows) for rows in both(str(tmp_path / "plain"))] == [30, 7]


@pytest.fixture
def hub(monkeypatch) -> list[tuple]:
    """A stand-in for the hub that records what it is asked for."""
    asked = []

    def load_dataset(name, config=None, *, split=None, streaming=False):
        asked.append((name, config, split))
        if name == "nobody/nothing":
            raise ConnectionError("Couldn't reach\nthe Hub")
        return SPLITS if split is None else SPLITS[split]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_a_data_set_of_the_hub_by_any_name(hub):
    mixture = load_mixture(["some/chats/config@train_sft,test_sft:2"], "train")
    assert {row.corpus for row in mixture.examples} == {"some/chats/config train_sft test_sft"}
    assert hub == [("some/chats", "config", "train_sft"), ("some/chats", "config", "test_sft")]
    assert mixture.recognised == {
        "some/chats/config@train_sft,test_sft": "completion (by its columns: prompt, completion)"
    }
    with pytest.raises(InputError, match=r"datasets=nobody/nothing: .*could not be loaded .*OWNER/NAME@TRAIN"):
        load_mixture(["nobody/nothing"], "train")


def test_names_of_files_folders_and_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine/rows").mkdir(parents=True)
    for name, kinds in {
        "a/b.parquet": "file", "./x": "file", "mine/rows": "file", "mine/rows@train": "file", "owner/name": "hub",
        "owner/name/config": "hub", "owner/name@a,b": "hub", "gsm8k": "none", "gsm8l": "none", "a/b/c/d": "none",
    }.items():  # fmt: skip
        assert (is_own_file(name), is_hub_name(name)) == (kinds == "file", kinds == "hub"), name
        assert is_own(name) == (kinds != "none")
    assert split_names("o/n@a,b") == ("o/n", ["a", "b"]) and split_names("me@home/a.csv") == ("me@home/a.csv", [])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.parquet", b"PAR1 no", r"a.parquet: cannot be read \(.*expected (a parquet file|the file)"),
        ("a.csv", b"prompt,answer\na,b,c\n", "a.csv:2: has 3 fields; expected 2, as the first line has"),
        ("a.csv", b'prompt,answer\n"a,b\n', r"a.csv:2: unexpected end of data; expected a table with quotes that"),
        ("a.csv", b"prompt,prompt\na,b\n", "a.csv:1: the column prompt stands there twice; expected each once"),
        ("a.csv", "prompt,answer\né,b\n".encode("latin-1"), "a.csv: not UTF-8 text"),
        ("a.csv", b"", "no usable row in its train split"),
    ],
)
def test_files_that_are_not_what_their_name_says(tmp_path, file, content, message):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_mixture([str(tmp_path / file)], "train")


def test_a_folder_without_data_is_told(tmp_path):
    with pytest.raises(InputError, match=r"cannot be read as data \(.*expected a folder written by save_to_disk"):
        load_mixture([str(tmp_path)], "train")


def test_columns_are_one_for_all_or_one_for_each(tmp_path):
    names = [
        write(tmp_path, "csv"),
        write(tmp_path, "parquet", [{"q": r["prompt"], "a": r["completion"]} for r in ROWS]),
    ]
    reading = Reading(columns=("auto", "prompt=q,answer=a"))
    mixture = load_mixture(names, "train", reading=reading)
    assert {row.form for row in mixture.examples} == {"completion", "reasoning"}
    with pytest.raises(InputError, match="has no column q; expected one of completion, prompt"):
        load_mixture(names, "train", reading=Reading(columns=("prompt=q,answer=a",)))
    with pytest.raises(InputError, match="columns=text=t: gsm8k have columns of their own; expected data of your own"):
        load_mixture(["gsm8k"], "train", reading=Reading(columns=("text=t",)))
    check_rows(DataSettings(datasets=("synthetic", *names), columns=("auto", "auto", "prompt=q,answer=a")), 0)


def test_a_prompt_is_held_out_of_every_form(tmp_path):
    chat = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": "c"}]} for r in ROWS
    ]
    names = [write(tmp_path, "parquet"), write(tmp_path, "jsonl", chat)]
    held_out = load_mixture(names[:1], "eval").examples
    mixture = load_mixture(names[1:], "train", held_out=held_out)
    asked = {row.prompt for row in held_out}
    assert asked and not asked & {row.prompt for row in mixture.examples}
