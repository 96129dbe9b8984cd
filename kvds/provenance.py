"""``provenance.json``: what a run's numbers were made with (revision, versions, ranks, command)."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

PROVENANCE_FILE = "provenance.json"


def write_provenance(folder: Path, facts: Mapping[str, str]) -> None:
    """Write ``facts`` and the command line of this process, without what the launcher added to it."""
    flags = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    content = {**facts, "command": shlex.join([sys.argv[0], *flags])}
    (folder / PROVENANCE_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
