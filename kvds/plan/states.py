"""Memory of a rank between steps, and what DeepSpeed adds during one: weights, gradients, optimizer, buckets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from kvds.align import ALIGNERS
from kvds.config import RunConfig
from kvds.kv import KVShape
from kvds.models.adapters import add_adapters
from kvds.models.quantized import BITS

_ADAM_NUMBERS = 2  # first and second moment
_FP32 = 4


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a model.

    Attributes:
        total: All of them, tied ones once.
        layer: Of the largest layer (or the embedding, where that is larger).
        backbone: Those that a forward without head multiplies with: all but embeddings, head and vectors.
        head: Of the language-model head.
        trained: Of adapters, where these alone train; else as ``total``.
    """

    total: int
    layer: int
    backbone: int
    head: int
    trained: int


def model_size(config: PreTrainedConfig, adapters: Any = None) -> ModelSize:
    """Counted on the meta device: no memory, no weights.

    Args:
        config: Of the model.
        adapters: From :func:`kvds.models.adapters.adapter_config`; None: all of it trains.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        if adapters is not None:
            add_adapters(model, adapters, seed=0)
    counted = {id(p): p.numel() for p in model.parameters()}
    trained = sum({id(p): p.numel() for p in model.parameters() if p.requires_grad}.values())
    head = model.get_output_embeddings().weight
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} | {id(head)}
    matrices = sum(p.numel() for p in model.parameters() if p.dim() >= 2 and id(p) not in tables)
    layer = matrices // config.num_hidden_layers
    return ModelSize(sum(counted.values()), max(layer, head.numel()), matrices, head.numel(), trained)


def aligner_size(student: KVShape, teacher: KVShape, cfg: RunConfig) -> int:
    """Learned numbers of the aligner; a frozen one has none."""
    frozen = cfg.aligner_update == "frozen"
    return 0 if frozen else ALIGNERS[cfg.alignment_mode].parameter_count(student, teacher, cfg)


def teacher_weights(cfg: RunConfig, size: ModelSize, element: int) -> int:
    """Bytes of a whole teacher: matrices of its layers in the bits asked for, all else in ``element`` bytes."""
    bits = BITS.get(cfg.teacher_quantization, 8 * element)
    return size.backbone * bits // 8 + element * (size.total - size.backbone)


@dataclass(frozen=True)
class StateMemory:
    """Bytes per rank on the GPU, and in host memory where parts are offloaded.

    Attributes:
        weights: Student and aligner in the compute precision, sharded with stage 3.
        master: The optimizer's fp32 copy of them.
        optimizer: Its moments.
        gradients: Accumulated ones.
        gradients_held: Whether they are there between steps, too (stages below 3 without accumulation make them anew).
        buckets: Where gradients wait for the others.
        gathered: Whole parameters of the student while its layers run (stage 3, more than one rank).
        teacher: The teacher's weights as placed.
        teacher_gathered: Whole parameters of the teacher while it runs.
        update: What the optimizer step adds.
        host: In host memory.
        copy: The student once more, where it writes completions.
    """

    weights: int
    master: int
    optimizer: int
    gradients: int
    gradients_held: bool
    buckets: int
    gathered: int
    teacher: int
    teacher_gathered: int
    update: int
    host: int
    copy: int = 0

    @property
    def held(self) -> int:
        """Between steps."""
        kept = self.gradients if self.gradients_held else 0
        return self.weights + self.master + self.optimizer + kept + self.buckets + self.teacher + self.copy


def state_memory(
    cfg: RunConfig,
    raw: dict[str, Any],
    *,
    student: ModelSize,
    aligner: int,
    teacher: ModelSize | None,
    element: int,
    ranks: int,
    device: str,
) -> StateMemory:
    """What DeepSpeed 0.19 allocates for a run of ``ranks`` ranks under the configuration ``raw``.

    Args:
        cfg: The run.
        raw: The DeepSpeed configuration file.
        student: Its size.
        aligner: Parameters of the aligner.
        teacher: Its size; None where nothing reads it.
        element: Bytes of a weight.
        ranks: In all.
        device: ``"cpu"`` or ``"cuda"``.
    """
    zero = raw["zero_optimization"]
    stage = zero["stage"]
    count = student.total + aligner
    shard = -(-count // ranks)
    trained = student.trained + aligner
    trained_shard = -(-trained // ranks)
    low = element < _FP32  # bf16: an fp32 copy is trained
    weights = element * (shard if stage == 3 else count)
    optimizer_numbers = _ADAM_NUMBERS if cfg.optimizer == "adamw" else 0
    owned = trained_shard if stage >= 1 else trained
    # Stage 3 copies the weights for the optimizer in any precision; below, fp32 weights are trained in place.
    master = _FP32 * owned if stage == 3 or low or stage in (1, 2) else 0
    optimizer = _FP32 * optimizer_numbers * owned
    kept = {"fp32": 4, "bf16": 2, "fp16": 2}[raw.get("data_types", {}).get("grad_accum_dtype") or
                                             ("fp32" if element == _FP32 else "bf16")]  # fmt: skip
    gradients = {3: kept * trained_shard, 2: kept * trained_shard, 1: kept * trained, 0: element * trained}[stage]
    bucket = element * int(zero.get("reduce_bucket_size", 500_000_000))
    buckets = 0 if stage == 0 else bucket * (2 if stage < 3 and zero.get("overlap_comm") else 1)
    gathered = 0
    live = int(zero.get("stage3_max_live_parameters", 1_000_000_000))
    ahead = int(zero.get("stage3_prefetch_bucket_size", 50_000_000))
    if stage == 3 and ranks > 1:
        # A layer is kept until its backward where that comes within the reuse distance.
        whole = int(zero.get("stage3_max_reuse_distance", 1_000_000_000)) >= 2 * count
        gathered = element * min(count, live if whole else 2 * student.layer + ahead)
    teacher_bytes = teacher_gathered = host = 0
    if teacher is not None:
        shares = {"replicated": 1, "tensor_parallel": min(ranks, cfg.teacher_tp_size)}.get(cfg.teacher_placement, ranks)
        teacher_bytes = -(-teacher_weights(cfg, teacher, element) // shares)
        sharded = cfg.teacher_placement in ("zero3", "zero3_offload")
        if sharded and (ranks > 1 or cfg.teacher_placement == "zero3_offload"):
            teacher_gathered = element * min(teacher.total, live, 2 * teacher.layer + ahead)
        if cfg.teacher_placement == "zero3_offload":
            host, teacher_bytes = host + teacher_bytes, 0
    # Stage 3 flattens the gradients of a group into a copy for the step; AdamW on the CPU makes two more of that size.
    group = min(int(zero.get("sub_group_size", 1_000_000_000)), owned)
    gradients_held = stage == 3 or cfg.gradient_accumulation_steps > 1
    update = _FP32 * group if stage == 3 else 0 if gradients_held else gradients
    if cfg.optimizer == "adamw" and device == "cpu":
        update += 2 * _FP32 * group
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        host += master + optimizer + _FP32 * owned
        master = optimizer = update = 0
    if zero.get("offload_param", {}).get("device", "none") != "none":
        host, weights = host + weights, 0
        gathered = element * min(count, 2 * student.layer + ahead)
    return StateMemory(
        weights,
        master,
        optimizer,
        gradients,
        gradients_held,
        buckets,
        gathered,
        teacher_bytes,
        teacher_gathered,
        update,
        host,
        element * student.total if cfg.on_policy_share else 0,
    )
