"""What kvds writes as JSON, any reader of JSON reads."""

import ast
import json
import math
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

import kvds
from kvds.durable_files import json_text, put_in_place, remove_folder

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
