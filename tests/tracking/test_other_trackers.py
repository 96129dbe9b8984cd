"""TensorBoard and wandb get what metrics.jsonl gets, on resume too; one that breaks costs one warning."""

from __future__ import annotations

import contextlib
import json
import math
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvds.config import extras
from kvds.config.recipe import parse_run_config
from kvds.errors import InputError
from kvds.tracking.tracker import Tracker

FLAGS = ["--model_name", "gpt2", "--output_dir", "x"]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """wandb without an account, all of it below ``tmp_path``."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))


@pytest.fixture
def fresh_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """wandb that reads its environment anew, and finds no account there."""
    wandb = pytest.importorskip("wandb", reason="pip install 'kvds[wandb]'")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    wandb.teardown()
    yield
    wandb.teardown()


def track(folder: Path, *names: str, steps: tuple[int, ...], resume_step: int | None = None) -> None:
    tracker = Tracker(
        folder, report_to=names, run_name="tried", params={"lr": 0.1, "datasets": ["a", "b"]},
        tags={"world_size": "2"}, resume_step=resume_step,
    )  # fmt: skip
    for step in steps:
        tracker.log(step, {"loss/task": 10.0 - step, "grad_norm": math.nan if step == 2 else 1.0})
    tracker.set_tag("warning/collapse", "step 2: fell")
    (folder / "note.md").write_text("note")
    tracker.log_artifact(folder / "note.md")
    tracker.flush()
    tracker.finish()


def test_tensorboard_has_every_step_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensorboard", reason="pip install 'kvds[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track(tmp_path, "tensorboard", steps=(1, 2, 3))
    track(tmp_path, "tensorboard", steps=(3, 4), resume_step=2)  # step 3 was taken again, from the checkpoint of 2
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss/task")] == [(1, 9), (2, 8), (3, 7), (4, 6)]
    assert [event.step for event in read.Scalars("grad_norm")] == [1, 3, 4]  # a NaN has no place on an axis
    texts = {tag: read.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in read.Tags()["tensors"]}
    assert "| lr | 0.1 |" in texts["settings/text_summary"] and texts["facts/world_size/text_summary"] == "2"
    assert texts["facts/warning/collapse/text_summary"] == "step 2: fell"
    assert texts["facts/status/text_summary"] == "FINISHED" and not told(caplog)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "kvds"]


def scanned(folder: Path) -> list[Any]:
    """The records of wandb's own file: after 7 bytes, blocks of 32 KiB of pieces with checksum, length and kind."""
    from wandb.proto import wandb_internal_pb2 as protocol

    [file] = folder.glob("wandb/offline-run-*/*.wandb")
    data, place, held, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:  # no header fits into the end of a block
            place += 2**15 - place % 2**15
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        held += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(protocol.Record.FromString(held))
            held = b""
    return found


@pytest.mark.usefixtures("offline")
def test_wandb_has_every_record_and_the_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("wandb", reason="pip install 'kvds[wandb]'")
    track(tmp_path, "wandb", steps=(1, 2, 3))
    records, begun = scanned(tmp_path), time.monotonic()
    while not any(record.HasField("exit") for record in records):  # wandb's process writes on when the call returns
        assert time.monotonic() - begun < 120
        time.sleep(0.05)
        records = scanned(tmp_path)
    [run] = [record.run for record in records if record.HasField("run")]
    assert run.display_name == "tried" and run.project == "kvds"
    assert run.run_id == (tmp_path / "wandb_run_id").read_text().strip()
    rows = []
    for record in records:
        if record.HasField("history"):
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    assert [(row["step"], row["loss/task"], row.get("grad_norm")) for row in rows] == [
        (1, 9.0, 1.0), (2, 8.0, None), (3, 7.0, 1.0),
    ]  # fmt: skip
    config = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert config["lr"] == 0.1 and config["datasets"] == ["a", "b"] and not told(caplog)


def test_a_tracker_that_breaks_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def __init__(self, folder: Path, **known: Any) -> None:
            pass

        def __getattr__(self, name: str) -> Any:
            raise ConnectionError(f"no {name} today")

    monkeypatch.setattr("kvds.tracking.tracker.TensorboardWriter", Broken)
    track(tmp_path, "tensorboard", steps=(1, 2))
    assert told(caplog) == [
        "records: no put_metrics today; the run goes on, its records may have gaps (no further warning)"
    ]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_several_trackers_are_asked_for_by_flag_and_recipe(tmp_path: Path) -> None:
    assert parse_run_config(FLAGS).report_to == ("mlflow",)
    (tmp_path / "one.yaml").write_text("report_to: none\n")
    (tmp_path / "two.yaml").write_text("report_to: [mlflow, tensorboard]\n")
    recipes = [parse_run_config([*FLAGS, "--config", str(tmp_path / f"{name}.yaml")]) for name in ("one", "two")]
    assert [cfg.report_to for cfg in recipes] == [("none",), ("mlflow", "tensorboard")]
    assert parse_run_config([*FLAGS, "--report_to", "tensorboard", "mlflow"]).report_to == ("tensorboard", "mlflow")


@pytest.mark.usefixtures("fresh_wandb")
@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, r"report_to=wandb without a key: expected a key \(wandb login, .*WANDB_MODE=offline"),
        ({"WANDB_API_KEY": "short"}, "report_to=wandb with a key that is none: .*40"),
        ({"WANDB_MODE": "offline"}, ""),
        ({"WANDB_MODE": "disabled"}, ""),
        ({"RANK": "1"}, ""),  # the first rank alone writes, and its node alone may have the key
    ],
)
def test_wandb_without_a_key_is_told_before_anything_is_loaded(
    environment: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refusal = pytest.raises(InputError, match=told) if told else contextlib.nullcontext()
    with refusal:
        assert parse_run_config([*FLAGS, "--report_to", "wandb"]).report_to == ("wandb",)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_told_before_anything_is_loaded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda package: None)
    with pytest.raises(InputError) as error:
        parse_run_config([*FLAGS, "--report_to", "mlflow", name])
    assert str(error.value) == (
        f"report_to={name}: {name} is not installed (pip install 'kvds[{name}]'); expected an environment with it"
    )
