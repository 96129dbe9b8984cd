"""Packages, devices, and the compiler that DeepSpeed builds its operations with."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from kvds.config.extras import EXTRAS
from kvds.doctor.finding import Finding, run_bounded

# As in pyproject.toml (a test compares them): a checkout that is not installed has no metadata to ask.
MINIMUM = {"torch": "2.11", "deepspeed": "0.19.8", "transformers": "5.20", "mlflow": "3.13", "datasets": "4.0"}
_OPTIONAL = ("triton",)
_COMPILED = "#include <Python.h>\n#include <optional>\nint main() { std::optional<int> x{1}; return x.value() - 1; }\n"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def check_versions(minimum: Mapping[str, str] = MINIMUM) -> list[Finding]:
    """Python and the packages that decide about a run."""
    found, wrong = [f"python {platform.python_version()}"], []
    for package, least in minimum.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if package in EXTRAS:
                found.append(
                    f"no {package}, which records and pictures may want (pip install 'kvds[{EXTRAS[package]}]')"
                )
                continue
            wrong.append(f"{package} is missing, expected {least} or newer")
            continue
        found.append(f"{package} {version}")
        if _numbers(version) < _numbers(least):
            wrong.append(f"{package} {version} is too old, expected {least} or newer")
    for package in _OPTIONAL:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    if not wrong:
        return [Finding("ok", "versions", ", ".join(found))]
    remedy = "pip install -e . (offline: pip install --no-index --find-links WHEELS -e ., see launch/wheelhouse.sh)"
    return [Finding("fault", "versions", "; ".join(wrong), remedy)]


def check_devices() -> list[Finding]:
    """The accelerators that torch sees, against those that the driver shows."""
    import torch

    status, listing = run_bounded(["nvidia-smi", "-L"], seconds=30)
    present = len(re.findall(r"^GPU \d+", listing, re.MULTILINE)) if status == 0 else 0
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not count:
        cores = len(os.sched_getaffinity(0))
        if not present:
            return [
                Finding(
                    "ok",
                    "devices",
                    f"no GPU; {cores} CPU cores for this process (--deepspeed_config ds_configs/zero3_cpu.json)",
                )
            ]
        if chosen is not None and not chosen.strip(" -1"):
            return [
                Finding(
                    "fault",
                    "devices",
                    f"{present} GPUs, hidden by CUDA_VISIBLE_DEVICES={chosen!r}",
                    "unset CUDA_VISIBLE_DEVICES",
                )
            ]
        return [
            Finding(
                "fault",
                "devices",
                f"{present} GPUs, and torch {torch.__version__} sees none",
                "install a torch that is built for this driver's CUDA (nvidia-smi shows it)",
            )
        ]
    names = [torch.cuda.get_device_properties(i) for i in range(count)]
    text = f"{count} × {names[0].name}, {names[0].total_memory / 2**30:.0f} GiB each, CUDA {torch.version.cuda}"
    if any(device.major < 8 for device in names):
        return [
            Finding(
                "warning",
                "devices",
                f"{text}; no bf16 in hardware below compute capability 8.0",
                "--deepspeed_config ds_configs/zero3_fp32.json",
            )
        ]
    return [Finding("ok", "devices", text)]


def check_compiler() -> list[Finding]:
    """Compile a line of C++17 against Python's headers, and ask ninja for its version."""
    name = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    findings = []
    if name is None:
        findings.append(
            Finding(
                "fault",
                "compiler",
                "no C++ compiler on PATH",
                "module load gcc, or apt install g++ (DeepSpeed compiles on first use)",
            )
        )
    else:
        headers = sysconfig.get_paths()["include"]
        command = [*name.split(), "-std=c++17", f"-I{headers}", "-x", "c++", "-fsyntax-only", "-"]
        status, said = run_bounded(command, seconds=60, text=_COMPILED)
        if status == 0:
            version = run_bounded([*name.split(), "-dumpfullversion", "-dumpversion"], seconds=30)[1].strip()
            findings.append(Finding("ok", "compiler", f"{name} {version} compiles C++17 with Python's headers"))
        elif not (Path(headers) / "Python.h").is_file():
            findings.append(
                Finding(
                    "fault",
                    "compiler",
                    f"{headers}/Python.h is missing",
                    "a Python with headers: module load python, or apt install python3-dev",
                )
            )
        else:
            error = next((line for line in said.splitlines() if "error" in line), said)[:160]
            findings.append(
                Finding(
                    "fault",
                    "compiler",
                    f"{name} does not compile C++17 ({error.strip()})",
                    "a newer compiler: module load gcc, and export CXX=g++",
                )
            )
    if shutil.which("ninja") is None:
        findings.append(Finding("fault", "ninja", "not on PATH", "activate the environment, or pip install ninja"))
    else:
        findings.append(Finding("ok", "ninja", run_bounded(["ninja", "--version"], seconds=30)[1].strip()))
    return findings
