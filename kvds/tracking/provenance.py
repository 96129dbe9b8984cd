"""``provenance.json``: what a run's numbers were made with (revision, versions, ranks, command)."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from kvds.durable_files import json_text

PROVENANCE_FILE = "provenance.json"


def write_provenance(folder: Path, facts: Mapping[str, str]) -> None:
    """Write ``facts`` and the command line of this process, without what the launcher added to it."""
    content = {**facts, "command": typed_command()}
    (folder / PROVENANCE_FILE).write_text(json_text(content, indent=1) + "\n", encoding="utf-8")


def typed_command() -> str:
    """What this process was started with, as one would type it: ``kvds distill …``, ``python -m kvds distill …``."""
    spec, script = sys.modules["__main__"].__spec__, sys.argv[0]
    name = os.path.basename(script)
    if spec is not None:
        program = ["python", "-m", spec.name.removesuffix(".__main__")]
    else:
        program = [name] if shutil.which(name) == script else ["python", script]
    return shlex.join(
        [*program, *(word for word in sys.argv[1:] if not word.startswith(("--local_rank", "--local-rank")))]
    )


def collect_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that decide about a run's numbers, without importing any."""
    versions = {"python": platform.python_version()}
    for package in ("kvds", "torch", "deepspeed", "transformers", "triton", "mlflow"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if package == "kvds":  # run from a checkout that is not installed
                from kvds import __version__

                versions[package] = __version__
    return versions


def git_revision() -> str | None:
    """The commit of the checkout that kvds runs from, ``+changes`` if tracked files differ; None outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed: a repository further up is somebody else's
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
