"""Bring a recipe's models, tokenizers and data sets into a folder, where there is internet, for nodes without.

The recipe keeps its names; a job sources DIR/env.sh, or is given KVDS_PREFETCHED=DIR with the files of launch/slurm.
Exit status 1 where something could not be brought or, with --check, is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from kvds.config import RunConfig
from kvds.config.values import split_dataset_weight
from kvds.durable_files import json_text
from kvds.errors import InputError, one_line
from kvds.models.weight_files import WEIGHT_PATTERNS, UnusableWeights, weight_parts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("recipe", metavar="RECIPE", help="launch/recipes/NAME.yaml, or a run's config.yaml")
    parser.add_argument("--to", type=Path, metavar="DIR", required=True, help="folder that the compute nodes see")
    parser.add_argument("--check", action="store_true", help="bring nothing; say what is missing, without internet")


def run(arguments: argparse.Namespace) -> int:
    """Fetch or check, one line per item."""
    from kvds.config.recipe import load_recipe, parse_run_config

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
    command = [sys.executable, "-m", "kvds.commands.prefetch", "check" if arguments.check else "fetch", as_json(items)]
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


_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
_ARC = ("arc_easy", "arc_challenge")


@dataclass(frozen=True)
class Item:
    """One thing to bring.

    Attributes:
        kind: ``model`` (with weights), ``config`` (configuration and tokenizer alone) or ``dataset``.
        name: Its name on the hub.
        config: Of a data set.
        splits: Of a data set.
    """

    kind: str
    name: str
    config: str | None = None
    splits: tuple[str, ...] = ()

    def __str__(self) -> str:
        what = (
            "model" if self.kind == "model" else "configuration and tokenizer" if self.kind == "config" else "data set"
        )
        return f"{what} {self.name}" + (f" ({self.config})" if self.config else "")


def wanted_items(cfg: RunConfig) -> tuple[list[Item], list[str]]:
    """What a run reads from the hub, and the local folders and files that it reads beside."""
    from kvds.data.corpora import CORPORA
    from kvds.data.corpus_names import is_hub_name, split_names

    items: dict[str, Item] = {}
    local: list[str] = []

    def add(name: str | None, weights: bool) -> None:
        if name is None:
            return
        if os.path.exists(name) or name.startswith((".", "/", "~")):
            local.append(name)
        elif weights or name not in items:
            items[name] = Item("model" if weights else "config", name)

    add(cfg.student, cfg.student_init == "pretrained")
    for teacher in cfg.all_teachers if cfg.uses_teacher else ():
        add(teacher, cfg.teacher_init == "pretrained")
    add(cfg.tokenizer_name, False)
    sets: list[Item] = []
    for spec in cfg.datasets:
        name = split_dataset_weight(spec)[0]
        if name == "synthetic":
            continue
        if is_hub_name(name):
            whole, splits = split_names(name)
            owner, repository, *config = whole.split("/", 2)
            sets.append(Item("dataset", f"{owner}/{repository}", config[0] if config else None, tuple(splits)))
            continue
        if cfg.data_dir is not None:
            local.append(f"{cfg.data_dir} ({name})")
            continue
        corpora = [c for c in (_ARC if name == "arc" else (name,)) if c in CORPORA]
        if not corpora:
            local.append(name)
        for corpus in (CORPORA[c] for c in corpora):
            sets.append(Item("dataset", corpus.hub_name, corpus.hub_config, tuple(corpus.hub_splits.values())))
    return [*items.values(), *sets], list(dict.fromkeys(local))


def fetch(item: Item) -> None:
    """Download one item into the cache that the environment names; what is there already is not loaded again."""
    if item.kind == "dataset":
        from datasets import load_dataset

        for split in item.splits or (None,):  # None: all that there are
            load_dataset(item.name, item.config, split=split)
        return
    from huggingface_hub import snapshot_download

    patterns = _SMALL_FILES + (list(WEIGHT_PATTERNS) if item.kind == "model" else [])
    snapshot_download(item.name, allow_patterns=patterns)


def missing(item: Item) -> str | None:
    """Why an item could not be read without internet, or None where it can; asks the cache alone."""
    try:
        if item.kind == "dataset":
            from datasets import load_dataset

            for split in item.splits or (None,):
                load_dataset(item.name, item.config, split=split)
            return None
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(item.name, local_files_only=True))
    except Exception as error:  # the hub's client raises a dozen kinds
        return one_line(error)[:160]
    if not (folder / "config.json").is_file():
        return "config.json is missing"
    if item.kind != "model":
        return None
    try:
        weight_parts(folder)
    except UnusableWeights as error:
        return str(error)
    return None


def write_environment(folder: Path) -> Path:
    """Write ``env.sh``: what a job on a node without internet sources."""
    file = folder / "env.sh"
    home = shlex.quote(str(folder.resolve()))
    file.write_text(f"export HF_HOME={home}\nexport HF_HUB_OFFLINE=1\nexport HF_DATASETS_OFFLINE=1\n")
    return file


def main(argv: list[str]) -> int:
    """Fetch or check each item; one line of JSON each: its place in the list and what is wrong, or null."""
    action, text = argv
    for number, values in enumerate(json.loads(text)):
        item = Item(**{**values, "splits": tuple(values["splits"])})
        if action == "check":
            problem = missing(item)
        else:
            try:
                fetch(item)
                problem = missing(item)
            except Exception as error:
                problem = one_line(error)[:300]
        print(json_text([number, problem]), flush=True)
    return 0


def as_json(items: list[Item]) -> str:
    """The list as :func:`main` reads it."""
    return json_text([dataclasses.asdict(item) for item in items])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
