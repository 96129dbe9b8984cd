"""Records reach metrics.jsonl and MLflow whole and once, on resume too; a broken store costs one warning."""

import json
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

import kvds
import kvds.tracking.provenance
import kvds.tracking.tracker
from kvds.errors import InputError
from kvds.tracking.metrics_file import MetricsFile, read_metrics
from kvds.tracking.provenance import collect_versions, git_revision
from kvds.tracking.tracker import Tracker, default_tracking_uri, ui_command


def client_and_run(folder: Path, tracker: Tracker):
    client = MlflowClient(tracking_uri=default_tracking_uri(folder))
    return client, client.get_run(tracker.run_id)


def history(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, key)]


def test_each_record_is_one_strict_line_at_once(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append(1, {"loss/total": 2.5, "loss/kv": math.nan, "grad_norm": math.inf, "rows": 3})
    text = (tmp_path / "metrics.jsonl").read_text()  # not closed yet: flushed per line
    record = json.loads(text, parse_constant=pytest.fail)  # NaN and Infinity are no JSON
    assert record == {"step": 1, "loss/total": 2.5, "loss/kv": None, "grad_norm": None, "rows": 3}
    assert text.endswith("}\n") and text.count("\n") == 1
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(record["loss/kv"]) and record["loss/total"] == 2.5


def test_resume_drops_later_steps_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in (10, 20, 30):
        file.append(step, {"loss/task": float(step)})
    file.append(20, {"eval/all/exact_match": 0.5})
    file.close()
    with path.open("a") as torn:
        torn.write('{"step": 40, "loss/ta')
    resumed = MetricsFile(path, resume_step=20)
    resumed.append(20, {"eval/all/exact_match": 0.7})  # the run evaluates the step it goes on from again
    resumed.append(30, {"loss/task": -30.0})
    records = [(r["step"], r.get("loss/task"), r.get("eval/all/exact_match")) for r in read_metrics(path)]
    assert records == [(10, 10.0, None), (20, 20.0, None), (20, None, 0.5), (30, -30.0, None)]


def test_a_new_run_keeps_the_older_file_aside(tmp_path):
    for value in (1.0, 2.0, 3.0):
        file = MetricsFile(tmp_path / "metrics.jsonl")
        file.append(1, {"x": value})
        file.close()
    found = {path.name: read_metrics(path)[0]["x"] for path in tmp_path.iterdir()}
    assert found == {"metrics-1.jsonl": 1.0, "metrics-2.jsonl": 2.0, "metrics.jsonl": 3.0}


@pytest.mark.parametrize("line", ["not json", "[1]", '{"loss": 1}', '{"step": "ten"}'])
def test_a_foreign_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "x": 1.0}\n' + line + "\n")
    with pytest.raises(InputError, match=re.escape(f"{path}:2: expected")):
        read_metrics(path)


def test_mlflow_gets_metrics_params_tags_and_artifacts(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "600")  # a run that ends before it has one
    params = {f"setting_{i}": i for i in range(130)} | {"long": "x" * 7000, "datasets": ("gsm8k", "svamp:0.2")}
    tags = {**collect_versions(), "world_size": "2"}
    tracker = Tracker(tmp_path, experiment_name="records", run_name="first", params=params, tags=tags)
    for step in (1, 2):
        metrics = {"loss/kv_keys_layer_00": step / 4, "eval/my corpus (1)/exact_match": 0.25, "loss/kv": math.nan}
        tracker.log(step, metrics)
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.md").write_text("table\n")
    tracker.log_artifact(tmp_path / "config.yaml")
    tracker.log_artifact(tmp_path / "report")
    tracker.flush()
    tracker.finish("FINISHED")
    tracker.finish("FAILED")

    client, run = client_and_run(tmp_path, tracker)
    assert (tmp_path / "mlflow_run_id").read_text().strip() == tracker.run_id
    assert run.info.status == "FINISHED" and run.info.run_name == "first"
    assert client.get_experiment(run.info.experiment_id).name == "records"
    assert history(client, tracker.run_id, "loss/kv_keys_layer_00") == [(1, 0.25), (2, 0.5)]
    assert history(client, tracker.run_id, "eval/my corpus _1_/exact_match") == [(1, 0.25), (2, 0.25)]
    assert math.isnan(run.data.metrics["loss/kv"])
    assert len(run.data.params) == 132 and run.data.params["setting_129"] == "129"
    assert run.data.params["long"] == "x" * 5999 + "…"
    expected = {"torch": torch.__version__, "world_size": "2", "host": socket.gethostname(), "kvds": kvds.__version__}
    assert {key: run.data.tags.get(key) for key in expected} == expected
    assert run.data.tags.get("git_revision") == git_revision()
    assert "system/cpu_utilization_percentage" in run.data.metrics
    assert sorted(entry.path for entry in client.list_artifacts(tracker.run_id)) == ["config.yaml", "report"]
    assert (tmp_path / "mlflow_artifacts").is_dir() and not Path("mlruns").exists()
    left = [thread.name for thread in threading.enumerate()]
    assert not [name for name in left if "SystemMetrics" in name or "kvds-mlflow" in name]  # other tests have threads


def test_resume_goes_on_with_the_run_and_repeats_no_step(tmp_path):
    first = Tracker(tmp_path, params={"lr": 0.1, "seed": 0}, tags={"world_size": "1"}, system_metrics=False)
    for step in (1, 2, 3):
        first.log(step, {"loss/task": float(step)})
    first.finish("KILLED")
    # Step 3 was lost with the checkpoint; the settings of the second attempt differ in one that is free to.
    params = {"lr": 0.1, "seed": 0, "eval_steps": 5}
    second = Tracker(tmp_path, params=params, tags={"world_size": "2"}, resume_step=2, system_metrics=False)
    for step in (3, 4):
        second.log(step, {"loss/task": float(step), "late": 1.0})
    second.finish()
    third = Tracker(tmp_path, params={"lr": 0.2}, run_id=second.run_id, resume_step=4, system_metrics=False)
    third.finish("FAILED")

    assert first.run_id == second.run_id == third.run_id
    client, run = client_and_run(tmp_path, second)
    assert history(client, second.run_id, "loss/task") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert history(client, second.run_id, "late") == [(3, 1.0), (4, 1.0)]
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert run.data.params == {"lr": "0.1", "seed": "0", "eval_steps": "5"}
    assert run.data.tags["world_size"] == "2" and run.data.tags["resumed/lr"] == "0.2"
    assert run.data.tags["resumed_from_step"] == "4" and run.info.status == "FAILED"


def test_resume_of_a_run_that_the_store_lost_begins_a_new_one(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="kvds"):
        tracker = Tracker(tmp_path, run_id="0" * 32, resume_step=5, system_metrics=False)
        tracker.log(6, {"loss/task": 1.0})
        tracker.finish()
    assert tracker.run_id not in (None, "0" * 32)
    client, run = client_and_run(tmp_path, tracker)
    assert run.data.metrics == {"loss/task": 1.0} and run.info.status == "FINISHED"
    assert "knows no run 000" in caplog.text


def test_without_mlflow_there_is_still_the_file(tmp_path):
    tracker = Tracker(tmp_path, report_to=())
    tracker.log(1, {"loss/task": 0.5})
    tracker.log_artifact(tmp_path / "nothing")
    tracker.flush()
    tracker.finish()
    assert tracker.run_id is None and sorted(os.listdir(tmp_path)) == ["metrics.jsonl"]
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss/task": 0.5}]


def broken_uris(tmp_path: Path) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "file").write_text("no database")
    return {
        "server": f"http://127.0.0.1:{port}",
        "file": f"sqlite:///{tmp_path}/file/mlflow.db",
        "scheme": "nonsense://x",
    }


@pytest.mark.parametrize("kind", ["server", "file", "scheme"])
def test_a_broken_store_warns_once_and_stops_nothing(tmp_path, monkeypatch, caplog, kind):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = broken_uris(tmp_path)[kind]
    with caplog.at_level(logging.WARNING, logger="kvds"):
        tracker = Tracker(tmp_path / "run", tracking_uri=uri, finish_seconds=20)
        for step in range(1, 4):
            tracker.log(step, {"loss/task": 1.0})
        tracker.log_artifact(tmp_path / "run" / "metrics.jsonl")
        tracker.flush(20)
        tracker.finish("FINISHED")
    warnings = [record.getMessage() for record in caplog.records if record.name == "kvds"]
    assert len(warnings) == 1 and warnings[0].startswith("records: ")
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    assert tracker.run_id is None


class StuckServer:
    """Takes connections and never answers."""

    def __enter__(self) -> str:
        self._socket = socket.create_server(("127.0.0.1", 0))
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def test_a_server_that_never_answers_delays_neither_steps_nor_exit(tmp_path):
    script = (
        "import sys, time; from kvds.tracking.tracker import Tracker\n"
        "tracker = Tracker(sys.argv[1], tracking_uri=sys.argv[2], finish_seconds=1)\n"
        "begun = time.monotonic()\n"
        "for step in range(1000): tracker.log(step, {'loss/task': 1.0})\n"
        "assert time.monotonic() - begun < 1\n"
        "begun = time.monotonic(); tracker.finish(); assert 0.9 < time.monotonic() - begun < 3\n"
        "print('through', flush=True)\n"
    )
    with StuckServer() as uri:
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path), uri], capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 0 and done.stdout == "through\n", done.stderr
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1000


def test_metrics_of_an_outage_are_sent_when_it_is_over(tmp_path, caplog):
    tracker = Tracker(tmp_path, system_metrics=False)
    tracker.flush()
    client = tracker._writer._client
    works, client.log_batch = client.log_batch, lambda *_, **__: 1 / 0
    tracker.log(1, {"loss/task": 1.0})
    tracker.log(2, {"loss/task": 2.0})
    tracker.flush()
    client.log_batch = works
    tracker.log(3, {"loss/task": 3.0})
    tracker.finish()
    client, _ = client_and_run(tmp_path, tracker)
    assert history(client, tracker.run_id, "loss/task") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert caplog.text.count("records:") == 1


def test_a_folder_that_cannot_be_written_warns_and_goes_on(tmp_path, caplog):
    (tmp_path / "run").write_text("a file where the folder should be")
    tracker = Tracker(tmp_path / "run", report_to=())
    tracker.log(1, {"x": 1.0})
    tracker.finish()
    assert caplog.text.count("records:") == 1


def test_a_killed_run_leaves_whole_lines(tmp_path):
    script = (
        "import sys; from kvds.tracking.tracker import Tracker\n"
        "tracker = Tracker(sys.argv[1], report_to=())\n"
        "for step in range(10**9):\n"
        "    tracker.log(step, {'x': 1.0 / 3})\n"
        "    if step == 50: print('going', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "going\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    text = (tmp_path / "metrics.jsonl").read_text()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(len(records))) and len(records) >= 51
    assert text.count("\n") == len(records)


def test_ui_command_names_the_database_of_the_run(tmp_path):
    folder = tmp_path / "my run"
    assert ui_command(folder) == f"mlflow ui --backend-store-uri 'sqlite:///{folder}/mlflow.db' --host 127.0.0.1"
    assert ui_command("x", "sqlite:////a.db") == "mlflow ui --backend-store-uri sqlite:////a.db --host 127.0.0.1"


def test_revision_is_that_of_the_checkout_and_marks_changes(tmp_path, monkeypatch):
    package = tmp_path / "kvds"
    package.mkdir()
    (package / "tracking.py").write_text("one\n")
    monkeypatch.setattr(kvds.tracking.provenance, "__file__", str(package / "tracking" / "provenance.py"))
    assert git_revision() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert git_revision() == head
    (package / "tracking.py").write_text("two\n")
    assert git_revision() == f"{head}+changes"
