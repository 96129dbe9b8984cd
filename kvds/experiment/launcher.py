"""One run of an experiment through the ``deepspeed`` launcher: its command and environment, and why it failed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from kvds.config import RunConfig
from kvds.distributed.preemption import EXIT_CODE, Preempted
from kvds.distributed.rank_environment import quiet_port
from kvds.errors import InputError, RunError

RANK_MODULE = "kvds.experiment.rank_process"
# Between the choice of a port and its use by rank 0 lie seconds in which another process may take it.
_ATTEMPTS = 3
_PORT_TAKEN = ("EADDRINUSE", "address already in use")
_VISIBLE = "CUDA_VISIBLE_DEVICES"
# Its values that hide every GPU.
_NONE_VISIBLE = ("", "-1", "NoDevFiles")
_TAIL_BYTES = 2**16
_EXCEPTION = re.compile(r"(?:\[rank\d+\]: )?((?:\w+\.)*\w*(?:Error|Exception|Interrupt): .+)")


def run_recipe(output_dir: str | Path) -> Path:
    """The recipe that ranks read: beside the run's folder, which they make themselves."""
    return Path(f"{output_dir}.yaml")


def run_log(output_dir: str | Path) -> Path:
    """What launcher and ranks print."""
    return Path(f"{output_dir}.log")


def check_devices(devices: str, ranks: int, source: str) -> None:
    """Refuse GPUs that the launcher would not start one rank each on.

    Args:
        devices: As in CUDA_VISIBLE_DEVICES.
        ranks: Of a run, which gets as many of them.
        source: The flag or variable that says them, for the message.

    Raises:
        InputError: too few, one twice, or not by number.
    """
    found = devices.split(",")
    for device in found:
        if not device.strip().isdecimal():
            raise InputError(
                f"{source} {devices}: {device or 'an empty name'} is no number; expected GPUs such as 0,1, since the "
                "deepspeed launcher takes no others (or --in_process)"
            )
    if len(found) < ranks or len(set(found[:ranks])) < ranks:
        raise InputError(f"{source} {devices}: expected {ranks} different GPUs for a run of --ranks {ranks}")


def chosen_gpus(environment: Mapping[str, str], ranks: int) -> list[str]:
    """The GPUs that ``environment`` chooses, the first ``ranks`` of them; empty where it does not, or wants the CPU.

    Raises:
        InputError: CUDA_VISIBLE_DEVICES is not what the launcher takes, or too short.
    """
    visible = environment.get(_VISIBLE, "")
    if visible in _NONE_VISIBLE or environment.get("DS_ACCELERATOR") == "cpu":
        return []
    check_devices(visible, ranks, f"{_VISIBLE} is")
    return visible.split(",")[:ranks]


def launcher_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """A worker's environment. The launcher is told GPUs by number and must see them all, or none."""
    rest = {name: item for name, item in environment.items() if name != _VISIBLE}
    return {**rest, _VISIBLE: ""} if environment.get(_VISIBLE) in _NONE_VISIBLE else rest


def launcher_command(recipe: Path, ranks: int, port: int, environment: Mapping[str, str]) -> list[str]:
    """Start ``ranks`` ranks on the GPUs that ``environment`` chooses, else on the first so many of the machine.

    ``--num_accelerators`` would make the launcher overlook CUDA_VISIBLE_DEVICES and start on GPU 0.
    """
    gpus = chosen_gpus(environment, ranks)
    where = ["--include", "localhost:" + ",".join(gpus)] if gpus else ["--num_accelerators", str(ranks)]
    # No host file: one that lies where the launcher looks by itself would spread a run over hosts.
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", os.devnull, *where]
    return [*launcher, "--master_port", str(port), "--module", RANK_MODULE, "--config", str(recipe)]


def launch(cfg: RunConfig, ranks: int) -> None:
    """Train one run through the launcher; who is stopped meanwhile leaves ending the processes to whoever started it.

    Raises:
        InputError: the ranks found a fault in the input.
        RunError: launcher or ranks ended otherwise; the message names their log.
        Preempted: the ranks were asked to stop.
    """
    recipe, log = run_recipe(cfg.output_dir), run_log(cfg.output_dir)
    recipe.parent.mkdir(parents=True, exist_ok=True)
    cfg.save(recipe)
    try:
        for attempt in range(1, _ATTEMPTS + 1):
            command = launcher_command(recipe, ranks, quiet_port(), os.environ)
            with log.open("wb") as output:
                status = subprocess.run(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, check=False,
                    env=launcher_environment(os.environ),
                ).returncode  # fmt: skip
            told = _tail(log)
            if not status or attempt == _ATTEMPTS or not any(sign in told for sign in _PORT_TAKEN):
                break
    finally:
        recipe.unlink()
    if status == EXIT_CODE:
        raise Preempted(f"the ranks were asked to stop (see {log})")
    if status:
        error = InputError if status == 2 else RunError
        raise error(f"the launcher ended with status {status} (see {log}){failure_text(told)}")


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        return file.read().decode(errors="replace")


def failure_text(told: str) -> str:
    """What ranks said last of why they ended, after a colon; empty where they said nothing."""
    lines = [line.strip() for line in told.splitlines()]
    mark = "kvds: error: "
    errors = [line.removeprefix(mark) for line in lines if line.startswith(mark)]
    exceptions = [match[1] for line in lines if (match := _EXCEPTION.fullmatch(line))]
    return f": {(errors or exceptions)[-1]}" if errors or exceptions else ""
