"""Models, tokenizers and data sets of a recipe, brought into one folder for nodes without internet.

The folder is the hub's own cache (``HF_HOME``), so that a recipe keeps its hub names and nothing in it changes.
``python -m kvds.prefetch fetch|check JSON`` works on a list of items in the folder that ``HF_HOME`` names.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from kvds.config import RunConfig
from kvds.config_values import one_line, split_dataset_weight

_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
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
    for teacher in cfg.teachers if cfg.uses_teacher else ():
        add(teacher, cfg.teacher_init == "pretrained")
    add(cfg.tokenizer_name, False)
    sets: list[Item] = []
    for spec in cfg.datasets:
        name = split_dataset_weight(spec)[0]
        if name == "synthetic":
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

        for split in item.splits:
            load_dataset(item.name, item.config, split=split)
        return
    from huggingface_hub import snapshot_download

    patterns = _SMALL_FILES + (_WEIGHTS if item.kind == "model" else [])
    folder = Path(snapshot_download(item.name, allow_patterns=patterns))
    if item.kind == "model" and not any(folder.glob("*.safetensors")):
        raise RuntimeError("it has no safetensors; expected a model saved in that form")


def missing(item: Item) -> str | None:
    """Why an item could not be read without internet, or None where it can; asks the cache alone."""
    try:
        if item.kind == "dataset":
            from datasets import load_dataset

            for split in item.splits:
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
    for index in folder.glob("*.safetensors.index.json"):
        try:
            parts = {str(part) for part in json.loads(index.read_text())["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return f"{index.name} is damaged"
        absent = sorted(part for part in parts if not (folder / part).is_file())
        if absent:
            return f"{absent[0]} is missing"
    return None if any(folder.glob("*.safetensors")) else "its weights (*.safetensors) are missing"


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
        print(json.dumps([number, problem]), flush=True)
    return 0


def as_json(items: list[Item]) -> str:
    """The list as :func:`main` reads it."""
    return json.dumps([dataclasses.asdict(item) for item in items])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
