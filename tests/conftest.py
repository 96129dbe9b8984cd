"""Settings that hold for every test and for the processes that tests start."""

import atexit
import gc
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

try:
    from hypothesis import HealthCheck, settings
except ModuleNotFoundError:  # a bare GPU machine that runs only tests/ops/test_gpu.py
    settings = None

REPOSITORY = Path(__file__).resolve().parent.parent

# Before torch is imported: one thread per process, no network, no warnings about forked tokenizers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Rows as tokens are kept where tests leave them for each other, and not for the user.
if "HF_DATASETS_CACHE" not in os.environ:
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="kvds-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
# Launched ranks run a file of another folder and must find this checkout, installed or not; launchers start fast.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(REPOSITORY), str(REPOSITORY / "tests/harness/launchers"), os.environ.get("PYTHONPATH")])
)

# Examples on a shared machine may be slow; the same ones in every run, so that a failure can be repeated.
if settings is not None:
    settings.register_profile("kvds", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("kvds")


def pytest_configure(config: pytest.Config) -> None:
    """Interpret Triton kernels, except where GPU tests run; decided before anything imports triton."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["TRITON_INTERPRET"] = "1"


# A minute or more each. Begun first by pytest-xdist, they leave the short ones to fill the end; the first mostly waits.
_LONG = (
    *("cluster/test_cluster.py", "reliability/test_survival.py", "training/test_zero3.py", "launch/test_launchers.py"),
    *("launch/test_smoke.py", "reliability/test_survival_kinds.py", "align/test_runs.py", "training/test_resume.py"),
    "experiment/test_runner.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the longest files first."""
    tests = Path(__file__).parent

    def turn(item: pytest.Item) -> int:
        name = item.path.relative_to(tests).as_posix() if item.path.is_relative_to(tests) else ""
        return _LONG.index(name) if name in _LONG else len(_LONG)

    items.sort(key=turn)


def pytest_collection_finish() -> None:
    """Leave what was imported out of each later collection of garbage, of which a run that a test trains has some."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let it be collected at the end, when libraries look for what was left."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def rank_server():
    """Forks ranks for the tests of all files: importing everything takes longer than most runs."""
    from tests.harness.forked_ranks import RankServer

    with RankServer() as server:
        yield server


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """A process group of one, which DDP, FSDP and collective calls ask for."""
    from torch import distributed as dist

    own = not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if own:
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Commands that a test runs in this process set levels and handlers; the next test starts without them."""
    loggers = [logging.getLogger(), logging.getLogger("kvds")]
    if loggers[1].level > logging.WARNING:  # by a fixture of a whole file, which this one does not see
        loggers[1].setLevel(logging.NOTSET)
    logging.disable(logging.NOTSET)
    before = [(logger.level, logger.handlers[:]) for logger in loggers]
    yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        for handler in logger.handlers[:]:
            if type(handler) is logging.StreamHandler and handler not in handlers:
                logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def _signals_as_they_were() -> Iterator[None]:
    """A listener that a test leaves behind would end the process of a later one that sends itself a signal."""
    before = set(threading.enumerate())
    yield
    assert [thread.name for thread in set(threading.enumerate()) - before if thread.name == "kvds-signals"] == []
