"""What each setting says of itself: its bounds, whether a resumed run may change it, whether it is a run's identity."""

import dataclasses

import pytest

from kvds.align import build_aligner
from kvds.config import AlignmentSettings, RunConfig, resume_rules
from kvds.config.resume_rules import check_resumable
from kvds.errors import InputError
from kvds.experiment import plan
from kvds.kv import KVShape

FIELDS = {field.name: field for field in dataclasses.fields(RunConfig)}
REQUIRED = {"model_name": "gpt2", "output_dir": "outputs/x"}
SHARE, RATE = "a share from 0 to below 1", "a number above 0, such as 5e-5"
# The number on the edge, the nearest that is refused, and the answer.
BOUNDS = {
    "on_policy_share": [(0.0, -1e-9, "a share from 0 to 1"), (1.0, 1 + 1e-9, "a share from 0 to 1")],
    "on_policy_max_new_tokens": [(1, 0, "a whole number, at least 1")],
    "on_policy_temperature": [(1e-9, 0.0, "a number above 0, such as 1.0")],
    "on_policy_top_p": [(1e-9, 0.0, "a share above 0, at most 1"), (1.0, 1 + 1e-9, "a share above 0, at most 1")],
    "lora_r": [(1, 0, "at least 1")],
    "lora_alpha": [(1, 0, "at least 1")],
    "lora_dropout": [(0.0, -1e-9, SHARE), (1 - 1e-9, 1.0, SHARE)],
    "logit_kd_beta": [(0.01, 0.0, "a number between 0 and 1"), (0.99, 1.0, "a number between 0 and 1")],
    "logit_kd_top_k": [(0, -1, "a finite number, at least 0")],
    "max_length": [(2, 1, "at least 2 tokens, one to read and one to predict")],
    "max_new_tokens": [(1, 0, "a whole number, at least 1")],
    "calibration_batches": [(1, 0, "a whole number, at least 1")],
    "synthetic_problems": [(1, 0, "a whole number, at least 1"), (1_000_000, 1_000_001, "at most 1000000")],
    "batch_size": [(1, 0, "a whole number, at least 1")],
    "gradient_accumulation_steps": [(1, 0, "a whole number, at least 1")],
    "epochs": [(1, 0, "a whole number, at least 1")],
    "logging_steps": [(1, 0, "a whole number, at least 1")],
    "source_layers_per_target": [(1, 0, "a whole number, at least 1")],
    "layer_groups": [(1, 0, "a whole number, at least 1")],
    "head_groups": [(1, 0, "a whole number, at least 1")],
    "max_bad_steps": [(1, 0, "a whole number, at least 1")],
    "eval_subset_size": [(0, -1, "a finite number, at least 0")],
    "save_steps": [(0, -1, "a finite number, at least 0")],
    "eval_steps": [(0, -1, "a finite number, at least 0")],
    "seed": [(0, -1, "a finite number, at least 0"), (2**31 - 1, 2**31, "at most 2147483647")],
    "task_weight": [(0.0, -1e-9, "a finite number, at least 0")],
    "logit_kd_weight": [(0.0, -1e-9, "a finite number, at least 0")],
    "handoff_weight": [(0.0, -1e-9, "a finite number, at least 0")],
    "weight_decay": [(0.0, -1e-9, "a finite number, at least 0")],
    "attention_loss_weight": [(0.0, -1e-9, "a finite number, at least 0")],
    "kv_weight_until": [(1e-9, 0.0, "a share above 0, at most 1"), (1.0, 1 + 1e-9, "a share above 0, at most 1")],
    "early_stopping_patience": [(0, -1, "a finite number, at least 0")],
    "keep_checkpoints": [(0, -1, "a finite number, at least 0")],
    "subset_size": [(1, 0, "at least 1 (or leave --subset_size away)")],
    "max_steps": [(1, 0, "at least 1 (or leave --max_steps away)")],
    "observing_tokens": [(1, 0, "at least 1 (or leave --observing_tokens away)")],
    "tokens_per_batch": [(0, -1, "at least 0 (or leave --tokens_per_batch away)")],
    "handoff_source_layers": [(1, 0, "at least 1 (or leave --handoff_source_layers away)")],
    "relation_heads": [(1, 0, "at least 1 (or leave --relation_heads away)")],
    "lr": [(1e-9, 0.0, RATE)],
    "aligner_lr": [(1e-9, 0.0, RATE)],
    "logit_kd_temperature": [(1e-9, 0.0, RATE)],
    "max_minutes": [(1e-9, 0.0, "above 0 (or leave --max_minutes away)")],
    "rank_timeout": [(5, 4, "at least 5 seconds")],
    "warmup_ratio": [(0.0, -1e-9, SHARE), (1 - 1e-9, 1.0, SHARE)],
    "max_grad_norm": [(0.0, -1e-9, "at least 0 (0: never clip)")],
    "max_lossy_rows": [
        (0.0, -1e-9, "a share from 0 to 1"),
        (1.0, 1 + 1e-9, "a share from 0 to 1"),
    ],
    "rkv_lambda": [(0.0, -1e-9, "a weight from 0 to 1"), (1.0, 1 + 1e-9, "a weight from 0 to 1")],
}
# What gives a setting its meaning where another would refuse the edge.
BESIDE = {
    "lora_alpha": {"lora_r": 4},
    "lora_dropout": {"lora_r": 4},
    "logit_kd_beta": {"logit_kd_loss": "jsd"},
    "handoff_source_layers": {"handoff_weight": 1.0},
    "relation_heads": {"alignment_mode": "relation"},
    "source_layers_per_target": {"alignment_mode": "flat"},
    "attention_loss_weight": {"alignment_mode": "structural_kv"},
    "task_weight": {"kv_weight": 1.0},
    "on_policy_share": {"kv_weight": 1.0, "task_weight": 0.0},
    **{f"on_policy_{name}": {"on_policy_share": 0.5} for name in ("max_new_tokens", "temperature", "top_p")},
}
MAY_CHANGE = {
    *("output_dir", "resume", "logging_steps", "save_steps", "eval_steps", "eval_subset_size", "max_new_tokens"),
    *("report_to", "tracking_uri", "experiment_name", "run_name", "data_dir", "deepspeed_config", "teacher_placement"),
    "chat_template",
    *("teacher_tp_size", "teacher_overlap", "pad_to_multiple_of", "model_name", "teacher_name", "student_name"),
    *("tokenizer_name", "impl", "teacher_cache", "data_cache", "dry_run", "batch_size", "gradient_accumulation_steps"),
    *("change_global_batch", "keep_checkpoints", "max_minutes", "max_bad_steps", "rank_timeout"),
    *("tokens_per_batch", "compile", "save_at_end", "deterministic"),
    *("max_lossy_rows", "early_stopping_patience", "push_to_hub", "hub_model_id", "hub_private_repo"),
}
NO_IDENTITY = {
    *("output_dir", "resume", "report_to", "tracking_uri", "experiment_name", "run_name", "save_steps", "data_dir"),
    *("on_bad_row", "max_lossy_rows", "data_cache", "rank_timeout", "keep_checkpoints", "max_minutes"),
    *("save_at_end", "push_to_hub", "hub_model_id", "hub_private_repo"),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_number_is_refused_beyond_its_bounds_and_nowhere_else(name):
    for edge, beyond, expected in BOUNDS[name]:
        assert getattr(RunConfig(**REQUIRED, **BESIDE.get(name, {}), **{name: edge}), name) == edge
        with pytest.raises(InputError) as error:
            RunConfig(**REQUIRED, **BESIDE.get(name, {}), **{name: beyond})
        assert str(error.value).startswith(f"{name}={beyond}: expected {expected}")


def test_every_bound_of_a_field_is_in_the_table():
    stated = {name: sum(field.metadata[side] is not None for side in ("least", "above", "most", "below"))
              for name, field in FIELDS.items()}  # fmt: skip
    assert {name: count for name, count in stated.items() if count} == {
        name: len(rows) for name, rows in BOUNDS.items()
    }


def test_a_section_by_itself_is_held_to_its_bounds():
    shape = KVShape(2, 2, 2, 4)
    with pytest.raises(InputError, match="attention_loss_weight=inf: expected a finite number, at least 0"):
        build_aligner(
            shape, shape, AlignmentSettings(alignment_mode="structural_kv", attention_loss_weight=float("inf"))
        )


@pytest.mark.parametrize("name", FIELDS)
def test_a_resumed_run_may_change_what_says_so(name, monkeypatch, tmp_path):
    (tmp_path / "config.yaml").touch()
    cfg = RunConfig(**REQUIRED)
    monkeypatch.setattr(resume_rules, "load_recipe", lambda _: dataclasses.asdict(cfg) | {name: "another"})
    if name in MAY_CHANGE:
        return check_resumable(cfg, tmp_path / "config.yaml")
    with pytest.raises(
        InputError, match=rf"--{name} .*: the checkpoint .* was trained with another; expected the same"
    ):
        check_resumable(cfg, tmp_path / "config.yaml")


@pytest.mark.parametrize("name", FIELDS)
def test_a_result_is_the_one_asked_for_unless_a_setting_of_its_identity_differs(name):
    one, other = (plan._hash({"run": {"seed": 0, name: value}}) for value in ("one", "another"))
    assert (one == other) == (name in NO_IDENTITY)
