"""The plan of a run: memory by part, whether it fits, what would, work, time and disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from kvds.align.loss import state_names
from kvds.config import RunConfig
from kvds.config.deepspeed_file import compute_dtype, load_deepspeed_config
from kvds.errors import InputError
from kvds.kv import group_slices
from kvds.models.adapters import adapter_config
from kvds.models.architecture import load_config
from kvds.models.loading import TORCH_DTYPES
from kvds.plan.batch_shape import BatchShape
from kvds.plan.handoff import map_size
from kvds.plan.rows import RowPlan, plan_rows
from kvds.plan.states import ModelSize, StateMemory, aligner_size, model_size, state_memory
from kvds.plan.step import StepMemory, StepPlanner
from kvds.plan.work import Work, checkpoint_bytes, disk_bytes, epoch_work
from kvds.teacher.stored_batches import read_ahead_bytes

GIB = 2**30
PLACEMENTS = ("replicated", "zero3", "zero3_offload")
# CUDA's context, NCCL's buffers, and what the allocator cannot use of its blocks.
_CONTEXT_BYTES, _USABLE_SHARE = GIB, 0.95
# Where the search for the largest micro-batch ends.
MOST_ROWS = 64
OFFLOADED = "ds_configs/zero3_offload.json"


@dataclass(frozen=True)
class Machine:
    """Where a run will be.

    Attributes:
        gpus: Per node; 0: one CPU process.
        nodes: How many.
        gpu_memory: Bytes of each GPU.
    """

    gpus: int
    nodes: int
    gpu_memory: int

    @property
    def ranks(self) -> int:
        """In all."""
        return max(1, self.gpus) * self.nodes

    @property
    def device(self) -> str:
        """``"cuda"`` or ``"cpu"``."""
        return "cuda" if self.gpus else "cpu"

    @property
    def usable(self) -> float:
        """Bytes per GPU that tensors can take."""
        return _USABLE_SHARE * self.gpu_memory - _CONTEXT_BYTES if self.gpus else float(self.gpu_memory)


class RunPlan:
    """Everything that ``kvds plan`` prints, computed when asked for.

    Args:
        cfg: The run.
        machine: Where it will be.
        rows: Training rows to assume where the data cannot be read; or the batches, where they are known already.
    """

    def __init__(self, cfg: RunConfig, machine: Machine, rows: int | RowPlan | None = None) -> None:
        self.cfg, self.machine, self._rows_given = cfg, machine, rows
        if cfg.teacher_names:
            raise InputError(
                f"teacher_names={' '.join(cfg.teacher_names)}: kvds plan knows runs of one teacher; expected "
                "--teacher_name (plan with the largest of them)"
            )
        self.raw: dict[str, Any] = load_deepspeed_config(cfg.deepspeed_config)
        self.dtype = TORCH_DTYPES[compute_dtype(self.raw)]
        self.element = self.dtype.itemsize
        self.student_config = load_config(cfg.student, cfg.student_config_overrides, flag="student")
        self.teacher_config = None
        if cfg.uses_teacher:
            self.teacher_config = load_config(cfg.first_teacher or "", cfg.teacher_config_overrides, flag="teacher")
        self._step_peaks: dict[tuple[int, bool], int] = {}
        self.planner = StepPlanner(cfg, self.student_config, self.teacher_config, self.dtype, machine.device)

    @cached_property
    def student_size(self) -> ModelSize:
        """Parameters of the student."""
        return model_size(self.student_config, adapter_config(self.cfg))

    @cached_property
    def teacher_size(self) -> ModelSize | None:
        """Parameters of the teacher; None where none runs."""
        return None if self.teacher_config is None or self.cfg.teacher_cache else model_size(self.teacher_config)

    @property
    def teacher_sizes(self) -> list[ModelSize]:
        """The teacher's, in a list; empty where none runs."""
        return [] if self.teacher_size is None else [self.teacher_size]

    @cached_property
    def aligner_parameters(self) -> int:
        """Learned numbers of the aligner."""
        shape = self.planner.teacher_shape
        if not self.cfg.uses_kv or shape is None:
            return 0
        return aligner_size(self.planner.student_shape, shape, self.cfg)

    @cached_property
    def map_parameters(self) -> int:
        """Learned numbers of the map that a handoff trains beside the student; 0 without."""
        shape = self.planner.teacher_shape
        return 0 if shape is None else map_size(self.cfg, shape, self.planner.student_shape)

    @cached_property
    def rows(self) -> RowPlan:
        """The batches."""
        given = self._rows_given
        return given if isinstance(given, RowPlan) else plan_rows(self.cfg, self.machine.ranks, given)

    def states(self, placement: str | None = None, raw: dict[str, Any] | None = None) -> StateMemory:
        """What is held between steps, under the recipe's placement of the teacher and DeepSpeed file or others."""
        cfg = self.cfg if placement is None else replace(self.cfg, teacher_placement=placement)
        return state_memory(
            cfg, raw or self.raw, student=self.student_size, aligner=self.aligner_parameters + self.map_parameters,
            teacher=self.teacher_size, element=self.element, ranks=self.machine.ranks, device=self.machine.device,
        )  # fmt: skip

    @cached_property
    def step(self) -> StepMemory:
        """The recipe's micro-batch with its own checkpointing."""
        return self.planner.plan(self.rows.largest, checkpointing=self.cfg.gradient_checkpointing)

    @cached_property
    def other_activations(self) -> int:
        """Activations of the same micro-batch with checkpointing switched."""
        return self.planner.activations(self.rows.largest, checkpointing=not self.cfg.gradient_checkpointing)

    def peak_of(self, states: StateMemory, step_peak: int) -> int:
        """Bytes per GPU at the worst moment: in a micro-batch, or in the optimizer's step."""
        within = states.gathered + step_peak
        teaching = states.teacher_gathered + self.step.teacher_forward + self.step.teacher_kv
        return states.held + max(within, teaching, states.update + self.step.teacher_ahead)

    @cached_property
    def peak(self) -> int:
        """Of the recipe as it stands."""
        return self.peak_of(self.states(), self.step.peak)

    @property
    def host(self) -> int:
        """Bytes of host memory per rank: what is offloaded, and what is read ahead from a teacher's cache."""
        stored = 0
        if self.cfg.teacher_cache and self.cfg.uses_teacher_kv:
            count = len(state_names(self.cfg))
            stored = count * read_ahead_bytes(self.step.teacher_kv // count, pinned=self.machine.device == "cuda")
        return self.states().host + self.step.host + stored

    def kv_by_group(self) -> list[int]:
        """Bytes of what is compared of teacher and student, for each layer group that is compared together."""
        teacher = self.planner.teacher_shape
        if not self.cfg.uses_kv or teacher is None:
            return []
        sizes = [0] * self.cfg.layer_groups
        for shape in (self.planner.student_shape, teacher):
            layer = self.planner.compared_bytes(replace(shape, num_hidden_layers=1), self.rows.largest, self.element)
            for i, group in enumerate(group_slices(shape.num_hidden_layers, self.cfg.layer_groups)):
                sizes[i] += layer * (group.stop - group.start)
        return sizes

    @cached_property
    def work(self) -> Work | None:
        """FLOPs of an epoch."""
        teacher = None
        if self.teacher_size is not None and self.planner.teacher_shape is not None:
            teacher = (self.teacher_size, self.planner.teacher_shape)
        return epoch_work(self.cfg, self.rows, (self.student_size, self.planner.student_shape), teacher)

    @property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint."""
        size, stage = self.student_size, self.raw["zero_optimization"]["stage"]
        trained = size.trained + self.aligner_parameters + self.map_parameters
        frozen = size.total - size.trained
        return checkpoint_bytes(self.cfg, trained, stage, self.element, frozen=frozen)

    @property
    def disk(self) -> int | None:
        """Bytes that the output folder grows to."""
        steps = self.cfg.max_steps or (self.rows.steps or 0) * self.cfg.epochs
        return disk_bytes(self.cfg, self.checkpoint, self.element * self.student_size.total, steps) if steps else None

    def _step_peak(self, rows: int, checkpointing: bool) -> int:
        key = (rows, checkpointing)
        if key not in self._step_peaks:
            self._step_peaks[key] = self.planner.peak(self._with_rows(rows), checkpointing=checkpointing)
        return self._step_peaks[key]

    def _with_rows(self, count: int) -> BatchShape:
        """The micro-batch of ``--batch_size count``, whose samples may share rows, or of as many samples in one row."""
        largest, own = self.rows.largest, self.cfg.batch_size
        if self.cfg.tokens_per_batch:
            tokens, slots, labelled = (
                max(1, size * count // largest.samples) for size in (largest.tokens, largest.slots, largest.labelled)
            )
            return replace(largest, tokens=tokens, slots=slots, labelled=labelled, samples=count)
        labelled = largest.labelled * count // own
        if count < own:  # a smaller micro-batch may hold the rows with the most labels alone
            labelled = min(largest.labelled, count * self.rows.row_labelled)
        return replace(largest, rows=-(-largest.rows * count // own), samples=count, labelled=max(1, labelled))

    def _rows_within(self, room: float, checkpointing: bool) -> int:
        """The most rows whose step stays within ``room``; between powers of four on a straight line, as the peak is the
        largest of several that each grow evenly.
        """
        low, high = 0, 1
        while high <= MOST_ROWS and self._step_peak(high, checkpointing) <= room:
            low, high = high, 4 * high
        if low == 0 or high > MOST_ROWS:
            return low
        below, above = self._step_peak(low, checkpointing), self._step_peak(high, checkpointing)
        return low + int((room - below) / (above - below) * (high - low))

    @property
    def _placements(self) -> list[str]:
        """Of the teacher, those that this run may have."""
        if self.teacher_size is None:
            return ["replicated"]
        return [placement for placement in PLACEMENTS if self._may_have(teacher_placement=placement)]

    def _may_have(self, **changes: Any) -> bool:
        """Whether the recipe's other settings allow it."""
        try:
            replace(self.cfg, **changes)
        except InputError:
            return False
        return True

    @cached_property
    def _may_checkpoint(self) -> bool:
        return self._may_have(gradient_checkpointing=True)

    def largest_rows(self, raw: dict[str, Any] | None = None) -> dict[tuple[str, bool], int]:
        """(placement, checkpointing) → rows per micro-batch that fit, at most ``MOST_ROWS``; 0: not even one."""
        found = {}
        for placement in self._placements:
            states = self.states(placement, raw)
            # The optimizer's step and the teacher's whole weights need their room whatever the micro-batch.
            fits = self.peak_of(states, 0) <= self.machine.usable
            room = self.machine.usable - states.held - states.gathered
            for checkpointing in (False, True):
                possible = fits and (not checkpointing or self._may_checkpoint)
                found[placement, checkpointing] = self._rows_within(room, checkpointing) if possible else 0
        return found

    @property
    def fits(self) -> bool:
        """Whether the recipe as it stands does."""
        return self.peak <= self.machine.usable

    def advice(self) -> list[str]:
        """Recipe lines that make the run fit, cheapest first; empty where it fits or nothing here would help."""
        if self.fits:
            return []
        if self.cfg.tokens_per_batch:
            padded = RunPlan(replace(self.cfg, tokens_per_batch=0), self.machine)
            more = padded.advice()
            return ["tokens_per_batch: 0", *more] if padded.fits or more else []
        if self.cfg.teacher_overlap:
            plain = RunPlan(replace(self.cfg, teacher_overlap=False), self.machine, self.rows)
            more = plain.advice()
            return ["teacher_overlap: false", *more] if plain.fits or more else []
        found = self._smallest_change(self.largest_rows())
        if found is None and compute_dtype(self.raw) == "bf16" and self.machine.gpus:
            found = self._smallest_change(self.largest_rows(load_deepspeed_config(OFFLOADED)))
            found = None if found is None else [f"deepspeed_config: {OFFLOADED}", *found]
        return found or []

    def _smallest_change(self, most: dict[tuple[str, bool], int]) -> list[str] | None:
        cfg = self.cfg
        wanted = cfg.batch_size * cfg.gradient_accumulation_steps
        # Recomputing costs a third more time, smaller micro-batches some, a sharded teacher traffic, offloading most.
        for placement in dict.fromkeys((cfg.teacher_placement, *PLACEMENTS)):
            for checkpointing in dict.fromkeys((cfg.gradient_checkpointing, True)):
                rows = most.get((placement, checkpointing), 0)
                rows = next((n for n in range(min(rows, cfg.batch_size), 0, -1) if wanted % n == 0), 0)
                if rows == 0 or (rows < cfg.batch_size and not checkpointing and self._may_checkpoint):
                    continue
                lines = []
                if placement != cfg.teacher_placement:
                    lines.append(f"teacher_placement: {placement}")
                if checkpointing != cfg.gradient_checkpointing:
                    lines.append("gradient_checkpointing: true")
                if rows != cfg.batch_size:
                    lines += [f"batch_size: {rows}", f"gradient_accumulation_steps: {wanted // rows}"]
                return lines
        return None
