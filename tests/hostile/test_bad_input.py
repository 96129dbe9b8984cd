"""All that a user can get wrong: exit code 2 and one line that names place and value and says what to do.

The tables are ``bad_input_settings.py`` and ``bad_input_runs.py``; every case goes through the ``main()`` of
``launch/distill.py`` or ``kvds``, all in one process.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hostile.bad_input_files import make_files
from tests.hostile.bad_input_recipes import DEEPSPEED, RECIPES
from tests.hostile.bad_input_runs import CACHE_COMMANDS, COMMANDS, NOT_DRY, RUNS
from tests.hostile.bad_input_settings import FLAGS, INCOMPLETE

REPOSITORY = Path(__file__).resolve().parents[2]
GOOD = ["--model_name", "gpt2", "--output_dir", "outputs/x"]
# Without a word of these a line would say what is wrong and not what would be right.
REMEDIES = ("expected", "--help", "mend the row", "did you mean", "without internet, bring it")


def run_flags(name: str, changes: dict[str, str]) -> list[str]:
    """A run of one step that works, with these changes."""
    values = {
        "teacher_name": "@/model", "student_name": "@/model", "tokenizer_name": "@/tokenizer", "datasets": "synthetic",
        "synthetic_problems": "20", "max_length": "64", "eval_subset_size": "0", "report_to": "none", "batch_size": "4",
        "max_steps": "1", "deepspeed_config": "ds_configs/zero3_cpu.json", "output_dir": f"@/out {name}", **changes,
    }  # fmt: skip
    values["datasets"], *more = values["datasets"].split()
    flags = [token for key, value in values.items() if value for token in (f"--{key}", value)]
    return [*flags[: (at := flags.index("--datasets") + 2)], *more, *flags[at:]]


def all_cases() -> dict[str, tuple[str, list[str], tuple[str, ...]]]:
    """Case → program, its arguments with ``@`` for the folder, and what the line must hold."""
    cases: dict[str, tuple[str, list[str], tuple[str, ...]]] = {}
    for flags, parts in FLAGS.items():
        cases[f"flags {flags}"] = "distill", [*GOOD, *flags.split()], parts
    for flags, parts in INCOMPLETE.items():
        cases[f"only {flags}"] = "distill", flags.split(), parts
    for number, (text, parts) in enumerate(RECIPES.items()):
        cases[f"recipe {text[:60]!r}"] = "distill", ["--config", f"@/recipe{number}.yaml", *GOOD], parts
    for number, (text, parts) in enumerate(DEEPSPEED.items()):
        flags = [*GOOD, "--deepspeed_config", f"@/ds{number}.json"]
        cases[f"deepspeed {text[:90]!r}"] = "distill", flags, (f"deepspeed_config=@/ds{number}.json", *parts)
    for name, (changes, parts) in RUNS.items():
        cases[name] = "distill", run_flags(name, changes), parts
        if name not in NOT_DRY:
            flags = [*run_flags(name, changes), "--dry_run"]
            cases[f"dry run, {name}"] = "distill", flags, parts
    for flags, parts in COMMANDS.items():
        cases[f"kvds {flags}"] = "kvds", flags.split(), parts
    for flags, parts in CACHE_COMMANDS.items():
        cases[f"kvds cache {flags}"] = "kvds", ["cache", *flags.split(), "--", *run_flags("cache", {})], parts
    return cases


CASES = all_cases()
WORKS = "a dry run"


def start(*command: str) -> subprocess.CompletedProcess[str]:
    # As a user's shell: no ranks, and kernels that are not interpreted as those of this session are.
    left_out = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TRITON_INTERPRET")
    environment = {k: v for k, v in os.environ.items() if k not in left_out}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    # No timeout: killed while DeepSpeed compiles, it would leave a lock behind that every later run waits for.
    return subprocess.run([sys.executable, *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("bad_input")
    make_files(folder)
    for number, text in enumerate(RECIPES):
        (folder / f"recipe{number}.yaml").write_text(text + "\n")
    for number, text in enumerate(DEEPSPEED):
        (folder / f"ds{number}.json").write_text(text)
    return folder


@pytest.fixture(scope="module")
def outcome(folder) -> Callable[[str], dict]:
    every = CASES | {WORKS: ("distill", [*run_flags("works", {}), "--dry_run"], ())}
    filled = {c: (p, [token.replace("@", str(folder)) for token in argv]) for c, (p, argv, _) in every.items()}
    (folder / "cases.json").write_text(json.dumps(filled))
    done = start("-m", "tests.hostile.bad_input_process", str(folder / "cases.json"))
    assert "RESULTS" in done.stdout, done.stderr[-4000:]
    return json.loads(done.stdout.split("RESULTS")[1]).__getitem__


def test_the_table_is_large():
    assert len(CASES) >= 300


@pytest.mark.parametrize("case", CASES)
def test_the_fault_is_told_in_one_line(case, folder, outcome):
    result = outcome(case)
    assert result["code"] == 2, result["stderr"][-3000:]
    assert "Traceback" not in result["stderr"]
    [message] = [line for line in result["stderr"].splitlines() if line.startswith("kvds: ")]
    assert message.startswith("kvds: error: ") and len(message) < 1000
    for part in CASES[case][2]:
        assert part.replace("@", str(folder)) in message, message
    assert any(word in message for word in REMEDIES), message
    assert result["seconds"] < 10
    assert result["loaded"] == 0


def test_the_run_that_the_cases_change_works(folder, outcome):
    """Its dry run finds nothing, loads nothing and leaves nothing."""
    result = outcome(WORKS)
    assert result["code"] == 0, result["stderr"][-3000:]
    assert "1 of 4 rows (4 × 1 × 1 ranks)" in result["stdout"] and "nothing stands in the way" in result["stdout"]
    assert result["loaded"] == 0 and not (folder / "out works").exists()


@pytest.mark.parametrize("case", ["flags --batch_sizes 4", "malformed row", "kvds track @/nowhere"])
def test_the_program_itself_ends_with_code_2_in_time(case, folder):
    """A fault that needs no model: before torch is imported, and so in well under 10 seconds of one core."""
    program, argv, parts = CASES[case]
    command = ["launch/distill.py"] if program == "distill" else ["-m", "kvds.cli"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = start(*command, *(token.replace("@", str(folder)) for token in argv))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    [message] = [line for line in done.stderr.splitlines() if line.startswith("kvds:")]
    assert all(part.replace("@", str(folder)) in message for part in parts)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
