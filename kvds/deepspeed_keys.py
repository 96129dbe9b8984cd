"""Which keys of DeepSpeed's JSON a run may set, what each takes, and which features a run cannot honour."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from kvds.config_values import near_miss, one_line
from kvds.errors import InputError


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


_KINDS: dict[str, Callable[[Any], bool]] = {
    "a section { … }": lambda value: isinstance(value, dict),
    "true or false": lambda value: isinstance(value, bool),
    "a number of at least 0": _is_number,
    "a whole number of at least 0": lambda value: _is_number(value) and value == int(value),
    "a text": lambda value: isinstance(value, str),
}
_SECTION, _SWITCH, _NUMBER, _COUNT, _TEXT = _KINDS


def _table(groups: dict[str, str]) -> dict[str, str]:
    return {key: kind for kind, keys in groups.items() for key in keys.split()}


# Of DeepSpeed 0.19; tests/test_config_deepspeed.py compares ZERO with DeepSpeed's own schema.
TOP_LEVEL = _table(
    {
        _SECTION: """zero_optimization bf16 fp16 torch_autocast data_types activation_checkpointing aio checkpoint
            comms_logger flops_profiler timers tensorboard csv_monitor wandb comet""",
        _SWITCH: """prescale_gradients wall_clock_breakdown memory_breakdown dump_state disable_allgather
            disable_python_gc zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
            managed_gradient_accumulation""",
        _NUMBER: "gradient_clipping gradient_predivide_factor",
        _COUNT: "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps steps_per_print",
        _TEXT: "communication_data_type gradient_allreduce_op log_level",
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
        _COUNT: """stage reduce_bucket_size allgather_bucket_size sub_group_size stage3_prefetch_bucket_size
            stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters
            stage3_max_reuse_distance stage3_module_granularity_threshold zero_hpz_partition_size""",
    }
)

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
