"""Hub names without a hub: the first failure is told once, at once, with its reason."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.harness.survival_runs import flags, make_models

CODE = """
import json, logging, sys, time
from kvds.config.recipe import parse_run_config
from kvds.errors import InputError
from kvds.models.architecture import load_model_configs
from kvds.models.tokenizer import check_same_tokenizer, load_tokenizer

logging.basicConfig(stream=sys.stderr, format="%(message)s")
cfg = parse_run_config(json.loads(sys.argv[1]))
begun = time.monotonic()
try:
    tokenizer = load_tokenizer(cfg)
    check_same_tokenizer(cfg, tokenizer)
    load_model_configs(cfg, tokenizer)
except InputError as error:
    print(error)
print(time.monotonic() - begun)
"""
UNREACHABLE = {"HF_HUB_OFFLINE": "", "HF_ENDPOINT": "http://127.0.0.1:9"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


def told(models, environment, **changes):
    """The error, and what was logged, of a process of its own: the hub's client reads its variables once."""
    command = flags(models, models / "out", **changes)
    if changes.get("tokenizer_name") == "":
        at = command.index("--tokenizer_name")
        del command[at : at + 2]
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(command)], capture_output=True, text=True,
        env={**os.environ, "HF_HOME": str(models / "cache"), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *error, seconds = done.stdout.splitlines()
    # Five more requests for each file would be half a minute each.
    assert float(seconds) < 15
    return " ".join(error), [line for line in done.stderr.splitlines() if "hub" in line.lower() or "Retry" in line]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("environment", "reason", "lines"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set, and", 0),
        (UNREACHABLE, "http://127.0.0.1:9 cannot be reached: [Errno 111] Connection refused, and", 1),
    ],
)
@pytest.mark.parametrize("tokenizer", ["", None])
def test_hub_names_without_a_hub_are_refused_with_the_reason(models, environment, reason, lines, tokenizer):
    """With a tokenizer at hand the architecture is what is missed first."""
    changes = {} if tokenizer is None else {"tokenizer_name": tokenizer}
    error, logged = told(models, environment, teacher_name="some/teacher", student_name="some/student", **changes)
    student, teacher = "--student_name=some/student: the config.json", "--teacher_name=some/teacher: the tokenizer"
    missing = student if tokenizer is None else teacher
    assert error.startswith(f"{missing} could not be loaded from the hub")
    assert f"({reason} {models / 'cache/hub'} holds nothing of it)" in error and "kvds prefetch" in error
    assert len([line for line in logged if "not compared" not in line]) == lines and len(set(logged)) == len(logged)


@pytest.mark.timeout(60)
def test_of_a_hub_name_and_a_folder_without_tokenizers_the_hub_s_reason_is_told(models):
    error, _ = told(models, {"HF_HUB_OFFLINE": "1"}, tokenizer_name="", teacher_name="some/teacher")
    assert "--teacher_name=some/teacher" in error and "HF_HUB_OFFLINE is set" in error


@pytest.mark.timeout(60)
def test_a_tokenizer_that_is_there_and_damaged_is_not_called_missing(models, tmp_path):
    teacher = shutil.copytree(models / "teacher", tmp_path / "teacher")
    (teacher / "tokenizer.json").write_text("{")
    error, _ = told(models, {"HF_HUB_OFFLINE": "1"}, tokenizer_name="", teacher_name=teacher)
    assert error.startswith(f"--teacher_name={teacher}: the folder holds no loadable tokenizer")
