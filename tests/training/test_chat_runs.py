"""Instruct models distilled on chats, from rows to an exported student: the same whatever holds the rows of a batch,
from a teacher's cache, and to the bit where a run goes on from a checkpoint.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

from kvds.cli import main
from kvds.config.recipe import parse_run_config
from kvds.errors import InputError
from kvds.plan.rows import plan_rows
from kvds.training.run import train
from tests.harness.chat_tokenizers import CHATML, chat_tokenizer, qwen2_tokenizer, turns

REPOSITORY = Path(__file__).resolve().parents[2]
ROWS = [
    {
        "messages": turns(
            f"user: Is {i} even?", f"assistant: {i % 2 == 0}", "user: Why?", "assistant: So.", reasoning="2"
        )
    }
    for i in range(9)
]


def save_models(folder: Path, tokenizer, kind: type) -> Path:
    tokenizer.save_pretrained(folder / "tokenizer")
    for name, seed, layers, hidden in (("teacher", 1, 3, 32), ("student", 2, 2, 16)):
        torch.manual_seed(seed)
        config = kind(
            vocab_size=len(tokenizer), num_hidden_layers=layers, hidden_size=hidden, intermediate_size=24,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512, initializer_range=0.3,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "chat.eval.jsonl").write_text(json.dumps({"messages": turns("user: Hm?", "assistant: Yes.")}))
    return folder


def flags(folder: Path, output: Path, **changes: object) -> list[str]:
    values = {
        "teacher_name": folder / "teacher", "student_name": folder / "student", "tokenizer_name": folder / "tokenizer",
        "datasets": folder / "chat.jsonl", "max_length": 160, "eval_subset_size": 1, "max_new_tokens": 3,
        "report_to": "none", "calibration_batches": 1, "batch_size": 3, "max_steps": 4, "save_steps": 2, "lr": 0.01,
        "kv_weight": 0.5, "logging_steps": 1, "map_start": "random",
        "deepspeed_config": REPOSITORY / "ds_configs/zero3_cpu.json", "output_dir": output, **changes,
    }  # fmt: skip
    return [token for key, value in values.items() for token in (f"--{key}", str(value))]


def losses(run: Path, name: str = "loss/total") -> list[float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record[name] for record in records if name in record]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"), chat_tokenizer(ends_turns=False), LlamaConfig)


@pytest.fixture(scope="module")
def straight(models) -> Path:
    train(parse_run_config(flags(models, models / "straight")))
    return models / "straight"


def test_a_student_of_chats_is_judged_and_keeps_its_template(straight):
    evaluated = json.loads((straight / "eval.json").read_text())
    assert evaluated["chat"]["judged"] == 1 and math.isfinite(evaluated["chat"]["cross_entropy"])
    tokenizer = AutoTokenizer.from_pretrained(straight / "student")
    student = AutoModelForCausalLM.from_pretrained(straight / "student")
    assert tokenizer.chat_template == CHATML
    asked = tokenizer.apply_chat_template(ROWS[0]["messages"][:1], add_generation_prompt=True, return_tensors="pt")
    assert student.generate(**asked, max_new_tokens=2).shape[1] > asked["input_ids"].shape[1]
    assert all(map(math.isfinite, losses(straight))) and losses(straight)[-1] < losses(straight)[0]


def test_a_run_on_chats_goes_on_to_the_bit(models, straight):
    resumed = models / "resumed"
    shutil.copytree(straight, resumed)
    for left in ("checkpoints/step-000004", "student"):
        shutil.rmtree(resumed / left)
    (resumed / "checkpoints/latest").write_text("step-000002")
    train(parse_run_config(flags(models, resumed, resume="auto")))
    assert losses(resumed) == losses(straight)
    ours, theirs = (load_file(run / "student/model.safetensors") for run in (resumed, straight))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("how", [{"packing": "true", "max_length": 400}, {"tokens_per_batch": 512}])
def test_chats_that_share_a_row_have_the_same_losses(models, straight, how):
    output = models / next(iter(how))
    train(parse_run_config(flags(models, output, max_steps=2, save_steps=0, eval_subset_size=0, **how)))
    assert losses(output) == pytest.approx(losses(straight)[:2], rel=1e-4)
    assert losses(output, "loss/kv") == pytest.approx(losses(straight, "loss/kv")[:2], rel=1e-4)


def test_chats_from_a_teachers_cache(models, straight):
    cached, run = flags(models, models / "unused"), flags(models, models / "cached", max_steps=2, save_steps=0)
    assert main(["cache", "--output", str(models / "cache"), "--store", "fp32", "--", *cached[:-2]]) == 0
    train(parse_run_config([*run, "--teacher_cache", str(models / "cache")]))
    assert losses(models / "cached") == pytest.approx(losses(straight)[:2], rel=1e-4)


def test_another_template_is_another_run(models, straight):
    (models / "other.jinja").write_text(CHATML.replace("<|im_start|>", "<|im_start|>the "))
    shutil.copytree(straight, models / "other")
    with pytest.raises(InputError, match="the training rows now"):
        train(parse_run_config(flags(models, models / "other", chat_template=models / "other.jinja")))


def test_a_plan_counts_the_tokens_of_chats(models):
    rows = plan_rows(parse_run_config(flags(models, models / "unused")), ranks=1)
    assert "read from the data" in rows.note
    # Per row two answers, the reasoning, and what ends the turns and the row.
    said = [len(f"{i % 2 == 0}") + len("<think>\n2\n</think>\n\nSo.") + 3 for i in range(len(ROWS))]
    assert (rows.row_labelled, rows.labelled_tokens, rows.steps) == (max(said), sum(said), 3)


def test_qwen2_by_its_own_template(tmp_path):
    models = save_models(tmp_path, qwen2_tokenizer(), Qwen2Config)
    how = {"max_steps": 1, "batch_size": 1, "assistant_turns": "last", "align_tokens": "segment", "max_new_tokens": 1}
    train(parse_run_config(flags(models, tmp_path / "run", **how)))
    assert all(map(math.isfinite, losses(tmp_path / "run"))) and len(losses(tmp_path / "run", "loss/kv")) == 1
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(tmp_path / "run/student").chat_template
    assert json.loads((tmp_path / "run/eval.json").read_text())["chat"]["samples"] == 1
