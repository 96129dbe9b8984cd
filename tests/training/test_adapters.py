"""LoRA students: adapters and map alone train under ZeRO-2 and ZeRO-3, resume to the bit, leave merged and alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from kvds.checkpoint.export import gather_parameters, plain_student
from kvds.cli import main
from kvds.config import RunConfig, extras
from kvds.data.tokenizer import train_problem_tokenizer
from kvds.errors import InputError
from kvds.kv import KVCapture
from kvds.models.adapters import adapter_config, adapters_of, add_adapters, check_adapted
from kvds.models.compiled_layers import compile_as_asked
from tests.harness.forked_ranks import REPOSITORY, RankServer
from tests.kv.test_capture import FAMILIES, inputs, make_model

ADAPTED = FAMILIES
SECONDS = 600  # generous: machines are shared


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    train_problem_tokenizer(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    for name, layers, hidden in (("teacher", 3, 32), ("student", 2, 16)):
        torch.manual_seed(layers)
        config = Qwen2Config(
            vocab_size=len(tokenizer), num_hidden_layers=layers, hidden_size=hidden, intermediate_size=24,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
            initializer_range=0.3, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return folder


def flags(models: Path, output: Path, stage: int) -> list[str]:
    values = {
        "teacher_name": models / "teacher", "student_name": models / "student", "tokenizer_name": models / "tokenizer",
        "datasets": "synthetic", "synthetic_problems": 10, "max_length": 64, "eval_subset_size": 0, "report_to": "none",
        "alignment_mode": "structured", "kv_weight": 1.0, "calibration_batches": 1, "batch_size": 1, "max_steps": 4,
        "save_steps": 2, "lr": 0.01, "logging_steps": 1, "lora_r": 3,
        "deepspeed_config": REPOSITORY / f"ds_configs/{'zero3_cpu' if stage == 3 else 'zero2_fp32'}.json",
        "output_dir": output,
    }  # fmt: skip
    return [token for key, value in values.items() for token in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def runs(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """``zero2`` and ``zero3``: 4 steps on two ranks. ``resumed``: the latter, gone on from step 2."""
    folder = tmp_path_factory.mktemp("runs")

    def run(server: RankServer, name: str, stage: int) -> None:
        log = folder / f"{name}.log"
        codes = server.start(flags(models, folder / name, stage), ranks=2, log=log).wait(SECONDS)
        assert codes == [0, 0], log.read_text()[-4000:]

    with RankServer() as server:
        run(server, "zero2", 2)
        run(server, "zero3", 3)
        shutil.copytree(folder / "zero3", folder / "resumed")
        for left in ("checkpoints/step-000004", "student", "adapter"):
            shutil.rmtree(folder / "resumed" / left)
        (folder / "resumed/checkpoints/latest").write_text("step-000002")
        run(server, "resumed", 3)
    yield folder


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_what_no_adapter_adapts_stays_as_it_was(runs: Path, models: Path) -> None:
    before = weights(models / "student")
    for run in ("zero2", "zero3"):
        after = weights(runs / run / "student")
        assert after.keys() == before.keys()
        for name, tensor in after.items():
            moved = not torch.equal(tensor, before[name])
            assert moved == name.endswith("_proj.weight"), name


@pytest.mark.parametrize("run", ["zero2", "zero3"])
def test_the_adapter_on_the_first_student_is_the_merged_one(run: str, runs: Path, models: Path) -> None:
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(models / "student"), runs / run / "adapter"
    )
    merged = AutoModelForCausalLM.from_pretrained(runs / run / "student")
    ids = torch.tensor([[3, 9, 4, 7, 5]])
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert json.loads((runs / run / "adapter/adapter_config.json").read_text())["r"] == 3


def test_both_stages_train_alike(runs: Path) -> None:
    losses = []
    for run in ("zero2", "zero3"):
        lines = [json.loads(line) for line in (runs / run / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss/total"] for line in lines if "loss/total" in line])
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][0] != losses[0][-1]


def test_a_resumed_run_ends_in_the_same_bits(runs: Path) -> None:
    assert "resumed from step 2 of 4" in (runs / "resumed.log").read_text()
    for file in ("student/model.safetensors", "adapter/adapter_model.safetensors"):
        straight, resumed = (load_file(runs / run / file) for run in ("zero3", "resumed"))
        assert straight.keys() == resumed.keys() and all(torch.equal(straight[k], resumed[k]) for k in straight)


@pytest.mark.parametrize("run", ["zero2", "zero3"])
def test_a_checkpoint_is_exported_as_the_run_itself(run: str, runs: Path, tmp_path: Path) -> None:
    assert main(["export", "--run", str(runs / run), "--output", str(tmp_path / "out")]) == 0
    for file in ("student/model.safetensors", "adapter/adapter_model.safetensors"):
        own, exported = load_file(runs / run / file), load_file(tmp_path / "out" / file)
        assert own.keys() == exported.keys()
        for name, tensor in own.items():
            torch.testing.assert_close(exported[name], tensor)


def run_of(**settings: Any) -> RunConfig:
    return RunConfig(teacher_name="a/b", student_name="c/d", output_dir="out", **({"lora_r": 2} | settings))


@pytest.mark.parametrize("family", ADAPTED)
def test_captures_see_what_adapters_add_and_gradients_reach_them_alone(family: str) -> None:
    model = make_model(family)
    add_adapters(model, adapter_config(run_of()), seed=1)
    check_adapted(model, run_of())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name)
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.5)
    with KVCapture(model, require_grad=True) as capture:
        model(**inputs())
    state = gather_parameters(model, keep=True)
    plain = plain_student(model.config, state, adapters=adapters_of(model))
    assert not any(".lora_" in name for name, _ in plain.named_parameters())
    with torch.no_grad(), KVCapture(plain) as merged:
        plain(**inputs())
    for found, expected in zip(
        (*capture.states.keys, *capture.states.values), (*merged.states.keys, *merged.states.values), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    torch.stack([layer.sum() for layer in capture.states.values]).sum().backward()
    assert all((p.grad is not None) <= (".lora_" in name) for name, p in model.named_parameters())
    assert any(p.grad is not None and p.grad.norm() > 0 for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "k_proj"), "lora_target_modules=k_proj q_proj: the value projection of the first layer has no ada"),
        (("o_proj",), "lora_target_modules=o_proj: the key and value projection of the first layer has no adapter"),
        (("c_attn",), "lora_target_modules=c_attn: Target modules .* not found .*expected names of the student's proj"),
    ],
)
def test_adapters_that_the_kv_loss_does_not_reach_are_refused(targets: tuple[str, ...], message: str) -> None:
    cfg, model = run_of(lora_target_modules=targets), make_model("llama")
    with pytest.raises(InputError, match=message):
        add_adapters(model, adapter_config(cfg), seed=0)
        check_adapted(model, cfg)
    if targets == ("o_proj",):
        check_adapted(model, run_of(alignment_mode="none", kv_weight=1.0))


def test_a_configuration_file_says_the_same(tmp_path: Path) -> None:
    adapter_config(run_of(lora_alpha=6, lora_dropout=0.1)).save_pretrained(tmp_path)
    for place in (tmp_path, tmp_path / "adapter_config.json"):
        found = adapter_config(run_of(lora_r=None, lora_config=str(place)))
        assert (found.r, found.lora_alpha, found.lora_dropout, found.target_modules) == (2, 6, 0.1, "all-linear")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "modules_to_save": ["lm_head"]}')
    with pytest.raises(InputError, match="lora_config=.*: expected a LoRA without modules_to_save"):
        adapter_config(run_of(lora_r=None, lora_config=str(tmp_path)))
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(InputError, match="lora_config=.*: peft does not read it"):
        adapter_config(run_of(lora_r=None, lora_config=str(tmp_path)))


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "installed", lambda package: package != "peft")
    with pytest.raises(InputError, match=r"lora_r=2: peft is not installed \(pip install 'kvds\[lora\]'\)"):
        adapter_config(run_of())


def test_layers_with_adapters_are_not_compiled() -> None:
    model = make_model("llama")
    model.config._attn_implementation = "kvds_rows"
    add_adapters(model, adapter_config(run_of()), seed=0)
    assert not compile_as_asked(model, "auto", torch.device("cuda"), flag="student")
    with pytest.raises(InputError, match="compile=on: the student cannot be compiled: its projections are no plain on"):
        compile_as_asked(model, "on", torch.device("cpu"), flag="student")
