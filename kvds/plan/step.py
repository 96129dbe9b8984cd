"""Memory of one micro-batch's forward and backward pass: the run's own modules, on fake tensors.

Models are simulated with two and with three layers, and what the third adds is added for each further one: layers are
alike, so that a model of any depth is planned in seconds.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, PreTrainedConfig

from kvds.align import build_aligner
from kvds.align.loss import PARTS, parts_of
from kvds.config import RunConfig
from kvds.config.alignment_modes import ALIGNMENT_MODES
from kvds.config.selection_methods import SELECTION_METHODS
from kvds.data.batches import TokenBatch
from kvds.data.labels import LabelledPositions
from kvds.data.model_inputs import model_inputs
from kvds.distillation.head_chunks import agreed_chunks, chunk_count, logit_divergence
from kvds.distillation.step import LossWeights, StepInput
from kvds.kv import HiddenStates, KVShape, KVStates, Selection, hidden_shape, open_capture
from kvds.kv.families import backbone
from kvds.kv.row_attention import run_attention
from kvds.models.compiled_layers import compile_layers, why_not_compiled
from kvds.models.family_check import attention_of
from kvds.plan.batch_shape import BatchShape, kv_bytes, lean_workspace
from kvds.plan.handoff import planned_continuation, planned_map
from kvds.plan.live_memory import LiveMemory, drop_gradients
from kvds.plan.stand_ins import COMPILED_PIECES, FusedStandIn, PlannedModule
from kvds.teacher.teacher import TeacherOutput

# The Triton kernels keep no projection; their partial sums and, with many heads, a chunk's mixed rows stay below this.
_TRITON_WORKSPACE = 64 * 2**20
# Chunks of the head that are simulated.
_HEAD_CHUNKS = 2


@dataclass(frozen=True)
class StepMemory:
    """Bytes beyond weights, gradients, optimizer and teacher.

    Attributes:
        peak: The most alive at once, all parts together.
        activations: Kept by the student's layers for the backward pass, without what only the KV loss keeps.
        logits: What the head adds at its worst moment.
        student_kv: Keys and values of the student that the KV loss keeps alive.
        teacher_kv: Keys and values of the teacher.
        aligner: What the KV loss adds: gradients of keys and values, and its workspace.
        teacher_forward: The most that the teacher's forward holds beside its keys and values.
        host: Activations that are kept in host memory instead.
        teacher_ahead: What the next micro-batch's teacher takes beside the student, where it is ahead.
        handoff: What the answers' forward over the mapped cache adds, and the map (``--handoff_weight``).
    """

    peak: int
    activations: int
    logits: int
    student_kv: int
    teacher_kv: int
    aligner: int
    teacher_forward: int
    host: int = 0
    teacher_ahead: int = 0
    handoff: int = 0


def _with_layers(config: PreTrainedConfig, count: int) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    for name in ("layer_types", "no_rope_layers"):
        if listed := getattr(config, name, None):
            setattr(config, name, [*listed[:count], *listed[-1:] * (count - len(listed))])
    config.num_hidden_layers = count
    return config


def _extrapolated(two: int, three: int, layers: int) -> int:
    """From two and three layers to as many as there are."""
    return two + (layers - 2) * (three - two)


def _tensors(inputs: StepInput) -> list[Tensor]:
    """All tensors that a step is given."""
    parts = [vars(inputs.batch), vars(inputs.labelled)]
    parts += [vars(part) for part in (inputs.selection, inputs.teacher, inputs.continuation) if part is not None]
    if inputs.continuation is not None:
        parts.append(vars(inputs.continuation.labelled))
    return [value for value in tree_iter(parts) if isinstance(value, Tensor)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    level = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.getLogger("transformers").setLevel(level)


def _model(config: PreTrainedConfig, cfg: RunConfig, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=attention_of(config, cfg.attn_implementation)
    )


class StepPlanner:
    """Plans micro-batches of one run.

    Args:
        cfg: The run.
        student: The student's configuration.
        teacher: The teacher's; None where nothing reads it.
        dtype: Of both models.
        device: ``"cpu"`` or ``"cuda"``, where the run will be.
    """

    def __init__(
        self,
        cfg: RunConfig,
        student: PreTrainedConfig,
        teacher: PreTrainedConfig | None,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        self.cfg, self.student, self.teacher, self.dtype, self.device = cfg, student, teacher, dtype, device
        shape = KVShape.from_config if cfg.uses_teacher_kv else KVShape.estimated
        self.student_shape = shape(student)
        self.teacher_shape = None if teacher is None else shape(teacher)
        self._element = torch.empty((), dtype=dtype).element_size()
        self._mode = ALIGNMENT_MODES[cfg.alignment_mode]
        self._hidden = self._mode.teacher_reads == "hidden"
        asked = cfg.compile == "on" or (cfg.compile == "auto" and device == "cuda")
        # With adapters a step is planned as without: they read what is kept already, and add a few columns to it.
        asked = asked and not cfg.uses_adapters
        self._compiled = asked and not why_not_compiled(student, run_attention(cfg.attn_implementation))
        # Positions that no key decides are chosen before the teacher's forward, which keeps them alone, and of them the
        # parts that are compared.
        self._keeps_all = self._hidden or SELECTION_METHODS[cfg.kv_method].reads_keys or cfg.teacher_kv == "shuffled"
        self._keeps_all |= cfg.handoff_weight > 0

    def plan(self, batch: BatchShape, *, checkpointing: bool) -> StepMemory:
        """Bytes of one micro-batch of ``batch``."""
        with_kv = self.cfg.uses_kv and self.teacher_shape is not None
        layers = self.student_shape.num_hidden_layers
        whole = both = [self._simulate(batch, count, checkpointing) for count in (2, 3)]
        if self.cfg.handoff_weight:
            both = [self._simulate(batch, count, checkpointing, handoff=False) for count in (2, 3)]
        bare = both
        if with_kv:
            bare = [self._simulate(batch, count, checkpointing, kv=False, handoff=False) for count in (2, 3)]

        def deep(pair: Sequence[tuple[int, ...]], which: int) -> int:
            return _extrapolated(pair[0][which], pair[1][which], layers)

        activations, peak = deep(bare, 0), deep(both, 1)
        student_kv = max(0, deep(both, 0) - activations)
        aligner = max(0, peak - deep(bare, 1) - student_kv)
        teacher_kv = self._teacher_output(batch)
        forward = self._teacher_forward(batch)
        return StepMemory(
            peak=self._with_teacher(batch, whole),
            activations=activations,
            logits=max(0, deep(bare, 1) - activations),
            student_kv=student_kv,
            teacher_kv=teacher_kv,
            aligner=aligner + (self._watch(batch) if with_kv else 0),
            teacher_forward=forward,
            host=deep(both, 2),
            teacher_ahead=self._ahead(teacher_kv, forward),
            handoff=max(0, deep(whole, 1) - peak),
        )

    def activations(self, batch: BatchShape, *, checkpointing: bool) -> int:
        """``plan(…).activations`` alone, from forward passes."""
        how = {"kv": False, "backward": False, "handoff": False}
        two, three = (self._simulate(batch, n, checkpointing, **how)[0] for n in (2, 3))
        return _extrapolated(two, three, self.student_shape.num_hidden_layers)

    def peak(self, batch: BatchShape, *, checkpointing: bool) -> int:
        """``plan(…).peak`` alone, in half the time."""
        return self._with_teacher(batch, [self._simulate(batch, count, checkpointing) for count in (2, 3)])

    def _with_teacher(self, batch: BatchShape, simulated: Sequence[tuple[int, ...]]) -> int:
        """The most alive at once, of student and teacher together."""
        layers, output = self.student_shape.num_hidden_layers, self._teacher_output(batch)
        watch = self._watch(batch) if self.cfg.uses_kv and self.teacher_shape is not None else 0
        _, peak, _, between = (_extrapolated(two, three, layers) for two, three in zip(*simulated, strict=True))
        if not self._runs_ahead:
            return peak + output + watch
        forward = self._teacher_forward(batch)
        beside = peak + watch + output + self._ahead(output, forward)
        # Without streams the next teacher runs between the student's forward and its backward pass.
        return beside if self.device == "cuda" else max(beside, between + 2 * output + forward)

    @property
    def _runs_ahead(self) -> bool:
        return self.cfg.teacher_ahead(self.device) and self.teacher is not None

    def _ahead(self, output: int, forward: int) -> int:
        """What stays of the next micro-batch's teacher, and on a GPU what it works with at the same time."""
        return 0 if not self._runs_ahead else output + (forward if self.device == "cuda" else 0)

    def _teacher_output(self, batch: BatchShape) -> int:
        size = 0
        if self.cfg.uses_teacher_kv and self.teacher_shape is not None:
            whole = self._states_bytes(self.teacher_shape, self._kept(batch), self._element)
            size += whole if self._keeps_all else self._compared(whole)
        if self.teacher is not None and self.cfg.logit_kd_weight:
            size += batch.rows * batch.tokens * self.teacher.hidden_size * self._element
        return size

    def _watch(self, batch: BatchShape) -> int:
        """Logging steps keep the KV loss's gradient in fp32 until the whole one arrives."""
        return self.compared_bytes(self.student_shape, batch, 4)

    def compared_bytes(self, shape: KVShape, batch: BatchShape, element: int) -> int:
        """Of one model's keys and values those of the parts that are compared, or its hidden states, whole rows."""
        whole = self._states_bytes(shape, batch, element)
        return whole if self._hidden else self._compared(whole)

    def _compared(self, whole: int) -> int:
        """Of bytes of keys and values those of the parts that the KV loss compares."""
        return whole * len(parts_of(self.cfg)) // len(PARTS["kv"])

    def _kept(self, batch: BatchShape) -> BatchShape:
        return batch if self._keeps_all else replace(batch, tokens=batch.slots)

    def _states_bytes(self, shape: KVShape, batch: BatchShape, element: int) -> int:
        """Of what is compared: keys and values, or hidden states."""
        return kv_bytes(hidden_shape(shape), batch, element) // 2 if self._hidden else kv_bytes(shape, batch, element)

    def _aligner(self, student: PreTrainedConfig, batch: BatchShape) -> Any:
        cfg, target = self.cfg, self.teacher_shape
        assert target is not None
        if not self._mode.fused or cfg.impl == "reference":
            return build_aligner(KVShape.from_config(student), target, cfg)
        source = self.student_shape
        workspace = _TRITON_WORKSPACE
        if self.device == "cpu" or cfg.token_weights == "attention":  # the kernel takes no weights
            pair = (source, target) if cfg.direction == "student_to_teacher" else (target, source)
            workspace = lean_workspace(*pair, cfg, batch, self.device)
        return FusedStandIn(parts_of(cfg), workspace)

    def _simulate(
        self,
        batch: BatchShape,
        layers: int,
        checkpointing: bool,
        kv: bool = True,
        backward: bool = True,
        handoff: bool = True,
    ) -> tuple[int, int, int, int]:
        """Bytes at the end of the student's forward, at the worst moment of forward and backward, in host memory, and
        between forward and backward.
        """
        cfg = self.cfg
        config = _with_layers(self.student, layers)
        aligned = kv and cfg.uses_kv and self.teacher_shape is not None
        handed = handoff and cfg.handoff_weight > 0
        memory = LiveMemory(self.device)
        with _quiet(), FakeTensorMode(allow_non_fake_inputs=True):
            student = _model(config, cfg, self.dtype)
            student.config.use_cache = False
            student.train()
            if self._compiled:
                compile_layers(student, pieces=COMPILED_PIECES)
            if checkpointing:
                student.gradient_checkpointing_enable({"use_reentrant": False})
            batch, chunks = self._few_chunks(student, batch)
            aligner = self._aligner(config, batch) if aligned else None
            follower = None
            if handed and self.teacher_shape is not None:
                follower = planned_map(cfg, self.teacher_shape, KVShape.from_config(config), self.dtype)
            module = PlannedModule(
                student, aligner, following_map=follower, rope=cfg.kv_rope, kd_temperature=cfg.logit_kd_temperature,
                kd_divergence=logit_divergence(cfg), head_chunks=chunks,
                # On a CPU it lies in the same memory.
                offload_checkpoints=cfg.checkpoint_offload and checkpointing and self.device == "cuda",
            )  # fmt: skip
            inputs = self._inputs(batch, aligned, handed)
            memory.ignore(module.parameters())
            memory.ignore(module.buffers())
            memory.ignore(iter(_tensors(inputs)))
            drop_gradients(module.parameters())
            forward_end = []
            hook = backbone(student).register_forward_hook(lambda *_: forward_end.append(memory.live))
            with memory:
                loss, _ = module(step=replace(inputs, batch=self._masked(inputs.batch)))
                between = memory.live
                if backward:
                    loss.backward()
            hook.remove()
        return forward_end[0], memory.peak, module.host.bytes, between

    def _few_chunks(self, student: Any, batch: BatchShape) -> tuple[BatchShape, int]:
        """One chunk's logits live at a time: a few of the same size show the peak of all."""
        tokens = self.cfg.tokens_per_batch or (batch.samples or batch.rows) * self.cfg.max_length
        chunks = agreed_chunks(self.cfg, student, tokens)
        if chunks is None:
            distilled = self.teacher is not None and bool(self.cfg.logit_kd_weight)
            chunks = chunk_count(batch.labelled, student.config.vocab_size, self._element, distilled=distilled)
        if chunks <= _HEAD_CHUNKS:
            return batch, chunks
        return replace(batch, labelled=max(1, batch.labelled * _HEAD_CHUNKS // chunks)), _HEAD_CHUNKS

    def _masked(self, batch: TokenBatch) -> TokenBatch:
        """With the mask that attention gets where it takes one; transformers would read data to make it."""
        if self.cfg.attn_implementation != "eager":
            return batch
        rows, tokens = batch.input_ids.shape
        kind = self.dtype if self.cfg.packing else torch.bool
        return replace(batch, attention_mask=torch.ones(rows, 1, tokens, tokens, dtype=kind), pads_right=False)

    def _inputs(self, batch: BatchShape, aligned: bool, handed: bool = False) -> StepInput:
        ids = torch.zeros(batch.rows, batch.tokens, dtype=torch.int64)
        index = None if batch.slots == batch.tokens else torch.zeros(batch.rows, batch.slots, dtype=torch.int64)
        selection = Selection(index, torch.ones(batch.rows, batch.slots, dtype=torch.bool)) if aligned else None
        states: KVStates | HiddenStates | None = None
        hidden = head = None
        if (aligned or handed) and self.teacher_shape is not None:
            shape = hidden_shape(self.teacher_shape) if self._hidden else self.teacher_shape
            size = (batch.rows, shape.num_key_value_heads, self._kept(batch).tokens, shape.head_dim)
            layers = tuple(torch.empty(size, dtype=self.dtype) for _ in range(shape.num_hidden_layers))
            states = HiddenStates(layers) if self._hidden else KVStates(layers, layers)
        if self.teacher is not None and self.cfg.logit_kd_weight:
            hidden = torch.empty(batch.rows, batch.tokens, self.teacher.hidden_size, dtype=self.dtype)
            weight = torch.empty(self.teacher.vocab_size, self.teacher.hidden_size, dtype=self.dtype)

            def head(rows: Tensor) -> Tensor:
                return rows @ weight.T

        labelled = torch.zeros(batch.labelled, dtype=torch.int64)
        tokens = TokenBatch(ids, ids, ids, ids, ids[:, 0], 1.0, 1.0, pads_right=True, taught_normalizer=1.0)
        weights = LossWeights(
            self.cfg.task_weight, 1.0 if aligned else 0.0, self.cfg.logit_kd_weight, self.cfg.handoff_weight * handed
        )
        continuation = planned_continuation(batch) if handed else None
        teacher = TeacherOutput(states, hidden)
        places = LabelledPositions(labelled, labelled)
        sampled = places if self.cfg.on_policy_share else None
        return StepInput(tokens, places, selection, teacher, head, weights, continuation=continuation, sampled=sampled)

    def _teacher_forward(self, batch: BatchShape) -> int:
        if self.teacher is None or self.cfg.teacher_cache:  # what is stored lies as it came beside where it belongs
            return 0 if (batch.rows, batch.slots) == (1, batch.tokens) else self._teacher_output(batch)
        return self._forward(self.teacher, batch, 2)[1]

    def evaluation_forward(self, batch: BatchShape) -> int:
        """The most that the student's forward without gradient holds at once."""
        return self._forward(self.student, batch, 2)[1]

    def read_student(self, batch: BatchShape, reads: str = "") -> tuple[int, int]:
        """Bytes of the student's states that ``reads`` names, or else the aligner, after a forward without gradient and
        at its peak.
        """
        reads, layers = reads or self._mode.reads, self.student_shape.num_hidden_layers
        two, three = (self._forward(self.student, batch, count, reads) for count in (2, 3))
        return _extrapolated(two[0], three[0], layers), _extrapolated(two[1], three[1], layers)

    def _forward(self, config: PreTrainedConfig, batch: BatchShape, layers: int, reads: str = "") -> tuple[int, int]:
        """What a forward without gradient leaves, with the states that ``reads`` names, and its peak."""
        memory = LiveMemory(self.device)
        with _quiet(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            model = _model(_with_layers(config, layers), self.cfg, self.dtype).eval()
            ids = torch.zeros(batch.rows, batch.tokens, dtype=torch.int64)
            memory.ignore(iter([*model.parameters(), *model.buffers(), ids]))
            tokens = TokenBatch(ids, ids, ids, ids, ids[:, 0], 1.0, 1.0, pads_right=True)
            capture = open_capture(model, reads, rope=self.cfg.kv_rope) if reads else None
            with memory, capture or contextlib.nullcontext():
                backbone(model)(**model_inputs(self._masked(tokens), model.config, self.dtype), use_cache=False)
            left = memory.live
        return left, memory.peak
