"""Interrupt a run of two ranks, go on with one, then with two again, and compare with a run that was never disturbed.

    python -m tests.reliability.other_ranks --output /tmp/other_ranks      (about three minutes on two cores)

Prints a line per kind of run: the largest differences of losses (relative above 1) and of weights. Exits 1 where one of
fp32 is over 1e-5.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from tests.harness.forked_ranks import RankServer
from tests.harness.survival_runs import REPOSITORY, at_step, flags, make_models, records

KINDS: dict[str, dict[str, object]] = {
    "ZeRO-3": {},
    "ZeRO-3, parameters and moments in host memory": {"deepspeed_config": "offload"},
    "ZeRO-3, frozen map": {"aligner_update": "frozen"},
    "ZeRO-3, packed rows": {"packing": True},
    "ZeRO-3, random selection": {"kv_method": "random", "kv_budget": 0.5},
    "ZeRO-2": {"deepspeed_config": REPOSITORY / "ds_configs/zero2_fp32.json"},
    "ZeRO-2, frozen map": {"deepspeed_config": REPOSITORY / "ds_configs/zero2_fp32.json", "aligner_update": "frozen"},
    "without ZeRO": {"deepspeed_config": REPOSITORY / "ds_configs/zero0_fp32.json"},
}
STOP = "os.kill(os.getpid(), signal.SIGTERM)"


def offload_config(folder: Path) -> Path:
    """ZeRO-3 whose parameters and moments lie in host memory, in many small groups."""
    config = json.loads((REPOSITORY / "ds_configs/zero3_cpu.json").read_text())
    for name in ("offload_optimizer", "offload_param"):
        config["zero_optimization"][name] = {"device": "cpu", "pin_memory": False}
    config["zero_optimization"]["sub_group_size"] = 500
    (folder / "offload.json").write_text(json.dumps(config))
    return folder / "offload.json"


def differences(one: Path, other: Path) -> tuple[float, float]:
    """Largest difference of a loss that was logged, and of a weight of the student."""
    from safetensors.torch import load_file

    losses = [
        abs(a[key] - b[key]) / max(1.0, abs(a[key]))
        for a, b in zip(records(one), records(other), strict=True)
        for key in a
        if key.startswith("loss/")
    ]
    weights = [load_file(run / "student/model.safetensors") for run in (one, other)]
    return max(losses), max(float((value - weights[1][name]).abs().max()) for name, value in weights[0].items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for models and runs, made anew")
    folder = parser.parse_args().output
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make_models(folder)
    worst = 0.0
    with RankServer() as server:
        for number, (kind, changes) in enumerate(KINDS.items()):
            settings = {"batch_size": 1, "logging_steps": 1, "max_steps": 9, "save_steps": 0, **changes}
            if settings.get("deepspeed_config") == "offload":
                settings["deepspeed_config"] = offload_config(folder)
            straight, moved = folder / f"straight{number}", folder / f"moved{number}"

            def run(output: Path, ranks: int, setup: str = "", settings: dict = settings) -> list[int | None]:
                command = flags(folder, output, **settings)
                return server.start(command, ranks=ranks, log=output.with_suffix(".log"), setup=setup).wait(600)

            codes = [run(straight, 2), run(moved, 2, at_step(2, STOP)), run(moved, 1, at_step(5, STOP)), run(moved, 2)]
            if codes != [[0, 0], [85, 85], [85], [0, 0]]:
                sys.exit(f"other_ranks: {kind}: exit codes {codes}, see {folder}/*{number}.log")
            losses, weights = differences(straight, moved)
            worst = max(worst, losses, weights)
            print(f"| {kind} | {losses:.1e} | {weights:.1e} |", flush=True)
    return int(worst > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
