"""The distiller's losses and gradients are those of a run's step, called or watched, in whatever wrapper."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvds import AlignmentSettings, KVDistiller
from kvds.align import build_aligner
from kvds.config import RunConfig
from kvds.data.batches import TokenBatch
from kvds.distillation.module import DistillationModule
from kvds.distillation.step import LossWeights
from kvds.distillation.step_input_builder import StepInputBuilder
from kvds.errors import InputError
from kvds.kv import KVShape
from kvds.teacher.teacher import Teacher
from kvds.teacher.token_selection import TokenChoice
from kvds.training.calibration import calibrate_aligner
from tests.harness.distillation_setup import CPU, batch_of, gpt2, qwen2, samples
from tests.kv.test_wrapped import WRAPPERS

SETTINGS: dict[str, dict[str, Any]] = {
    "structured": {"kv_parts": "kv"},
    "rkv": {"kv_method": "rkv", "kv_budget": 4, "kv_parts": "v"},
    "flat": {"alignment_mode": "flat", "kv_rope": "post"},
    "hidden, frozen": {"alignment_mode": "hidden", "aligner_update": "frozen"},
    "attention outputs": {"alignment_mode": "hidden", "hidden_at": "attention"},
    "relation": {"alignment_mode": "relation"},
}


pytestmark = pytest.mark.usefixtures("alone")


def models(dtype: torch.dtype = torch.float32, make: Any = qwen2) -> tuple[nn.Module, nn.Module]:
    return make(1, 2, 16).to(dtype), make(2, 3, 24).to(dtype)


def the_batch() -> TokenBatch:
    rows = list(samples())
    return batch_of(rows, (float(sum(row.label_count for row in rows)), 1.0))


def inputs() -> dict[str, Tensor]:
    batch = the_batch()
    names = ("input_ids", "attention_mask", "labels", "segment_ids")
    return {name: getattr(batch, name) for name in names}


def product_step(
    settings: AlignmentSettings, dtype: torch.dtype, make: Any, weight: float, kd: float
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """What a run computes: its teacher, selection, calibration, module; loss, metrics and gradients of one batch."""
    student, teacher_model = models(dtype, make)
    cfg = RunConfig(
        model_name="x", output_dir="x", batch_size=4, compile="off",
        **{name: getattr(settings, name) for name in vars(settings)} | {"kv_weight": weight, "logit_kd_weight": kd},
    )  # fmt: skip
    aligner = build_aligner(KVShape.from_config(student.config), KVShape.from_config(teacher_model.config), cfg, 0)
    choice = TokenChoice(cfg, 0)
    teacher = Teacher(
        teacher_model, device=CPU, rope=cfg.kv_rope, reads=aligner.teacher_reads, wants_hidden=kd > 0,
        observe=choice.observing,
    )  # fmt: skip
    calibrate_aligner(aligner, student, lambda: [the_batch()], partial(choice.with_teacher, teacher), rope=cfg.kv_rope)
    module = DistillationModule(student, aligner, rope=cfg.kv_rope, kd_vocab_size=50).train()
    step = StepInputBuilder(cfg, [teacher], choice, CPU)(the_batch(), LossWeights(1.0, weight, kd))
    assert step.selection is not None
    step = replace(step, batch=replace(step.batch, position_normalizer=float(step.selection.mask.sum())))
    loss, metrics = module(step)
    loss.backward()
    return loss.detach(), metrics, gradients(module)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def distiller_of(settings: AlignmentSettings, dtype: torch.dtype = torch.float32, make: Any = qwen2) -> KVDistiller:
    distiller = KVDistiller(*models(dtype, make), settings)
    distiller.fit([inputs()])
    return distiller.train()


def same(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert found.keys() == expected.keys() and found
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    tolerance = 1e-10 if dtype == torch.float64 else 2e-6
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=10 * tolerance, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_call_and_a_watched_forward_are_the_step_of_a_run(name: str, dtype: torch.dtype) -> None:
    settings = AlignmentSettings(kv_weight=0.7, impl="reference", map_start="ridge", **SETTINGS[name])
    if name == "relation":
        settings = replace(settings, map_start="random")
    loss, metrics, expected = product_step(settings, dtype, qwen2, 0.7, 0.0)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert float(metrics["loss/kv"]) > 0.01 and any(p.startswith("student") for p in expected)
    assert any(p.startswith("aligner") for p in expected) == (name != "hidden, frozen")

    called = distiller_of(settings, dtype)
    output = called(**inputs())
    output.loss.backward()
    assert float(output.loss.detach()) == pytest.approx(float(loss), rel=tolerance)
    assert float(output.metrics["loss/kv"]) == pytest.approx(float(metrics["loss/kv"]), rel=tolerance)
    same(gradients(called), expected, dtype)

    watched = distiller_of(settings, dtype)
    with watched.watch() as forward:
        task = watched.student(**{key: value for key, value in inputs().items() if key != "segment_ids"}).loss
    total = task + forward.loss(inputs())
    total.backward()
    assert float(total.detach()) == pytest.approx(float(loss), rel=1e-5)  # a model's own cross entropy is made in fp32
    assert float(forward.metrics["loss/kv"]) == pytest.approx(float(metrics["loss/kv"]), rel=tolerance)
    same(gradients(watched), expected, torch.float32)


def test_logit_distillation_is_that_of_a_run() -> None:
    settings = AlignmentSettings(kv_weight=0.7, impl="reference", map_start="ridge", logit_kd_weight=0.5)
    loss, metrics, expected = product_step(settings, torch.float64, gpt2, 0.7, 0.5)
    distiller = distiller_of(settings, torch.float64, gpt2)
    output = distiller(**inputs())
    output.loss.backward()
    assert float(output.loss.detach()) == pytest.approx(float(loss), rel=1e-10)
    assert float(output.metrics["loss/logit_kd"]) == pytest.approx(float(metrics["loss/logit_kd"]), rel=1e-10)
    same(gradients(distiller), expected, torch.float64)
    with pytest.raises(InputError, match=r"logit_kd_weight=0\.5: a watched forward shows no head"):
        distiller.watch()


def test_normalizers_of_a_global_step_are_taken() -> None:
    distiller = distiller_of(AlignmentSettings(kv_weight=1.0, task_weight=0.0))
    batch = replace(the_batch(), label_normalizer=1.0, position_normalizer=100.0)
    whole = distiller(**inputs())
    positions = float(batch.attention_mask[:, 1:].sum())  # the first token of a row is left out
    assert float(distiller(batch=batch).loss.detach()) == pytest.approx(
        float(whole.loss.detach()) * positions / 100, rel=1e-5
    )


def test_the_weight_gives_the_gradient_its_share() -> None:
    settings = AlignmentSettings(map_start="random")
    distiller = distiller_of(replace(settings, kv_weight="auto:0.5"))
    weight = distiller.kv_weight

    def norm(task: float, kv: float) -> float:
        twin = KVDistiller(*models(), replace(settings, kv_weight=kv, task_weight=task)).eval()
        twin.fit([inputs()])
        twin(**inputs()).loss.backward()
        return float(torch.cat([p.grad.flatten() for p in twin.student.parameters() if p.grad is not None]).norm())

    assert norm(0.0, weight) == pytest.approx(0.5 * norm(1.0, 0.0), rel=1e-4) and abs(weight - 0.5) > 0.01


def test_a_fitted_map_counts_as_much_as_the_task_at_most() -> None:
    distiller = distiller_of(AlignmentSettings(kv_weight="auto:2.0")).eval()
    metrics = distiller(**inputs()).metrics
    assert distiller.kv_weight * float(metrics["loss/kv"]) == pytest.approx(2 * float(metrics["loss/task"]), rel=1e-4)


def test_normalizers_of_a_global_step_are_taken_through_what_is_around_the_student() -> None:
    settings, student = AlignmentSettings(kv_weight=1.0), models()
    batch = replace(the_batch(), label_normalizer=40.0, position_normalizer=100.0)
    plain, wrapped = KVDistiller(*student, settings), KVDistiller(WRAPPERS["ddp"](student[0]), student[1], settings)
    for distiller in (plain, wrapped):
        distiller.fit([inputs()])
    found, expected = wrapped(batch=batch), plain(batch=batch)
    for name in ("loss/task", "loss/kv"):
        assert float(found.metrics[name]) == pytest.approx(float(expected.metrics[name]), rel=1e-5)
    assert float(found.loss.detach()) == pytest.approx(float(expected.loss.detach()), rel=1e-5)
    with pytest.raises(InputError, match="its samples share rows"):
        wrapped(batch=replace(batch, packing=object()))


def test_maps_that_explain_nothing_weigh_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kvds.align.ridge._LEAST_R2", 2.0)  # whatever is fitted is not told from chance
    distiller = distiller_of(AlignmentSettings(kv_weight="auto:2.0"))
    assert distiller.kv_weight == 0.0 and "no map explains held-out states of the teacher" in caplog.text
    distiller(**inputs()).loss.backward()
    assert any(bool(p.grad.any()) for p in distiller.student.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", WRAPPERS)
def test_what_stands_around_a_student_changes_nothing(name: str) -> None:
    settings = AlignmentSettings(kv_weight=0.7)
    plain = distiller_of(settings)
    expected = plain(**inputs())
    expected.loss.backward()

    student, teacher = models()
    wrapped = WRAPPERS[name](student)
    distiller = KVDistiller(wrapped, teacher, settings)
    distiller.fit([inputs()])
    output = distiller.train()(**inputs())
    output.loss.backward()
    assert float(output.loss.detach()) == pytest.approx(float(expected.loss.detach()), rel=1e-5)
    same(gradients(distiller.aligner), gradients(plain.aligner), torch.float32)
    if name != "fsdp":  # whose gradients are those of its flat parameter
        found = [p.grad for p in student.parameters()]
        for gradient, other in zip(found, plain.student.parameters(), strict=True):
            torch.testing.assert_close(gradient, other.grad, rtol=1e-4, atol=1e-6)

    with distiller.watch(wrapped) as forward:
        wrapped(input_ids=inputs()["input_ids"], attention_mask=inputs()["attention_mask"])
    assert float(forward.loss(inputs()).detach()) == pytest.approx(0.7 * float(expected.metrics["loss/kv"]), rel=1e-5)


def test_adapters_of_peft_learn_from_keys_and_values() -> None:
    peft = pytest.importorskip("peft", reason="pip install peft")
    student, teacher = models()
    adapted = peft.get_peft_model(student, peft.LoraConfig(r=2, target_modules=["k_proj", "v_proj"]))
    distiller = KVDistiller(adapted, teacher, AlignmentSettings(task_weight=0.0, kv_weight=1.0, kv_parts="kv"))
    distiller.fit([inputs()])
    first = distiller(**inputs())
    first.loss.backward()
    learning = {name for name, gradient in gradients(distiller.student).items() if gradient.abs().max() > 0}
    assert learning and all("lora_B" in name for name in learning)  # A waits for B, which starts at 0
    torch.optim.SGD([p for p in distiller.parameters() if p.requires_grad], lr=0.05).step()
    assert float(distiller(**inputs()).loss.detach()) < float(first.loss.detach())


def test_the_state_dict_holds_all_but_the_teacher(tmp_path: Path) -> None:
    settings = AlignmentSettings(kv_weight="auto:1.0")
    distiller = distiller_of(settings)
    state = distiller.state_dict()
    assert {name.split(".")[0] for name in state} == {"student", "aligner", "_weight_bits"}
    assert sum(p.numel() for p in distiller.parameters()) == sum(
        p.numel() for part in (distiller.student, distiller.aligner) for p in part.parameters()
    )
    again = KVDistiller(*models(), settings)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(1.0)
    assert not again.fitted
    again.load_state_dict(state)
    assert again.fitted and again.kv_weight == distiller.kv_weight
    expected = pytest.approx(float(distiller(**inputs()).loss.detach()), rel=1e-6)
    assert float(again(**inputs()).loss.detach()) == expected
    again.bfloat16()  # what casts weights leaves the weight of the loss alone
    again.load_state_dict(again.state_dict())
    assert again.kv_weight == distiller.kv_weight

    around = torch.nn.ModuleDict({"distiller": KVDistiller(*models(), settings)})
    around["distiller"].fit([inputs()])
    around["distiller"].kv_weight = 5.0
    around.load_state_dict({f"distiller.{name}": value for name, value in state.items()})
    assert around["distiller"].kv_weight == distiller.kv_weight

    distiller.save_aligner(tmp_path / "map_aligner.pt")
    third = KVDistiller(*models(), replace(settings, kv_weight=distiller.kv_weight))
    third.load_aligner(tmp_path / "map_aligner.pt")
    assert third.fitted and float(third(**inputs()).loss.detach()) == expected
    other = KVDistiller(qwen2(1, 3, 16), qwen2(2, 3, 24), settings)
    with pytest.raises(InputError, match="models of other shapes"):
        other.load_aligner(tmp_path / "map_aligner.pt")


def test_what_was_not_fitted_is_told(caplog: pytest.LogCaptureFixture) -> None:
    unfitted = KVDistiller(*models(), AlignmentSettings(kv_weight=1.0))
    for _ in range(2):
        unfitted(**inputs())
    [told] = [record.message for record in caplog.records if "nothing was fitted" in record.message]
    assert told.endswith("call fit(batches) before training, or load an aligner")
    caplog.clear()
    distiller_of(AlignmentSettings(kv_weight=1.0))(**inputs())
    assert not [record for record in caplog.records if "fitted" in record.message]
    with pytest.raises(InputError, match=r"kv_weight=auto:2\.0: nothing was fitted; expected fit\(batches\) first"):
        KVDistiller(*models())(**inputs())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kv_method": "rkv"}, "kv_budget=none: expected a number of tokens or a fraction"),
        ({"kv_weight": "hold:1.0"}, "kv_weight=hold:1.0: expected a number or auto:SHARE in a loop of one's own"),
        ({"kv_weight": "balance:1.0"}, "kv_weight=balance:1.0: expected a number or auto:SHARE in a loop of one's own"),
        ({"kv_weight_until": 0.5}, "kv_weight_until=0.5: expected 1 in a loop of one's own"),
        ({"kv_weight": -1.0}, "kv_weight=-1.0: expected a number of at least 0"),
        ({"kv_weight_schedule": "linear"}, "kv_weight_schedule=linear: expected constant in a loop of one's own"),
        ({"handoff_weight": 1.0}, "handoff_weight=1.0: expected 0 in a loop of one's own"),
        ({"align_tokens": "segment"}, "align_tokens=segment: expected position in a loop of one's own"),
        ({"kv_method": "rvk"}, "kv_method=rvk: expected one of"),
        ({"aligner_update": "frozen", "map_start": "random"}, "aligner_update=frozen: expected --map_start pca"),
        ({"alignment_mode": "none"}, "alignment_mode=none: expected"),
    ],
)
def test_settings_without_a_meaning_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as caught:
        KVDistiller(*models(), AlignmentSettings(**changes))
    assert told in str(caught.value)


def test_settings_that_nothing_reads_are_told(caplog: pytest.LogCaptureFixture) -> None:
    KVDistiller(*models(), AlignmentSettings(logit_kd_top_k=5, kv_weight=1.0))
    KVDistiller(*models(), AlignmentSettings(logit_kd_top_k=5, kv_weight=1.0, logit_kd_weight=0.5))
    told = [record.getMessage() for record in caplog.records if "nothing reads" in record.getMessage()]
    assert told == ["nothing reads logit_kd_top_k=5 (that takes --logit_kd_weight above 0)"]


def test_inputs_that_cannot_be_read_are_refused() -> None:
    distiller = distiller_of(AlignmentSettings(kv_weight=1.0))
    given = inputs()
    for changes, told in (
        ({"input_ids": None}, "input_ids=None: expected token ids"),
        ({"labels": given["labels"][:, 1:]}, "labels: has shape"),
    ):
        with pytest.raises(InputError, match=told):
            distiller(**{**given, **changes})
    with distiller.watch() as forward:
        distiller.student(input_ids=given["input_ids"])
    with pytest.raises(InputError, match="position_ids: expected rows of one sample each"):
        forward.loss({**given, "position_ids": given["input_ids"]})
    with pytest.raises(InputError, match="fit: no batch"):
        distiller.fit([])


def test_random_positions_are_drawn_anew_from_torchs_generator() -> None:
    distiller = distiller_of(AlignmentSettings(kv_weight=1.0, kv_method="random", kv_budget=2, task_weight=0.0))

    def losses() -> list[float]:
        torch.manual_seed(5)
        return [float(distiller(**inputs()).loss.detach()) for _ in range(3)]

    first = losses()
    assert first == losses() and len(set(first)) == 3


def test_a_copy_computes_the_same() -> None:
    distiller = distiller_of(AlignmentSettings(kv_weight=1.0))
    loss = float(distiller(**inputs()).loss.detach())
    assert float(copy.deepcopy(distiller)(**inputs()).loss.detach()) == pytest.approx(loss, rel=1e-6)


def test_the_package_alone_is_light() -> None:
    code = (
        "import sys, kvds, kvds.config\n"
        "assert not {'torch', 'transformers', 'deepspeed', 'mlflow'} & set(sys.modules)\n"
        "from kvds import KVDistiller\n"
        "assert 'deepspeed' not in sys.modules, 'a loop of one\\'s own needs no DeepSpeed'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
