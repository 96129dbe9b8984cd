"""Rank environment: the launchers' variables, and Slurm's where ``srun`` alone started the ranks."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
from collections.abc import MutableMapping

from kvds.errors import InputError

# Below the ports that Linux hands out by itself (32768 and up), so that no client socket can sit there already.
_FIRST_PORT, _PORTS = 12000, 20000


def first_host(node_list: str) -> str:
    """The first host of a Slurm node list: ``"gpu[003-004,9],cpu1"`` → ``"gpu003"``."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^\[,]*)", node_list.strip())
    if match is None:
        raise InputError(f"SLURM_STEP_NODELIST={node_list!r}: expected a node list such as n[1-2] (set MASTER_ADDR)")
    return "".join(part or "" for part in match.groups())


def job_port(job_id: int, step_id: int = 0) -> int:
    """A port below 32768 that jobs whose numbers are near each other do not share."""
    return _FIRST_PORT + (job_id + step_id) % _PORTS


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def quiet_port() -> int:
    """The same, drawn at random below the ports that Linux hands out: it is likely to be free some seconds later, too,
    and a process that was killed has hardly left anything under its number.
    """
    for _ in range(100):
        port = _FIRST_PORT + secrets.randbelow(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    return free_port()


def adopt_slurm_ranks(environment: MutableMapping[str, str] | None = None) -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE and, where missing, MASTER_ADDR and MASTER_PORT in a step of ``srun``.

    Nothing happens where a launcher has set RANK already, nor in a batch script's own shell, which is no step though
    Slurm sets SLURM_PROCID there, too.

    Args:
        environment: Changed in place; None = this process's.

    Raises:
        InputError: a variable of Slurm's is missing or no number.
    """
    env = os.environ if environment is None else environment
    if "RANK" in env or "SLURM_STEP_NUM_TASKS" not in env or "SLURM_PROCID" not in env:
        return

    def number(name: str, fallback: str | None = None) -> int:
        text = env.get(name, fallback)
        if text is None or not text.isdigit():
            raise InputError(f"{name}={text}: expected the number that srun sets (start ranks by srun or deepspeed)")
        return int(text)

    ranks = number("SLURM_STEP_NUM_TASKS")
    if ranks == 1:
        return
    env.update(RANK=str(number("SLURM_PROCID")), LOCAL_RANK=str(number("SLURM_LOCALID")), WORLD_SIZE=str(ranks))
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", ""))
    if "MASTER_PORT" not in env:
        env["MASTER_PORT"] = str(job_port(number("SLURM_JOB_ID"), number("SLURM_STEP_ID", "0")))
