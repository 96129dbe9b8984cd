"""The distiller of a student in anyone's loop: its losses are those of a run's step, computed by the same code."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from kvds.align import aligner_config_dict, build_aligner
from kvds.align.loss import state_names
from kvds.checkpoint.aligner_file import load_aligner, save_aligner
from kvds.config.selection_methods import SELECTION_METHODS
from kvds.config.settings import AlignmentSettings
from kvds.data.batches import TokenBatch
from kvds.data.labels import IGNORED_LABEL, LabelledPositions
from kvds.distillation.calibration import fit_to_batches, kv_weight_of_share, nothing_mapped
from kvds.distillation.module import DistillationModule
from kvds.distillation.step import LossWeights, StepInput
from kvds.distiller.model_batch import token_batch
from kvds.distiller.own_settings import own_settings
from kvds.distiller.watched_forward import WatchedForward
from kvds.distiller.wrappers import inside, ranks, runs_whole, sum_over_ranks
from kvds.errors import InputError
from kvds.kv import KVShape, Selection, States, open_capture
from kvds.kv.families import backbone, unwrapped
from kvds.teacher.teacher import Teacher, TeacherOutput
from kvds.teacher.token_selection import TokenChoice

log = logging.getLogger("kvds")

_UNFITTED = int(torch.tensor(math.nan, dtype=torch.float64).view(torch.int64))
Inputs = Mapping[str, Any] | TokenBatch


@dataclass
class DistillerOutput(ModelOutput):
    """What a forward of :class:`KVDistiller` returns.

    Attributes:
        loss: Scalar with a graph.
        metrics: Detached parts of it, under the keys of ``metrics.jsonl``: ``loss/task``, ``loss/kv``, …
    """

    loss: Tensor | None = None
    metrics: dict[str, Tensor] | None = None


class KVDistiller(DistillationModule):
    """Student, aligner and the losses between student and teacher, for a training loop of one's own.

    ``loss = task_weight · CE + kv_weight · KV + logit_kd_weight · KD``, means over the labelled and the selected
    positions of a micro-batch. Two ways to train with it, after :meth:`fit`:

    * call it: it is a module with the student and the aligner in it, to be wrapped as a whole by DDP, FSDP, DeepSpeed
      or ``accelerator.prepare`` and given to an optimizer;
    * :meth:`watch` a forward that some trainer calls on the student, itself wrapped or not, and add
      :meth:`WatchedForward.loss` to that trainer's loss. The aligner's parameters go into the optimizer beside the
      student's; their gradients are averaged over the ranks here.

    The teacher is no part of it: neither its parameters nor its state dict have it.

    Args:
        student: A causal language model of transformers, or one inside DDP, FSDP, DeepSpeed's engine or PEFT.
        teacher: Likewise, of the same tokenizer. Frozen, in evaluation mode, moved to the student's device.
        settings: How they are matched. ``map_start="auto"`` is ``ridge`` where there are maps; ``kv_weight`` is a
            number or ``auto:SHARE``.
        seed: Of the maps' random start and of random selections.

    Raises:
        InputError: settings without a meaning, or that the two models cannot serve.
    """

    _weight_bits: Tensor

    def __init__(
        self, student: nn.Module, teacher: nn.Module, settings: AlignmentSettings | None = None, *, seed: int = 0
    ) -> None:
        settings = own_settings(AlignmentSettings() if settings is None else settings)
        inner, teacher = inside(student), unwrapped(teacher)
        configs: list[Any] = [unwrapped(model).config for model in (inner, teacher)]
        shapes = (KVShape.from_config(configs[0]), KVShape.from_config(configs[1]))
        vocab = min(config.vocab_size for config in configs)
        super().__init__(
            inner, build_aligner(*shapes, settings, seed), rope=settings.kv_rope,
            kd_temperature=settings.logit_kd_temperature, kd_vocab_size=vocab,
        )  # fmt: skip
        self.aligner.to(next(inner.parameters()).device)  # type: ignore[union-attr]
        self._settings, self._choice = settings, TokenChoice(settings, seed)
        self._make_teacher = partial(
            Teacher, teacher, rope=settings.kv_rope, reads=settings.teacher_reads, parts=state_names(settings),
            value_metric=settings.value_metric,
            wants_hidden=settings.logit_kd_weight > 0, observe=self._choice.observing,
            shuffled=settings.teacher_kv == "shuffled",
        )  # fmt: skip
        self._teacher: tuple[torch.device, Teacher] | None = None
        self._outer = (student,)  # in a tuple: what is around the student is no module of this one
        # Whole numbers: what casts a module to 16 bits leaves them alone.
        self.register_buffer("_weight_bits", torch.tensor(_UNFITTED))
        self._weight: float | None = None
        # A hook, since what is around this module loads its state without calling its own method.
        self.register_load_state_dict_post_hook(_forget_weight)
        self._averages = self._warned = False
        for parameter in self.aligner.parameters():  # type: ignore[union-attr]
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._average)

    # -- start ------------------------------------------------------------------------------------------------------

    def fit(self, batches: Iterable[Inputs]) -> dict[str, list[float]]:
        """Fit the aligner's statistics and closed-form start, and with ``auto:SHARE`` the weight of the KV loss.

        Every rank calls it, with as many batches of its own, before the optimizer is made.

        Args:
            batches: The first ``calibration_batches`` are taken: what :meth:`forward` is called with.

        Returns:
            Part → R² of the fitted maps on held-out positions for each target layer; empty where no map is judged.

        Raises:
            InputError: nothing to fit on, or a weight that cannot be calibrated.
        """
        device = next(self.student.parameters()).device
        taken = [_as_batch(batch).to(device) for batch in islice(batches, self._settings.calibration_batches)]
        if not taken:
            raise InputError("fit: no batch; expected at least one, of input_ids, attention_mask and labels")
        outer = self._outer[0]
        held_out_r2 = fit_to_batches(
            self.aligner, self.student, lambda: taken, self._match, rope=self._rope,  # type: ignore[arg-type]
            all_reduce=sum_over_ranks, forward=outer if runs_whole(outer) else None,
        )  # fmt: skip
        weight = self._settings.kv_weight
        if isinstance(weight, str) and nothing_mapped([held_out_r2]):
            log.warning(
                "kv_weight=%s: no map explains held-out states of the teacher; the KV loss weighs nothing", weight
            )
            weight = 0.0
        elif isinstance(weight, str):
            weight = self._weight_of_share(taken[0], float(weight.split(":")[1]), fitted=bool(held_out_r2))
        self.kv_weight = float(weight)
        return held_out_r2

    @property
    def fitted(self) -> bool:
        """Whether the aligner has a start, of :meth:`fit` or of a file or state dict."""
        return int(self._weight_bits) != _UNFITTED

    @property
    def kv_weight(self) -> float:
        """The factor of the KV loss; may be set at any time, for a schedule.

        Raises:
            InputError: it waits for :meth:`fit`.
        """
        if self._weight is None:
            asked = self._settings.kv_weight
            if self.fitted:
                self._weight = float(self._weight_bits.view(torch.float64))
            elif isinstance(asked, str):
                raise InputError(f"kv_weight={asked}: nothing was fitted; expected fit(batches) first (or a number)")
            else:
                self._weight = float(asked)
        return self._weight

    @kv_weight.setter
    def kv_weight(self, value: float) -> None:
        bits = torch.tensor(float(value), dtype=torch.float64).view(torch.int64)
        self._weight, self._weight_bits = float(value), bits.to(self._weight_bits.device)

    def _weight_of_share(self, batch: TokenBatch, share: float, *, fitted: bool) -> float:
        if runs_whole(self._outer[0]):
            raise InputError(
                f"kv_weight=auto:{share}: the student is sharded, its gradients are nowhere whole; expected a number "
                "(or fit before it is wrapped)"
            )
        parameters = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        norms, losses = [], []
        was_training = self.student.training
        self.student.eval()
        for weights in (LossWeights(task=1.0), LossWeights(task=0.0, kv=1.0)):
            loss, _ = super().forward(self._step(batch, weights))
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            squares = torch.zeros((), dtype=torch.float64, device=loss.device)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                total = torch.zeros_like(parameter) if gradient is None else gradient
                sum_over_ranks(total)
                squares += (total.double() / ranks()).square().sum()
            norms.append(float(squares.sqrt()))
            sum_over_ranks(whole := loss.detach())
            losses.append(float(whole) / ranks())
        self.student.train(was_training)
        return kv_weight_of_share(
            share, task_weight=self._settings.task_weight or 1.0, norms=norms, losses=losses if fitted else None
        )

    # -- losses -----------------------------------------------------------------------------------------------------

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        segment_ids: Tensor | None = None,
        *,
        batch: TokenBatch | None = None,
    ) -> DistillerOutput:
        """Run teacher and student once.

        Args:
            input_ids: ``[B, T]`` int64.
            attention_mask: ``[B, T]``, 1 = real token; None: all are.
            labels: ``[B, T]`` int64, unshifted, -100 where not counted.
            segment_ids: ``[B, T]`` int64, 1 = prompt, 2 = rationale, 3 = answer; None: what is labelled is the answer.
            batch: A batch of kvds' own data, in place of all these, with normalizers of its global step.

        Raises:
            InputError: samples share rows, and the student is called through what is around it.
        """
        if batch is None:
            given = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
            batch = _as_batch({**given, "segment_ids": segment_ids})
        self._warn_if_unfitted()
        weights = LossWeights(self._settings.task_weight, self.kv_weight, self._settings.logit_kd_weight)
        outer = self._outer[0]
        if not runs_whole(outer):
            self._averages = False
            loss, metrics = super().forward(self._step(batch, weights))
            return DistillerOutput(loss=loss, metrics=metrics)
        if batch.packing is not None:
            raise InputError(
                "batch: its samples share rows, which what is around the student is not told; expected padded rows, a "
                "sample each (or the student as it was before it was wrapped)"
            )
        with self.watch(outer) as watched:
            task = outer(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        if batch.label_normalizer:  # the model's own loss is the mean of this batch alone
            task = task * ((batch.labels[:, 1:] != IGNORED_LABEL).sum() / batch.label_normalizer)
        loss = weights.task * task + watched.loss(batch)
        return DistillerOutput(loss=loss, metrics={"loss/task": task.detach(), **watched.metrics})

    def watch(self, model: nn.Module | None = None) -> WatchedForward:
        """A context in which somebody else calls the student, for its KV loss.

        Args:
            model: The student as it is called there, inside whatever a trainer put around it; None: as it was given.

        Raises:
            InputError: logit distillation is asked for, whose head is not seen here.
        """
        if self._settings.logit_kd_weight:
            raise InputError(
                f"logit_kd_weight={self._settings.logit_kd_weight}: a watched forward shows no head; expected 0, or "
                "the distiller itself to be called"
            )
        body = backbone(self.student if model is None else model)
        grad = torch.is_grad_enabled()
        return WatchedForward(
            open_capture(body, self.aligner.reads, rope=self._rope, require_grad=grad),  # type: ignore[union-attr]
            self._watched_loss,
        )

    def _watched_loss(
        self, states: States, inputs: Inputs, position_normalizer: float | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self._warn_if_unfitted()
        self._averages = True
        batch = _as_batch(inputs)
        batch = replace(batch, position_normalizer=position_normalizer or batch.position_normalizer)
        metrics: dict[str, Tensor] = {}
        loss = self.kv_loss(states, self._step(batch, LossWeights(kv=self.kv_weight)), metrics)
        return self.kv_weight * loss, metrics

    def _step(self, batch: TokenBatch, weights: LossWeights) -> StepInput:
        """The student's input; a normalizer of 0 becomes the number of labelled tokens, or of selected positions."""
        output, selection = self._match(batch)
        labelled = LabelledPositions.from_labels(batch.labels).to(batch.input_ids.device)
        positions: Any = batch.position_normalizer or selection.mask.sum().clamp(min=1)  # the device is not asked
        batch = replace(
            batch, label_normalizer=batch.label_normalizer or max(1, len(labelled.index)), position_normalizer=positions
        )
        head = self._teacher[1].head if weights.logit_kd and self._teacher else None
        return StepInput(batch, labelled, selection, output, head, weights)

    def _match(self, batch: TokenBatch) -> tuple[TeacherOutput, Selection]:
        device = batch.input_ids.device
        if self._teacher is None or self._teacher[0] != device:
            self._teacher = device, self._make_teacher(device=device)
        # A trainer keeps the state of torch's generator, which says what is drawn.
        draws = SELECTION_METHODS[self._settings.kv_method].draws
        step = int(torch.randint(2**31, ())) if draws else 0
        return self._choice.with_teacher(self._teacher[1], batch, step)

    def _average(self, parameter: Tensor) -> None:
        """The gradient of an aligner's parameter as the mean over ranks, where no wrapper of the whole sees to it.

        Of several backward passes in a row each mean is added to the mean before, so that the sum is right.
        """
        if self._averages and ranks() > 1 and parameter.grad is not None:
            sum_over_ranks(parameter.grad)
            parameter.grad /= ranks()

    def _warn_if_unfitted(self) -> None:
        if not self._warned and self._weight is None and not self.fitted:
            log.warning(
                "nothing was fitted: the maps start at random and the losses have no unit; call fit(batches) before "
                "training, or load an aligner"
            )
        self._warned = True

    # -- state ------------------------------------------------------------------------------------------------------

    def save_aligner(self, path: str | Path) -> None:
        """Write the aligner as a run's ``map_aligner.pt``."""
        state = {name: tensor.detach().cpu() for name, tensor in self.aligner.state_dict().items()}  # type: ignore[union-attr]
        save_aligner(aligner_config_dict(self.aligner), state, Path(path))  # type: ignore[arg-type]

    def load_aligner(self, path: str | Path) -> None:
        """Take the aligner of a ``map_aligner.pt``, in place of :meth:`fit`; ``auto:SHARE`` still wants a weight.

        Raises:
            InputError: no such file, or the aligner of other models or settings.
        """
        found = load_aligner(path)
        own, theirs = aligner_config_dict(self.aligner), aligner_config_dict(found)  # type: ignore[arg-type]
        shapes = ("student_shape", "teacher_shape")
        if any(own[name] != theirs.get(name) for name in shapes):
            raise InputError(
                f"{path}: the aligner of models of other shapes; expected that of this student and teacher"
            )
        try:
            self.aligner.load_state_dict(found.state_dict())  # type: ignore[union-attr]
        except RuntimeError as error:
            raise InputError(f"{path}: an aligner of other settings; expected those of this distiller") from error
        if self._weight is None and not isinstance(self._settings.kv_weight, str):
            self.kv_weight = float(self._settings.kv_weight)


def _forget_weight(distiller: nn.Module, incompatible_keys: Any) -> None:
    """The weight of the KV loss comes with the state."""
    distiller._weight = None  # type: ignore[assignment]


def _as_batch(inputs: Inputs) -> TokenBatch:
    return inputs if isinstance(inputs, TokenBatch) else token_batch(inputs)
