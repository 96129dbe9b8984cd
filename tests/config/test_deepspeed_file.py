"""The DeepSpeed configurations: what each file says, what the engines get, and whether DeepSpeed's schema agrees."""

import copy
import json
from pathlib import Path

import pytest

from kvds.config import RunConfig
from kvds.config.deepspeed_file import compute_dtype, load_deepspeed_config
from kvds.config.deepspeed_keys import NESTED, ZERO
from kvds.config.engine_config import student_engine_config, teacher_engine_config
from kvds.errors import InputError

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"
FILES = sorted(path.name for path in FOLDER.glob("*.json"))


def run(**changes: object) -> RunConfig:
    return RunConfig(**{"model_name": "gpt2", "output_dir": "x", "batch_size": 4, **changes})


def test_the_files_that_are_promised_are_there():
    promised = {
        "zero1.json",
        "zero2.json",
        "zero3.json",
        "zero3_offload.json",
        "zero3_cpu.json",
        "zero3_fp32.json",
        "zero2_fp32.json",
    }
    assert promised <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_every_file_says_what_its_name_says(name):
    raw = load_deepspeed_config(FOLDER / name)
    zero = raw["zero_optimization"]
    bf16 = "bf16" in name or not ("fp32" in name or "cpu" in name)
    assert zero["stage"] == int(name.removeprefix("zero")[0])
    assert compute_dtype(raw) == ("bf16" if bf16 else "fp32")
    assert ("offload_optimizer" in zero) == ("offload" in name)
    assert isinstance(raw["gradient_clipping"], float)
    # Micro steps added up in bf16 lose small gradients; without ZeRO DeepSpeed 0.19 adds them up in no other way.
    assert not bf16 or raw["data_types"]["grad_accum_dtype"] == ("fp32" if zero["stage"] else "bf16")
    assert not {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"} & set(raw)


@pytest.mark.parametrize("name", FILES)
def test_the_student_gets_its_batch_arithmetic_and_its_clipping(name):
    raw = load_deepspeed_config(FOLDER / name)
    before = copy.deepcopy(raw)
    config = student_engine_config(raw, run(gradient_accumulation_steps=3), world_size=2)
    assert raw == before
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [config[key] for key in sizes] == [24, 4, 3]
    assert config["gradient_clipping"] == raw["gradient_clipping"]
    assert student_engine_config(raw, run(max_grad_norm=0.0), 1)["gradient_clipping"] == 0.0
    assert student_engine_config(raw, run(max_grad_norm=0.5), 1)["gradient_clipping"] == 0.5
    assert config["zero_optimization"] == raw["zero_optimization"]


def test_clipping_is_written_where_the_file_has_none():
    config = student_engine_config({"zero_optimization": {"stage": 2}}, run(), 1)
    assert config["gradient_clipping"] == 0.0


def test_the_timer_that_waits_for_the_device_is_off_unless_the_file_turns_it_on():
    deepspeed_config = pytest.importorskip("deepspeed.runtime.config").DeepSpeedConfig
    off = student_engine_config({"zero_optimization": {"stage": 0}}, run(), 1)
    assert deepspeed_config(off).timers_config.enabled is False
    on = {"enabled": True, "synchronized": False}
    config = student_engine_config({"zero_optimization": {"stage": 0}, "timers": {"throughput": on}}, run(), 1)
    assert config["timers"]["throughput"] == on


def test_batch_sizes_in_a_file_may_agree():
    raw = {"train_batch_size": 16, "gradient_accumulation_steps": 2, "zero_optimization": {"stage": 3}}
    config = student_engine_config(raw, run(gradient_accumulation_steps=2), world_size=2)
    assert config["train_micro_batch_size_per_gpu"] == 4


def test_sgd_is_let_through_also_with_offloading():
    raw = load_deepspeed_config(FOLDER / "zero3_offload.json")
    config = student_engine_config(raw, run(optimizer="sgd"), 1)
    assert config["zero_allow_untested_optimizer"] is True and config["zero_force_ds_cpu_optimizer"] is False
    assert "zero_force_ds_cpu_optimizer" not in student_engine_config(raw, run(), 1)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("placement", ["zero3", "zero3_offload"])
def test_the_teacher_is_sharded_and_trains_nothing(name, placement):
    raw = load_deepspeed_config(FOLDER / name)
    config = teacher_engine_config(raw, run(teacher_placement=placement, gradient_accumulation_steps=4), world_size=2)
    zero = config["zero_optimization"]
    assert zero["stage"] == 3
    assert not {"optimizer", "scheduler"} & set(config) and "offload_optimizer" not in zero
    assert ("offload_param" in zero) == (placement == "zero3_offload")
    assert compute_dtype(config) == compute_dtype(raw)
    assert (config["train_batch_size"], config["gradient_accumulation_steps"]) == (8, 1)
    for key in ("stage3_param_persistence_threshold", "stage3_max_live_parameters"):
        assert zero.get(key) == raw["zero_optimization"].get(key)


@pytest.mark.parametrize("name", FILES)
def test_deepspeed_accepts_every_file(name):
    deepspeed_config = pytest.importorskip("deepspeed.runtime.config").DeepSpeedConfig
    raw = load_deepspeed_config(FOLDER / name)
    student = student_engine_config(raw, run(gradient_accumulation_steps=2, max_grad_norm=0.25), world_size=1)
    accepted = deepspeed_config(json.loads(json.dumps(student)))
    assert accepted.zero_config.stage == raw["zero_optimization"]["stage"]
    assert (accepted.train_batch_size, accepted.gradient_accumulation_steps) == (8, 2)
    assert accepted.gradient_clipping == 0.25
    assert accepted.bfloat16_config.enabled == (compute_dtype(raw) == "bf16")
    teacher = teacher_engine_config(raw, run(teacher_placement="zero3_offload"), world_size=1)
    accepted = deepspeed_config(json.loads(json.dumps(teacher)))
    assert accepted.zero_config.stage == 3 and accepted.zero_config.offload_param.device == "cpu"
    assert accepted.optimizer_name is None and accepted.scheduler_name is None


def test_the_known_keys_are_deepspeeds_own():
    schema = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig.model_fields
    names = {field.alias or name for name, field in schema.items()}
    assert set(ZERO) <= names
    left_out = {
        "cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory", "stage3_gather_fp16_weights_on_model_save",
        "legacy_stage1", "elastic_checkpoint", "save_muon_momentum_buffer_in_memory", "zenflow",
    }  # fmt: skip
    assert names - set(ZERO) <= left_out


def test_keys_of_the_sections_within_are_deepspeeds_own():
    precision = pytest.importorskip("deepspeed.runtime.precision_config")
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.zero import offload_config
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig

    schemas = {
        "bf16": precision.DeepSpeedBF16Config,
        "zero_optimization.offload_param": offload_config.DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.offload_optimizer": offload_config.DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.leaf_module": DeepSpeedZeroLeafModuleConfig,
        "tensorboard": TensorBoardConfig,
        "csv_monitor": CSVConfig,
        "wandb": WandbConfig,
        "comet": CometConfig,
    }
    for name, schema in schemas.items():
        assert set(NESTED[name]) == set(schema.model_fields), name


@pytest.mark.parametrize(
    ("key", "value"),
    [("train_batch_size", 64), ("train_micro_batch_size_per_gpu", 2), ("gradient_accumulation_steps", 3)],
)
def test_batch_arithmetic_of_file_and_flags_must_agree(key, value):
    cfg = run(gradient_accumulation_steps=2)
    with pytest.raises(InputError) as caught:
        student_engine_config({"zero_optimization": {"stage": 3}, key: value}, cfg, world_size=4)
    expected = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}[key]
    for part in (f"{key}={value}", f"= {expected}", "--", "same number", f"no {key} in the file"):
        assert part in str(caught.value)
