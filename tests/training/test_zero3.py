"""Distributed training under ZeRO-3 gives the losses and weights of a plain loop in one process on the same global
batches.
"""

import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from kvds import cli
from kvds.checkpoint.aligner_file import load_aligner
from kvds.config.recipe import parse_run_config
from kvds.data.tokenizer import train_problem_tokenizer
from kvds.tracking.tracker import UI_PAGE
from tests.harness.plain_training import STEPS, plain_training

REPOSITORY = Path(__file__).resolve().parents[2]
KV_WEIGHT = 0.7


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with a tokenizer, a teacher of 4 layers and a student of 3, with other head_dims."""
    folder = tmp_path_factory.mktemp("models")
    train_problem_tokenizer(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    for name, seed, layers, hidden, head_dim in (("teacher", 1, 4, 32, 16), ("student", 2, 3, 24, 8)):
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=len(tokenizer), num_hidden_layers=layers, hidden_size=hidden, intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2, head_dim=head_dim, max_position_embeddings=128, tie_word_embeddings=True,
            initializer_range=0.2,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return folder


def flags(models: Path, output: Path, **changes: object) -> list[str]:
    """A small run: SGD without clipping, so that rounding stays rounding (Adam would turn it into steps of size lr)."""
    values = {
        "teacher_name": models / "teacher", "student_name": models / "student", "tokenizer_name": models / "tokenizer",
        "datasets": "synthetic", "synthetic_problems": 64, "max_length": 64, "eval_subset_size": 0, "report_to": "none",
        "alignment_mode": "structured", "kv_weight": KV_WEIGHT, "calibration_batches": 2, "batch_size": 4, "max_steps":
        STEPS,
        "lr": 0.05, "optimizer": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0, "logging_steps": 1,
        "save_steps": 0, "kv_parts": "kv",
        "deepspeed_config": REPOSITORY / "ds_configs/zero3_cpu.json", "output_dir": output, **changes,
    }  # fmt: skip
    return [token for key, value in values.items() if value is not None for token in (f"--{key}", str(value))]


RUNS: dict[str, dict[str, object]] = {
    "structured": {},
    "flat": {"alignment_mode": "flat"},
    "default_parts": {"kv_parts": "auto"},
    "sharded": {"deepspeed_config": None},  # every parameter sharded, none kept whole: set in the fixture
    # Sharded, too; a gradient of zero passes the last layer. From fitted maps KV alone would move the student little.
    "kv_only": {"deepspeed_config": None, "task_weight": 0, "map_start": "random"},
    "sharded_checkpointing": {"deepspeed_config": None, "gradient_checkpointing": "true"},
    "zero2": {"deepspeed_config": None},
    "teacher_zero3": {"teacher_placement": "zero3"},
    "teacher_offload": {"teacher_placement": "zero3_offload"},
    "teacher_heads": {"teacher_placement": "tensor_parallel"},
    "teacher_heads_crop": {
        "teacher_placement": "tensor_parallel", "packing": "true", "kv_method": "right_crop", "kv_budget": 6,
    },
    "cached": {"teacher_cache": None},  # no teacher is loaded: set in the fixture
    "cached_crop": {"teacher_cache": None, "kv_method": "right_crop", "kv_budget": 6, "packing": "true"},
    "checkpointing": {"gradient_checkpointing": "true"},
    "offload": {"gradient_checkpointing": "true", "checkpoint_offload": "true"},
    "packing": {"packing": "true", "kv_method": "right_crop", "kv_budget": 6},
    "one_row": {"tokens_per_batch": 64, "kv_method": "right_crop", "kv_budget": 6, "gradient_checkpointing": "true"},
    "one_row_zero2": {"tokens_per_batch": 200, "deepspeed_config": None, "kv_weight": "auto:1.5"},
    "one_row_teacher_zero3": {"tokens_per_batch": 100, "teacher_placement": "zero3", "logit_kd_weight": 0.5},
    "one_row_teacher_heads": {"tokens_per_batch": 100, "teacher_placement": "tensor_parallel"},
    "one_row_cached": {"tokens_per_batch": 64, "teacher_cache": None, "kv_method": "right_crop", "kv_budget": 6},
    "compiled": {"compile": "on", "deepspeed_config": None, "kv_weight": "hold:0.6"},  # sharded: set in the fixture
    "compiled_one_row": {"compile": "on", "tokens_per_batch": 100, "deepspeed_config": None, "eval_subset_size": 6,
                         "max_new_tokens": 2, "eval_steps": 2, "gradient_checkpointing": "true"},
    "compiled_teacher_zero3": {"compile": "on", "teacher_placement": "zero3", "logit_kd_weight": 0.5},
    "crop": {"kv_method": "right_crop", "kv_budget": 6},
    "rkv": {"kv_method": "rkv", "kv_budget": 0.4, "rkv_lambda": 0.3, "teacher_placement": "zero3"},
    "random": {"kv_method": "random", "kv_budget": 6, "seed": 3},
    # How near it comes in so few steps depends on the start of the maps.
    "held": {"kv_weight": "hold:0.6", "alignment_mode": "flat", "map_start": "random"},
    "accumulated": {"batch_size": 1, "gradient_accumulation_steps": 4},
    "adamw": {"optimizer": "adamw", "lr": 0.001},
    "logit_kd": {"logit_kd_weight": 0.5, "logit_kd_temperature": 2.0},
    "logit_kd_teacher_zero3": {"logit_kd_weight": 0.5, "logit_kd_temperature": 2.0, "teacher_placement": "zero3"},
    "auto_weight": {
        "kv_weight": "auto:1.5", "kv_weight_schedule": "linear", "batch_size": 2, "gradient_accumulation_steps": 2,
    },
    "frozen": {"direction": "teacher_to_student", "aligner_update": "frozen", "map_start": "ridge"},
    "recorded": {"report_to": "mlflow", "eval_subset_size": 6, "max_new_tokens": 6, "eval_steps": 2},
    "no_kv_weight": {"kv_weight": 0},
    "task_only": {"alignment_mode": "none"},
    "reference": {"impl": "reference"},
    "hidden": {"alignment_mode": "hidden", "gradient_checkpointing": "true"},
    "relation": {"alignment_mode": "relation"},
    "segment": {"align_tokens": "segment"},
    "structural_kv": {"alignment_mode": "structural_kv", "gradient_checkpointing": "true"},
    "handoff": {"handoff_weight": 0.7, "deepspeed_config": None},  # sharded: set in the fixture
    "handoff_cached": {"handoff_weight": 0.7, "alignment_mode": "none", "teacher_cache": None},
}  # fmt: skip


@pytest.fixture(scope="module")
def distributed(models, tmp_path_factory) -> Path:
    """All of ``RUNS`` on two ranks through the real launcher."""
    folder = tmp_path_factory.mktemp("distributed")
    raw = json.loads((REPOSITORY / "ds_configs/zero3_cpu.json").read_text())
    sharded, zero2 = json.loads(json.dumps(raw)), json.loads(json.dumps(raw))
    sharded["zero_optimization"] |= {
        "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 1, "memory_efficient_linear": False,
    }  # fmt: skip
    zero2["zero_optimization"] = {"stage": 2}
    for name in ("sharded", "kv_only", "sharded_checkpointing", "compiled", "compiled_one_row", "handoff"):
        (folder / f"{name}.json").write_text(json.dumps(sharded))
    for name in ("zero2", "one_row_zero2"):
        (folder / f"{name}.json").write_text(json.dumps(zero2))
    runs = {}
    for name, changes in RUNS.items():
        if "deepspeed_config" in changes:
            changes = {**changes, "deepspeed_config": folder / f"{name}.json"}
        if "teacher_cache" in changes:
            stored = folder / f"{name}_teacher"
            online = flags(
                models, folder / name, **{**changes, "packing": None, "tokens_per_batch": None, "teacher_cache": None}
            )
            assert cli.main(["cache", "--store", "fp32", "--output", str(stored), "--", *online]) == 0
            changes = {**changes, "teacher_cache": stored}
        runs[name] = flags(models, folder / name, **changes)
    (folder / "runs.json").write_text(json.dumps(runs))
    command = [
        "deepspeed",
        "--num_accelerators",
        "2",
        "--master_port",
        "0",
        "tests/harness/ranked_runs.py",
        str(folder / "runs.json"),
    ]
    port = 20000 + os.getpid() % 20000
    command[command.index("--master_port") + 1] = str(port)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["HF_DATASETS_CACHE"] = str(folder / "datasets")
    environment["MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"] = "0.2"
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=840)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    (folder / "log.txt").write_text(done.stderr)
    (folder / "shared.txt").write_text("\n".join(map(str, Path("/dev/shm").glob(f"*_{port}_*"))))
    return folder


def weights_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for _, p in sorted(model.named_parameters())])


def relative_error(actual: nn.Module, expected: nn.Module) -> float:
    a, e = weights_of(actual), weights_of(expected)
    return float((a - e).norm() / e.norm())


def logged(run: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", [n for n in RUNS if n not in ("no_kv_weight", "accumulated", "recorded")])
def test_two_ranks_equal_a_plain_loop(name, models, distributed):
    changes = {
        k: v
        for k, v in RUNS[name].items()
        if k not in ("deepspeed_config", "teacher_placement", "gradient_checkpointing", "checkpoint_offload", "packing",
                     "teacher_cache", "tokens_per_batch", "compile")
    }  # fmt: skip
    whole = {"batch_size": 8, "gradient_accumulation_steps": 1}
    cfg = parse_run_config(flags(models, distributed / "plain", **{**changes, **whole}))
    records, student, aligner = plain_training(models, cfg)
    losses_only = name == "adamw"
    for key in records[0]:
        tolerance = 1e-4 if losses_only else 1e-5
        assert logged(distributed / name, key) == pytest.approx([r[key] for r in records], rel=tolerance), key
    start = AutoModelForCausalLM.from_pretrained(models / "student")
    assert relative_error(student, start) > 1e-3  # it did train
    if losses_only:
        return
    saved = AutoModelForCausalLM.from_pretrained(distributed / name / "student")
    assert relative_error(saved, student) < 1e-5
    if aligner is not None:
        assert relative_error(load_aligner(distributed / name / "map_aligner.pt"), aligner) < 1e-5
    if name == "auto_weight":
        assert len(set(logged(distributed / name, "kv/weight"))) == STEPS


@pytest.mark.multiprocess
def test_no_shared_memory_stays_behind(distributed):
    assert (distributed / "shared.txt").read_text() == ""


@pytest.mark.multiprocess
def test_layers_are_gathered_whole(distributed):
    fetched = json.loads((distributed / "fetched.json").read_text())
    within = {"Qwen2Attention", "Qwen2MLP"}
    for name in ("sharded", "kv_only", "sharded_checkpointing", "task_only"):
        assert "Qwen2DecoderLayer" in fetched[name] and not within & set(fetched[name]), name
    # Of a teacher the last of four layers alone is in parts: it runs no further than keys and values.
    teacher = fetched["teacher_zero3"]
    assert {teacher[name] for name in within} == {teacher["_TeacherModule"]} and teacher["_TeacherModule"] >= STEPS
    assert fetched["zero2"] == {}


@pytest.mark.multiprocess
def test_rows_are_tokenised_once_for_all_runs_of_the_same_rows(distributed):
    kept = list((distributed / "datasets/kvds").iterdir())
    # Training rows; those of another seed, or with their steps numbered; held-out rows.
    seeds, steps, held_out = (
        {tuple(changes.get(key) for key in keys) for changes in RUNS.values()}
        for keys in (("seed",), ("align_tokens",), ("eval_subset_size",))
    )
    assert {path.suffix for path in kept} == {".safetensors"}
    assert len(kept) == len(seeds) + (len(steps) - 1) + (len(held_out) - 1)


@pytest.mark.multiprocess
def test_a_held_share_comes_closer_step_by_step(distributed):
    weights, ratios = (logged(distributed / "held", key) for key in ("kv/weight", "kv/gradient_ratio"))
    # The first ratio is taken at once.
    assert len(weights) == STEPS and all(0.8 - 1e-9 <= b / a <= 1.25 + 1e-9 for a, b in pairwise(weights[1:]))
    for ratio, before, after in zip(ratios, weights, weights[1:], strict=False):
        assert (after > before) == (ratio < 0.6)
    distances = [abs(math.log(ratio / 0.6)) for ratio in ratios]
    assert distances[-1] < 0.5 * distances[0]


@pytest.mark.multiprocess
def test_accumulating_four_of_one_equals_one_of_four(distributed):
    for key in ("loss/task", "loss/kv"):
        assert logged(distributed / "accumulated", key) == pytest.approx(
            logged(distributed / "structured", key), rel=1e-5
        )
    load = AutoModelForCausalLM.from_pretrained
    assert relative_error(load(distributed / "accumulated/student"), load(distributed / "structured/student")) < 1e-5
    accumulated, whole = (load_aligner(distributed / run / "map_aligner.pt") for run in ("accumulated", "structured"))
    assert relative_error(accumulated, whole) < 1e-5


@pytest.mark.multiprocess
def test_the_lean_operation_trains_as_the_oracle_does(distributed):
    lean, reference = distributed / "structured", distributed / "reference"  # auto is lean where there is no GPU
    for key in ("loss/task", "loss/kv"):
        assert logged(lean, key) == pytest.approx(logged(reference, key), rel=1e-5)
    load = AutoModelForCausalLM.from_pretrained
    assert relative_error(load(lean / "student"), load(reference / "student")) < 1e-5
    assert relative_error(load_aligner(lean / "map_aligner.pt"), load_aligner(reference / "map_aligner.pt")) < 1e-5


@pytest.mark.multiprocess
def test_kv_weight_zero_is_plain_fine_tuning_to_the_bit(distributed):
    load = AutoModelForCausalLM.from_pretrained
    zero, plain = (weights_of(load(distributed / run / "student")) for run in ("no_kv_weight", "task_only"))
    assert torch.equal(zero, plain)


@pytest.mark.multiprocess
def test_checkpoint_holds_no_teacher_and_the_student_has_plain_names(distributed, models):
    from safetensors import safe_open

    with safe_open(distributed / "structured/student/model.safetensors", "pt") as file:
        names = set(file.keys())
    assert names == {n for n, _ in AutoModelForCausalLM.from_pretrained(models / "student").named_parameters()}
    shard = next((distributed / "structured/checkpoints").glob(f"step-{STEPS:06d}/*model_states.pt"))
    content = torch.load(shard, weights_only=False)
    parameters = {name for group in content["param_shapes"] for name in group}
    assert parameters and all(name.startswith(("student.", "aligner.")) for name in parameters)


@pytest.mark.multiprocess
def test_a_run_leaves_its_records(distributed):
    """``metrics.jsonl`` and MLflow hold the same, from rank 0 alone, and recording changes nothing in the training."""
    from mlflow import MlflowClient

    run_dir = distributed / "recorded"
    for key in ("loss/task", "loss/kv", "grad_norm"):
        assert logged(run_dir, key) == logged(distributed / "structured", key)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss/task" in line]
    layers = [f"loss/kv_{part}_layer_{i:02d}" for part in ("keys", "values") for i in range(4)]
    wanted = {
        "loss/total", "loss/task", "loss/kv", "loss/kv_keys", "loss/kv_values", *layers, "lr", "grad_norm",
        "perf/tokens_per_second", "perf/peak_memory_bytes", "perf/memory_bytes", "perf/seconds_teacher",
        "perf/seconds_forward", "perf/seconds_backward", "perf/seconds_optimizer", "kv/weight", "kv/gradient_ratio",
        "kv/norm_ratio", "kv/norm_keys", "kv/norm_values", "kv/effective_rank_keys", "kv/effective_rank_values",
    }  # fmt: skip
    assert [line["step"] for line in trained] == list(range(1, STEPS + 1))
    assert all(line.keys() >= wanted and all(line[key] is not None for key in wanted) for line in trained)
    assert trained[0]["kv/norm_ratio"] == 1.0 and trained[-1]["kv/norm_ratio"] != 1.0
    assert [line["step"] for line in lines if "eval/all/exact_match" in line] == [2, 4, STEPS]
    assert json.loads((run_dir / "eval.json").read_text())["all"].keys() >= {"cross_entropy", "exact_match", "kv_loss"}

    client = MlflowClient(tracking_uri=f"sqlite:///{run_dir / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("kvds")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_id == (run_dir / "mlflow_run_id").read_text().strip()
    history = {key: client.get_metric_history(run.info.run_id, key) for key in ("loss/task", "loss/kv_keys_layer_03")}
    for key, points in history.items():
        assert [(point.step, point.value) for point in points] == [(line["step"], line[key]) for line in trained]
    assert run.data.metrics.keys() >= {*wanted, "eval/synthetic/perplexity", "system/cpu_utilization_percentage"}
    assert run.data.params.keys() >= {"lr", "kv_weight", "alignment_mode", "seed", "parameters_student"}
    tags = run.data.tags
    assert tags["world_size"] == "2" and tags["torch"] == torch.__version__ and tags["kv_weight"] == str(KV_WEIGHT)
    assert len(tags["git_revision"].partition("+")[0]) == 40
    found = {entry.path for entry in client.list_artifacts(run.info.run_id)}
    assert found == {"config.yaml", "report.md", "report.csv", "loss_curves.png"}
    provenance = json.loads((run_dir / "provenance.json").read_text())
    assert provenance["git_revision"] == tags["git_revision"] and provenance["torch"] == torch.__version__
    assert "--local_rank" not in provenance["command"] and provenance["world_size"] == "2"
    told = [line for line in (distributed / "log.txt").read_text().splitlines() if "look through them: " in line]
    assert [line.split("them: ")[1] for line in told] == [
        f"mlflow ui --backend-store-uri sqlite:///{run_dir / 'mlflow.db'} --host 127.0.0.1, then {UI_PAGE}"
    ]
