"""Ranks that do not meet say so in one line; one that was asked to stop is not taken for lost with another."""

import json
import os

import deepspeed
import pytest
from torch import distributed as dist

from kvds.config import RunConfig
from kvds.distributed.preemption import StopRequest, leave_at_once
from kvds.distributed.process_group import init_distributed, leave_distributed
from kvds.distributed.rank_watch import RankWatch
from kvds.errors import RunError
from kvds.training.guard import guarded


@pytest.mark.parametrize(
    ("rank", "fault"),
    [
        ("0", dist.DistStoreError("Timed out after 601 seconds waiting for clients. 1/2 clients joined.")),
        ("0", RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:29")),
        ("1", dist.DistNetworkError("The client socket has timed out after 600000ms\nwhile trying to connect")),
    ],
)
def test_a_rank_that_died_before_all_had_joined(rank, fault, monkeypatch, capsys):
    environment = {"RANK": rank, "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "29"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def never(**_: object) -> None:
        raise fault

    monkeypatch.setattr(deepspeed, "init_distributed", never)
    with pytest.raises(RunError) as told:
        init_distributed()
    line = str(told.value)
    assert " ".join(str(fault).split()) in line and "\n" not in line
    assert f"RANK={rank}, WORLD_SIZE=2, MASTER_ADDR=n1, MASTER_PORT=29" in line and "look at the other ranks" in line
    # Rank 0 tells what ends a run; here it may be the one that is gone.
    assert capsys.readouterr().err.count("kvds: error: the ranks did not meet") == (rank == "1")


def test_a_rank_that_is_gone_at_the_end_is_told_in_one_line(monkeypatch):
    def gone() -> None:
        raise RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:2781")

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "barrier", gone)
    with pytest.raises(RunError, match="another rank was gone at the end"):
        leave_distributed()


def test_other_faults_on_the_way_are_told_as_they_are(monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)

    def fault(**_: object) -> None:
        raise RuntimeError("of ours")

    monkeypatch.setattr(deepspeed, "init_distributed", fault)
    with pytest.raises(RuntimeError, match="^of ours$") as told:
        init_distributed()
    assert not isinstance(told.value, RunError)


@pytest.mark.parametrize("asked", [True, False])
def test_a_rank_that_was_asked_to_stop_leaves_with_rank_0_whose_store_is_gone(asked, monkeypatch, capsys):
    class Gone(BaseException):
        pass

    def leave(code: int) -> None:
        raise Gone(code)

    def broken(*_: object) -> None:
        raise dist.DistNetworkError("Broken pipe")

    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(os, "_exit", leave)
    watch = RankWatch(5)
    watch._who[0] = {"pid": 2**22 + 1, "host": os.uname().nodename, "since": "1"}
    monkeypatch.setattr(watch, "_exchange", broken)
    assert watch._store is None  # a rank that has not come so far has nobody to tell
    if asked:
        monkeypatch.setattr(watch, "_end", lambda verdict: None)
        watch.leave("SIGUSR1 arrived")
        monkeypatch.undo()
        monkeypatch.setattr(os, "_exit", leave)
        monkeypatch.setattr(watch, "_exchange", broken)
    with pytest.raises(Gone) as left:
        watch._watch()
    assert left.value.args == (85 if asked else 1,)
    assert ("rank 0 is dead" in capsys.readouterr().err) is not asked


def test_a_rank_that_is_asked_to_stop_while_it_joins_tells_the_others(monkeypatch, tmp_path):
    """Its watch has met the others already, or is just about to: they must not take it for dead."""
    told = []

    class Store:
        def compare_set(self, key: str, expected: str, value: str) -> bytes:
            told.append((key, expected, json.loads(value)["code"]))
            return value.encode()

        def add(self, key: str, amount: int) -> int:
            return 1

    class Left(BaseException):
        pass

    def leave(code: int) -> None:
        raise Left(code)

    def signalled(watch: RankWatch) -> RankWatch:
        watch._store = Store()
        stop.ask("SIGTERM arrived")
        raise AssertionError("it went on")

    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(RankWatch, "start", signalled)
    monkeypatch.setattr(StopRequest, "join", lambda self: None)
    stop = StopRequest()
    stop._leave = leave_at_once
    cfg = RunConfig(model_name="gpt2", output_dir=str(tmp_path))
    with pytest.raises(Left) as left, guarded(cfg, stop):
        pass
    assert left.value.args == (85,) and told == [("verdict", "none", 85)]
