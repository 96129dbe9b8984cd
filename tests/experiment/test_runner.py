"""Running an experiment: dealing out jobs, results that survive, failures, the time limit, a real tiny experiment
inside a worker.
"""

import csv
import json
import threading
import time
from pathlib import Path

import psutil
import pytest
from matplotlib.image import imread
from mlflow import MlflowClient

from kvds.cli import main
from kvds.errors import InputError
from kvds.experiment.plan import load_plan, load_tuned, save_tuned
from kvds.experiment.results import ResultStore
from kvds.experiment.runner import Experiment, Runner, choose
from kvds.experiment.tracking import mean_curves, means, telling_numbers, track_experiment

REPOSITORY = Path(__file__).resolve().parents[2]

# A worker that trains nothing: its score is the learning rate plus the seed; lr 66 fails, lr 77 dies, lr 88 starts
# something and sleeps, lr 99 says that it was asked to stop.
FAKE_WORKER = """
import json, pathlib, subprocess, sys, time
for line in sys.stdin:
    job = json.loads(line)
    settings = job["settings"]
    folder = pathlib.Path(settings["output_dir"])
    folder.mkdir(parents=True)
    (folder / "student").mkdir()
    (folder / "student" / "config.json").write_text(settings.get("student_name", ""))
    (folder / "checkpoints").mkdir()
    lr = settings["lr"]
    if lr == 77: sys.exit(9)
    if lr == 99: sys.exit(85)
    if lr == 88: (folder / "child").write_text(str(subprocess.Popen(["sleep", "60"]).pid)); time.sleep(60)
    answer = {"status": "failed", "error": "InputError: no"} if lr == 66 else {
        "status": "finished", "auc/x": lr + settings["seed"], "student": settings.get("student_name"),
        "checkpoint": settings["save_at_end"]}
    print(json.dumps(answer), flush=True)
"""

PLAN = """
settings: {model_name: gpt2}
primary: auc/x
seeds: [0, 1]
tuning_seeds: [5]
baseline: a
arms:
  a: {tune: [{lr: 1.0}, {lr: 3.0}, {lr: 2.0}]}
  b: {student_name: "prepared:start", tune: [{lr: 4.0}, {lr: 66}, {lr: 2.5}]}
prepare: {start: {lr: 0.5, student_name: first}}
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    (tmp_path / "fake_worker.py").write_text(FAKE_WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def experiment(folder: Path, text: str = PLAN) -> Experiment:
    (folder / "plan.yaml").write_text(text)
    return Experiment(load_plan(folder / "plan.yaml"), folder / "out" / "plan")


def runner(folder: Path, **options) -> Runner:
    return Runner(folder / "logs", module="fake_worker", **options)


def lives(pid: int) -> bool:
    """Whether a process that was killed is not yet gone; a moment is given to it."""
    for _ in range(50):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie":
            return False
        time.sleep(0.02)
    return True


def test_finished_runs_are_never_run_twice_and_failed_ones_are(fake):
    e = experiment(fake)
    with runner(fake, workers=2) as r:
        assert r.run([(e, job) for job in e.plan.preparation_jobs()], "prepare")
        assert r.run([(e, job) for job in e.plan.tuning_jobs()], "tune")
    lines = e.store.path.read_text().splitlines()
    assert len(lines) == 7
    assert [row["error"] for row in e.store.failed(e.plan.tuning_jobs())] == ["InputError: no"]
    # The student of a prepared run is where arms look for it; of the rest nothing stays.
    assert (e.prepared("start") / "config.json").read_text() == "first"
    assert not list((e.folder / "runs").iterdir()) or {p.name for p in (e.folder / "runs").iterdir()} == {
        "tune-b-value1-seed5"
    }
    row = next(row for row in e.store.rows if row["arm"] == "b" and row["status"] == "finished")
    assert row["student"] == str(e.prepared("start"))
    # The third value of a failed arm is the worst, the best of each arm is chosen.
    assert choose(e.plan, e.store, e.plan.tuning_jobs()) == ({"a": {"lr": 3.0}, "b": {"lr": 4.0}}, 1)
    e.save_choice([job for job in e.plan.tuning_jobs() if job.arm == "b"])
    assert load_tuned(e.folder / "tuned.yaml") == {"b": {"lr": 4.0}}
    e.save_choice([job for job in e.plan.tuning_jobs() if job.arm == "a"])
    assert load_tuned(e.folder / "tuned.yaml") == {"b": {"lr": 4.0}, "a": {"lr": 3.0}}
    with pytest.raises(InputError, match="no tuning seed is complete"):
        choose(e.plan, ResultStore(fake / "other"), e.plan.tuning_jobs())
    again = experiment(fake)
    with runner(fake) as r:
        assert r.run([(again, job) for job in again.plan.tuning_jobs()], "tune")
    assert [json.loads(line)["variant"] for line in e.store.path.read_text().splitlines()[7:]] == [1]


def test_a_list_of_what_is_to_be_done_knows_what_tuning_chose(fake, capsys):
    e = experiment(fake)
    argv = ["ab", str(fake / "plan.yaml"), "--output", str(e.folder.parent), "--dry_run"]
    assert main(argv) == 2 and "no tuned value" in capsys.readouterr().err
    assert main([*argv, "--tune"]) == 0 and "11 of 11 runs" in capsys.readouterr().out
    chosen = {"a": {"lr": 1.0}, "b": {"lr": 2.0}}
    save_tuned(e.folder / "tuned.yaml", chosen, "chosen")
    with runner(fake) as r:
        r.run([(e, e.plan.report_jobs(chosen)[0])], "train")
    assert main([*argv, "--tune"]) == 0
    out = capsys.readouterr().out
    assert "done   plan/report-a-seed0\n" in out and "10 of 11 runs" in out
    assert main(argv) == 0 and "4 of 5 runs" in capsys.readouterr().out


def test_changed_settings_make_another_run(fake):
    e = experiment(fake)
    chosen = {"a": {"lr": 1.0}, "b": {"lr": 2.0}}
    with runner(fake) as r:
        r.run([(e, job) for job in e.plan.report_jobs(chosen)], "train")
        r.run([(e, job) for job in e.plan.report_jobs({**chosen, "a": {"lr": 2.0}})], "train")
    assert [(row["arm"], row["auc/x"]) for row in e.store.rows] == [
        ("a", 1.0), ("b", 2.0), ("a", 2.0), ("b", 3.0), ("a", 2.0), ("a", 3.0),
    ]  # fmt: skip
    assert sorted(row["auc/x"] for row in e.store.finished(e.plan.report_jobs(chosen)).values()) == [1.0, 2.0, 2.0, 3.0]


def test_a_worker_that_dies_fails_its_job_alone(fake):
    e = experiment(fake)
    jobs = e.plan.report_jobs({"a": {"lr": 77}, "b": {"lr": 2.0}})
    with runner(fake) as r:
        assert r.run([(e, job) for job in jobs], "train")
    assert [(row["arm"], row["status"]) for row in e.store.rows] == [
        ("a", "failed"), ("b", "finished"), ("a", "failed"), ("b", "finished"),
    ]  # fmt: skip
    assert "the worker ended with status 9" in e.store.rows[0]["error"]


def test_the_time_limit_keeps_what_has_finished(fake):
    e = experiment(fake)
    jobs = e.plan.report_jobs({"a": {"lr": 1.0}, "b": {"lr": 88}})
    begun = time.monotonic()
    with runner(fake, workers=2, deadline=begun + 3) as r:
        assert not r.run([(e, job) for job in jobs], "train")
    assert time.monotonic() - begun < 20
    assert {(row["arm"], row["seed"]) for row in e.store.rows} == {("a", 0), ("a", 1)} or len(e.store.rows) == 1
    for file in e.folder.rglob("child"):  # what a worker has started ends with it
        assert not lives(int(file.read_text()))


def test_tuning_under_a_time_limit_ends_as_a_run_does(fake, caplog):
    text = PLAN.replace("gpt2", "launch/quickstart_teacher, max_length: 64").replace(
        'student_name: "prepared:start", ', ""
    )
    e = experiment(fake, text.split("prepare:")[0])
    argv = ["ab", str(fake / "plan.yaml"), "--output", str(e.folder.parent), "--tune", "--in_process"]
    assert main([*argv, "--max_minutes", "1e-9"]) == 1
    assert "stopped early" in caplog.text and "expected one at least" not in caplog.text
    assert not (e.folder / "tuned.yaml").exists()
    jobs = e.plan.tuning_jobs()
    with runner(fake) as r:
        assert r.run([(e, job) for job in jobs[:-1]], "tune")
        e.save_choice(jobs, in_time=False)
        assert not (e.folder / "tuned.yaml").exists()  # a value has not been tried
        with pytest.raises(InputError, match="no tuning seed is complete"):
            e.save_choice(jobs)
        assert r.run([(e, jobs[-1])], "tune")
    e.save_choice(jobs, in_time=False)
    assert load_tuned(e.folder / "tuned.yaml") == {"a": {"lr": 3.0}, "b": {"lr": 4.0}}


def test_a_run_that_was_asked_to_stop_is_neither_finished_nor_failed(fake):
    e = experiment(fake)
    jobs = e.plan.report_jobs({"a": {"lr": 99}, "b": {"lr": 2.0}})
    with runner(fake) as r:
        assert not r.run([(e, job) for job in jobs], "train")
    assert [(row["arm"], row["seed"], row["status"]) for row in e.store.rows] == [
        ("b", 0, "finished"), ("b", 1, "finished"),
    ]  # fmt: skip


def test_leaving_ends_what_is_running_and_records_nothing_of_it(fake):
    e = experiment(fake)
    jobs = e.plan.report_jobs({"a": {"lr": 88}, "b": {"lr": 88}})
    with pytest.raises(KeyboardInterrupt), runner(fake, workers=2) as r:
        threading.Thread(target=r.run, args=([(e, job) for job in jobs], "train"), daemon=True).start()
        deadline = time.monotonic() + 30
        while len(children := [file for file in e.folder.rglob("child") if file.read_text()]) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        raise KeyboardInterrupt
    assert e.store.rows == []
    assert not any(lives(int(file.read_text())) for file in children)


@pytest.mark.parametrize("keep", ["metrics", "student", "all"])
def test_what_is_kept_of_a_run(fake, keep):
    e = experiment(fake)
    job = e.plan.report_jobs({"a": {"lr": 1.0}, "b": {"lr": 1.0}})[0]
    with runner(fake, keep=keep) as r:
        r.run([(e, job)], "train")
    found = sorted(path.name for path in (e.folder / "runs").rglob("*/*") if path.is_dir())
    assert found == {"metrics": [], "student": ["student"], "all": ["checkpoints", "student"]}[keep]
    assert e.store.rows[0]["checkpoint"] == (keep == "all")  # none is written to be deleted at once


def test_half_a_line_of_a_killed_process_is_cut_off(tmp_path):
    row = {"phase": "report", "arm": "a", "seed": 0, "variant": 0, "config_hash": "x", "status": "finished"}
    ResultStore(tmp_path).append({**row, "auc/x": float("nan")})
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"phase": "rep')
    store = ResultStore(tmp_path)
    store.append({**row, "seed": 1})
    assert [r["seed"] for r in ResultStore(tmp_path).rows] == [0, 1] and ResultStore(tmp_path).rows[0]["auc/x"] is None
    (tmp_path / "runs.jsonl").write_text('{"arm": "a"}\n')
    with pytest.raises(InputError, match="runs.jsonl:1: expected a line that kvds ab writes"):
        ResultStore(tmp_path)


def test_two_arms_two_seeds_for_real(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    (tmp_path / "tiny.yaml").write_text(
        f"""
base: {REPOSITORY}/launch/recipes/quickstart.yaml
settings: {{batch_size: 4, max_steps: 4, eval_steps: 2, logging_steps: 1, eval_subset_size: 8, max_new_tokens: 4,
           synthetic_problems: 16, calibration_batches: 1, deepspeed_config: ds_configs/zero0_fp32.json}}
primary: auc/cross_entropy
better: lower
seeds: 0-1
baseline: task_only
arms:
  task_only: {{alignment_mode: none}}
  shuffled: {{teacher_kv: shuffled, kv_weight: 1.0}}
"""
    )
    output = tmp_path / "out"
    argv = ["ab", str(tmp_path / "tiny.yaml"), "--output", str(output), "--devices", "cpu", "--in_process"]
    assert main([*argv, "--dry_run"]) == 0
    assert "4 of 4 runs are still to be done" in capsys.readouterr().out
    assert main(argv) == 0, (output / "logs" / "worker-0.log").read_text()[-2000:]
    rows = list(csv.DictReader((output / "tiny" / "runs.csv").open()))
    assert [(row["arm"], row["seed"]) for row in rows] == [(a, s) for a in ("task_only", "shuffled") for s in "01"]
    curves = list(csv.DictReader((output / "tiny" / "curves.csv").open()))
    for row in rows:
        points = [float(p["cross_entropy"]) for p in curves if (p["arm"], p["seed"]) == (row["arm"], row["seed"])]
        assert len(points) == 2 and float(row["auc/cross_entropy"]) == pytest.approx(sum(points) / 2, rel=1e-4)
        assert float(row["final/cross_entropy"]) == pytest.approx(points[-1], rel=1e-4)
        assert float(row["train_cpu_seconds"]) > 0 and (int(row["parameters/aligner"]) > 0) == (
            row["arm"] == "shuffled"
        )
    # Seeds differ, so data and weights do; the arms of a seed start from the same student.
    assert len({row["auc/cross_entropy"] for row in rows}) == 4
    report = (output / "tiny" / "report.md").read_text()
    assert "shuffled − task_only | 2 |" in report
    for name in ("arms.png", "learning_curves.png"):
        assert imread(output / "tiny" / name).std() > 0.02
    client = MlflowClient(f"sqlite:///{output}/tiny/mlflow.db")
    parent = track_experiment(load_plan(tmp_path / "tiny.yaml"), ResultStore(output / "tiny").rows, output / "tiny")
    runs = client.search_runs(["1"], f"tags.experiment_run = '{parent}'")
    arms = {run.info.run_id: run for run in runs if "mlflow.parentRunId" not in run.data.tags}
    children = [run for run in runs if run.info.run_id not in arms]
    assert client.get_experiment("1").tags["mlflow.experimentKind"] == "custom_model_development"
    assert {run.data.params["arm"] for run in arms.values()} == {row["arm"] for row in rows} and len(arms) == 2
    for child in children:  # an arm has the means of what is nested in it
        arm = arms[child.data.tags["mlflow.parentRunId"]]
        own = [c for c in children if c.data.tags["mlflow.parentRunId"] == arm.info.run_id]
        for name, value in arm.data.metrics.items():
            assert value == pytest.approx(sum(c.data.metrics[name] for c in own) / 2, rel=1e-6)
        assert arm.data.params["arm"] == child.data.params["arm"] and "mlflow.note.content" in child.data.tags
    assert {(c.data.params["arm"], c.data.params["seed"]) for c in children} == {(r["arm"], r["seed"]) for r in rows}
    child = next(c for c in children if c.info.run_name == "shuffled-seed1")
    [row] = [r for r in rows if (r["arm"], r["seed"]) == ("shuffled", "1")]
    assert child.data.metrics["auc/cross_entropy"] == pytest.approx(float(row["auc/cross_entropy"]), rel=1e-4)
    assert [m.step for m in client.get_metric_history(child.info.run_id, "curve/cross_entropy")] == [2, 4]
    assert {a.path for a in client.list_artifacts(parent)} >= {"report.md", "runs.csv", "arms.png"}
    before = (output / "tiny" / "runs.jsonl").read_text()
    capsys.readouterr()
    assert main(argv) == 0 and (output / "tiny" / "runs.jsonl").read_text() == before
    assert main([*argv, "--dry_run"]) == 0 and "0 of 4 runs" in capsys.readouterr().out


def test_numbers_that_tell_nothing_apart_are_no_metrics():
    rows = [
        {"arm": "a", "seed": 0, "final/cross_entropy": 2.0, "same": 7.0, "auc": 1.0, "again": 1.0, "flag": True},
        {"arm": "b", "seed": 1, "final/cross_entropy": 1.0, "same": 7.0, "auc": 4.0, "again": 4.0, "flag": False},
    ]
    assert telling_numbers(rows) == ["final/cross_entropy", "auc"]
    assert telling_numbers(rows[:1]) == ["final/cross_entropy", "same", "auc", "again"]
    assert means(rows, ["auc", "gone"]) == {"auc": 2.5}
    curves = [
        {"curves": {"loss": [[1, 2, 3], [4.0, 3.0, None]], "one": [[1], [1.0]]}},
        {"curves": {"loss": [[2, 1], [5.0, 2.0]]}},
    ]
    assert mean_curves(curves) == {"loss": {1: 3.0, 2: 4.0}}
