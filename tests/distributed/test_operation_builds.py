"""Builds of DeepSpeed's operations: whole or not there, by one process at a time, never waited for without a word."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from kvds.distributed import operation_builds
from kvds.distributed.operation_builds import VARIABLE, builds_folder, load_operation
from kvds.errors import RunError
from kvds.identity import folder_owner
from kvds.identity.folder_owner import FolderOwner

OWNER = """
import sys, time
from pathlib import Path
from kvds.identity.folder_owner import FolderOwner
FolderOwner(Path(sys.argv[1])).take()
print("owns", flush=True)
time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Of the operation ``op``, whose library is text: what a build wrote is what an import returns."""

    def read(name, folder):
        library = folder / f"{name}.so"
        return library.read_text() if library.exists() else None

    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setattr(operation_builds, "_imported", read)
    return builds_folder() / "op"


def build(seconds=0.0, calls=None, text="module"):
    def compile_aside():
        place = Path(os.environ[VARIABLE], "op", "op.so")
        place.parent.mkdir()
        place.write_text(text[:3])
        if calls is not None:
            calls.append(place)
        time.sleep(seconds)
        place.write_text(text)
        return text

    return compile_aside


@pytest.fixture
def other(folder):
    """Another process that has the folder."""
    folder.mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-c", OWNER, folder], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "owns\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_build_is_one_of_its_environment_and_done_once(folder, tmp_path):
    calls = []
    assert load_operation("op", build(calls=calls)) == load_operation("op", build(calls=calls)) == "module"
    assert len(calls) == 1 and calls[0].parent.parent.parent == folder  # aside, then moved
    assert not calls[0].exists() and os.environ[VARIABLE] == str(tmp_path)
    assert f"torch{torch.__version__}" in str(folder) and f"py{sys.version_info.major}" in str(folder)


@pytest.mark.timeout(60)
def test_what_a_killed_build_has_left_holds_nobody_up(folder, other):
    """Torch's own lock and half of a library beside the owner's file of a process that is gone."""
    left = folder / "build-old" / "op"
    left.mkdir(parents=True)
    for name in ("lock", "op.so"):
        (left / name).touch()
    (folder / "lock").touch()
    other.kill()
    other.wait()
    begun = time.monotonic()
    assert load_operation("op", build()) == "module" and time.monotonic() - begun < 5
    assert not left.exists()


@pytest.mark.timeout(60)
def test_of_two_builds_at_once_one_waits_and_takes_the_other_s(folder, capsys, monkeypatch):
    monkeypatch.setattr(operation_builds, "_TELL_SECONDS", 0.0)
    calls, loaded = [], []
    first = threading.Thread(target=lambda: loaded.append(load_operation("op", build(1.5, calls, "first"))))
    first.start()
    while not calls:
        time.sleep(0.01)
    monkeypatch.setenv(VARIABLE, str(calls[0].parents[5]))  # another process has an environment of its own
    assert load_operation("op", build(0.0, calls, "second")) == "first"
    first.join()
    assert loaded == ["first"] and len(calls) == 1
    said = capsys.readouterr().err
    assert f"op is built in {folder} by process {os.getpid()} on" in said and "waiting for at most 600 s" in said


@pytest.mark.timeout(60)
def test_waiting_ends_with_who_where_and_what_to_do(folder, other, monkeypatch):
    monkeypatch.setattr(operation_builds, "WAIT_SECONDS", 0.6)
    with pytest.raises(RunError) as told:
        load_operation("op", build())
    for part in (str(folder), f"process {other.pid} on", "stop that process", f"export {VARIABLE}=FOLDER"):
        assert part in str(told.value)


def test_an_owner_of_another_machine_that_is_silent_is_dead(folder, monkeypatch):
    folder.mkdir(parents=True)
    monkeypatch.setattr(folder_owner, "LOST_SECONDS", 0.3)
    FolderOwner(folder)._make(1, 1)
    content = (folder / ".owner.000001.json").read_text().replace('"machine": "', '"machine": "elsewhere')
    (folder / ".owner.000001.json").write_text(content)
    assert load_operation("op", build()) == "module"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("Error building extension 'op': [1/2] c++ …\nop.cpp:1:10: fatal error: x.h\n"),
            "fatal error: x.h",
        ),
        (OSError("CUDA_HOME environment variable is not set"), "CUDA_HOME"),
        (RuntimeError("Unable to JIT load the op op due to ninja not being installed."), "ninja"),
    ],
)
def test_a_build_that_fails_is_one_line_and_a_file_with_the_rest(folder, error, said):
    def fail():
        raise error

    with pytest.raises(RunError) as told:
        load_operation("op", fail)
    assert said in str(told.value) and "\n" not in str(told.value) and str(folder / "build.log") in str(told.value)
    assert str(error) in (folder / "build.log").read_text() and not list(folder.glob("build-*"))
    assert load_operation("op", build()) == "module"  # nothing stands in the way of the next


def test_a_folder_that_cannot_be_made_is_told(folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file"))
    with pytest.raises(RunError, match="cannot be kept in .*expected a folder that can be written"):
        load_operation("op", build())


def test_a_library_of_another_system_is_built_anew(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    folder = builds_folder() / "op"
    folder.mkdir(parents=True)
    (folder / "op.so").write_bytes(b"\x7fELF of no machine")
    assert load_operation("op", build()) == "module"


def test_deepspeed_builds_through_it(monkeypatch):
    builder = pytest.importorskip("deepspeed.ops.op_builder.builder")

    class Fake(builder.OpBuilder):
        def absolute_name(self):
            return "op"

        def sources(self):
            return []

    monkeypatch.setattr(builder.OpBuilder, "jit_load", lambda self, verbose: f"built {self.name}")
    monkeypatch.setattr(operation_builds, "load_operation", lambda name, build: ("guarded", name, build()))
    operation_builds.guard_builds()
    operation_builds.guard_builds()  # once
    monkeypatch.setattr(builder.OpBuilder, "_loaded_ops", {})
    assert Fake("op").load() == ("guarded", "op", "built op")
    assert builder.OpBuilder._loaded_ops["op"] == ("guarded", "op", "built op")
