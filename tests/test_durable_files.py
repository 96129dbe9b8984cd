"""What kvds writes as JSON, any reader of JSON reads; a disk that is full is told in one line, whoever writes."""

import ast
import json
import math
import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

import kvds
from kvds import cli
from kvds.checkpoint.aligner_file import save_aligner
from kvds.durable_files import full_disk, json_text, put_in_place, remove_folder, write_durably
from kvds.training import rank

# What writes files for a run: all of it is stopped by a disk that takes no more.
WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: write_durably(path, "{}"),
    "tokenizer": lambda path: Tokenizer(models.BPE()).save(str(path)),
    "safetensors": lambda path: save_file({"a": torch.ones(4)}, path),
    "aligner": lambda path: save_aligner({}, {"a": torch.ones(400)}, path),
}

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
# Messages show a value as the user's file has it.
_SHOWN = {"config/deepspeed_file.py", "config/deepspeed_keys.py"}
# Texts that configurations are told apart by, in memory: infinity is no null there.
_COMPARED = {"models/family_check.py", "models/adapters.py"}


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def with_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {key: with_nulls(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [with_nulls(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@given(VALUES)
def test_numbers_that_are_not_finite_are_null_and_all_else_is_itself(value):
    assert json.loads(json_text(value), parse_constant=refuse) == with_nulls(value)
    assert json.loads(json_text(value, indent=1, ensure_ascii=False), parse_constant=refuse) == with_nulls(value)


def test_json_is_written_in_one_place():
    package = Path(kvds.__file__).parent
    writers = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("dump", "dumps") and ast.unparse(node.value) == "json":
                writers.add(path.relative_to(package).as_posix())
    assert writers - _SHOWN - _COMPARED == {"durable_files.py"}


def test_a_link_gives_its_name_to_what_is_written_and_keeps_what_it_leads_to(tmp_path):
    elsewhere, target = tmp_path / "elsewhere", tmp_path / "student"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    target.symlink_to(elsewhere)
    for number in range(3):
        new = tmp_path / "student.unfinished"
        new.mkdir()
        (new / str(number)).touch()
        put_in_place(new, target)
        assert [path.name for path in target.iterdir()] == [str(number)]
        assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", "student"}
    assert (elsewhere / "kept").is_file()


def test_a_link_is_removed_and_what_it_leads_to_is_not(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for _ in range(2):
        (tmp_path / "step").symlink_to(tmp_path / "elsewhere")
        remove_folder(tmp_path / "step")
        assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


@pytest.fixture
def full() -> Callable[[Callable[[], object]], BaseException]:
    """What is raised by a function while no file may grow."""

    def run(write: Callable[[], object]) -> BaseException:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            write()
        except Exception as error:
            return error
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        raise AssertionError("it was written")

    return run


@pytest.mark.parametrize("name", WRITERS)
def test_whoever_writes_a_full_disk_is_known(name, tmp_path, full):
    assert full_disk(full(lambda: WRITERS[name](tmp_path / "file"))).endswith(": File too large")


def test_any_other_fault_is_none_of_a_full_disk(tmp_path):
    assert full_disk(PermissionError(13, "Permission denied")) == ""
    assert full_disk(RuntimeError("connection reset (os error 104)")) == ""
    assert full_disk(OSError(28, "No space left on device", "here")) == "here: No space left on device"


@pytest.mark.parametrize("writer", ["tokenizer", "safetensors"])
def test_a_full_disk_ends_runs_and_commands_in_one_line(writer, tmp_path, full, monkeypatch, capsys):
    error = full(lambda: WRITERS[writer](tmp_path / "file"))

    def fail(*_: object) -> None:
        raise error

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(rank, "StopRequest", lambda: SimpleNamespace(install=lambda leave: None))
    told = "kvds: error: the output: File too large (make room, then start again)\n"
    assert rank.run_rank(["--model_name", "gpt2", "--output_dir", str(tmp_path)], train=fail) == 1
    assert capsys.readouterr().err.endswith(told)
    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["report"]) == 1 and capsys.readouterr().err.endswith(told)
