"""The launch files: what they start, in which environment, and what they do with a run's exit status.

Slurm and the launchers are stand-ins here that write down how they were called; tests/cluster runs the real ones.
"""

import ast
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

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
    first = next(i for i, word in enumerate(sys.argv) if i and not word.startswith("--"))
    sys.exit(subprocess.run(sys.argv[first:], env=environment).returncode)
else:
    sys.exit(int(os.environ.get("STATUS", "0")))
"""


@pytest.fixture
def start(tmp_path):
    """Runs a launch file with stand-ins; returns its exit status and the calls it made."""
    import sys

    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("accelerate", "deepspeed", "torchrun", "srun", "scontrol", "python", "qsub"):
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
        ("launch/one_gpu.sh", "deepspeed", ["--quiet", "--num_accelerators", "1"]),
        ("launch/one_node.sh", "deepspeed", ["--quiet"]),
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
    assert called(calls, "deepspeed")["args"][:4] == ["--quiet", "--hostfile", "hosts", "launch/distill.py"]
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
    assert ("--mem=0" in options) == ("gpu:8" in " ".join(options))  # whole nodes take all of their memory
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
    assert env["SRUN_CPUS_PER_TASK"] == "64"  # which srun since 22.05 does not take over from sbatch
    env = called(start("launch/slurm/rank.sbatch", **JOB)[1], "python")["env"]
    assert "NCCL_SOCKET_IFNAME" not in env  # the libraries choose by themselves


def test_one_task_per_node_starts_the_launcher(start):
    status, calls = start("launch/slurm/node.sbatch", "my.yaml", "--seed", "1", **JOB)
    call = called(calls, "deepspeed")
    port = str(job_port(123456))
    hostfile = str(REPOSITORY / ".hostfile-123456")
    assert status == 0
    assert call["args"] == [
        "--quiet", "--no_ssh", "--node_rank", "0", "--hostfile", hostfile, "--master_addr", "n1", "--master_port", port,
        "launch/distill.py", "--config", "my.yaml", "--seed", "1",
    ]  # fmt: skip
    assert call["env"]["OMP_NUM_THREADS"] == "8"
    assert not Path(hostfile).exists()


@pytest.mark.parametrize("status", [0, 85])
def test_what_is_staged_is_read_from_the_node_and_removed(start, tmp_path, status):
    hub, disk = tmp_path / "hub", tmp_path / "disk"
    (hub / "blobs").mkdir(parents=True)
    (hub / "env.sh").write_text(f"export HF_HOME={hub}\n")
    (hub / "link").symlink_to("blobs")
    stage = {"KVDS_PREFETCHED": str(hub), "SLURM_TMPDIR": str(disk), "SLURM_JOB_NUM_NODES": "2"}
    _, calls = start("launch/slurm/rank.sbatch", **JOB, **stage, KVDS_STAGE="1", STATUS=str(status))
    staged = Path(called(calls, "python")["env"]["HF_HOME"])
    copied, _, removed = [call["args"] for call in calls if call["name"] == "srun"]
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1"} <= set(copied) and set(copied[:3]) == set(removed[:3])
    assert staged.parent.parent == disk and not staged.exists() and hub.exists()
    # The same without the last word: what would lie there is what was prefetched, links as links.
    subprocess.run(copied[3:], check=True)
    assert (staged / "link").is_symlink() and (staged / "link").is_dir()
    assert called(start("launch/slurm/rank.sbatch", **JOB, **stage)[1], "python")["env"]["HF_HOME"] == str(hub)


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


# -- accelerate, PBS, images -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gpus", "several"), [("1", []), ("8", ["--multi_gpu"])])
def test_accelerate_starts_the_ranks_alone(start, gpus, several):
    status, calls = start("launch/accelerate.sh", "my.yaml", "--lr", "0.1", GPUS=gpus, STATUS="85")
    [call] = [call for call in calls if call["name"] == "accelerate"]
    assert status == 85
    assert call["args"] == [
        "launch", *several, "--num_machines", "1", "--num_processes", gpus, "--mixed_precision", "no",
        "--dynamo_backend", "no", "--module", "kvds", "distill", "--config", "my.yaml", "--lr", "0.1",
    ]  # fmt: skip


def test_accelerate_knows_these_flags():
    """Its own parser reads the line; what it starts is a module and that one's arguments."""
    from accelerate.commands.launch import launch_command_parser

    flags = ["--multi_gpu", "--num_machines", "1", "--num_processes", "2", "--mixed_precision", "no"]
    read = launch_command_parser().parse_args([*flags, "--dynamo_backend", "no", "--module", "kvds", "distill", "--x"])
    assert (read.module, read.training_script, read.training_script_args) == (True, "kvds", ["distill", "--x"])


@pytest.fixture
def pbs(start, tmp_path):
    """Runs the PBS file on two nodes of four GPUs."""
    nodes = tmp_path / "nodes"
    nodes.write_text("n1\n" * 4 + "n2\n" * 4)
    job = {"PBS_JOBID": "77.server", "PBS_NODEFILE": str(nodes), "PBS_O_WORKDIR": str(REPOSITORY)}

    def run(**environment: str) -> tuple[int, list[dict]]:
        try:
            return start("launch/pbs/node.pbs", **job, KVDS_RANKS_PER_NODE="4", **environment)
        finally:
            (REPOSITORY / ".deepspeed_env").unlink(missing_ok=True)

    return run


def test_pbs_starts_the_launcher_over_its_nodes_and_leaves_in_time(pbs):
    status, calls = pbs(KVDS_RECIPE="my.yaml", KVDS_FLAGS="--output_dir out --seed 1", KVDS_INTERFACE="ib0")
    call = called(calls, "deepspeed")
    hostfile = REPOSITORY / ".hostfile-77"
    assert status == 0 and call["env"]["NCCL_SOCKET_IFNAME"] == "ib0"
    assert call["args"] == [
        "--quiet", "--hostfile", str(hostfile), "launch/distill.py", "--config", "my.yaml", "--max_minutes", "710",
        "--output_dir", "out", "--seed", "1",
    ]  # fmt: skip
    assert not hostfile.exists() and not any(call["name"] == "qsub" for call in calls)


def test_pbs_queues_85_again_and_no_other_status(pbs):
    status, calls = pbs(STATUS="85", KVDS_MINUTES="50", KVDS_QSUB="-q long -l walltime=01:00:00")
    [call] = [call for call in calls if call["name"] == "qsub"]
    *options, flag, names, file = call["args"]
    assert (status, options, flag) == (85, ["-q", "long", "-l", "walltime=01:00:00"], "-v")  # the stand-in's own status
    assert set(names.split(",")) >= {"KVDS_MINUTES", "KVDS_QSUB", "KVDS_RANKS_PER_NODE"} and file.endswith("node.pbs")
    status, calls = pbs(STATUS="1")
    assert status == 1 and not any(call["name"] == "qsub" for call in calls)


def test_images_hold_what_a_wheel_is_built_of():
    """Every file that setup.py and pyproject.toml ask for is copied, and both images are filled by one script."""
    images = [(REPOSITORY / "launch/containers" / name).read_text() for name in ("Dockerfile", "kvds.def")]
    wanted = ["pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "kvds", *_shipped()]
    for image in images:
        copied = [line.removeprefix("COPY").split()[:-1] for line in image.splitlines() if line[:4] in ("COPY", "    ")]
        assert {name for line in copied for name in line} >= {*wanted, "launch/containers/install.sh"}
        assert "containers/install.sh" in image.split("launch/containers/install.sh", 1)[1] and "3.12-slim" in image
    assert all((REPOSITORY / name).exists() for name in wanted)


def _shipped() -> list[str]:
    [line] = [line for line in (REPOSITORY / "setup.py").read_text().splitlines() if line.startswith("SHIPPED")]
    return list(ast.literal_eval(line.split(" = ")[1]))


def test_one_version_of_torch_is_installed_everywhere():
    conda = yaml.safe_load((REPOSITORY / "launch/environment.yml").read_text())["dependencies"]
    [pip] = [entry["pip"] for entry in conda if isinstance(entry, dict)]
    files = [REPOSITORY / "launch" / name for name in ("setup.sh", "containers/install.sh", "containers/Dockerfile")]
    versions = {
        version
        for file in files
        for version in re.findall(r"[Tt][Oo][Rr][Cc][Hh](?:==|=|:-)(2[\d.]+)", file.read_text())
    }
    assert {f"torch=={version}" for version in versions} == set(pip)
