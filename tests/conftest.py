"""Settings that hold for every test and for the processes that tests start."""

import os
from pathlib import Path

import pytest

try:
    from hypothesis import HealthCheck, settings
except ModuleNotFoundError:  # a bare GPU machine that runs only tests/test_ops_gpu.py
    settings = None

REPOSITORY = Path(__file__).resolve().parent.parent

# Before torch is imported: one thread per process, no network, no warnings about forked tokenizers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Launched ranks run a file of another folder and must find this checkout, installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))

# Examples on a shared machine may be slow; the same ones in every run, so that a failure can be repeated.
if settings is not None:
    settings.register_profile("kvds", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("kvds")


def pytest_configure(config: pytest.Config) -> None:
    """Interpret Triton kernels, except where GPU tests run; decided before anything imports triton."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def rank_server():
    """Forks ranks for the tests of all files: importing everything takes longer than most runs."""
    from benchmarks.forked_ranks import RankServer

    with RankServer() as server:
        yield server
