"""Free space, caches on the right file system, and sqlite where the records will lie."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from kvds.doctor.finding import Finding, last_line, run_bounded
from kvds.durable_files import existing_parent

GIB = 2**30
_NETWORK = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "smb3", "ceph", "fuse.sshfs", "afs", "panfs", "wekafs"}
_STALE_LOCK_SECONDS = 1800
# A writer holds a transaction while a reader asks: what MLflow's UI does beside a run.
_SQLITE = """
import sqlite3, sys
path = sys.argv[1]
writer = sqlite3.connect(path, timeout=5)
writer.execute("create table t (x integer)")
writer.execute("insert into t values (1)")
writer.commit()
writer.execute("insert into t values (2)")
reader = sqlite3.connect(path, timeout=5)
assert reader.execute("select sum(x) from t").fetchone() == (1,), "a reader saw what was not committed"
try:
    sqlite3.connect(path, timeout=0).execute("insert into t values (9)")
    raise SystemExit("two writers at once were let in: file locks do nothing here")
except sqlite3.OperationalError:
    pass
writer.commit()
assert reader.execute("select sum(x) from t").fetchone() == (3,), "a reader missed what was committed"
"""


def file_system(path: Path, mounts: str | Path = "/proc/mounts") -> str:
    """The type of the file system that ``path`` lies on, such as ``ext4`` or ``nfs4``; ``unknown`` off Linux."""
    try:
        lines = Path(mounts).read_text().splitlines()
    except OSError:
        return "unknown"
    real = str(existing_parent(path).resolve())
    best = ("", "unknown")
    for line in lines:
        _, point, kind, *_ = line.split()
        point = point.replace("\\040", " ")
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1]


def check_space(output_dir: Path, *, warn_below: int = 20 * GIB, fault_below: int = GIB) -> list[Finding]:
    """Free bytes where checkpoints, temporary files and shared memory go."""
    findings = []
    places = {
        "output": (output_dir, "another --output_dir, or clear old checkpoints (kvds plan RECIPE: how much it takes)"),
        "temporary": (Path(os.environ.get("TMPDIR", "/tmp")), "export TMPDIR to a folder with room"),
    }
    for name, (folder, remedy) in places.items():
        where = existing_parent(folder)
        if not os.access(where, os.W_OK):
            findings.append(Finding("fault", "free space", f"{name} {folder}: {where} is not writable", remedy))
            continue
        free = shutil.disk_usage(where).free
        text = f"{name} {folder}: {free / GIB:.1f} GiB on {file_system(folder)}"
        limits = (warn_below, fault_below) if name == "output" else (2 * GIB, GIB // 8)
        level = "fault" if free < limits[1] else "warning" if free < limits[0] else "ok"
        findings.append(Finding(level, "free space", text, "" if level == "ok" else remedy))  # type: ignore[arg-type]
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).free < GIB // 4:
        mebibytes = shutil.disk_usage(shared).free / 2**20
        findings.append(
            Finding(
                "warning",
                "free space",
                f"/dev/shm: {mebibytes:.0f} MiB, through which ranks of a node talk",
                "in a container: --shm-size=8g (or export NCCL_SHM_DISABLE=1)",
            )
        )
    return findings


def check_caches() -> list[Finding]:
    """Where compiled code goes, and locks of torch's that a killed build has left. A run has builds of its own
    (:mod:`kvds.distributed.operation_builds`); other programs would wait for them.
    """
    findings = []
    for name, default in (("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions"), ("TRITON_CACHE_DIR", "~/.triton")):
        folder = Path(os.environ.get(name) or os.path.expanduser(default))
        kind = file_system(folder)
        if kind in _NETWORK:
            findings.append(
                Finding(
                    "warning",
                    "cache",
                    f"{name} {folder} is on {kind}, shared by all nodes",
                    f"export {name}=/tmp/$USER/{name.lower()} (as launch/slurm/ does)",
                )
            )
        else:
            findings.append(Finding("ok", "cache", f"{name} {folder} on {kind}"))
        locks = folder.rglob("lock") if name == "TORCH_EXTENSIONS_DIR" and folder.is_dir() else ()
        for lock in locks:
            age = time.time() - lock.stat().st_mtime
            if age > _STALE_LOCK_SECONDS:
                text = (
                    f"{lock}: stale lock of a build, {age / 3600:.1f} h old; other programs wait for it without a word"
                )
                findings.append(Finding("warning", "cache", text, f"if no build runs: rm {lock}"))
    return findings


def check_sqlite(output_dir: Path, *, seconds: float = 30.0) -> list[Finding]:
    """Two connections to one file on the output folder's file system: does what is committed arrive, do locks hold?"""
    folder = existing_parent(output_dir)
    probe = folder / f".kvds-doctor-{os.getpid()}.db"
    remedy = "--tracking_uri sqlite:////LOCAL/DISK/mlflow.db, a server's http://…, or --report_to none"
    kind = file_system(output_dir)
    try:
        status, said = run_bounded([sys.executable, "-c", _SQLITE, str(probe)], seconds=seconds)
    finally:
        for leftover in folder.glob(f"{probe.name}*"):
            leftover.unlink(missing_ok=True)
    if status != 0:
        return [Finding("fault", "sqlite", f"{folder} on {kind}: {last_line(said, 'no reason given')}", remedy)]
    if kind in _NETWORK:
        return [Finding("warning", "sqlite", f"works in {folder}, but {kind} may lose locks when nodes write", remedy)]
    return [Finding("ok", "sqlite", f"locks and commits hold in {folder} on {kind}")]


def check_offline() -> list[Finding]:
    """Whether the variables that keep a run off the internet agree with what lies on disk."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    home = Path(os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    if not offline:
        return [Finding("ok", "hub", f"online (HF_HUB_OFFLINE is not set); cache {cache}")]
    if not any(cache.glob("*--*")):
        return [
            Finding(
                "warning",
                "hub",
                f"offline, and {cache} holds nothing: only folders can be named",
                "on a login node: kvds prefetch RECIPE --to DIR",
            )
        ]
    return [Finding("ok", "hub", f"offline; cache {cache}")]
