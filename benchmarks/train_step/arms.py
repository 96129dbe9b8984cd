"""The ways to train that ``bench`` compares, each as a function of a batch that does one whole step."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.train_step.ahead import InputTurns, copied_ahead
from benchmarks.train_step.workbench import Clock, Pair, build_model, held_bytes
from kvds.align import build_aligner
from kvds.align.layer_map import endpoint_map
from kvds.align.loss import state_names
from kvds.config.settings import AlignmentSettings
from kvds.data.batches import TokenBatch
from kvds.data.encoding import EncodedSample
from kvds.data.labels import LabelledPositions
from kvds.data.model_inputs import repacked, unpacked
from kvds.distillation.module import DistillationModule
from kvds.distillation.step import LossWeights, StepInput
from kvds.kv import KVShape, select_tokens
from kvds.teacher.cached import CachedTeacher, write_teacher_cache
from kvds.teacher.teacher import Teacher

LR = 1e-5


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        step: From a batch on the CPU to the loss, after forward, backward and optimizer (or a teacher's forward alone).
        held: Bytes of weights and optimizer state that it needs between steps.
        uses_teacher: Whether a teacher runs.
        trains: Whether a student is trained.
        packed: Whether it is given the samples in shared rows.
        prepare: What the step before would have done for a batch; not timed.
    """

    step: Callable[[TokenBatch], Tensor]
    held: Callable[[], int]
    uses_teacher: bool = True
    trains: bool = True
    packed: bool = False
    prepare: Callable[[TokenBatch], object] = lambda batch: None


class Workbench:
    """One teacher, one student and its AdamW, which all arms of a process share; each arm brings its own map."""

    def __init__(
        self,
        pair: Pair,
        device: torch.device,
        clock: Clock,
        *,
        samples: Sequence[EncodedSample] = (),
    ) -> None:
        self.samples, self.keep = samples, list[Any]()
        self.pair, self.device, self.clock = pair, device, clock
        self._teacher: nn.Module | None = None
        self._student: nn.Module | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    @property
    def teacher(self) -> Any:
        """Built when first asked for, frozen, in evaluation mode."""
        if self._teacher is None:
            self._teacher = build_model(self.pair.teacher, self.pair.dtype, self.device, 1)
            self._teacher.requires_grad_(False).eval()
        return self._teacher

    @property
    def student(self) -> Any:
        """Built when first asked for, in training mode."""
        if self._student is None:
            self._student = build_model(self.pair.student, self.pair.dtype, self.device, 2).train()
        return self._student

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The student's fused AdamW, moments in the parameters' dtype."""
        if self._optimizer is None:
            self._optimizer = adamw(self.student)
        return self._optimizer

    def held(self, *maps: nn.Module, teacher: bool = True, student: bool = True) -> int:
        """Bytes of what an arm needs between steps: weights, and two moments of what it trains."""
        trained = [self.student if student else None, *maps]
        return held_bytes(self.teacher if teacher else None) + 3 * held_bytes(*trained)


def adamw(*modules: nn.Module) -> torch.optim.Optimizer:
    """Fused AdamW over all parameters."""
    return torch.optim.AdamW([p for module in modules for p in module.parameters()], lr=LR, fused=True)


def _finish(bench: Workbench, loss: Tensor, *optimizers: torch.optim.Optimizer) -> Tensor:
    with bench.clock.phase("backward"):
        loss.backward()
    with bench.clock.phase("optimizer"):
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def time_forward(module: nn.Module, clock: Clock) -> None:
    """Have a module's forward counted as the phase ``align``."""
    open_phases: list[Any] = []

    def begin(*_: Any) -> None:
        open_phases.append(clock.phase("align"))
        open_phases[-1].__enter__()

    def end(*_: Any) -> None:
        open_phases.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(begin)
    module.register_forward_hook(end)


def _cached(bench: Workbench, teacher: Teacher, cfg: AlignmentSettings) -> CachedTeacher:
    """The teacher's states of all samples on disk, in its own dtype, for as long as the bench lives."""
    folder = tempfile.TemporaryDirectory()
    bench.keep.append(folder)
    store = "bf16" if bench.pair.dtype == torch.bfloat16 else "fp32"
    made_of = {"parts": " ".join(state_names(cfg))}
    write_teacher_cache(
        Path(folder.name), teacher, bench.samples,
        lambda rows: select_tokens(cfg.kv_method, cfg.kv_budget, rows.segment_ids, rows.attention_mask),
        fingerprint=made_of, store=store, batch_size=8, shard_samples=64, device=bench.device,
    )  # fmt: skip
    return CachedTeacher(Path(folder.name), dtype=bench.pair.dtype, device=bench.device, fingerprint=made_of)


def kvds_step(
    bench: Workbench,
    *,
    weights: LossWeights,
    checkpointing: bool = False,
    offload: bool = False,
    packed: bool = False,
    cached: bool = False,
    overlap: bool = False,
    **alignment: Any,
) -> Arm:
    """A step as ``kvds.training.run`` does it, without an engine; ``alignment`` are fields of ``AlignmentSettings``."""
    cfg = AlignmentSettings(**{"alignment_mode": "none", **alignment})
    uses_kv, uses_teacher = cfg.alignment_mode != "none", cfg.alignment_mode != "none" or weights.logit_kd > 0
    aligner = None
    if uses_kv:
        shapes = [KVShape.from_config(config) for config in (bench.pair.student, bench.pair.teacher)]
        aligner = build_aligner(*shapes, cfg).to(bench.device)
        time_forward(aligner, bench.clock)
    module = DistillationModule(bench.student, aligner, offload_checkpoints=offload)
    teacher: Teacher | CachedTeacher | None = None
    if uses_teacher:
        teacher = Teacher(
            bench.teacher, device=bench.device, wants_states=uses_kv, wants_hidden=weights.logit_kd > 0,
            parts=state_names(cfg),
        )  # fmt: skip
    if cached and teacher is not None:
        teacher = _cached(bench, teacher, cfg)
    optimizers = [bench.optimizer, *([adamw(aligner)] if aligner is not None else [])]

    def make_input(batch: TokenBatch) -> StepInput:
        labelled = LabelledPositions.from_labels(batch.labels).to(bench.device)
        batch = batch.to(bench.device)
        selection = None
        if uses_kv:
            rows = unpacked(batch)
            selection = select_tokens(cfg.kv_method, cfg.kv_budget, rows.segment_ids, rows.attention_mask)
            selection = repacked(selection, batch)
        output = teacher(batch, selection) if teacher is not None else None
        head = teacher.head if teacher is not None and weights.logit_kd else None
        return StepInput(batch, labelled, selection, output, head, weights)

    turns = InputTurns(
        make_input, bench.clock, weights, device=bench.device, ahead=overlap or copied_ahead(teacher, bench.device),
        cache=teacher if isinstance(teacher, CachedTeacher) else None,
    )  # fmt: skip

    def step(batch: TokenBatch) -> Tensor:
        if checkpointing:
            bench.student.gradient_checkpointing_enable({"use_reentrant": False})
        inputs = turns.take(batch)
        with bench.clock.phase("forward"):
            loss, _ = module(inputs)
        turns.run_ahead(batch)
        _finish(bench, loss, *optimizers)
        turns.end()
        if checkpointing:
            bench.student.gradient_checkpointing_disable()
        return loss.detach()

    maps = [] if aligner is None else [aligner]
    held = partial(bench.held, *maps, teacher=uses_teacher and not cached)
    return Arm(step, held, uses_teacher, packed=packed, prepare=turns.prepare)


def teacher_forward(bench: Workbench) -> Arm:
    """The whole backbone of the teacher, no head, nothing captured: what a teacher must cost at least."""

    @torch.no_grad()
    def step(batch: TokenBatch) -> Tensor:
        with bench.clock.phase("teacher"):
            batch = batch.to(bench.device)
            hidden = bench.teacher.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).last_hidden_state
        return hidden.new_zeros(())

    return Arm(step, lambda: bench.held(student=False), trains=False)


def plain_task(bench: Workbench) -> Arm:
    """What ``transformers`` users write: ``model(labels=…)`` with full logits."""

    def step(batch: TokenBatch) -> Tensor:
        with bench.clock.phase("forward"):
            batch = batch.to(bench.device)
            loss = bench.student(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, use_cache=False
            ).loss
        return _finish(bench, loss, bench.optimizer)

    return Arm(step, lambda: bench.held(teacher=False), uses_teacher=False)


def _cache_layers(output: Any) -> list[tuple[Tensor, Tensor]]:
    cache = getattr(output, "cache", None)  # transformers 5.2x renames past_key_values
    cache = output.past_key_values if cache is None else cache
    return [(layer.keys, layer.values) for layer in cache.layers]


class _PerLayerMaps(nn.Module):
    def __init__(self, pair: Pair) -> None:
        super().__init__()
        student, teacher = (KVShape.from_config(config) for config in (pair.student, pair.teacher))
        widths = [shape.num_key_value_heads * shape.head_dim for shape in (student, teacher)]
        self.layers = endpoint_map(student.num_hidden_layers, teacher.num_hidden_layers)
        count = student.num_hidden_layers
        self.keys = nn.ModuleList(nn.Linear(*widths) for _ in range(count))
        self.values = nn.ModuleList(nn.Linear(*widths) for _ in range(count))


def earlier(bench: Workbench) -> Arm:
    """The earlier project's step: full logits, keys and values out of cache objects, for the student from a second
    forward, and a loop over layers with one linear map each. Rows are padded as everybody's here, to the longest.
    """
    maps = _PerLayerMaps(bench.pair).to(bench.device, bench.pair.dtype)
    own = adamw(maps)

    def step(batch: TokenBatch) -> Tensor:
        with bench.clock.phase("teacher"), torch.no_grad():
            batch = batch.to(bench.device)
            ids = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            teacher = _cache_layers(bench.teacher(**ids, use_cache=True))
        with bench.clock.phase("forward"):
            task = bench.student(**ids, labels=batch.labels, use_cache=False).loss
            student = _cache_layers(bench.student(**ids, use_cache=True))
        with bench.clock.phase("forward"), bench.clock.phase("align"):
            mask = batch.attention_mask[..., None].to(task.dtype)
            kv = task.new_zeros(())
            for i, layer in enumerate(maps.layers):
                for side, heads in enumerate((maps.keys, maps.values)):
                    found = heads[i](student[i][side].transpose(1, 2).flatten(2))
                    wanted = teacher[layer][side].transpose(1, 2).flatten(2)
                    error = F.mse_loss(found, wanted, reduction="none") * mask
                    kv = kv + error.sum() / (mask.sum() * error.shape[-1])
            loss = task + kv / (2 * len(maps.layers))
        return _finish(bench, loss, bench.optimizer, own)

    return Arm(step, lambda: bench.held(maps))


KV = LossWeights(task=1.0, kv=1.0)
# What the results files describe: keys and values. The arm of the default, values alone, is named so.
STRUCTURED = {"alignment_mode": "structured", "kv_parts": "kv"}

# On a CPU a teacher that runs ahead runs beside nothing.
ONLY_ON_GPU = ("kvds_structured_overlap",)
# Arms in the order of the table. The first two are what a step must cost at least.
ARMS: dict[str, Callable[[Workbench], Arm]] = {
    "task_only": lambda bench: kvds_step(bench, weights=LossWeights()),
    "teacher_forward": teacher_forward,
    "kvds_flat": lambda bench: kvds_step(bench, weights=KV, alignment_mode="flat", kv_parts="kv"),
    "kvds_structured": lambda bench: kvds_step(bench, weights=KV, **STRUCTURED),
    "kvds_structured_values": lambda bench: kvds_step(bench, weights=KV, alignment_mode="structured"),
    "kvds_structured_endpoint": lambda bench: kvds_step(bench, weights=KV, **STRUCTURED, layer_map="endpoint"),
    "kvds_structured_share_dim": lambda bench: kvds_step(bench, weights=KV, **STRUCTURED, map_proj_share_dim=True),
    "kvds_structured_crop25": lambda bench: kvds_step(
        bench, weights=KV, **STRUCTURED, kv_method="right_crop", kv_budget=0.25
    ),
    "kvds_structured_checkpointing": lambda bench: kvds_step(bench, weights=KV, **STRUCTURED, checkpointing=True),
    "kvds_structured_checkpointing_offload": lambda bench: kvds_step(
        bench, weights=KV, **STRUCTURED, checkpointing=True, offload=True
    ),
    "kvds_structured_packed": lambda bench: kvds_step(bench, weights=KV, **STRUCTURED, packed=True),
    "kvds_structured_overlap": lambda bench: kvds_step(bench, weights=KV, **STRUCTURED, overlap=True),
    "kvds_structured_cached": lambda bench: kvds_step(bench, weights=KV, **STRUCTURED, cached=True),
    "kvds_structured_values_packed": lambda bench: kvds_step(
        bench, weights=KV, alignment_mode="structured", packed=True
    ),
    "kvds_structured_values_cached": lambda bench: kvds_step(
        bench, weights=KV, alignment_mode="structured", cached=True
    ),
    "task_only_packed": lambda bench: kvds_step(bench, weights=LossWeights(), packed=True),
    "kvds_logit_kd": lambda bench: kvds_step(bench, weights=LossWeights(task=0.0, logit_kd=1.0)),
    "plain_task": plain_task,
    "earlier": earlier,
}
