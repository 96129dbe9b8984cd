"""A run that goes on from a checkpoint is the run that was never interrupted; what it leaves loads anywhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config

from kvds.checkpoint.aligner_file import load_aligner
from kvds.cli import main
from kvds.data.tokenizer import train_problem_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
PROMPTS = ["Lee has 68 balls eats 2?\n", "Ann has 05 cups gets 9 loses 4?\n"]

# Trains the run of argv and lets the engine's own student, gathered whole, generate.
TRAIN_AND_GENERATE = f"""
import json, sys, deepspeed, torch
from kvds.config.recipe import parse_run_config
from kvds.config.deepspeed_file import load_deepspeed_config
from kvds.distributed.process_group import init_distributed, leave_distributed
from kvds.training.run import TrainingRun

for flags in json.loads(open(sys.argv[1]).read()):
    cfg = parse_run_config(flags)
    run = TrainingRun(cfg, load_deepspeed_config(cfg.deepspeed_config), init_distributed())
    run.fit()
    run.finish()
    run.close("FINISHED")
    student = run.engine.module.student.eval()
    with deepspeed.zero.GatheredParameters(list(student.parameters())), torch.no_grad():
        tokens = []
        for prompt in {PROMPTS!r}:
            ids = torch.tensor([run.tokenizer(prompt)["input_ids"]])
            for _ in range(12):
                following = student(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)
                ids = torch.cat([ids, following], 1)
            tokens.append(ids[0].tolist())
    (run.output_dir / "generated.json").write_text(json.dumps(tokens))
leave_distributed()
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A teacher, and a student with dropout and a tied head."""
    folder = tmp_path_factory.mktemp("models")
    train_problem_tokenizer(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    for name, seed, layers, hidden in (("teacher", 1, 3, 32), ("student", 2, 2, 16)):
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=len(tokenizer), num_hidden_layers=layers, hidden_size=hidden, intermediate_size=24,
            num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True, attention_dropout=0.1,
            initializer_range=0.3, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
        model.generation_config = GenerationConfig(do_sample=True, temperature=0.5, eos_token_id=[5, 999])
        model.save_pretrained(folder / name)
    return folder


def flags(models: Path, output: Path, **changes: object) -> list[str]:
    """Everything with a memory is on: Adam, a schedule with warm-up, dropout, a calibrated weight that decays, a map
    that follows.
    """
    values = {
        "teacher_name": models / "teacher", "student_name": models / "student", "tokenizer_name": models / "tokenizer",
        "datasets": "synthetic", "synthetic_problems": 10, "max_length": 64, "eval_subset_size": 0, "report_to": "none",
        "alignment_mode": "structured", "kv_weight": "auto:1.5", "kv_weight_schedule": "linear",
        "map_start": "procrustes", "kv_parts": "kv", "handoff_weight": 0.5,
        "calibration_batches": 1, "batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6, "save_steps": 3,
        "lr": 0.01,
        "lr_scheduler_type": "cosine", "warmup_ratio": 0.3, "logging_steps": 1,
        "deepspeed_config": REPOSITORY / "ds_configs/zero3_cpu.json", "output_dir": output, **changes,
    }  # fmt: skip
    return [token for key, value in values.items() for token in (f"--{key}", str(value))]


HELD = {
    "kv_weight": "hold:0.5", "kv_weight_schedule": "constant", "kv_method": "random", "kv_budget": 0.5,
    "handoff_weight": 0,
}  # fmt: skip


def start(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, *map(str, command)]
    # No timeout: killed while DeepSpeed compiles, it would leave a lock behind that every later run waits for.
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def interrupt(run: Path, copy: Path) -> Path:
    """``run`` as a crash after step 5 would have left it: its last checkpoint is that of step 3, its records go on to
    5.
    """
    shutil.copytree(run, copy)
    for left in ("checkpoints/step-000006", "student"):
        shutil.rmtree(copy / left)
    for left in ("map_aligner.pt", "generated.json"):
        (copy / left).unlink(missing_ok=True)
    (copy / "checkpoints/latest").write_text("step-000003")
    metrics = copy / "metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines(keepends=True) if json.loads(line)["step"] <= 5]
    metrics.write_text("".join(kept) + '{"step": 6, "loss/ta')  # killed while it wrote
    return copy


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory) -> Path:
    """``straight``: 6 steps. ``resumed``: the same, interrupted after 5 and resumed from 3. ``flat``: another mode, 2
    steps.
    """
    folder = tmp_path_factory.mktemp("runs")
    (folder / "train.py").write_text(TRAIN_AND_GENERATE)
    both = [
        flags(models, folder / "straight"),
        flags(models, folder / "flat", alignment_mode="flat", map_start="pca", max_steps=2, save_steps=0),
        flags(models, folder / "held", **HELD),
    ]
    (folder / "first.json").write_text(json.dumps(both))
    done = start(folder / "train.py", folder / "first.json")
    assert done.returncode == 0, done.stderr[-4000:]
    interrupt(folder / "straight", folder / "resumed")
    done = start("launch/distill.py", *flags(models, folder / "resumed", resume="auto"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "resumed from step 3 of 6" in done.stderr
    interrupt(folder / "held", folder / "held_resumed")
    done = start("launch/distill.py", *flags(models, folder / "held_resumed", resume="auto", **HELD))
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def records(run: Path) -> list[dict[str, float]]:
    """What was logged, without what a clock or the allocator says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


def test_a_resumed_run_ends_in_the_same_bits(runs):
    straight, resumed = (load_file(runs / run / "student/model.safetensors") for run in ("straight", "resumed"))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    aligners = [load_aligner(runs / run / "map_aligner.pt").state_dict() for run in ("straight", "resumed")]
    assert aligners[0].keys() == aligners[1].keys()
    assert all(torch.equal(aligners[0][name], aligners[1][name]) for name in aligners[0])


def test_the_second_half_did_train(runs, tmp_path):
    assert main(["export", "--run", str(runs / "straight"), "--step", "3", "--output", str(tmp_path)]) == 0
    half, whole = (
        load_file(tmp_path / "student/model.safetensors"),
        load_file(runs / "straight/student/model.safetensors"),
    )
    assert max(float((half[name] - whole[name]).abs().max()) for name in whole) > 1e-3


def test_a_resumed_run_has_the_same_records_once(runs):
    straight, resumed = records(runs / "straight"), records(runs / "resumed")
    assert straight == resumed
    start, *straight = straight
    assert all(name == "step" or name.startswith("kv/start_") for name in start)
    assert [start["step"], *(record["step"] for record in straight)] == [0, 1, 2, 3, 4, 5, 6]
    assert {
        "loss/task",
        "loss/kv",
        "loss/handoff",
        "loss/handoff_map",
        "lr",
        "grad_norm",
        "kv/weight",
        "kv/norm_ratio",
    } <= set(straight[-1])
    assert len({record["kv/weight"] for record in straight}) == 6
    assert (
        len({record["lr"] for record in straight}) == 5
    )  # up by 2 steps of warm-up and down again past the same value


def test_a_held_weight_and_random_selections_go_on_where_they_were(runs, models):
    straight, resumed = (load_file(runs / run / "student/model.safetensors") for run in ("held", "held_resumed"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert records(runs / "held") == records(runs / "held_resumed")
    trained = [record for record in records(runs / "held") if record["step"] > 0]
    weights = [record["kv/weight"] for record in trained]
    assert len(weights) == len(set(weights)) == 6
    assert all(record["kv/selected_share"] == pytest.approx(0.5, abs=0.05) for record in trained)
    done = start("launch/distill.py", *flags(models, runs / "held_resumed", **{**HELD, "logging_steps": 2}))
    assert done.returncode == 2 and "--logging_steps 2" in done.stderr  # the weight moves at logging steps


def test_an_exported_checkpoint_is_the_student_of_the_run(runs, tmp_path):
    assert main(["export", "--run", str(runs / "straight"), "--output", str(tmp_path)]) == 0
    run, exported = (load_file(root / "student/model.safetensors") for root in (runs / "straight", tmp_path))
    assert run.keys() == exported.keys() and all(torch.equal(run[name], exported[name]) for name in run)
    aligners = [load_aligner(root / "map_aligner.pt").state_dict() for root in (runs / "straight", tmp_path)]
    assert all(torch.equal(aligners[0][name], aligners[1][name]) for name in aligners[0])
    files = [{path.name for path in (root / "student").iterdir()} for root in (runs / "straight", tmp_path)]
    assert files[0] == files[1]
    for name in files[0]:
        assert (runs / "straight/student" / name).read_bytes() == (tmp_path / "student" / name).read_bytes(), name


def test_a_run_leaves_no_training_settings_and_no_file_that_others_cannot_read(runs):
    student = runs / "straight/student"
    content = {name: json.loads((student / name).read_text()) for name in ("config.json", "generation_config.json")}
    tokenizer = AutoTokenizer.from_pretrained(student)
    for settings in content.values():
        assert settings["use_cache"] is True and settings["eos_token_id"] == tokenizer.eos_token_id
        assert settings["pad_token_id"] == tokenizer.pad_token_id
    assert content["generation_config.json"]["temperature"] == 0.5  # the source's
    card = (student / "README.md").read_text()
    assert "- teacher: teacher" in card and "| synthetic | 10 | 0 |" in card and "for 6 steps" in card
    mask = os.umask(0o022)
    os.umask(mask)
    for path in (runs / "straight").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


@pytest.mark.parametrize("run", ["straight", "flat"])
def test_the_saved_student_generates_what_the_engines_student_does(runs, run):
    model = AutoModelForCausalLM.from_pretrained(runs / run / "student").eval()
    tokenizer = AutoTokenizer.from_pretrained(runs / run / "student")
    expected = json.loads((runs / run / "generated.json").read_text())
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        found = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None)
        assert found[0].tolist() == tokens
    assert expected[0][-12:] != expected[1][-12:]  # it reads its prompt


def test_the_saved_student_has_plain_names_and_its_tied_head_once(runs, models):
    names = load_file(runs / "straight/student/model.safetensors").keys()
    plain = AutoModelForCausalLM.from_pretrained(models / "student")
    assert names == dict(plain.named_parameters()).keys()
    assert "lm_head.weight" not in names and not any(name.startswith(("student.", "aligner.")) for name in names)
    saved = AutoModelForCausalLM.from_pretrained(runs / "straight/student")
    assert saved.lm_head.weight is saved.model.embed_tokens.weight
    assert saved.config.use_cache  # training turns it off; who loads the student wants to generate


def test_the_aligner_file_holds_no_code(runs):
    for run, mode in (("straight", "structured"), ("flat", "flat")):
        content = torch.load(runs / run / "map_aligner.pt", weights_only=True)
        assert set(content) == {"config", "state_dict"} and mode in json.dumps(content["config"])
        assert sum(p.numel() for p in load_aligner(runs / run / "map_aligner.pt").parameters()) > 0


def test_another_learning_rate_is_another_run(runs, models):
    before = (runs / "resumed/config.yaml").read_bytes()
    done = start("launch/distill.py", *flags(models, runs / "resumed", lr=0.02))
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("kvds:")] == [
        f"kvds: error: --lr 0.02: the checkpoint in {runs / 'resumed'} was trained with 0.01; expected the same value "
        "to go on "
        "(or --resume never, or another --output_dir)"
    ]
    assert "Traceback" not in done.stderr and (runs / "resumed/config.yaml").read_bytes() == before
