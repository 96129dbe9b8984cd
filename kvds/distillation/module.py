"""The module that DeepSpeed wraps: student and aligner together, one forward to one scalar loss."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvds.align import AlignerGroup, KVAligner, members_of
from kvds.data.example import Segment
from kvds.data.model_inputs import model_inputs
from kvds.distillation.gradient_watch import GradientWatch
from kvds.distillation.losses import head_losses, spoil_gradient
from kvds.distillation.sampled_losses import losses_with_sampled
from kvds.distillation.state_metrics import state_metrics
from kvds.distillation.step import StepInput, TeacherKV
from kvds.handoff.continuation import continue_from
from kvds.handoff.following_map import FollowingMap
from kvds.handoff.reading import without_padding
from kvds.kv import KVCapture, KVStates, States, open_capture, pool_reasoning_steps, selected_shares
from kvds.kv.families import backbone
from kvds.models.own_logits import head_of, is_plain_head
from kvds.ops.divergences import Divergence
from kvds.ops.softmax_loss import FORWARD_KL


class DistillationModule(nn.Module):
    """Student and aligner behind one forward that returns the loss of a micro-batch.

    ``loss = w_task · CE + w_kv · KV + w_kd · KD + w_handoff · CE'``, each part the micro-batch's sum over positions
    divided by the global step's mean count (``TokenBatch.label_normalizer``, ``position_normalizer``): averaged over
    ranks and micro-batches, as DeepSpeed does, it is the mean over the whole global batch, however it was split and
    padded.

    Args:
        student: A causal language model.
        aligner: From :func:`kvds.align.build_aligner`; None without KV alignment.
        following_map: Of the teacher's keys and values, from which ``CE'`` is written; None without handoff. It is
            trained beside, towards the student's own, which have no gradient in that.
        rope: Capture keys ``"pre"`` or ``"post"`` rotary embedding.
        head_chunks: Chunks of positions at the language-model head where ranks have to agree on it
            (:func:`kvds.distillation.head_chunks.agreed_chunks`); None: by the labelled tokens of a micro-batch.
        kd_temperature: Temperature of logit distillation.
        kd_divergence: What logit distillation makes small.
        kd_vocab_size: Entries of the vocabulary that carry tokens.
        offload_checkpoints: Keep what the student's forward saves for its backward pass in host memory; with gradient
            checkpointing that is each layer's input.
    """

    def __init__(
        self,
        student: nn.Module,
        aligner: KVAligner | AlignerGroup | None = None,
        *,
        following_map: FollowingMap | None = None,
        rope: str = "pre",
        head_chunks: int | None = None,
        kd_temperature: float = 1.0,
        kd_divergence: Divergence = FORWARD_KL,
        kd_vocab_size: int | None = None,
        offload_checkpoints: bool = False,
    ) -> None:
        super().__init__()
        self.student = student
        self.aligner = aligner
        self.following_map = following_map
        self._rope, self._head_chunks = rope, head_chunks
        self._kd_temperature, self._kd_vocab_size = kd_temperature, kd_vocab_size
        self._kd_divergence = kd_divergence
        self._offload_checkpoints = offload_checkpoints
        self._plain_head = is_plain_head(student)
        self.gradient_watch: GradientWatch | None = None

    def _storage(self, ids: Tensor) -> AbstractContextManager[Any]:
        """Where the student's forward keeps what its backward pass reads."""
        if not (self._offload_checkpoints and torch.is_grad_enabled()):
            return nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=ids.is_cuda)

    def forward(self, step: StepInput) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the student once.

        Returns:
            The loss (fp32 scalar with a graph) and detached metrics, means in the sense above; keys as in
            ``metrics.jsonl``.
        """
        batch, weights = step.batch, step.weights
        model = backbone(self.student)
        inputs: dict[str, Any] = {
            **model_inputs(batch, model.config, next(self.student.parameters()).dtype),
            "use_cache": False,
        }
        metrics: dict[str, Tensor] = {}
        kv = None
        self.gradient_watch = None
        # A KV loss that was given up is not computed: no teacher has run for it.
        given_up = step.selection is None and not step.sources and _is_zero(weights.kv)
        handed = self.following_map is not None and weights.handoff > 0
        own: KVStates | None = None
        if self.aligner is None or given_up:
            with contextlib.ExitStack() as stack:
                reading = stack.enter_context(KVCapture(model)) if handed else None
                stack.enter_context(self._storage(batch.input_ids))
                hidden = model(**inputs).last_hidden_state
            own = None if reading is None else reading.states.detach()
        else:
            require_grad = torch.is_grad_enabled()
            capture = open_capture(model, self.aligner.reads, rope=self._rope, require_grad=require_grad)
            with capture, self._storage(batch.input_ids):
                hidden = model(**inputs).last_hidden_state
            states = capture.states
            if handed:
                own = KVStates(states.keys, states.values).detach()  # type: ignore[union-attr]
            if batch.reasoning_step_ids is not None:
                states = pool_reasoning_steps(states, batch.reasoning_step_ids, batch.num_reasoning_steps)  # type: ignore[type-var]
            if step.watch and torch.is_grad_enabled():
                self.gradient_watch = GradientWatch()
                self.gradient_watch.attach(capture)
            kv = self.kv_loss(states, step, metrics)

        teacher_hidden = step.teacher.hidden if step.teacher is not None and weights.logit_kd else None
        losses_at = partial(
            head_losses,
            head_of(self.student, plain=self._plain_head),
            hidden,
            num_chunks=self._head_chunks,
            teacher_head=step.teacher_head,
            teacher_hidden=teacher_hidden,
            temperature=self._kd_temperature,
            vocab_size=self._kd_vocab_size,
            divergence=self._kd_divergence,
            kd_weight=weights.logit_kd,
        )
        if step.sampled is None:
            head = losses_at(step.labelled, scale=1 / batch.label_normalizer, task_weight=weights.task)
        else:
            head = losses_with_sampled(losses_at, step, distilled=teacher_hidden is not None)
        # At a weight of 0, too: ZeRO-3 gathers the last layer for its backward pass once its output has a gradient.
        loss = head.loss
        if batch.label_normalizer:  # not where the student wrote all of the step
            metrics["loss/task"] = head.task
        if kv is not None:
            # At a weight of 0, too: ZeRO keeps the aligner's last gradient until another one comes.
            loss = loss + weights.kv * kv
        if teacher_hidden is not None:
            metrics["loss/logit_kd"] = head.kd
        if own is not None:
            loss = loss + self._handoff_loss(own, step, metrics)
        metrics["loss/total"] = loss.detach()
        return spoil_gradient(loss), metrics

    def _handoff_loss(self, own: KVStates, step: StepInput, metrics: dict[str, Tensor]) -> Tensor:
        """The cross entropy of answers that are written from the mapped cache, one forward of their tokens, and the
        map's own loss.
        """
        row, teacher = step.continuation, None if step.teacher is None else step.teacher.states
        if row is None or not isinstance(teacher, KVStates) or self.following_map is None:
            raise RuntimeError("a handoff needs the teacher's keys and values and the places of prompts and answers")
        scale = 1 / step.batch.label_normalizer
        followed = self.following_map(
            row.prompt_states(teacher), row.prompt_states(own), row.prompt_mask, scale
        )  # fmt: skip
        states = without_padding(followed.states, row.prompt_mask)  # the map's bias stands there
        with self._storage(step.batch.input_ids):
            hidden = continue_from(self.student, states, row, step.batch.input_ids)
        head = head_losses(
            head_of(self.student, plain=self._plain_head), hidden, row.labelled, num_chunks=self._head_chunks,
            scale=scale, task_weight=step.weights.handoff,
        )  # fmt: skip
        metrics["loss/handoff"] = head.task
        metrics["loss/handoff_map"] = followed.loss.detach()
        return head.loss + followed.loss

    def kv_loss(self, states: States, step: StepInput, metrics: dict[str, Tensor]) -> Tensor:
        """The KV loss of the teacher; of several the weighted sum, one after the other.

        Args:
            states: Of the student.
            step: With the teacher's states and the selection.
            metrics: Gets its parts.
        """
        if self.aligner is None:
            raise RuntimeError("a KV loss needs an aligner")
        members = members_of(self.aligner)
        if not step.sources:
            if step.teacher is None or step.teacher.states is None or step.selection is None:
                raise RuntimeError("an aligner needs the teacher's keys and values and a selection of positions")
            return self._loss_of(members[0][1], states, TeacherKV(step.teacher.states, step.selection), step, metrics)
        terms: list[Tensor] = []
        sums: dict[str, Tensor] = {}
        for number, ((weight, member), source) in enumerate(zip(members, step.sources, strict=True)):
            own: dict[str, Tensor] = {}
            # Nothing holds this teacher's keys and values once its loss is there: the operation has its gradients.
            terms.append(weight * self._loss_of(member, states, source(), step, own))
            metrics[f"loss/kv_teacher_{number}"] = own["loss/kv"]
            for key in ("loss/kv", "loss/kv_keys", "loss/kv_values", "loss/kv_attention"):
                if key in own:
                    sums[key] = sums[key] + weight * own[key] if key in sums else weight * own[key]
            if number == 0:
                metrics |= {key: value for key, value in own.items() if key.startswith("kv/")}
        metrics |= sums
        return torch.stack(terms).sum()

    def _loss_of(
        self, aligner: nn.Module, states: States, teacher: TeacherKV, step: StepInput, metrics: dict[str, Tensor]
    ) -> Tensor:
        selection = teacher.selection
        if step.watch:
            rows = step.batch.row_samples
            if any(rows) or not rows:  # padding alone has no states to measure
                metrics |= state_metrics(states, selection)
            if step.batch.reasoning_step_ids is None:
                segments = {segment.name.lower(): int(segment) for segment in Segment if segment}
                metrics |= selected_shares(selection, step.batch.segment_ids, segments)
        aligned = aligner(student=states, teacher=teacher.states, selection=selection)
        # From the mean over this micro-batch to its share of the mean over the global step.
        share = selection.mask.sum() / step.batch.position_normalizer
        metrics["loss/kv"] = aligned.loss.detach() * share
        for part, loss, layers in (
            ("keys", aligned.key_loss, aligned.key_layers),
            ("values", aligned.value_loss, aligned.value_layers),
            ("attention", aligned.attention_loss, None),
        ):
            if loss is not None:
                metrics[f"loss/kv_{part}"] = loss * share
                if step.watch and layers is not None:
                    metrics |= {f"loss/kv_{part}_layer_{i:02d}": layer * share for i, layer in enumerate(layers)}
        return aligned.loss * share


def _is_zero(weight: float | Tensor) -> bool:
    return not isinstance(weight, Tensor) and weight == 0
