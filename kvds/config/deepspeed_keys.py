"""Keys of DeepSpeed's JSON that a run may set, what each takes, and which features a run cannot honour."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from kvds.errors import InputError, near_miss, one_line


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


_KINDS: dict[str, Callable[[Any], bool]] = {
    "a section { … }": lambda value: isinstance(value, dict),
    "true or false": lambda value: isinstance(value, bool),
    "a number of at least 0": _is_number,
    "a whole number of at least 0": lambda value: _is_number(value) and value == int(value),
    "a whole number of at least 1": lambda value: _is_number(value) and value >= 1 and value == int(value),
    "a text": lambda value: isinstance(value, str),
    "a list of texts": lambda value: isinstance(value, list) and all(isinstance(entry, str) for entry in value),
    "fp32 or bf16": lambda value: value in ("fp32", "bf16"),
    "none, cpu or nvme": lambda value: value in ("none", "cpu", "nvme"),
    "debug, info, warning, error or critical": lambda value: value in ("debug", "info", "warning", "error", "critical"),
    "anything": lambda value: True,
}
_SECTION, _SWITCH, _NUMBER, _COUNT, _POSITIVE, _TEXT, _TEXTS, _DTYPE, _DEVICE, _LEVEL, _ANY = _KINDS


def _table(groups: dict[str, str]) -> dict[str, str]:
    return {key: kind for kind, keys in groups.items() for key in keys.split()}


# Of DeepSpeed 0.19; tests/config/test_deepspeed_file.py compares ZERO with DeepSpeed's own schema.
TOP_LEVEL = _table(
    {
        _SECTION: """zero_optimization bf16 fp16 torch_autocast data_types activation_checkpointing aio checkpoint
            comms_logger flops_profiler timers tensorboard csv_monitor wandb comet""",
        _SWITCH: """prescale_gradients wall_clock_breakdown memory_breakdown dump_state disable_allgather
            disable_python_gc zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
            managed_gradient_accumulation""",
        _NUMBER: "gradient_clipping",
        _POSITIVE: "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps steps_per_print",
        _TEXT: "gradient_allreduce_op",
        _DTYPE: "communication_data_type",
        _LEVEL: "log_level",
    }
)
ZERO = _table(
    {
        _SECTION: "offload_param offload_optimizer leaf_module",
        _SWITCH: """contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions
            overlap_comm
            load_from_fp32_weights stage3_gather_16bit_weights_on_model_save stage3_use_all_reduce_for_fetch_params
            stage3_allgather_sequential ignore_unused_parameters round_robin_gradients parameter_alignment
            zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear
            pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks
            compute_grad_norm""",
        _POSITIVE: "reduce_bucket_size allgather_bucket_size sub_group_size",
        _COUNT: """stage stage3_prefetch_bucket_size
            stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters
            stage3_max_reuse_distance stage3_module_granularity_threshold zero_hpz_partition_size""",
    }
)

NESTED: dict[str, dict[str, str]] = {
    "bf16": _table(
        {
            _SWITCH: """enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads
                bf16_optimizer_states"""
        }
    ),
    "data_types": _table({_DTYPE: "grad_accum_dtype"}),
    "activation_checkpointing": _table(
        {
            _SWITCH: """partition_activations contiguous_memory_optimization synchronize_checkpoint_boundary profile
                cpu_checkpointing""",
            _POSITIVE: "number_checkpoints",
        }
    ),
    "aio": _table(
        {
            _POSITIVE: "block_size queue_depth intra_op_parallelism thread_count",
            _SWITCH: "single_submit overlap_events use_gds",
        }
    ),
    "flops_profiler": _table(
        {_SWITCH: "enabled detailed", _ANY: "recompute_fwd_factor profile_step module_depth top_modules output_file"}
    ),
    "comms_logger": _table({_SWITCH: "enabled prof_all verbose debug", _TEXTS: "prof_ops"}),
    "tensorboard": _table({_SWITCH: "enabled", _TEXT: "output_path job_name"}),
    "csv_monitor": _table({_SWITCH: "enabled", _TEXT: "output_path job_name"}),
    "wandb": _table({_SWITCH: "enabled", _TEXT: "group team project"}),
    "comet": _table(
        {
            _SWITCH: "enabled online",
            _POSITIVE: "samples_log_interval",
            _TEXT: "project workspace api_key experiment_name experiment_key mode",
        }
    ),
    "zero_optimization.offload_param": _table(
        {_DEVICE: "device", _TEXT: "nvme_path", _COUNT: "buffer_count buffer_size max_in_cpu", _SWITCH: "pin_memory"}
    ),
    "zero_optimization.offload_optimizer": _table(
        {
            _DEVICE: "device",
            _TEXT: "nvme_path",
            _COUNT: "buffer_count",
            _SWITCH: "pin_memory pipeline_read pipeline_write fast_init super_offload",
            _NUMBER: "ratio cpuadam_cores_perc",
        }
    ),
    "zero_optimization.leaf_module": _table({_TEXTS: "classes names name_suffixes"}),
}
"""Keys of the sections within; those that stand here are read as DeepSpeed reads them, or dropped by it silently."""

MONITOR_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
"""Trackers of DeepSpeed's own and the package that each needs."""

REFUSED = {
    "pipeline": "teacher and student are not cut into pipeline stages",
    "tensor_parallel": "layers are not split over ranks",
    "sequence_parallel_size": "rows are not split over ranks",
    "expert_parallel": "no supported family has experts",
    "data_efficiency": "kvds orders the batches itself, by --datasets and --seed",
    "hybrid_engine": "generation runs outside the engine",
    "autotuning": "it would change batch sizes that the flags set",
    "compile": "captured keys and values would leave the compiled graph",
    "amp": "DeepSpeed no longer has it (bf16 is there)",
    "elasticity": "DeepSpeed no longer has it",
    "gradient_predivide_factor": "it keeps gradients of fp16 small, which is refused, too",
}
"""Sections of DeepSpeed that a run cannot honour, and why."""


def check_keys(section: dict[str, Any], known: dict[str, str], *, place: str, prefix: str = "") -> None:
    """Refuse a key that DeepSpeed would ignore and a value that it would read as something else.

    Args:
        section: The whole file or one section of it.
        known: ``TOP_LEVEL`` or ``ZERO``.
        place: What to name in an error: ``deepspeed_config=FILE``.
        prefix: The section's name and a dot.

    Raises:
        InputError: for the first such key.
    """
    for key, value in section.items():
        if key not in known:
            raise InputError(
                f"{place}: unknown key {prefix}{one_line(key)}{near_miss(key, known)} "
                f"(expected a key of DeepSpeed 0.19 that kvds knows; rename or remove it)"
            )
        if not _KINDS[known[key]](value):
            shown = json.dumps(value)[:80]
            raise InputError(f"{place}: {prefix}{key}={shown}: expected {known[key]} (correct or remove it)")
