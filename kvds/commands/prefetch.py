"""On a machine with internet: bring a recipe's models, tokenizers and data sets into a folder, for nodes without.

The recipe keeps its names; a job sources DIR/env.sh, or is given KVDS_PREFETCHED=DIR with the files of launch/slurm.
Exit status 1 where something could not be brought or, with --check, is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from kvds.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("recipe", metavar="RECIPE", help="launch/recipes/NAME.yaml, or a run's config.yaml")
    parser.add_argument("--to", type=Path, metavar="DIR", required=True, help="folder that the compute nodes see")
    parser.add_argument("--check", action="store_true", help="bring nothing; say what is missing, without internet")


def run(arguments: argparse.Namespace) -> int:
    """Fetch or check, one line per item."""
    from kvds.config_input import load_recipe, parse_run_config
    from kvds.prefetch import as_json, wanted_items, write_environment

    folder: Path = arguments.to
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--to {folder}: is a file; expected a folder")
    flags = ["--config", arguments.recipe]
    if "output_dir" not in load_recipe(arguments.recipe):
        flags += ["--output_dir", "outputs/prefetch"]
    items, local = wanted_items(parse_run_config(flags))
    for place in local:
        print(f"local    {place}: stays where it is; the compute nodes must see it there")
    folder.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ, HF_HOME=str(folder.resolve()))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE", "TRANSFORMERS_CACHE"):
        environment.pop(name, None)  # they would lead elsewhere
    offline = "1" if arguments.check else "0"
    environment |= {"HF_HUB_OFFLINE": offline, "HF_DATASETS_OFFLINE": offline, "TRANSFORMERS_OFFLINE": offline}
    command = [sys.executable, "-m", "kvds.prefetch", "check" if arguments.check else "fetch", as_json(items)]
    # A process of its own: the hub's client reads these variables once, when it is imported.
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        problems = {}
        for line in worker.stdout:
            if line.startswith("["):
                number, problem = json.loads(line)
                problems[number] = problem
                print(
                    f"{'ok' if problem is None else 'MISSING':<8} {items[number]}" + (f": {problem}" if problem else "")
                )
    again = f"kvds prefetch {arguments.recipe} --to {folder}"
    if len(problems) < len(items) or any(problems.values()):
        print(f"bring what is missing, on a machine with internet: {again}")
        return 1
    print(f"on the compute nodes: source {write_environment(folder)}")
    print(f"with the files of launch/slurm: KVDS_PREFETCHED={folder.resolve()} sbatch …")
    return 0
