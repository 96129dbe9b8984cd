"""A run's log: what rank 0 writes, what the others do not, and that both read the steps left out."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient
from torch import nn
from tqdm import tqdm

from kvds.config.recipe import parse_run_config
from kvds.training.run_log import RunLog, lines_above_bars, parameter_count

EVERY = {"cross_entropy": 1.25, "exact_match": 0.5, "cut_completions": 1, "samples": 4, "judged": 4}
RECORDED = {f"eval/all/{name}": value for name, value in EVERY.items()}


class LeftOut:
    """Stands for the steps that were left out: those given, in one go."""

    def __init__(self, *told: tuple[int, int]) -> None:
        self.told, self.waits = list(told), list[bool]()

    def read(self, *, wait: bool = True) -> Iterator[tuple[int, int]]:
        self.waits.append(wait)
        while self.told:
            yield self.told.pop(0)


def log_of(folder: Path, *, rank: int = 0, nonfinite_steps: Any = None, aligner: Any = None, **flags: Any) -> RunLog:
    folder.mkdir(exist_ok=True)
    flags = {"model_name": "m", "output_dir": folder, "report_to": "none", **flags}
    cfg = parse_run_config([token for key, value in flags.items() for token in (f"--{key}", str(value))])
    module: Any = SimpleNamespace(student=nn.Linear(3, 2), aligner=aligner)
    return RunLog(cfg, module, nonfinite_steps or LeftOut(), rank=rank, world_size=2, kv_weight=0.125, total_steps=9)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_parameters_are_counted_where_zero3_has_them() -> None:
    module = nn.Linear(3, 2)
    assert parameter_count(None) == 0 and parameter_count(module) == 8
    module.weight.ds_numel = 600  # type: ignore[assignment]  # this rank's share lies elsewhere
    assert parameter_count(module) == 602


def test_what_fitted_maps_start_with_is_one_line_a_part_and_recorded_at_step_0(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO, logger="kvds")
    log_of(tmp_path / "one").record_starts([{"value": [0.5, 0.25]}])
    assert records(tmp_path / "one") == [
        {
            "step": 0,
            "kv/start_r2/values": 0.375,
            "kv/start_r2/values_layer_00": 0.5,
            "kv/start_r2/values_layer_01": 0.25,
        }
    ]
    assert "maps of values start at held-out R² 0.375, by layer: 0.50 0.25" in caplog.messages
    log_of(tmp_path / "two").record_starts([{"hidden_state": [0.5]}, {"hidden_state": [0.0]}])
    assert records(tmp_path / "two")[0]["kv/start_r2/teacher_2_hidden_states_layer_00"] == 0
    assert "maps of teacher 1 hidden states start at held-out R² 0.500, by layer: 0.50" in caplog.messages
    log_of(tmp_path / "out").record_starts([], [{"relative_error": [0.5, 0.25], "cosine": [0.75, 1.0]}])
    expected = {"relative_error": (0.375, 0.5, 0.25), "cosine": (0.875, 0.75, 1.0)}
    assert records(tmp_path / "out") == [
        {"step": 0} | {
            f"kv/start_attention_output_{measure}/{name}": value
            for measure, values in expected.items()
            for name, value in zip(("mean", "layer_00", "layer_01"), values, strict=True)
        }
    ]  # fmt: skip
    line = "attention output of mapped states starts at relative error 0.375, cosine 0.875, by layer: 0.50 0.25"
    assert line in caplog.messages
    for nothing in ([], [{}]):
        log_of(tmp_path / f"none{len(nothing)}").record_starts(nothing, nothing)
        assert records(tmp_path / f"none{len(nothing)}") == []


def test_records_and_provenance_are_rank_zeros(tmp_path: Path) -> None:
    for rank in (0, 1):
        run_log = log_of(tmp_path / str(rank), rank=rank, nonfinite_steps=LeftOut((3, 1), (4, 2)))
        run_log.record(2, {"loss/task": 0.5})
        run_log.record_nonfinite_steps(wait=False)
        run_log.record_evaluation(4, {"all": EVERY, "gsm8k": {"exact_match": 0.25}})
        run_log.warn(4, {"kv_norm": "fell"})
        run_log.conclude()
        run_log.close("FINISHED")
        assert run_log.mlflow_run_id is None
    assert records(tmp_path / "0") == [
        {"step": 2, "loss/task": 0.5},
        {"step": 3, "bad_steps": 1},
        {"step": 4, "bad_steps": 2},
        {"step": 4, **RECORDED, "eval/gsm8k/exact_match": 0.25},
    ]
    provenance = json.loads((tmp_path / "0/provenance.json").read_text())
    assert provenance["world_size"] == "2" and provenance["kv_weight"] == "0.125" and "torch" in provenance
    assert list((tmp_path / "1").iterdir()) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_reads_the_steps_left_out_to_their_end(tmp_path: Path, rank: int) -> None:
    """What is read may end the run, and must end it on all ranks."""
    left_out = LeftOut((3, 1), (4, 2))
    run_log = log_of(tmp_path, rank=rank, nonfinite_steps=left_out)
    run_log.record_nonfinite_steps(wait=False)
    run_log.record_nonfinite_steps()
    assert left_out.told == [] and left_out.waits == [False, True]
    run_log.close("FINISHED")


@pytest.mark.parametrize("draw_report", [True, False])
def test_a_report_is_drawn_on_request(tmp_path: Path, draw_report: bool) -> None:
    run_log = log_of(tmp_path)
    for step in (1, 2):
        run_log.record(step, {"loss/task": 1.0 / step, "loss/total": 1.0 / step})
    (tmp_path / "config.yaml").write_text("output_dir: x\n")
    run_log.conclude(draw_report=draw_report)
    run_log.close("FINISHED")
    assert (tmp_path / "report/report.md").exists() == draw_report


def test_mlflow_gets_params_tags_warnings_and_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kvds")
    run_log = log_of(tmp_path / "run", aligner=nn.Linear(4, 1, bias=False), report_to="mlflow", experiment_name="tried")
    run_log.warn(5, {"kv_norm": "the norm fell (a smaller --kv_weight)"})
    run_log.conclude(draw_report=False)
    run_log.close("KILLED")
    client = MlflowClient(f"sqlite:///{tmp_path / 'run/mlflow.db'}")
    run = client.get_run(run_log.mlflow_run_id or "")
    assert run.info.status == "KILLED" and run.info.run_name == "run"
    assert client.get_experiment(run.info.experiment_id).name == "tried"
    assert run.data.tags["warning/kv_norm"] == "step 5: the norm fell (a smaller --kv_weight)"
    assert run.data.tags["world_size"] == "2" and run.data.tags["kv_weight"] == "0.125"
    assert run.data.params["parameters_student"] == "8" and run.data.params["parameters_aligner"] == "4"
    lines = [record.getMessage() for record in caplog.records]
    assert "step 5: the norm fell (a smaller --kv_weight)" in lines
    assert any("kv_weight 0.125 | student 8 parameters, aligner 4 | 9 steps of" in line for line in lines)
    assert lines[-1].startswith("look through them: mlflow ui") and "mlflow.db" in lines[-1]


def test_lines_and_warnings_stand_above_a_bar() -> None:
    """A bar is wiped, the line written, the bar drawn again: each line begins at the left."""
    out, root = io.StringIO(), logging.getLogger()
    before = root.handlers
    try:
        with contextlib.redirect_stderr(out):
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(name)s %(message)s"))
            root.handlers = [handler]
            with lines_above_bars(), tqdm(total=3, mininterval=0) as bar:
                bar.update()
                logging.getLogger("kvds").warning("step 1: it fell")
                warnings.warn("an old name", stacklevel=1)
                bar.update()
            assert root.handlers == [handler]
    finally:
        root.handlers = before
    text = out.getvalue()
    assert "1/3" in text
    for line in ("kvds step 1: it fell", "py.warnings "):
        at = text.index(line)
        assert text[at - 1] in "\r\n", repr(text[max(0, at - 40) : at + 40])


def test_an_evaluation_on_the_way_is_told_and_recorded(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO, logger="kvds")
    log_of(tmp_path / "run").record_evaluation(3, {"all": EVERY})
    assert (
        "step 3 of 9, held-out: cross entropy 1.2500, exact match 50.0 %, 1 of 4 completions cut before" in caplog.text
    )
    assert records(tmp_path / "run") == [{"step": 3, **RECORDED}]
