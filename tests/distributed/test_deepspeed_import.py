"""MLflow is imported by who writes records, and not by whoever imports DeepSpeed."""

import importlib
import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_loader
from types import ModuleType

import pytest

from kvds.distributed import deepspeed_import

TRAINING = """
import json, sys
import kvds.training.rank, kvds.training.run, kvds.training.dry_run
before = sorted(name for name in sys.modules if name.split(".")[0] == "mlflow")
from deepspeed.autotuning import autotuner
found = autotuner.has_mlflow
started = autotuner.mlflow.start_run.__module__
import mlflow
whole = autotuner.mlflow.start_run is mlflow.start_run and "MlflowClient" in dir(mlflow)
print(json.dumps([before, found, started, whole]))
"""


def test_training_imports_deepspeed_and_no_mlflow():
    ended = subprocess.run([sys.executable, "-c", TRAINING], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1]) == [[], True, "mlflow.tracking.fluent", True]


def test_launchers_that_tests_start_import_none_either():
    """By ``tests/harness/launchers``, which conftest.py puts on the path."""
    code = (
        "import sys, deepspeed.launcher.runner, deepspeed.launcher.launch; print(sorted(set(sys.modules) & {'mlflow'}))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ended.stdout.splitlines()[-1] == "[]", ended.stderr


@pytest.fixture
def autotuner(tmp_path, monkeypatch):
    """Runs a stand-in for the autotuner's file beside a stand-in for MLflow, which the test may take away."""
    (tmp_path / "flow_tracker").mkdir()
    (tmp_path / "flow_tracker/__init__.py").write_text("import sys\nsys.flow_tracker_runs += 1\nanswer = 42\n")
    (tmp_path / "flow_tracker/parts.py").write_text("half = 21\n")
    file = tmp_path / "own_autotuner.py"
    file.write_text("try:\n    import flow_tracker\n    found = True\nexcept Exception:\n    found = False\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(deepspeed_import, "_MLFLOW", "flow_tracker")
    monkeypatch.setattr(sys, "flow_tracker_runs", 0, raising=False)
    for name in ("flow_tracker", "flow_tracker.parts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()

    def run(extra: str = "") -> ModuleType:
        file.write_text(file.read_text() + extra)
        loader = deepspeed_import._AutotunerLoader("own_autotuner", str(file))
        module = module_from_spec(spec_from_loader("own_autotuner", loader))
        loader.exec_module(module)
        return module

    return run


def test_it_is_imported_when_a_name_of_it_is_asked_for(autotuner):
    module = autotuner()
    assert (module.found, sys.flow_tracker_runs, "flow_tracker" in sys.modules) == (True, 0, False)
    assert (module.flow_tracker.answer, sys.flow_tracker_runs) == (42, 1)
    assert sys.modules["flow_tracker"].answer == 42


def test_it_is_whole_for_who_imports_a_part_of_it_meanwhile(autotuner):
    module = autotuner("from flow_tracker.parts import half\n")
    assert (module.half, sys.flow_tracker_runs, sys.modules["flow_tracker"].answer) == (21, 1, 42)


def test_where_it_is_not_installed_the_autotuner_sees_that(autotuner, monkeypatch, tmp_path):
    (tmp_path / "flow_tracker").rename(tmp_path / "elsewhere")
    importlib.invalidate_caches()
    assert autotuner().found is False


def test_where_it_is_imported_already_the_autotuner_gets_it(autotuner):
    import flow_tracker

    assert autotuner().flow_tracker is flow_tracker
