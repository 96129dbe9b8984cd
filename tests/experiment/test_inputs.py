"""Results count for the data and models they were made of: an edited file or folder mixes nothing."""

import json
import os
import shutil
from pathlib import Path

import pytest

from kvds.cli import main
from kvds.errors import InputError
from kvds.experiment.inputs import inputs_of
from kvds.experiment.plan import load_plan
from kvds.experiment.results import ResultStore
from kvds.experiment.runner import Experiment, Runner, prepare
from kvds.identity.folder_owner import FolderOwner

# Its score is the number of rows of its first file, plus what its student's folder says; it may edit a file meanwhile.
FAKE_WORKER = """
import json, pathlib, sys
for line in sys.stdin:
    settings = json.loads(line)["settings"]
    folder = pathlib.Path(settings["output_dir"])
    (folder / "student").mkdir(parents=True)
    source = pathlib.Path(settings["student_name"], "config.json").read_text()
    (folder / "student/config.json").write_text(source + " trained")
    rows = pathlib.Path(settings["datasets"][0])
    count = len(rows.read_text().splitlines())
    if rows.with_name("edit").exists():
        rows.write_text(rows.read_text() + "more\\n")
    print(json.dumps({"status": "finished", "auc/x": count + settings["seed"]}), flush=True)
"""
PLAN = """
settings: {{teacher_name: {0}/student, datasets: ["{0}/rows.jsonl"]}}
primary: auc/x
seeds: [0, 1]
baseline: a
arms:
  a: {{student_name: {0}/student, lr: 1.0}}
  b: {{student_name: "prepared:start", lr: 2.0}}
prepare: {{start: {{student_name: {0}/student, lr: 3.0}}}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "fake_worker.py").write_text(FAKE_WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text("one\ntwo\n")
    (tmp_path / "student").mkdir()
    (tmp_path / "student/config.json").write_text("{}")
    (tmp_path / "plan.yaml").write_text(PLAN.format(tmp_path))
    return tmp_path


def experiment(folder: Path, **how) -> Experiment:
    return Experiment(load_plan(folder / "plan.yaml"), folder / "out" / "plan", **how)


def train(folder: Path) -> tuple[Experiment, int]:
    """Run all that is not there yet: the experiment, and how many runs that took."""
    e = experiment(folder)
    before = len(e.store.rows)
    with Runner(folder / "logs", module="fake_worker") as runner:
        assert prepare([e], runner)
        assert runner.run([(e, job) for job in e.report_jobs()], "train")
    return e, len(e.store.rows) - before


def scores(e: Experiment) -> list[float]:
    return sorted(row["auc/x"] for row in e.store.finished(e.report_jobs()).values())


def test_unchanged_contents_are_trained_once_wherever_they_are_touched(folder):
    assert train(folder)[1] == 5  # a prepared run, two arms of two seeds
    os.utime(folder / "rows.jsonl", (1, 1))
    (folder / "rows.jsonl").rename(folder / "kept")
    shutil.copy(folder / "kept", folder / "rows.jsonl")
    assert train(folder)[1] == 0


def test_an_edited_data_file_mixes_no_old_rows_with_new_ones(folder, caplog):
    e, _ = train(folder)
    assert scores(e) == [2, 2, 3, 3]
    (folder / "rows.jsonl").write_text("one\ntwo\nthree\n")
    assert scores(e) == [] and e.store.failed(e.report_jobs()) == []
    assert train(folder)[1] == 5
    assert scores(experiment(folder)) == [3, 3, 4, 4]
    assert (
        "2 of 2 finished runs" not in caplog.text and "4 of 4 finished runs of these settings read other" in caplog.text
    )
    (folder / "rows.jsonl").write_text("one\ntwo\n")  # as it was: what was trained on it counts again
    assert scores(experiment(folder))[0] == 2


@pytest.mark.parametrize("what", ["held-out rows", "student", "prepared student", "DeepSpeed's file"])
def test_other_inputs_count_too(folder, what, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "ds_configs").mkdir()
    (folder / "ds_configs/zero3.json").write_text("{}")
    e, _ = train(folder)
    assert len(scores(e)) == 4
    if what == "held-out rows":
        (folder / "rows.eval.jsonl").write_text("other\n")
    elif what == "student":
        (folder / "student/model.safetensors").write_bytes(b"trained further")
    elif what == "prepared student":
        (e.prepared("start") / "config.json").write_text("{}")
    else:
        (folder / "ds_configs/zero3.json").write_text("{ }")
    assert len(scores(experiment(folder))) == (2 if what == "prepared student" else 0)


def test_data_that_changes_while_a_run_reads_it_fails_that_run(folder):
    (folder / "edit").write_text("")
    e = experiment(folder)
    with Runner(folder / "logs", module="fake_worker") as runner:
        runner.run([(e, e.report_jobs()[0])], "train")
    [row] = e.store.rows
    assert row["status"] == "failed" and row["error"] == "data or models that it reads were changed while it ran"


def test_rows_of_an_earlier_version_are_reported_alone_and_never_beside_others(folder, caplog):
    e, _ = train(folder)
    old = [{key: item for key, item in row.items() if key != "inputs"} for row in e.store.rows]
    e.store.path.write_text("".join(json.dumps(row) + "\n" for row in old))
    assert scores(experiment(folder)) == []
    assert scores(experiment(folder, to_read=True)) == [2, 2, 3, 3]
    assert train(folder)[1] == 5 and "as an earlier version wrote them" in caplog.text
    e.store.path.write_text(e.store.path.read_text() + json.dumps(old[-1] | {"auc/x": 99}) + "\n")
    assert scores(experiment(folder, to_read=True)) == [2, 2, 3, 3]


def test_a_report_is_made_where_the_data_are_not(folder):
    train(folder)
    (folder / "rows.jsonl").write_text("one\n")
    e = experiment(folder)
    with Runner(folder / "logs", module="fake_worker") as runner:  # one of four again, on other data
        prepare([e], runner)
        runner.run([(e, e.report_jobs()[0])], "train")
    (folder / "rows.jsonl").unlink()
    shutil.rmtree(folder / "student")
    assert scores(experiment(folder, to_read=True)) == [1]  # the newest row says what the data are


def test_a_second_experiment_in_the_folder_is_refused(folder, capsys):
    argv = ["ab", str(folder / "plan.yaml"), "--output", str(folder / "out")]
    with FolderOwner(experiment(folder).folder):
        assert main(argv) == 2
        assert f"output={folder / 'out/plan'}: belongs to process {os.getpid()}" in capsys.readouterr().err
        assert main([*argv, "--dry_run"]) == 0  # looking is free


def test_a_run_s_folder_that_a_living_process_writes_to_is_not_removed(folder, monkeypatch):
    import kvds.experiment.runner as module

    monkeypatch.setattr(module, "_ORPHAN_SECONDS", 0.0)
    e = experiment(folder)
    job = e.report_jobs()[0]
    run = e.folder / "runs" / job.name
    run.mkdir(parents=True)
    with FolderOwner(run), Runner(folder / "logs", module="fake_worker") as runner:
        runner.run([(e, job)], "train")
        assert run.is_dir()
    [row] = ResultStore(e.folder).rows
    assert row["status"] == "failed" and "belongs to process" in row["error"]
    with pytest.raises(InputError), FolderOwner(run), FolderOwner(run):
        pass


def test_data_of_every_kind_and_a_template_are_inputs(tmp_path):
    (tmp_path / "rows").mkdir()
    files = {name: tmp_path / name for name in ("a.parquet", "rows/part.csv", "chat.jinja")}
    for path in files.values():
        path.write_text("one")
    settings = {
        "model_name": "x/y", "datasets": (str(files["a.parquet"]), f"{tmp_path}/rows@train", "owner/name"),
        "chat_template": str(files["chat.jinja"]),
    }  # fmt: skip
    before = inputs_of(settings, Path)
    for path in files.values():
        path.write_text("two")
        now = inputs_of(settings, Path)
        assert len(now) == len(before) and sum(now[name] != before[name] for name in now) == 1, path
        before = now
