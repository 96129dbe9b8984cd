"""Settings that nothing in a run reads: refused where the flag that they need was forgotten, told where it rests."""

import dataclasses

import pytest

from kvds.config import RunConfig
from kvds.config.recipe import parse_run_config
from kvds.config.unread_settings import NEEDS, unread_rules
from kvds.errors import InputError

FIELDS = {field.name: field for field in dataclasses.fields(RunConfig)}
RUN = ["--teacher_name", "gpt2", "--student_name", "gpt2", "--output_dir", "unset"]
KD = "--logit_kd_weight 1"
KEYS = "--kv_parts kv"
# Flag with a value of its own → what makes a run read it (beside the defaults) → what makes it rest.
TABLE = {
    "--model_name gpt2": (None, ""),
    "--teacher_init random": ("", "--alignment_mode none"),
    "--teacher_config_overrides a=1": ("", "--kv_weight 0"),
    "--teacher_quantization 8bit": ("", "--kv_weight 0"),
    "--teacher_placement zero3": ("", "--alignment_mode none", "--teacher_cache kvds"),
    "--teacher_overlap": ("", "--alignment_mode none"),
    "--teacher_tp_size 4": ("--teacher_placement tensor_parallel", "--teacher_placement zero3"),
    "--checkpoint_offload": ("--gradient_checkpointing", "--no_gradient_checkpointing"),
    "--lora_alpha 4": ("--lora_r 2", "--lora_r none"),
    "--lora_dropout 0.1": ("--lora_r 2", "--lora_r none"),
    "--lora_target_modules q_proj": ("--lora_r 2", "--lora_r none"),
    "--columns text=a": ("--datasets owner/name", "--datasets gsm8k"),
    "--data_format text": ("--datasets owner/name", "--datasets gsm8k"),
    "--assistant_turns last": ("--datasets owner/name", "--datasets gsm8k"),
    "--streaming --subset_size 9": ("--datasets owner/name", "--datasets gsm8k"),
    "--synthetic_problems 9": ("", "--datasets gsm8k"),
    "--direction teacher_to_student": ("", "--alignment_mode none", "--kv_weight 0"),
    "--aligner_update frozen": ("", "--kv_weight 0"),
    "--layer_map endpoint": ("", "--alignment_mode none"),
    "--map_start pca": ("", "--alignment_mode none"),
    "--align_tokens segment": ("", "--kv_weight 0"),
    "--kv_method uniform --kv_budget 4": ("", "--alignment_mode none"),
    "--kv_budget 4 --kv_method uniform": ("", "--alignment_mode none"),
    "--teacher_kv shuffled": ("", "--alignment_mode none"),
    "--kv_parts k": ("", "--alignment_mode none"),
    "--value_metric output": ("", "--kv_weight 0"),
    "--token_weights attention": ("", "--kv_weight 0"),
    "--kv_loss l1": ("", "--alignment_mode none"),
    "--kv_weight_schedule linear": ("", "--kv_weight 0"),
    "--kv_weight_until 0.5": ("", "--kv_weight 0"),
    "--layer_groups 2": ("", "--kv_weight 0"),
    "--head_groups 2": ("", "--kv_weight 0"),
    "--teacher_cache kvds": ("", "--kv_weight 0"),
    "--kv_weight 1": ("", "--alignment_mode none"),
    "--calibration_batches 2": ("", "--alignment_mode none"),
    "--aligner_lr 0.1": ("", "--alignment_mode none", "--aligner_update frozen"),
    "--map_proj_share_dim": ("", "--alignment_mode flat", "--kv_weight 0"),
    "--map_proj_init_uniform": ("", "--alignment_mode flat", "--kv_weight 0"),
    "--impl lean": ("", "--alignment_mode flat"),
    "--kv_rope post": (KEYS, "--kv_parts v", f"{KEYS} --kv_weight 0"),
    "--no_mask_first_token": ("", "--align_tokens segment"),
    "--rkv_lambda 0.5": ("--kv_method rkv --kv_budget 9", "--kv_method keydiff --kv_budget 9"),
    "--observing_tokens 2": ("--kv_method snapkv --kv_budget 9", "--kv_method keydiff --kv_budget 9"),
    "--on_policy_max_new_tokens 9": ("--on_policy_share 0.5", "--on_policy_share 0"),
    "--on_policy_temperature 2": ("--on_policy_share 0.5", "--on_policy_share 0"),
    "--on_policy_top_p 0.5": ("--on_policy_share 0.5", "--on_policy_share 0"),
    "--logit_kd_temperature 2": (KD, "--logit_kd_weight 0"),
    "--logit_kd_loss jsd": (KD, "--logit_kd_weight 0"),
    "--logit_kd_top_k 5": (KD, "--logit_kd_weight 0"),
    "--logit_kd_beta 0.3": (f"{KD} --logit_kd_loss jsd", f"{KD} --logit_kd_loss reverse_kl", "--logit_kd_weight 0"),
    "--handoff_source_layers 2": ("--handoff_weight 1", "--handoff_weight 0"),
    "--epochs 9": ("", "--max_steps 5"),
    "--eval_steps 5": ("", "--eval_subset_size 0"),
    "--metric_for_best_model kv_loss": ("--early_stopping_patience 2 --eval_steps 5", "--no_load_best_model_at_end"),
    "--hub_model_id a/b": ("--push_to_hub", "--no_push_to_hub"),
    "--hub_private_repo": ("--push_to_hub", "--no_push_to_hub"),
}  # fmt: skip
# Settings that every run reads, whatever others say, and those that a mode has as its own (alignment_modes.py).
ALWAYS = {
    *("teacher_name", "teacher_names", "teacher_weights", "student_name", "student_init", "student_config_overrides"),
    *("tokenizer_name", "attn_implementation", "compile", "tf32", "gradient_checkpointing", "lora_r", "lora_config"),
    *("datasets", "chat_template", "data_dir", "data_cache", "subset_size", "max_length", "packing"),
    *("group_by_length", "pad_to_multiple_of", "on_bad_row", "max_lossy_rows", "eval_subset_size", "max_new_tokens"),
    *("alignment_mode", "kv_let_go", "task_weight", "logit_kd_weight", "handoff_weight", "batch_size", "weight_decay"),
    *("relation_kind", "relation_heads", "relation_units", "attention_loss_weight", "tokens_per_batch", "max_steps"),
    *("source_layers_per_target", "hidden_at", "on_policy_share"),
    *("gradient_accumulation_steps", "lr", "optimizer", "lr_scheduler_type", "warmup_ratio", "max_grad_norm", "seed"),
    *("load_best_model_at_end", "early_stopping_patience", "push_to_hub", "output_dir", "deepspeed_config"),
    *("logging_steps", "save_steps", "save_at_end", "resume", "change_global_batch", "keep_checkpoints"),
    *("max_minutes", "deterministic", "max_bad_steps", "rank_timeout", "report_to", "tracking_uri"),
    *("experiment_name", "run_name", "dry_run"),  # `kvds track` reads MLflow's of any run
}
# Read, or at rest, whatever else is not said: with the defaults no flag is missing.
ON_BY_DEFAULT = [flags for flags, (read, *_) in TABLE.items() if read == ""]
OFF_BY_DEFAULT = [flags for flags, (read, *_) in TABLE.items() if read]
RESTS = [(flags, rest) for flags, (_, *rests) in TABLE.items() for rest in rests]


@pytest.fixture(autouse=True)
def _with_a_hub(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "a token")


def name_of(flags: str) -> str:
    return flags.split()[0].removeprefix("--").removeprefix("no_")


def run_with(*flags: str) -> RunConfig:
    return parse_run_config([*RUN, *" ".join(flags).split()])


def test_every_setting_is_read_always_or_says_what_for():
    assert set(FIELDS) == ALWAYS | set(NEEDS) and not ALWAYS & set(NEEDS)
    assert {name_of(flags) for flags in TABLE} == set(NEEDS)
    assert all(switch in FIELDS for needs in NEEDS.values() for need in needs for switch in need.switches)


@pytest.mark.parametrize("flags", OFF_BY_DEFAULT)
def test_a_flag_whose_need_was_forgotten_is_refused(flags):
    with pytest.raises(InputError) as error:
        run_with(flags)
    assert str(error.value).startswith(f"{name_of(flags)}=") and "nothing reads it (leave --" in str(error.value)


@pytest.mark.parametrize("flags", OFF_BY_DEFAULT + ON_BY_DEFAULT)
def test_a_flag_that_is_read_is_not_told_of(flags):
    assert not [text for text in run_with(flags, TABLE[flags][0]).warnings if "nothing reads" in text]


@pytest.mark.parametrize(("flags", "rest"), RESTS)
def test_a_flag_that_rests_because_another_says_so_is_told_in_one_line(flags, rest):
    told = [text for text in run_with(flags, rest).warnings if text.startswith("nothing reads")]
    assert len(told) == 1 and f"{name_of(flags)}=" in told[0]


def test_what_is_refused_can_be_kept_as_the_message_says():
    with pytest.raises(InputError, match=r"say with --logit_kd_weight 0.0 that it shall rest"):
        run_with("--logit_kd_top_k 5")
    [told] = run_with("--logit_kd_top_k 5 --logit_kd_weight 0.0").warnings
    assert told == "nothing reads logit_kd_top_k=5 (that takes --logit_kd_weight above 0)"


def test_a_saved_configuration_can_be_read_and_started_again(tmp_path):
    """An earlier version took it: all that it says is given, so nothing was forgotten."""
    cfg = RunConfig(model_name="gpt2", output_dir=str(tmp_path), logit_kd_top_k=5)
    cfg.save(tmp_path / "config.yaml")
    assert parse_run_config(["--config", str(tmp_path / "config.yaml")]) == cfg
    assert [name for holds, name, *_ in unread_rules(cfg, ()) if not holds] == ["logit_kd_top_k"]
