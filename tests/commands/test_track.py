"""``kvds track`` gives MLflow what it lacks of a run's records, once."""

import json
import sqlite3
from pathlib import Path

from mlflow import MlflowClient

from kvds.cli import main
from kvds.config import RunConfig
from kvds.tracking.tracker import Tracker

RECORDS = [{"step": step, "loss/task": 3.0 / step, "lr": 0.01 * step} for step in range(1, 6)]


def make_run(folder: Path) -> Path:
    """What a run leaves whose MLflow was never reached; the last line is one that it was killed in."""
    folder.mkdir()
    RunConfig(model_name="gpt2", output_dir=str(folder), experiment_name="late").save(folder / "config.yaml")
    lines = [json.dumps(record) for record in RECORDS]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 6, "lo')
    return folder


def histories(run: Path, run_id: str) -> dict[str, list[tuple[int, float]]]:
    client = MlflowClient(tracking_uri=f"sqlite:///{run}/mlflow.db")
    return {k: [(m.step, m.value) for m in client.get_metric_history(run_id, k)] for k in ("loss/task", "lr")}


def test_records_are_sent_once_however_often_it_is_called(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    assert main(["track", str(run)]) == 0
    run_id = (run / "mlflow_run_id").read_text().strip()
    expected = {key: [(record["step"], record[key]) for record in RECORDS] for key in ("loss/task", "lr")}
    assert histories(run, run_id) == expected
    client = MlflowClient(tracking_uri=f"sqlite:///{run}/mlflow.db")
    found = client.get_run(run_id)
    assert found.info.status == "KILLED" and found.data.params["model_name"] == "gpt2"  # it left no student

    with (run / "metrics.jsonl").open("a") as file:
        file.write('ss/task": 0.5, "lr": 0.06}\n')  # the line is whole now
    (run / "student").mkdir()
    assert main(["track", str(run)]) == 0
    assert (run / "mlflow_run_id").read_text().strip() == run_id
    expected["loss/task"].append((6, 0.5))
    expected["lr"].append((6, 0.06))
    assert histories(run, run_id) == expected
    assert client.get_run(run_id).info.status == "FINISHED"
    assert len(client.search_runs([client.get_experiment_by_name("late").experiment_id])) == 1


def test_what_cannot_be_sent_is_told_in_one_line(tmp_path, capsys):
    assert main(["track", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such folder; expected the --output_dir of a run" in capsys.readouterr().err
    run = make_run(tmp_path / "run")
    before = (run / "metrics.jsonl").read_bytes()
    (tmp_path / "file").write_text("in the way")
    assert main(["track", str(run), "--tracking_uri", f"sqlite:///{tmp_path}/file/mlflow.db"]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("kvds: error: sqlite:///") and "call kvds track again" in message
    assert (run / "metrics.jsonl").read_bytes() == before


def test_what_a_locked_database_did_not_take_is_sent_later_and_once(tmp_path, caplog):
    """Locked by name only: MLflow waits 20 seconds with each statement for a real lock to go away."""
    run = tmp_path / "run"
    run.mkdir()
    RunConfig(model_name="gpt2", output_dir=str(run), experiment_name="late").save(run / "config.yaml")
    uri = f"sqlite:///{run}/mlflow.db?timeout=9"  # an address may have options
    tracker = Tracker(run, tracking_uri=uri, experiment_name="late", system_metrics=False)
    tracker.log(1, {name: value for name, value in RECORDS[0].items() if name != "step"})
    tracker.flush()

    def locked(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("database is locked")

    client = tracker._writer._client
    client.log_batch = client.set_terminated = locked
    for record in RECORDS[1:]:
        tracker.log(record["step"], {name: value for name, value in record.items() if name != "step"})
    tracker.finish()
    assert caplog.text.count("records:") == 1 and "database is locked" in caplog.text
    expected = {key: [(record["step"], record[key]) for record in RECORDS] for key in ("loss/task", "lr")}
    assert histories(run, tracker.run_id) == {key: values[:1] for key, values in expected.items()}
    assert main(["track", str(run)]) == 0
    assert histories(run, tracker.run_id) == expected
