"""kvds as users install it: a wheel in an environment of its own, used from a folder that is no checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvds.distributed.rank_environment import quiet_port

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = ("ds_configs", "launch/recipes", "launch/quickstart_teacher")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: a build folder in the checkout would bring modules that are gone."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("kvds", *SHIPPED):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", out]
    done = subprocess.run([*build, source], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    [built] = out.glob("kvds-*-py3-none-any.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs a command of the environment from a folder outside of the checkout."""
    folder, elsewhere = tmp_path_factory.mktemp("venv"), tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=120)
    python = folder / "bin/python"
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    # What kvds depends on is this environment's; a path of a .pth file brings no other .pth file along, so no kvds.
    Path(paths["purelib"], "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    done = subprocess.run([*pip, "--disable-pip-version-check"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # Tests before it, in this process, may have left a rank of theirs.
    foreign = {"PYTHONPATH", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in os.environ.items() if name not in foreign}
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])

    def run(*command: str, **more: str) -> subprocess.CompletedProcess[str]:
        words = [str(python) if word == "python" else word for word in command]
        environment = {**kept, "PATH": path, "DS_ACCELERATOR": "cpu", **more}
        return subprocess.run(words, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=600)

    run.folder = elsewhere
    return run


def test_the_wheel_has_what_lies_beside_the_package(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [path for name in SHIPPED for path in (REPOSITORY / name).rglob("*") if path.is_file()]
    assert len(files) > 30
    assert {f"kvds/shipped/{path.relative_to(REPOSITORY)}" for path in files} <= names
    assert not any(name.split("/")[0] in ("launch", "ds_configs", "tests") for name in names)


def test_the_command_and_the_module_are_one(installed):
    by_name, by_module = installed("kvds", "--help"), installed("python", "-m", "kvds", "--help")
    assert (by_name.returncode, by_name.stdout) == (0, by_module.stdout) and "  distill " in by_name.stdout
    where = installed("python", "-c", "import kvds; print(kvds.__file__)").stdout
    assert str(REPOSITORY) not in where and "site-packages" in where


def test_a_dry_run_by_bare_names(installed):
    names = ("--config", "quickstart", "--deepspeed-config", "zero3_cpu", "--output-dir", "dry", "--dry-run")
    done = installed("kvds", "distill", *names)
    assert done.returncode == 0 and "nothing stands in the way" in done.stdout, done.stderr
    assert not (installed.folder / "dry").exists()
    done = installed("kvds", "distill", "--config", "quikstart", "--output_dir", "dry")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "did you mean quickstart?" in done.stderr


ONE_STEP = (
    *(
        "distill",
        "--config",
        "quickstart",
        "--deepspeed_config",
        "zero3_cpu",
        "--max_steps",
        "1",
        "--logging_steps",
        "1",
    ),
    *("--synthetic_problems", "16", "--eval_subset_size", "2", "--max_new_tokens", "2", "--report_to", "none"),
)


def one_step_is_there(run: Path, ranks: int) -> None:
    assert (run / "student/model.safetensors").is_file()
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["step"] in (0, 1)
    told = json.loads((run / "provenance.json").read_text())
    assert told["world_size"] == str(ranks) and told["command"].startswith("python -m kvds distill --config quickstart")


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("ranks", "launcher"),
    [
        (1, ("-m", "deepspeed.launcher.runner", "--num_accelerators", "1", "--module")),
        (2, ("-m", "torch.distributed.run", "--nproc_per_node", "2", "-m")),
    ],
    ids=["deepspeed", "torchrun"],
)
def test_one_step_through_a_launcher(ranks, launcher, installed):
    port, folder = ("--master_port", str(quiet_port())), f"one_step_{ranks}"
    done = installed("python", *launcher[:-1], *port, launcher[-1], "kvds", *ONE_STEP, "--output_dir", folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    one_step_is_there(installed.folder / folder, ranks)


@pytest.mark.multiprocess
def test_one_step_of_two_tasks_of_srun(installed):
    """Slurm's variables alone, as ``srun python -m kvds distill …`` sets them: no launcher, no MPI."""
    step = {"SLURM_JOB_ID": str(quiet_port()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}
    tasks = [
        {**step, "SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in ("0", "1")
    ]
    command = ("python", "-m", "kvds", *ONE_STEP, "--output_dir", "srun")
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda task: installed(*command, **task), tasks))
    assert [one.returncode for one in done] == [0, 0], done[0].stderr[-2000:] + done[1].stderr[-2000:]
    one_step_is_there(installed.folder / "srun", 2)
