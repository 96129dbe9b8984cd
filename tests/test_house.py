"""The house stays as CONTRIBUTING.md draws it: few files at the root, none long, every room on a floor and told."""

import re
import subprocess
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "kvds"
IMPORTS_DEEPSPEED = {"checkpoint", "distributed", "doctor", "teacher", "training"}


def rooms() -> set[str]:
    """Packages and modules directly below ``kvds/``."""
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    return packages | {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}


def contracts() -> dict[str, dict]:
    linter = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]
    return {contract["type"] + str(contract.get("forbidden_modules", "")): contract for contract in linter["contracts"]}


def test_at_most_three_modules_stand_at_the_root():
    doors = {"__init__.py", "__main__.py"}  # where Python itself looks
    assert sorted({path.name for path in PACKAGE.glob("*.py")} - doors) == ["cli.py", "durable_files.py", "errors.py"]


def test_no_file_is_over_400_lines():
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "*.sh"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    lines = {name: len((REPOSITORY / name).read_text().splitlines()) for name in listed.stdout.split()}
    assert len(lines) > 300
    assert {name: count for name, count in lines.items() if count > 400} == {}


def test_every_room_has_a_line_in_contributing():
    tree = (REPOSITORY / "CONTRIBUTING.md").read_text().split("```\nkvds/\n")[1].split("```")[0]
    told = {re.sub(r"(/|\.py)$", "", line.split()[0]) for line in tree.splitlines() if line.startswith("  ")}
    assert told == rooms()


def test_every_room_has_a_floor_and_a_word_on_deepspeed():
    layers = contracts()["layers"]["layers"]
    assert {room.strip() for floor in layers for room in floor.split("|")} == rooms()
    sources = {name.removeprefix("kvds.") for name in contracts()["forbidden['deepspeed']"]["source_modules"]}
    assert sources == rooms() - IMPORTS_DEEPSPEED
