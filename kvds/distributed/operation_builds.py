"""Builds of DeepSpeed's operations: one process at a time, in a folder of their own, whole or not there.

DeepSpeed compiles an operation where it is first used, through torch, whose lock is an empty file: one that a killed
build has left holds up every later run, without a word. Here an operation is compiled in a folder that nobody else
uses, then moved to its name. Who needs it meanwhile waits for a process that is named and seen to live, for
:data:`WAIT_SECONDS` at most.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from kvds.errors import InputError, RunError, one_line
from kvds.identity.folder_owner import FolderOwner, Owner, living_owner

VARIABLE = "TORCH_EXTENSIONS_DIR"
WAIT_SECONDS = 600.0
_TELL_SECONDS = 3.0
_REMEDY = f"kvds doctor looks at the compiler; export {VARIABLE}=FOLDER is another place"


class BuildError(RunError):
    """An operation of DeepSpeed that cannot be had: no network and no setting of a run is at fault."""


def guard_builds() -> None:
    """Let DeepSpeed compile through :func:`load_operation` from now on, in this process."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    build = OpBuilder.jit_load
    if build.__module__ == __name__:
        return

    def jit_load(builder: Any, verbose: bool = True) -> Any:
        module = load_operation(builder.name, partial(build, builder, False))
        OpBuilder._loaded_ops[builder.name] = module
        return module

    OpBuilder.jit_load = jit_load


def builds_folder() -> Path:
    """Where the operations of this environment are: below ``TORCH_EXTENSIONS_DIR`` or the user's cache, by what the
    machine code depends on. A machine without a compiler takes what one like it has built.
    """
    root = os.environ.get(VARIABLE)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = Path(root) / "kvds" if root else cache / "kvds" / "operations"
    environment, compiler = _environment(), _compiler()
    if compiler is None:
        return next(iter(sorted(place.glob(f"{environment}-*"))), place / environment)
    return place / f"{environment}-{compiler}"


def builds_under_way() -> list[tuple[Path, Owner]]:
    """Operations that a living process builds now, and which."""
    folders = builds_folder().glob("*/")
    return [(folder, owner) for folder in folders if (owner := living_owner(folder)) is not None]


def _environment() -> str:
    """Python, torch, DeepSpeed, processor and GPU."""
    import deepspeed
    import torch

    processor = re.search(r"^(?:flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    kind = [processor.group() if processor else "", os.environ.get("TORCH_CUDA_ARCH_LIST", "")]
    if torch.cuda.is_available():
        kind.append(str(torch.cuda.get_device_capability()))
    digest = hashlib.sha256("\n".join(kind).encode()).hexdigest()[:8]
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    return f"{python}-torch{torch.__version__}-deepspeed{deepspeed.__version__}-{digest}"


def _compiler() -> str | None:
    """Name and version of the C++ compiler, or None where there is none."""
    name = os.environ.get("CXX", "c++")
    try:
        said = subprocess.run([name, "-dumpfullversion", "-dumpversion"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    version = re.match(r"[\d.]+", said.stdout)
    return f"{Path(name).name}{version.group()}" if said.returncode == 0 and version else None


def load_operation(name: str, build: Callable[[], Any]) -> Any:
    """An operation as a Python module, built where it is not there yet.

    Args:
        name: Of the operation.
        build: Compiles it below ``TORCH_EXTENSIONS_DIR`` and returns the module.

    Raises:
        BuildError: it cannot be built, or another process has been building it for longer than anybody should wait.
    """
    folder = builds_folder() / name
    try:
        module = _imported(name, folder)
        if module is not None:
            return module
        folder.mkdir(parents=True, exist_ok=True)
        with _owned(name, folder):
            module = _imported(name, folder)  # by the process that was waited for
            return _built(name, folder, build) if module is None else module
    except OSError as error:
        raise BuildError(
            f"{VARIABLE}: DeepSpeed's {name} cannot be kept in {folder} ({one_line(error)}); expected a folder that "
            f"can be written, with room (export {VARIABLE}=FOLDER)"
        ) from error


def _library(name: str, folder: Path) -> Path:
    return folder / f"{name}.so"


def _imported(name: str, folder: Path) -> Any:
    """The module that lies in ``folder``; None where there is none that this machine can load."""
    library = _library(name, folder)
    if not library.is_file():
        return None
    found = importlib.util.spec_from_file_location(name, library)
    assert found is not None and found.loader is not None
    try:
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
    except ImportError:  # of another system's libraries: it is built anew
        return None
    return module


@contextlib.contextmanager
def _owned(name: str, folder: Path) -> Iterator[None]:
    """Alone in ``folder``; while another process is, it is named after a moment."""
    begun, told = time.monotonic(), False

    def tell() -> None:
        nonlocal told
        owner = None if told or time.monotonic() - begun < _TELL_SECONDS else living_owner(folder)
        if owner is not None:
            told = True
            _say(f"DeepSpeed's {name} is built in {folder} by {owner}; waiting for at most {WAIT_SECONDS:.0f} s")

    owner = FolderOwner(folder, flag=VARIABLE)
    try:
        owner.take(patience=WAIT_SECONDS, between=tell)
    except InputError as error:
        raise BuildError(
            f"{VARIABLE}: DeepSpeed's {name} is still not built in {folder} after {WAIT_SECONDS:.0f} s by "
            f"{living_owner(folder) or 'another process'}; expected a few minutes (stop that process and start again, "
            f"or export {VARIABLE}=FOLDER)"
        ) from error
    with owner:
        yield


def _built(name: str, folder: Path, build: Callable[[], Any]) -> Any:
    """The module, compiled aside and moved to its name, and what killed builds have left is gone."""
    for leftover in folder.glob("build-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    _say(f"building DeepSpeed's {name} in {folder}, once on machines like this one")
    aside, before = Path(tempfile.mkdtemp(prefix="build-", dir=folder)), os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(aside)
    try:
        module = build()
        made = next(aside.rglob("*.so"), None)
        if made is not None:
            made.replace(_library(name, folder))
    except (RuntimeError, OSError) as error:  # a compiler's words, or no compiler, nvcc or ninja
        log = folder / "build.log"
        with contextlib.suppress(OSError):
            log.write_text(f"{error}\n", encoding="utf-8")
        raise BuildError(
            f"DeepSpeed's {name} cannot be built: {_reason(error)} (all of it: {log}; {_REMEDY})"
        ) from error
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before
        shutil.rmtree(aside, ignore_errors=True)
    return module


def _reason(error: Exception) -> str:
    """What of a compiler's output says why."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    telling = (line for line in lines if re.search(r"\berror:|No such file|No space|not found", line))
    return one_line(next(telling, lines[0]))


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"kvds: {text}", file=sys.stderr, flush=True)
