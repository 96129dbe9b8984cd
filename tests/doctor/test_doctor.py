"""``kvds doctor``: what is sound reads ok, each fault that is put in is found, and a fault is exit status 1."""

import os
import re
import shutil
import sys
import threading
import tomllib
from pathlib import Path

import pytest

from kvds.cli import main
from kvds.distributed import operation_builds
from kvds.doctor import kernel, network, software, storage
from kvds.doctor.finding import Finding, run_bounded
from kvds.identity.folder_owner import FolderOwner

REPOSITORY = Path(__file__).resolve().parents[2]


def only(findings: list[Finding]) -> Finding:
    [finding] = findings
    return finding


def program(folder: Path, name: str, script: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


# -- software ----------------------------------------------------------------------------------------------------------


def test_minimum_versions_are_those_of_pyproject():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["mlflow"]]
    listed = dict(item.split(",")[0].split(">=") for item in wanted)
    assert {name: listed[name] for name in software.MINIMUM} == software.MINIMUM


def test_old_and_missing_packages_are_faults():
    assert only(software.check_versions()).level == "ok"
    finding = only(software.check_versions({"torch": "99.0", "no-such-package": "1.0"}))
    assert finding.level == "fault" and finding.remedy.startswith("pip install")
    assert re.search(r"torch 2\.\d+\S* is too old, expected 99.0 or newer; no-such-package is missing", finding.text)


def test_a_driver_with_gpus_that_torch_does_not_see_is_a_fault(tmp_path, monkeypatch):
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a driver of its own")
    assert only(software.check_devices()).level == "ok"
    program(tmp_path, "nvidia-smi", "echo 'GPU 0: A (UUID: x)'; echo 'GPU 1: A (UUID: y)'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    finding = only(software.check_devices())
    assert finding.level == "fault" and "2 GPUs, and torch" in finding.text and "sees none" in finding.text
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    finding = only(software.check_devices())
    assert finding.level == "fault" and finding.remedy == "unset CUDA_VISIBLE_DEVICES"


def test_compiler_and_ninja(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    assert [finding.level for finding in software.check_compiler()] == ["ok", "ok"]
    program(tmp_path, "old++", "echo 'x.cc:1: error: no member optional' >&2; exit 1")
    monkeypatch.setenv("CXX", str(tmp_path / "old++"))
    finding = software.check_compiler()[0]
    assert finding.level == "fault" and "does not compile C++17" in finding.text and "no member" in finding.text
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    faults = software.check_compiler()
    assert [(f.level, f.subject) for f in faults] == [("fault", "compiler"), ("fault", "ninja")]


# -- storage -----------------------------------------------------------------------------------------------------------


def test_file_system_is_that_of_the_longest_mount(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/a / ext4 rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\n/dev/b {tmp_path}-other xfs rw 0 0\n")
    assert storage.file_system(tmp_path / "not" / "yet", mounts) == "nfs4"
    assert storage.file_system(Path("/"), mounts) == "ext4"


def test_little_space_warns_and_none_is_a_fault(tmp_path):
    def level(**limits: int) -> str:
        return next(f for f in storage.check_space(tmp_path, **limits) if f.text.startswith("output")).level

    free = shutil.disk_usage(tmp_path).free
    assert level(warn_below=1, fault_below=0) == "ok"
    assert level(warn_below=2 * free, fault_below=0) == "warning"
    assert level(warn_below=4 * free, fault_below=2 * free) == "fault"


def test_a_lock_left_by_a_killed_build_is_named_as_such(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    assert all(finding.level == "ok" for finding in storage.check_caches())  # a build that runs
    os.utime(lock, (0, 0))
    warnings = [finding for finding in storage.check_caches() if finding.level == "warning"]
    assert only(warnings).remedy == f"if no build runs: rm {lock}" and "stale lock" in only(warnings).text


def test_caches_and_records_on_a_network_file_system_warn(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "file_system", lambda path: "nfs4")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert {finding.level for finding in storage.check_caches()} == {"warning"}
    assert only(storage.check_sqlite(tmp_path)).level == "warning"


def test_sqlite_without_locks_is_a_fault(tmp_path, monkeypatch):
    finding = only(storage.check_sqlite(tmp_path / "run"))
    assert finding.level == "ok" and not list(tmp_path.iterdir())  # nothing is left behind
    # Without the first writer's transaction the second gets in, as on a file system without locks.
    monkeypatch.setattr(storage, "_SQLITE", storage._SQLITE.replace('("insert into t values (2)")', '("select 1")'))
    finding = only(storage.check_sqlite(tmp_path))
    assert finding.level == "fault" and "file locks do nothing here" in finding.text
    assert "--tracking_uri" in finding.remedy


def test_offline_without_a_cache_warns(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    finding = only(storage.check_offline())
    assert finding.level == "warning" and "kvds prefetch" in finding.remedy
    (tmp_path / "models--Qwen--Qwen2-0.5B").mkdir()
    assert only(storage.check_offline()).level == "ok"


# -- kernel and network ------------------------------------------------------------------------------------------------


def test_kernel_is_compared_with_the_oracle(monkeypatch):
    assert kernel.worst_difference("lean", "cpu") < 1e-5
    monkeypatch.setattr(kernel.importlib.util, "find_spec", lambda name: None)
    finding = only(kernel.check_kernel())
    assert finding.level == "ok" and "lean" in finding.text and "triton kernel skipped" in finding.text
    monkeypatch.setattr(kernel, "_BOUND", 1e-12)
    assert only(kernel.check_kernel()).level == "fault"


@pytest.mark.multiprocess
def test_all_reduce_between_ranks():
    finding = only(network.check_all_reduce(2))
    assert finding.level == "ok" and re.fullmatch(r"2 ranks over gloo: 16 MiB in [\d.]+ ms", finding.text)


def test_a_rank_that_fails_or_hangs_is_a_fault_in_time(monkeypatch):
    failing = "import os, time\nif os.environ['RANK'] == '1': raise SystemExit('no route to host')\ntime.sleep(60)"
    monkeypatch.setattr(network, "_SCRIPT", failing)
    finding = only(network.check_all_reduce(2))
    assert finding.level == "fault" and finding.text.endswith("rank 1: no route to host")
    monkeypatch.setattr(network, "_SCRIPT", "import time\ntime.sleep(60)")
    finding = only(network.check_all_reduce(2, seconds=0.5))
    assert finding.level == "fault" and "no sum within" in finding.text and "SOCKET_IFNAME" in finding.remedy


def test_a_build_that_fails_or_takes_long_is_no_fault_of_the_network(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    begin = "from kvds.distributed.operation_builds import load_operation\n"
    real = network._SCRIPT.replace("text, right = all_reduce_here()", "load_operation('op', lambda: None)")
    monkeypatch.setattr(network, "_SCRIPT", begin + real)
    finding = only(network.check_all_reduce(1))
    assert (finding.level, finding.subject) == ("fault", "build") and "SOCKET_IFNAME" not in str(finding)
    assert "cannot be kept in" in finding.text and "export TORCH_EXTENSIONS_DIR=FOLDER" in finding.text

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(network, "_SCRIPT", "import time\ntime.sleep(60)")
    folder = operation_builds.builds_folder() / "op"
    folder.mkdir(parents=True)
    with FolderOwner(folder):
        finding = only(network.check_all_reduce(2, seconds=0.5))
    assert finding.subject == "build" and f"{folder} is being built by process {os.getpid()} on" in finding.text
    assert "SOCKET_IFNAME" not in finding.remedy


def test_a_program_that_hangs_is_stopped():
    assert run_bounded([sys.executable, "-c", "input()"], seconds=5)[0] == 1  # no input: it ends by itself
    assert run_bounded(["sleep", "20"], seconds=0.2) == (None, "no answer within 0 s")


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def sound(monkeypatch):
    ok = [Finding("ok", "part", "as it should be")]
    for module, name in ((network, "check_all_reduce"), (kernel, "check_kernel")):
        monkeypatch.setattr(module, name, lambda *args: ok)
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def test_exit_status_is_1_on_a_fault_only(sound, monkeypatch, capsys, tmp_path):
    assert main(["doctor", "--output_dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.split()[0] in ("ok", "warning") for line in lines) and len(lines) >= 10
    monkeypatch.setattr(storage, "check_sqlite", lambda path: [Finding("warning", "sqlite", "slow", "wait")])
    assert main(["doctor", "--output_dir", str(tmp_path)]) == 0
    monkeypatch.setattr(storage, "check_sqlite", lambda path: [Finding("fault", "sqlite", "broken", "mend it")])
    assert main(["doctor", "--output_dir", str(tmp_path)]) == 1
    assert "fault    sqlite        broken → mend it" in capsys.readouterr().out


def test_what_is_quick_is_told_before_what_takes_long(sound, monkeypatch, capsys, tmp_path):
    seen: dict[str, str] = {}
    quick_is_out = threading.Event()

    def slow(*_: int) -> list[Finding]:
        assert quick_is_out.wait(120)
        return [Finding("ok", "slow", "at last")]

    def last_of_the_quick(path: Path) -> list[Finding]:
        seen["before"] = capsys.readouterr().out
        quick_is_out.set()
        return [Finding("ok", "sqlite", "quick")]

    for module, name in ((network, "check_all_reduce"), (kernel, "check_kernel")):
        monkeypatch.setattr(module, name, slow)
    monkeypatch.setattr(storage, "check_sqlite", last_of_the_quick)
    assert main(["doctor", "--output_dir", str(tmp_path)]) == 0
    assert "ok       versions" in seen["before"] and "free space" in seen["before"] and "slow" not in seen["before"]
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["sqlite", "slow", "slow"]


def test_bad_flags(capsys):
    assert main(["doctor", "--ranks", "0"]) == 2
    assert "--ranks 0: expected at least 1" in capsys.readouterr().err
