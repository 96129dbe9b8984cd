"""The launch files: what they start, in which environment, and what they do with a run's exit status.

Slurm and the launchers are stand-ins here that write down how they were called; tests/cluster runs the real ones.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from kvds.config.recipe import load_recipe, parse_run_config
from kvds.distributed.rank_environment import job_port

REPOSITORY = Path(__file__).resolve().parents[2]
SLURM = sorted((REPOSITORY / "launch/slurm").glob("*.sbatch"))

# Writes its arguments and environment as a line of JSON; srun runs the task it was given, as on node 0.
RECORD = """#!{python}
import json, os, subprocess, sys
name = os.path.basename(sys.argv[0])
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps({{"name": name, "args": sys.argv[1:], "env": dict(os.environ)}}) + "\\n")
if name == "scontrol":
    print("n1\\nn2") if sys.argv[1] == "show" else None
elif name == "srun":
    environment = {{**os.environ, "SLURM_NODEID": "0"}}
    sys.exit(subprocess.run([a for a in sys.argv[1:] if not a.startswith("--wait")], env=environment).returncode)
else:
    sys.exit(int(os.environ.get("STATUS", "0")))
"""


@pytest.fixture
def start(tmp_path):
    """Runs a launch file with stand-ins; returns its exit status and the calls it made."""
    import sys

    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("deepspeed", "torchrun", "srun", "scontrol", "python"):
        (programs / name).write_text(RECORD.format(python=sys.executable))
        (programs / name).chmod(0o755)

    def run(file: str, *arguments: str, **environment: str) -> tuple[int, list[dict]]:
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMP_", "TORCH_", "TRITON_", "HF_"))}
        env = (
            kept | {"PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(calls), "KVDS_VENV": "none"} | environment
        )
        done = subprocess.run(["bash", REPOSITORY / file, *arguments], env=env, cwd=REPOSITORY, capture_output=True)
        lines = calls.read_text().splitlines() if calls.exists() else []
        return done.returncode, [json.loads(line) for line in lines]

    return run


JOB = {
    "SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_SUBMIT_DIR": str(REPOSITORY),
    "SLURM_CPUS_PER_TASK": "64", "SLURM_GPUS_ON_NODE": "8",
}  # fmt: skip


def called(calls: list[dict], name: str) -> dict:
    [call] = [call for call in calls if call["name"] == name and "distill.py" in " ".join(call["args"])]
    return call


# -- recipes -----------------------------------------------------------------------------------------------------------


def test_the_qwen2_recipes_differ_in_how_a_step_is_split_only():
    counts = {"qwen2_zero3_1gpu": 1, "qwen2_zero3_8gpu": 8, "qwen2_zero3_2x8gpu": 16}
    recipes = {name: load_recipe(REPOSITORY / f"launch/recipes/{name}.yaml") for name in counts}
    split = ("batch_size", "gradient_accumulation_steps")
    rows = {name: counts[name] * recipe[split[0]] * recipe[split[1]] for name, recipe in recipes.items()}
    assert set(rows.values()) == {128}
    rest = [{k: v for k, v in recipe.items() if k not in split} for recipe in recipes.values()]
    assert rest[0] == rest[1] == rest[2]


@pytest.mark.parametrize("recipe", sorted((REPOSITORY / "launch/recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_a_run(recipe, monkeypatch, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    cfg = parse_run_config(["--config", str(recipe), "--output_dir", str(tmp_path / "run")])
    assert cfg.teacher_placement == ("zero3_offload" if "offload" in recipe.stem else "replicated")


# -- one machine, hostfile, torchrun -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "launcher", "head"),
    [
        ("launch/one_gpu.sh", "deepspeed", ["--num_accelerators", "1"]),
        ("launch/one_node.sh", "deepspeed", []),
        ("launch/torchrun.sh", "torchrun", ["--standalone", "--nproc-per-node", "gpu"]),
    ],
)
def test_one_machine(start, file, launcher, head):
    status, calls = start(file, "my.yaml", "--lr", "0.1", STATUS="85")
    assert status == 85
    assert called(calls, launcher)["args"] == [*head, "launch/distill.py", "--config", "my.yaml", "--lr", "0.1"]
    recipe = called(start(file)[1], launcher)["args"][-1]
    assert (REPOSITORY / recipe).is_file()


def test_hostfile_hands_the_environment_on(start):
    written = REPOSITORY / ".deepspeed_env"
    try:
        status, calls = start("launch/hostfile.sh", "hosts", HF_HOME="/x/hf home", HF_HUB_OFFLINE="1", HF_EMPTY="")
        lines = written.read_text().splitlines()
    finally:
        written.unlink(missing_ok=True)
    assert status == 0
    assert called(calls, "deepspeed")["args"][:3] == ["--hostfile", "hosts", "launch/distill.py"]
    pairs = dict(line.split("=", 1) for line in lines)  # as DeepSpeed reads them
    assert pairs["HF_HOME"] == "/x/hf home" and pairs["HF_HUB_OFFLINE"] == "1" and pairs["DEEPSPEED_TIMEOUT"] == "20"
    assert {"TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "OMP_NUM_THREADS"} <= pairs.keys()
    assert "HF_EMPTY" not in pairs and "PATH" not in pairs
    assert start("launch/hostfile.sh")[0] != 0


# -- Slurm -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", SLURM, ids=lambda path: path.stem)
def test_slurm_files_carry_what_a_job_needs(file):
    options = [line.removeprefix("#SBATCH ") for line in file.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--signal=USR1@300", "--requeue", "--open-mode=append"} <= set(options)
    assert any(option.startswith("--output=") for option in options)
    assert len(SLURM) == 3


def test_slurm_environment(start):
    _, calls = start("launch/slurm/rank.sbatch", **JOB, KVDS_INTERFACE="ib0", SLURM_TMPDIR="/scratch")
    env = called(calls, "python")["env"]
    expected = {
        "MASTER_ADDR": "n1", "MASTER_PORT": str(job_port(123456)), "NCCL_SOCKET_IFNAME": "ib0",
        "GLOO_SOCKET_IFNAME": "ib0", "DEEPSPEED_TIMEOUT": "20", "OMP_NUM_THREADS": "64", "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }  # fmt: skip
    assert {key: env.get(key) for key in expected} == expected
    assert env["TRITON_CACHE_DIR"].startswith("/scratch/") and env["TORCH_EXTENSIONS_DIR"].startswith("/scratch/")
    env = called(start("launch/slurm/rank.sbatch", **JOB)[1], "python")["env"]
    assert "NCCL_SOCKET_IFNAME" not in env  # the libraries choose by themselves


def test_one_task_per_node_starts_the_launcher(start):
    status, calls = start("launch/slurm/node.sbatch", "my.yaml", "--seed", "1", **JOB)
    call = called(calls, "deepspeed")
    port = str(job_port(123456))
    hostfile = str(REPOSITORY / ".hostfile-123456")
    assert status == 0
    assert call["args"] == [
        "--no_ssh", "--node_rank", "0", "--hostfile", hostfile, "--master_addr", "n1", "--master_port", port,
        "launch/distill.py", "--config", "my.yaml", "--seed", "1",
    ]  # fmt: skip
    assert call["env"]["OMP_NUM_THREADS"] == "8"
    assert not Path(hostfile).exists()


@pytest.mark.parametrize("file", SLURM, ids=lambda path: path.stem)
def test_85_is_queued_again_and_no_other_status(start, file):
    task = {"SLURM_ARRAY_TASK_ID": "3"}
    name = str(file.relative_to(REPOSITORY))
    for status, requeued in ((0, False), (1, False), (85, True), (137, False)):
        code, calls = start(name, **JOB, **task, STATUS=str(status))
        requeues = [call["args"] for call in calls if call["name"] == "scontrol" and call["args"][0] == "requeue"]
        assert requeues == ([["requeue", "123456"]] if requeued else [])
        assert code == (0 if requeued else status)


def test_array_tasks_are_arms_and_seeds(start):
    runs = set()
    for task in range(4):
        args = called(start("launch/slurm/ab_array.sbatch", **JOB, SLURM_ARRAY_TASK_ID=str(task))[1], "python")["args"]
        runs.add((args[args.index("--alignment_mode") + 1], args[args.index("--seed") + 1], args[-1]))
    assert runs == {
        ("flat", "0", "outputs/ab/flat-0"), ("structured", "0", "outputs/ab/structured-0"),
        ("flat", "1", "outputs/ab/flat-1"), ("structured", "1", "outputs/ab/structured-1"),
    }  # fmt: skip
