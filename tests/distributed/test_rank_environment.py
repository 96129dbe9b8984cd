"""Ranks from Slurm's variables: in a step of srun, and nowhere else."""

import os
import socket
import subprocess
import sys

import pytest

from kvds.distributed.rank_environment import adopt_slurm_ranks, first_host, job_port
from kvds.errors import InputError

STEP = {
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_ID": "41", "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
}  # fmt: skip


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("n1", "n1"), ("n[1-2]", "n1"), ("gpu[003-004,9],cpu1", "gpu003"), ("a,b", "a"), ("n[5]", "n5"),
        ("r1[2-4]x", "r12x"), ("tr-[07,09]-ib0", "tr-07-ib0"), ("host-1.site", "host-1.site"),
    ],
)  # fmt: skip
def test_first_host_of_a_node_list(node_list, host):
    assert first_host(node_list) == host


def test_a_step_of_srun_becomes_ranks():
    env = dict(STEP)
    adopt_slurm_ranks(env)
    expected = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "gpu007", "MASTER_PORT": "12041"}
    assert {key: env[key] for key in expected} == expected


def test_what_is_set_already_stays():
    env = {**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29"}
    adopt_slurm_ranks(env)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"], env["RANK"]) == ("10.0.0.1", "29", "3")
    launched = {**STEP, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    before = dict(launched)
    adopt_slurm_ranks(launched)
    assert launched == before


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {key: value for key, value in STEP.items() if not key.startswith("SLURM_STEP_")},  # the batch script's shell
        {**STEP, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
    ],
)
def test_no_ranks_where_srun_started_none(environment):
    before = dict(environment)
    adopt_slurm_ranks(environment)
    assert environment == before


def test_a_broken_step_is_told():
    with pytest.raises(InputError, match="SLURM_LOCALID=None: expected the number that srun sets"):
        adopt_slurm_ranks({key: value for key, value in STEP.items() if key != "SLURM_LOCALID"})


def test_ports_of_neighbouring_jobs_differ_and_are_never_ephemeral():
    ports = [job_port(job) for job in range(987_654, 987_654 + 20_000)]
    assert len(set(ports)) == 20_000 and min(ports) >= 1024 and max(ports) < 32768


def test_a_run_alone_takes_no_port_of_its_neighbours():
    with socket.socket() as neighbour:
        neighbour.bind(("127.0.0.1", 0))
        neighbour.listen()
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        alone |= {"MASTER_PORT": str(neighbour.getsockname()[1]), "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(
            [sys.executable, "-c", "from kvds.distributed.process_group import *; "
             "init_distributed(); leave_distributed()"],
            env=os.environ | alone, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
