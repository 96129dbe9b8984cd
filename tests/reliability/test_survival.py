"""Runs that are killed, asked to stop, starved of disk and fed with bad numbers end as if nothing had been.

Ranks are forked from one process that has imported everything (``tests/harness/forked_ranks.py``), with the environment
that any launcher gives; ``test_launchers.py`` does it through the launchers themselves.
"""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from kvds.checkpoint.folder import latest_step
from kvds.cli import main
from tests.harness.survival_runs import (
    REPOSITORY,
    at_call,
    at_step,
    check_equal,
    cut,
    make_models,
    records,
    spoil,
    starter,
)

WITH_EVALUATION = {"eval_subset_size": 3, "eval_steps": 4, "max_new_tokens": 4}
FULL_DISK = "resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes}, resource.RLIM_INFINITY))"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("survival")
    make_models(folder)
    return folder


@pytest.fixture(scope="module")
def start(rank_server, folder):
    return starter(rank_server, folder)


def errors(log: str) -> list[str]:
    return [line for line in log.splitlines() if line.startswith("kvds: error: ")]


@pytest.fixture(scope="module")
def straight(start, folder) -> Path:
    """One rank, 8 steps, never interrupted."""
    codes, log = start("straight", report_to="mlflow", **WITH_EVALUATION)
    assert codes == [0], log[-3000:]
    return folder / "straight"


def mlflow_runs(run: Path) -> list:
    client = MlflowClient(tracking_uri=f"sqlite:///{run}/mlflow.db")
    experiment = client.get_experiment_by_name("kvds")
    return client.search_runs([experiment.experiment_id])


def test_killed_preempted_and_damaged_it_ends_in_the_same_bits(start, straight, folder):
    run, settings = folder / "tried", {"report_to": "mlflow", **WITH_EVALUATION}
    codes, _ = start("tried", setup=at_step(5, "os.kill(os.getpid(), signal.SIGKILL)"), **settings)
    assert codes == [-signal.SIGKILL]

    # Step 7 of 8: in the middle of an epoch and of the interval that the next record is a mean over.
    codes, log = start("tried", setup=at_step(6, "os.kill(os.getpid(), signal.SIGTERM)"), **settings)
    assert codes == [85] and "resumed from step 3 of 8" in log and "stopping: SIGTERM arrived" in log
    assert (run / "checkpoints/latest").read_text() == "step-000007"
    assert (run / "preempted").read_text() == "SIGTERM arrived\n"
    first = mlflow_runs(run)[0]  # killed before MLflow was open, the first attempt may have none
    assert first.info.status == "KILLED"

    file = next((run / "checkpoints/step-000007").glob("*optim_states.pt"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    stopped_in_evaluation = at_call("kvds.training.results", "evaluate_model", "os.kill(os.getpid(), signal.SIGUSR1)")
    codes, log = start("tried", setup=stopped_in_evaluation, **settings)
    assert codes == [85] and "stopping: SIGUSR1 arrived" in log and "resumed from step 6 of 8" in log
    assert f"step-000007: not whole, {file.name} does not have the checksum that was written" in log
    assert not (run / "eval.json").exists()

    codes, log = start("tried", **settings)
    assert codes == [0] and "resumed from step 8 of 8" in log
    check_equal(straight, run)
    assert json.loads((run / "eval.json").read_text()) == json.loads((straight / "eval.json").read_text())
    assert not (run / "preempted").exists()

    last = mlflow_runs(run)[0]
    assert last.info.run_id == first.info.run_id and last.info.status == "FINISHED"
    client = MlflowClient(tracking_uri=f"sqlite:///{run}/mlflow.db")
    for key in ("loss/task", "loss/kv", "lr", "eval/all/cross_entropy"):
        mine = sorted((m.step, m.value) for m in client.get_metric_history(last.info.run_id, key))
        assert mine == [(r["step"], r[key]) for r in records(straight) if key in r], key


def test_an_evaluation_on_the_way_that_was_stopped_is_made_up_for(start, straight, folder):
    once = at_call("kvds.training.results", "evaluate_model", "os.kill(os.getpid(), signal.SIGTERM)")
    codes, _ = start("evaluated", setup=once, **WITH_EVALUATION)
    assert codes == [85] and (folder / "evaluated/checkpoints/latest").read_text() == "step-000004"
    assert not any("eval/all/cross_entropy" in record for record in records(folder / "evaluated"))
    codes, _ = start("evaluated", keep_checkpoints=2, **WITH_EVALUATION)
    assert codes == [0]
    assert records(folder / "evaluated") == records(straight)
    assert sorted(p.name for p in (folder / "evaluated/checkpoints").glob("step-*")) == ["step-000006", "step-000008"]


@pytest.mark.parametrize("when", ["calibration", "time"])
def test_asked_to_stop_before_anything_is_saved(when, start, folder):
    if when == "calibration":
        codes, log = start(when, setup=at_step(0, "os.kill(os.getpid(), signal.SIGUSR1)"))
    else:
        codes, log = start(when, max_minutes=0.0001)
        assert "--max_minutes 0.0001 are over" in log
    assert codes == [85]
    assert not list((folder / when).glob("checkpoints/step-*")) and (folder / when / "preempted").exists()


@pytest.fixture(scope="module")
def straight2(start, folder) -> Path:
    """Two ranks, 8 steps of the same samples, never interrupted."""
    codes, log = start("straight2", ranks=2, batch_size=1)
    assert codes == [0, 0], log[-3000:]
    return folder / "straight2"


def test_a_signal_to_one_rank_while_models_are_loaded_ends_both_at_once(start, folder):
    """The other one is elsewhere, and the signalled one hears nothing for as long as it loads."""
    wait = "import time; rank == 1 and os.kill(os.getpid(), signal.SIGTERM); [time.sleep(1) for _ in range(100)]"
    begun = time.monotonic()
    codes, log = start("loading", ranks=2, batch_size=1, setup=at_call("kvds.training.build", "load_model", wait))
    assert codes == [85, 85] and time.monotonic() - begun < 60
    assert log.count("stopped: SIGTERM arrived before the first step") == 1 and "Traceback" not in log
    assert (folder / "loading/preempted").read_text() == "another rank was asked to stop\n"


def test_a_signal_to_one_rank_stops_both_and_a_full_disk_on_the_other_stops_none(start, straight2, folder):
    full = FULL_DISK.format(bytes=4096)
    # From before the save of step 3 until after it, rank 1 has no room; at step 7 it alone gets the signal.
    setup = at_step(2, full, of_rank=1) + at_step(3, FULL_DISK.format(bytes="resource.RLIM_INFINITY"), of_rank=1)
    setup += at_step(6, "os.kill(os.getpid(), signal.SIGUSR1)", of_rank=1)
    codes, log = start("both", ranks=2, batch_size=1, setup=setup)
    assert codes == [85, 85]
    assert "checkpoint step-000003 was not saved" in log and "File too large" in log
    assert "the one before is whole, the run goes on" in log
    checkpoints = folder / "both/checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["latest", "model", "step-000006", "step-000007"]
    codes, log = start("both", ranks=2, batch_size=1)
    assert codes == [0, 0] and "resumed from step 7 of 8" in log
    check_equal(straight2, folder / "both")


def check_close(straight: Path, other: Path) -> None:
    """Same records and same student within rounding."""
    pairs = list(zip(records(straight), records(other), strict=True))
    assert pairs and all(one == pytest.approx(two, rel=1e-5, abs=1e-5) for one, two in pairs)
    weights = [load_file(run / "student/model.safetensors") for run in (straight, other)]
    assert all(torch.allclose(weights[0][name], weights[1][name], rtol=0, atol=1e-5) for name in weights[0])


def test_two_ranks_then_one_then_two_are_as_two_all_the_way(start, straight2, folder):
    run = cut(straight2, folder / "elastic", 3)
    codes, log = start(
        "elastic", batch_size=1, setup=at_call("kvds.training.run", "load_checkpoint", FULL_DISK.format(bytes=8192))
    )
    assert codes == [1] and "Traceback" not in log
    [message] = errors(log)
    assert "step-000003: could not be converted for 1 ranks (a file could not be written whole); the" in message
    assert "make room" in message and latest_step(run) == 3 and not list((run / "checkpoints").glob("universal*"))
    codes, log = start("elastic", batch_size=1, setup=at_step(4, "os.kill(os.getpid(), signal.SIGTERM)"))
    assert codes == [85] and "resumed from step 3 of 8" in log
    assert "saved by 2 ranks, now there are 1: --gradient_accumulation_steps is 4 instead of 2" in log
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "model", "step-000003",
                                                                             "step-000005"]  # fmt: skip
    codes, log = start("elastic", ranks=2, batch_size=1)
    assert codes == [0, 0] and "resumed from step 5 of 8" in log
    check_close(straight2, run)


@pytest.mark.parametrize("stage", [0, 2])
def test_what_no_optimizer_moves_comes_along_to_other_ranks(stage, start, folder):
    """A frozen map and the scales that its start was measured with."""
    settings = {"aligner_update": "frozen", "deepspeed_config": REPOSITORY / f"ds_configs/zero{stage}_fp32.json"}
    settings |= {"batch_size": 1, "gradient_accumulation_steps": 4}
    codes, log = start(f"frozen{stage}", **settings)
    assert codes == [0], log[-3000:]
    cut(folder / f"frozen{stage}", folder / f"frozen{stage} on 2", 3)
    codes, log = start(f"frozen{stage} on 2", ranks=2, **settings)
    assert codes == [0, 0] and "resumed from step 3 of 8" in log
    check_close(folder / f"frozen{stage}", folder / f"frozen{stage} on 2")


def test_three_full_disks_in_a_row_stop_the_run(start, folder):
    codes, log = start("full", setup=at_step(4, FULL_DISK.format(bytes=8192)), save_steps=1)
    assert codes == [1] and "Traceback" not in log
    [message] = errors(log)
    assert "3 checkpoints in a row could not be saved, the last at step 7" in message
    assert "File too large (make room, then start again with --resume auto)" in message
    assert (folder / "full/checkpoints/latest").read_text() == "step-000004"
    assert not list((folder / "full/checkpoints").glob("*.unfinished"))
    codes, log = start("full", save_steps=3)
    assert codes == [0] and "resumed from step 4 of 8" in log


def test_numbers_that_are_not_finite_on_one_rank_change_no_weight(start, straight2, folder):
    codes, log = start("bad", ranks=2, batch_size=1, setup=spoil(range(2, 99), "+ inf", of_rank=1), max_bad_steps=4)
    assert codes == [1, 1] and "Traceback" not in log
    for step in (3, 4, 5, 6):
        assert f"step {step}: loss or gradient is not finite; left out on all ranks ({step - 2} so far)" in log
    [message] = errors(log)
    assert "4 steps in a row had a loss or gradient that is not finite, the last was step 6" in message
    assert "rank 1" not in message
    bad = [record["bad_steps"] for record in records(folder / "bad") if "bad_steps" in record]
    assert bad == [1, 2, 3]
    dumps = [json.loads(p.read_text()) for p in sorted((folder / "bad/bad_steps").glob("step-000006-rank*.json"))]
    assert [dump["rank"] for dump in dumps] == [0, 1] and dumps[0]["weight_norms"] == dumps[1]["weight_norms"]
    parts = [[part["metrics"]["loss/task"] for part in dump["micro_batches"]] for dump in dumps]
    assert parts[1] == ["inf", "inf"] and all(isinstance(value, float) for value in parts[0])
    ids = [i for dump in dumps for part in dump["micro_batches"] for i in part["sample_ids"]]
    assert len(ids) == 4 and len(set(ids)) == 4
    assert "student.model.layers.0" in dumps[0]["weight_norms"]
    # The checkpoint of step 3, whose step was left out, holds the weights of step 2.
    for run, step, settings in (("bad", 3, {}), ("two", 2, {"max_steps": 8, "save_steps": 2})):
        if settings:
            stop = at_step(2, "os.kill(os.getpid(), signal.SIGTERM)")
            codes, _ = start(run, ranks=2, batch_size=1, setup=stop, **settings)
            assert codes == [85, 85]
        command = ["export", "--run", str(folder / run), "--step", str(step), "--output", str(folder / f"out-{run}")]
        assert main(command) == 0
    weights = [load_file(folder / f"out-{run}/student/model.safetensors") for run in ("bad", "two")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_few_bad_gradients_are_survived(start, folder):
    codes, log = start("few", setup=spoil(range(2, 4), "* nan", of_rank=0), max_bad_steps=3)
    assert codes == [0], log[-3000:]
    assert [r["bad_steps"] for r in records(folder / "few") if "bad_steps" in r] == [1, 2]
    weights = load_file(folder / "few/student/model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_without_zero_a_bad_step_is_left_out_as_well(start, folder):
    """Stage 0 steps with a plain optimizer, which an infinite loss of rank 1 would make write NaN into all weights."""
    stage0 = REPOSITORY / "ds_configs/zero0_fp32.json"
    setup = spoil(range(4, 99), "+ inf", of_rank=1)
    settings = {"deepspeed_config": stage0, "max_bad_steps": 99, "save_steps": 2, "batch_size": 1}
    codes, log = start("stage0", ranks=2, setup=setup, **settings)
    assert codes == [0, 0], log[-3000:]
    assert [r["bad_steps"] for r in records(folder / "stage0") if "bad_steps" in r] == [1, 2, 3, 4]
    half, whole = (folder / f"stage0/checkpoints/step-00000{n}/mp_rank_00_model_states.pt" for n in (4, 8))
    weights = [torch.load(file, weights_only=False)["module"] for file in (half, whole)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    start_weights = load_file(folder / "student/model.safetensors")
    assert max(float((start_weights[n] - weights[0][f"student.{n}"]).abs().max()) for n in start_weights) > 1e-3


def test_a_pretrained_student_trains_in_bf16_under_zero3(start, folder):
    """Its weights are loaded in shards, the map's are not, and DeepSpeed wants one dtype."""
    bf16 = REPOSITORY / "ds_configs/zero3_cpu_bf16.json"
    codes, log = start("bf16", deepspeed_config=bf16, max_steps=2, save_steps=0, logging_steps=1)
    assert codes == [0], log[-3000:]
    first, second = (record["loss/kv"] for record in records(folder / "bf16") if record["step"])
    assert second != first
    assert load_file(folder / "bf16/student/model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_weights_that_are_not_finite_are_never_saved(start, folder):
    poison = "next(p for p in loader.run.engine.module.parameters()).ds_tensor.fill_(float('nan'))"
    setup = "import kvds.training.run\n" + at_step(4, poison) + (
        "def fit(run, ask=kvds.training.run.TrainingRun.fit):\n    run.loader.run = run\n    ask(run)\n"
        "kvds.training.run.TrainingRun.fit = fit\n"
    )  # fmt: skip
    codes, log = start("poisoned", setup=setup, max_bad_steps=100)
    assert codes == [1] and "Traceback" not in log
    [message] = errors(log)
    assert "weights of the student or the map are not finite; no checkpoint was written" in message
    assert (folder / "poisoned/checkpoints/latest").read_text() == "step-000003"


DEATHS = {
    "exception": (1, "raise RuntimeError('the cable is loose')", "rank 1 ended with RuntimeError: the cable is loose"),
    "memory": (
        1,
        "__import__('torch').empty(1 << 60)",
        "rank 1 ended with RuntimeError: ",
    ),
    "kill": (1, "os.kill(os.getpid(), signal.SIGKILL)", "rank 1 is dead (no sign of life for "),
    "exit": (1, "os._exit(0)", "rank 1 is dead (no sign of life for "),
    "hang": (1, "os.kill(os.getpid(), signal.SIGSTOP)", "rank 1 hangs (no sign of life for "),
    "first rank killed": (0, "os.kill(os.getpid(), signal.SIGKILL)", "rank 0 is dead (its store does not answer"),
    "first rank hangs": (0, "os.kill(os.getpid(), signal.SIGSTOP)", "rank 0 hangs (its store does not answer"),
}


@pytest.mark.parametrize("kind", DEATHS)
def test_a_rank_that_dies_or_hangs_ends_all_with_one_message(kind, start, folder):
    culprit, action, expected = DEATHS[kind]
    begun = time.monotonic()
    codes, log = start(
        f"death {kind}", ranks=2, batch_size=1, setup=at_step(5, action, of_rank=culprit), rank_timeout=20
    )
    assert time.monotonic() - begun < 150
    assert codes[1 - culprit] == 1 and None not in codes, log[-3000:]  # None: still there
    [message] = errors(log)
    assert message.startswith(f"kvds: error: {expected}"), message
    if kind in ("kill", "hang", "first rank killed", "first rank hangs"):
        assert codes[culprit] == -signal.SIGKILL and f"on {os.uname().nodename})" in message
        assert message.endswith("the last checkpoint is whole (start again with --resume auto)")
    assert (folder / f"death {kind}/checkpoints/latest").read_text() == "step-000003"
