"""Disturb runs again and again, let them resume, and compare their ends with those of runs that were left in peace.

    python -m tests.reliability.chaos --kills 300 --output /tmp/chaos      (about forty minutes on two cores)
    python -m tests.reliability.races --turns 50 --output /tmp/races       (two jobs that want one folder)

Five kinds of disturbance take turns: ``kill -9``, SIGTERM, SIGUSR1, a disk that is full (until three saves have failed
or the job is killed, or for a while before that), and a node of two that is lost (its ranks dead at once, or silent).
They meet one rank or all, at any time after the start, in the middle of a step, or while a checkpoint is written. Kinds
of runs take turns as well, thirty disturbances each.

Prints one line per attempt and, at the end, tables; exits 1 where a bit of student, map, records or evaluation differs,
where a rank is left behind or a traceback was told. Tests run a short form of it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.harness.forked_ranks import RankServer
from tests.harness.survival_runs import REPOSITORY, flags, make_models, records

# Kind → statements of what happens to a victim; one of them is drawn.
KINDS: dict[str, tuple[str, ...]] = {
    "kill -9": ("die()",),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM)",),
    "SIGUSR1": ("os.kill(os.getpid(), signal.SIGUSR1)",),
    "full disk": (
        "room(BYTES); time.sleep(20 * one_step()); die()",
        "room(BYTES); time.sleep(6 * one_step()); room(); time.sleep(3 * one_step()); die()",
    ),
    "lost node": ("die()", "os.kill(os.getpid(), signal.SIGSTOP)"),
}
MOMENTS = ("any time", "in a step", "in a save")
_BYTES = (0, 300, 3000, 9000, 20000)
_STAGE0, _STAGE2 = (REPOSITORY / f"ds_configs/zero{stage}_fp32.json" for stage in (0, 2))
# Kind of run → its settings beside those of all.
RUNS: dict[str, dict[str, Any]] = {
    "ZeRO-3": {},
    "ZeRO-3, packed, checkpointed": {"packing": True, "gradient_checkpointing": True},
    "without ZeRO, evaluated on the way": {
        "deepspeed_config": _STAGE0, "eval_subset_size": 3, "eval_steps": 5, "max_new_tokens": 2,
    },
    "ZeRO-2, held weight, drawn positions": {
        "deepspeed_config": _STAGE2, "kv_weight": "hold:1.0", "kv_weight_schedule": "constant", "kv_method": "random",
        "kv_budget": 0.5,
    },
}  # fmt: skip

# Runs in each rank: once the moment has begun, a victim has a part of a step to live, as long as one lasts now.
_DISTURBANCE = """
import os, resource, signal, threading, time
from pathlib import Path
from kvds.checkpoint.manifest import ChecksummedFile
from kvds.data.loader import BatchLoader

begun, steps = [], [time.monotonic()] * 2

def one_step():
    return steps[-1] - steps[-2] or 0.1

def room(size=resource.RLIM_INFINITY):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def act(seconds):
    time.sleep(seconds)
    Path({mark!r}).touch()
    {action}

def begin(seconds):
    if not begun and rank in {victims}:
        begun.append(True)
        threading.Thread(target=act, args=(seconds,), daemon=True).start()

def step(loader, step, ask=BatchLoader.step):
    steps.append(time.monotonic())
    if {moment!r} == "in a step" and len(steps) > {steps} + 1:
        begin({share} * one_step())
    return ask(loader, step)

def write(file, data, ask=ChecksummedFile.write):
    if {moment!r} == "in a save":
        begin({share} * one_step() / 2)
    return ask(file, data)

BatchLoader.step, ChecksummedFile.write = step, write
if {moment!r} == "any time":
    begin({share} * {span})
"""


@dataclass
class Tally:
    """What was done and what came of it."""

    done: Counter[tuple[str, str]] = field(default_factory=Counter)
    exits: Counter[tuple[str, str]] = field(default_factory=Counter)
    ranks_left_behind: int = 0
    tracebacks: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """Disturbances that came to pass."""
        return self.done.total()

    def table(self) -> str:
        """Kinds by moments, and how the ranks ended, as Markdown."""
        lines = [f"| disturbance | {' | '.join(MOMENTS)} | exit codes of the two ranks, how often |"]
        lines.append("| --- " * (len(MOMENTS) + 2) + "|")
        for kind in KINDS:
            counts = " | ".join(str(self.done[kind, moment]) for moment in MOMENTS)
            exits = ", ".join(f"{codes} ×{n}" for (of, codes), n in self.exits.most_common() if of == kind)
            lines.append(f"| {kind} | {counts} | {exits} |")
        return "\n".join(lines)


def same_bits(one: Path, other: Path) -> int:
    """Bytes of student and map compared; records and the evaluation are, too.

    Raises:
        SystemExit: a bit differs.
    """
    import torch
    from safetensors.torch import load_file

    count = 0
    for name in ("student/model.safetensors", "map_aligner.pt"):
        paths = [run / name for run in (one, other)]
        loaded = [
            load_file(path) if name.endswith("safetensors") else torch.load(path, weights_only=True)["state_dict"]
            for path in paths
        ]
        if loaded[0].keys() != loaded[1].keys():
            sys.exit(f"chaos: {name} of {one} and {other} hold different names")
        for key, value in loaded[0].items():
            if not torch.equal(value, loaded[1][key]):
                sys.exit(f"chaos: {name}: {key} of {one} and {other} differs")
            count += value.numel() * value.element_size()
    if records(one) != records(other):
        sys.exit(f"chaos: metrics.jsonl of {one} and {other} differs")
    judged = [(run / "eval.json").read_text() if (run / "eval.json").exists() else "" for run in (one, other)]
    if judged[0] != judged[1]:
        sys.exit(f"chaos: eval.json of {one} and {other} differs")
    return count


def chaos(
    server: RankServer,
    models: Path,
    folder: Path,
    *,
    kills: int,
    ranks: int = 2,
    seed: int = 0,
    kinds: tuple[str, ...] = tuple(KINDS),
    moments: tuple[str, ...] = MOMENTS,
    tally: Tally | None = None,
    **settings: object,
) -> dict[str, int]:
    """Disturb one run so often, or until it has ended, and compare; figures of what was done.

    Args:
        server: Forks the ranks.
        models: From :func:`tests.harness.survival_runs.make_models`.
        folder: Gets two runs and their logs.
        kills: How often.
        ranks: Processes.
        seed: Of moments and victims.
        kinds: Of disturbances, in turn.
        moments: Of those of :data:`MOMENTS`, in turn.
        tally: Of what was done before.
        settings: Of the run.

    Raises:
        SystemExit: a run failed, or its end differs.
    """
    tally = Tally() if tally is None else tally
    before, left, told = tally.kills, tally.ranks_left_behind, len(tally.tracebacks)
    steps = 10 + 6 * kills  # a disturbance lets a few steps pass
    settings = {
        "max_steps": steps, "save_steps": 2, "keep_checkpoints": 2, "logging_steps": 3, "batch_size": 1,
        "warmup_ratio": 0.1, "lr": 0.003, **settings,
    }  # fmt: skip
    chance, started = random.Random(seed), time.monotonic()
    straight, killed = folder / "straight", folder / "killed"

    def run(output: Path, log: Path, setup: str = "", **more: object) -> list[int | None]:
        return server.start(flags(models, output, **{**settings, **more}), ranks=ranks, log=log, setup=setup).wait(600)

    if any(run(straight, straight.with_suffix(".log"))):
        sys.exit(f"chaos: the undisturbed run failed, see {straight}.log")
    attempts, finished, span = 0, False, 6.0
    while tally.kills - before < kills and not finished:
        kind, moment = kinds[attempts % len(kinds)], moments[attempts // len(kinds) % len(moments)]
        attempts += 1
        everyone = kind != "lost node" and chance.random() < 0.5
        victims = list(range(ranks)) if everyone else [chance.randrange(ranks)]
        mark, log = folder / f"mark-{attempts}", folder / f"killed-{attempts}.log"
        share, step = chance.random(), chance.randrange(2, 6)
        action = chance.choice(KINDS[kind]).replace("BYTES", str(chance.choice(_BYTES)))
        begun = time.monotonic()
        setup = _DISTURBANCE.format(
            mark=str(mark), action=action, victims=victims, moment=moment, steps=step, share=share, span=span
        )  # fmt: skip
        codes = run(killed, log, setup, **({"rank_timeout": 15} if kind == "lost node" else {}))
        finished = not any(codes)
        tally.ranks_left_behind += codes.count(None)
        if "Traceback" in (text := log.read_text(errors="replace")):
            tally.tracebacks.append(f"{kind} {moment}: {log}: {text.strip().splitlines()[-1][:200]}")
        if mark.exists():
            tally.done[kind, moment] += 1
            tally.exits[kind, " ".join(map(str, sorted(codes, key=str)))] += 1
        elif kind != "lost node":  # whose watch takes a while
            span = 1.2 * (time.monotonic() - begun)
        latest = killed / "checkpoints/latest"
        saved = latest.read_text() if latest.exists() else "no checkpoint yet"
        hit = "" if mark.exists() else ", which it did not meet"
        print(f"attempt {attempts}: {kind} {moment}, ranks {victims}{hit}: {codes}, {saved}", flush=True)
    if not finished and any(run(killed, killed.with_suffix(".log"))):
        sys.exit(f"chaos: the killed run did not end, see {killed}.log")
    for name in ("preempted", "**/*.unfinished"):
        if found := sorted(killed.glob(name)):
            sys.exit(f"chaos: the finished run left {found[0]} behind")
    return {
        "ranks": ranks, "optimizer_steps": steps, "kills": tally.kills - before,
        "ranks_left_behind": tally.ranks_left_behind - left, "tracebacks": len(tally.tracebacks) - told,
        "bytes_compared": same_bits(straight, killed), "records_compared": len(records(straight)),
        "seconds": round(time.monotonic() - started),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300, help="how many disturbances")
    parser.add_argument("--round", type=int, default=30, help="disturbances of one run")
    parser.add_argument("--seed", type=int, default=0, help="of moments and victims")
    parser.add_argument("--output", type=Path, required=True, help="folder for models and runs, made anew")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.output, ignore_errors=True)
    arguments.output.mkdir(parents=True)
    make_models(arguments.output)
    tally, number = Tally(), 0
    os.environ.setdefault("DEEPSPEED_TIMEOUT", "1")  # minutes that a rank waits for one that died before they had met
    with RankServer() as server:
        while tally.kills < arguments.kills:
            name = list(RUNS)[number % len(RUNS)]
            folder = arguments.output / f"round-{number}"
            folder.mkdir()
            kills = min(arguments.round, arguments.kills - tally.kills)
            figures = chaos(
                server, arguments.output, folder, kills=kills, seed=arguments.seed + number, tally=tally, **RUNS[name]
            )
            number += 1
            print(json.dumps({"run": name, **figures}), tally.table(), *tally.tracebacks, sep="\n", flush=True)
    return 1 if tally.ranks_left_behind or tally.tracebacks else 0


if __name__ == "__main__":
    sys.exit(main())
