"""What needs an extra says which; all else does without."""

import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest

from kvds.cli import NEEDS, main
from kvds.config import extras
from kvds.tracking.run_report import write_report
from kvds.tracking.tracker import Tracker

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def nothing_beside(monkeypatch):
    """An environment without any extra."""
    monkeypatch.setattr(extras, "find_spec", lambda package: None)


def test_every_package_is_brought_by_the_extra_that_is_named():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    brought = project["optional-dependencies"]
    for package, extra in extras.EXTRAS.items():
        assert any(wish.startswith(f"{package}>") for wish in brought[extra]), package
        assert not any(wish.startswith(f"{package}>") for wish in project["dependencies"]), package
    assert {package for packages in NEEDS.values() for package in packages} <= extras.EXTRAS.keys()
    wishes = [*project["dependencies"], *(wish for name in ("all", "dev") for wish in brought[name])]
    assert all("<" in wish for wish in project["dependencies"]) and any(wish.startswith("kvds[") for wish in wishes)
    assert requires("kvds") is None or len(requires("kvds")) > 10


@pytest.mark.parametrize(("command", "package"), [(name, packages[0]) for name, packages in NEEDS.items()])
def test_a_command_names_the_extra_that_it_needs(nothing_beside, capsys, command, package):
    assert main([command, "x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"kvds: error: kvds {command}: {package} is not installed (pip install 'kvds[")


def test_records_go_on_without_mlflow(nothing_beside, caplog, tmp_path):
    tracker = Tracker(tmp_path)
    tracker.log(1, {"loss/total": 2.0})
    tracker.finish()
    assert [record.getMessage() for record in caplog.records] == [
        "records: mlflow is not installed (pip install 'kvds[mlflow]'); metrics.jsonl alone is written "
        "(or --report_to none)"
    ]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1 and not (tmp_path / "mlflow.db").exists()


def test_a_report_without_matplotlib_has_no_picture(nothing_beside, caplog, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1, "loss/task": 2.0}\n')
    written = write_report([tmp_path / "run"], tmp_path / "report")
    assert [path.name for path in written] == ["report.md", "report.csv"] and "kvds[plots]" in caplog.text
    assert "![" not in written[0].read_text() and "| run " in written[0].read_text()
