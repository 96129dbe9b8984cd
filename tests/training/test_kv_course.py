"""A KV loss that does not help is let go of: at the start, on the way, the same on all ranks and after a resume."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from kvds.cli import main
from kvds.config import RunConfig
from kvds.data.batches import collate
from kvds.data.encoding import EncodedSample
from kvds.distillation.step_input_builder import StepInputBuilder
from kvds.teacher.cached import CachedTeacher
from kvds.training.kv_course import KVCourse
from kvds.training.run import TrainingRun
from tests.harness.forked_ranks import REPOSITORY, RankServer
from tests.harness.survival_runs import Start, check_equal, cut, make_models, records, starter

FP32 = {"deepspeed_config": REPOSITORY / "ds_configs/zero0_fp32.json", "logging_steps": 1, "save_steps": 0}
OFTEN = "from kvds.training.kv_let_go import KVLetGo; KVLetGo.LEAST_STEPS = 2\n"
NO_MAP = "from kvds.align import ridge; ridge._LEAST_R2 = 2.0\n"  # whatever is fitted is not told from chance
AT_ONCE = OFTEN + "KVLetGo.note = lambda self, agreement: True\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("course")
    make_models(made)
    return made


@pytest.fixture(scope="module")
def start(folder: Path) -> Iterator[Start]:
    with RankServer() as server:
        yield starter(server, folder)


def students(*runs: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(run / "student/model.safetensors") for run in runs]


def test_maps_that_explain_nothing_leave_the_task_alone(
    folder: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    name, settings = "nothing", {**FP32, "map_start": "auto", "save_at_end": "false", "tf32": "true"}
    told = "import torch; torch.set_float32_matmul_precision = lambda precision: print('products:', precision)\n"
    codes, text = start(name, setup=NO_MAP + told, **settings)
    assert "products: high\n" in text and not list((folder / name).rglob("step-*"))
    assert codes == [0] and "the KV loss is let go of: no map explains held-out states" in text, text[-3000:]
    found = records(folder / name)
    assert all(found[0][f"kv/start_r2/{part}"] == 0 for part in ("keys", "values"))
    errors = [value for key, value in found[0].items() if key.startswith("kv/start_attention_output_relative_error/")]
    assert f"attention output of mapped states starts at relative error {errors[0]:.3f}, cosine" in text
    assert errors[0] == pytest.approx(sum(errors[1:]) / len(errors[1:])) and min(errors) > 0.01  # means alone
    assert main(["profile", "--run", str(folder / name), "--fit_rows", "4", "--output", str(folder / "profile")]) == 0
    fit = json.loads((folder / "profile/profile.json").read_text())["fit"]
    for when, measures in fit.items():
        layers = {part: {len(values) for values in found.values()} for part, found in measures.items()}
        assert len(set(map(tuple, layers.values()))) == 1 and "attention_output" in layers, when
        assert all(0.01 < error < 3 for error in measures["attention_output"]["relative_error"])
    assert "attention output: mean cosine on held-out text" in capsys.readouterr().out
    assert {line["kv/weight"] for line in found[1:]} == {0.0}
    assert ["loss/kv" in line for line in found[1:]] == [True] + [False] * 7
    codes, text = start("task", **settings, alignment_mode="none", kv_parts="auto")
    assert codes == [0], text[-3000:]
    ours, task, before = (*students(folder / name, folder / "task"), load_file(folder / "student/model.safetensors"))
    for weight, value in ours.items():
        torch.testing.assert_close(value, task[weight], rtol=0, atol=1e-5)
        assert (value - before[weight]).abs().max() > 1e-3


@pytest.mark.parametrize(("matching", "handoff"), [(True, 0.0), (False, 0.0), (False, 1.0)])
def test_a_cache_is_read_ahead_for_a_loss_that_is_still_there(
    monkeypatch: pytest.MonkeyPatch, matching: bool, handoff: float
) -> None:
    read: list[str] = []
    monkeypatch.setattr(CachedTeacher, "read_ahead", lambda teacher, batch: read.append(batch))
    teachers, inputs = [object.__new__(CachedTeacher)], object.__new__(StepInputBuilder)
    inputs.matching, inputs._cfg = matching, SimpleNamespace(handoff_weight=handoff)  # type: ignore[assignment]
    run = SimpleNamespace(teachers=teachers, inputs=inputs, device=torch.device("cpu"))
    assert TrainingRun._ready(run, ["a", "b"]) == ["a", "b"]  # type: ignore[arg-type, list-item, comparison-overlap]
    assert read == (["a", "b"] if matching or handoff else [])


def test_nothing_is_read_ahead_for_a_run_that_goes_on_without_the_loss() -> None:
    cfg = RunConfig(model_name="m", output_dir="o", kv_weight=1.0, kv_weight_until=0.5)
    inputs = StepInputBuilder(cfg, [], object(), torch.device("cpu"))  # type: ignore[arg-type]
    kv = KVCourse(cfg, None, None, inputs, total_steps=8)  # type: ignore[arg-type]
    asked: list[bool] = []

    @contextlib.contextmanager
    def read_ahead(steps: range, finish: object) -> Iterator[None]:
        asked.append(inputs.reads_keys_and_values)
        yield

    for step in (3, 7):
        run = SimpleNamespace(cfg=cfg, kv=kv, step=step, total_steps=8, _ready=None, _fit=lambda: None, on_policy=None)
        run.loader, run._weights = SimpleNamespace(read_ahead=read_ahead), partial(TrainingRun._weights, run)  # type: ignore[arg-type]
        TrainingRun.fit(run)  # type: ignore[arg-type]
    assert asked == [True, False]


def test_what_was_read_ahead_goes_with_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, dropped = object.__new__(CachedTeacher), list[bool]()
    monkeypatch.setattr(CachedTeacher, "drop_ahead", lambda teacher: dropped.append(inputs.matching))
    cfg = RunConfig(model_name="m", output_dir="o")
    inputs = StepInputBuilder(cfg, [teacher], object(), torch.device("cpu"))  # type: ignore[arg-type]
    batch = collate([EncodedSample([1, 2, 3], [-100, 2, 3], [0, 1, 1])], [0], 0, 1.0, 1.0)
    for inputs.matching in (True, False):
        inputs(batch, match=False)
    assert dropped == [False]


def test_an_empty_map_is_refused_only_by_who_wants_to_keep_it(start: Start) -> None:
    codes, text = start("kept", setup=NO_MAP, **FP32, map_start="auto", kv_let_go="false")
    assert codes != [0] and "the KV loss sends the student no gradient" in text


@pytest.mark.parametrize(("config", "ranks"), [("zero0_fp32", 1), ("zero3_cpu", 2)])
def test_asking_the_task_changes_nothing(folder: Path, start: Start, config: str, ranks: int) -> None:
    settings = {**FP32, "deepspeed_config": REPOSITORY / f"ds_configs/{config}.json", "gradient_accumulation_steps": 1}
    never = OFTEN + "KVLetGo.IN_A_ROW = 99\n"
    for name, setup, wanted in (("asked", never, "true"), ("unasked", "", "false")):
        codes, text = start(f"{config}-{name}", ranks=ranks, setup=setup, kv_let_go=wanted, **settings)
        assert codes == [0] * ranks, text[-3000:]
    found = records(folder / f"{config}-asked")
    asked = [line for line in found if "kv/agreement" in line]
    assert [line["step"] for line in asked] == [2, 4, 6] and all(-1 < line["kv/agreement"] < 1 for line in asked)
    assert [line for line in found if "kv/agreement" not in line] == records(folder / f"{config}-unasked")
    one, other = students(folder / f"{config}-asked", folder / f"{config}-unasked")
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_all_ranks_let_go_together_and_a_resumed_run_goes_on_without(folder: Path, start: Start) -> None:
    settings = {"ranks": 2, "logging_steps": 1}
    codes, text = start("let-go", setup=AT_ONCE, **settings)
    assert codes == [0, 0] and "step 2: the KV loss is let go of: its gradient turned against the task's" in text
    found = records(folder / "let-go")
    weights = {line["step"]: line["kv/weight"] for line in found if "kv/weight" in line}
    assert [step for step, weight in weights.items() if weight > 0] == [1, 2]
    # Once more at a weight of 0, so that no gradient of the aligner is left over; then it is not computed.
    assert [line["step"] for line in found if "loss/kv" in line] == [1, 2, 3]
    cut(folder / "let-go", folder / "let-go-resumed", 3)
    codes, text = start("let-go-resumed", **settings)
    assert codes == [0, 0] and "resumed from step 3" in text
    check_equal(folder / "let-go", folder / "let-go-resumed")


def test_a_balanced_run_resumes_to_the_same_bits(folder: Path, start: Start) -> None:
    settings = {"ranks": 2, "kv_weight": "balance:0.5", "logging_steps": 1, "map_start": "ridge"}
    codes, text = start("balanced", **settings)
    assert codes == [0, 0], text[-3000:]
    found = [line for line in records(folder / "balanced") if "kv/weight" in line]
    for before, line in zip(found, found[1:], strict=False):
        part = 1 - (line["step"] - 1) / 8
        assert line["kv/weight"] == pytest.approx(part * 0.5 * before["loss/task"] / before["loss/kv"], rel=1e-4)
    cut(folder / "balanced", folder / "balanced-resumed", 3)
    codes, text = start("balanced-resumed", **settings)
    assert codes == [0, 0] and "resumed from step 3" in text
    check_equal(folder / "balanced", folder / "balanced-resumed")
