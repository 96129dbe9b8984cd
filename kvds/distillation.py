"""The module that DeepSpeed wraps: student and aligner together, one forward to one scalar loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvds.align import AlignerGroup, KVAligner, members_of
from kvds.align.diagnostics import effective_rank
from kvds.data.batches import TokenBatch
from kvds.data.encoding import Segment
from kvds.data.packing import model_inputs
from kvds.kv import Capture, Selection, States, open_capture, pool_steps, selected_shares
from kvds.losses import Head, LabelledPositions, head_losses, spoil_gradient
from kvds.models import backbone
from kvds.teacher import TeacherOutput


@dataclass(frozen=True)
class LossWeights:
    """Factors of the loss parts; a part of weight 0 is not computed into the loss."""

    task: float = 1.0
    kv: float = 0.0
    logit_kd: float = 0.0


class TeacherKV(NamedTuple):
    """One teacher's keys and values of a batch, and the positions that count."""

    states: States
    selection: Selection


@dataclass(frozen=True)
class StepInput:
    """One micro-batch with all that the student's forward needs. Tensors on the device of the student.

    Attributes:
        batch: Token ids, masks and the normalizers that make a sum over this rank's share of the global mean.
        labelled: Positions of ``batch`` whose next token counts.
        selection: Positions (or steps) whose keys and values count; None without alignment.
        teacher: The teacher's output for this batch; None where nothing reads it.
        teacher_head: Its language-model head, for logit distillation.
        weights: Factors of the loss parts.
        sources: With several teachers, one call each that runs it on the batch: only one teacher's keys and values are
            there at a time. Then ``teacher`` and ``selection`` are None.
        watch: Also measure the student's KV and the gradient that the KV loss sends back (logging steps).
    """

    batch: TokenBatch
    labelled: LabelledPositions
    selection: Selection | None
    teacher: TeacherOutput | None
    teacher_head: Head | None
    weights: LossWeights
    watch: bool = False
    sources: tuple[Callable[[], TeacherKV], ...] = ()


class GradientWatch:
    """Compares what the KV loss sends back at the captured keys and values with what the task loss sends there.

    ``ratio = ‖∂ kv_weight·kv / ∂(K,V)‖ / ‖∂ rest / ∂(K,V)‖``, over all layers, without a second backward pass: hooks
    see the KV loss's own share on the tensors handed to the aligner, and all that arrives on the projections' outputs.
    What the KV loss of later layers sends back through the network counts with the rest: it arrives in one sum with the
    task's, so with more than one layer the ratio is that of the direct share to everything else.
    """

    def __init__(self) -> None:
        self._kv_squares: list[Tensor] = []
        self._rest_squares: list[Tensor] = []

    def attach(self, capture: Capture) -> None:
        """Hang hooks on what ``capture`` took; call between forward and backward."""
        for heads, output, columns in capture.watched:
            self._watch(heads, output, columns)

    def _watch(self, heads: Tensor, output: Tensor, columns: slice) -> None:
        # The view of the heads has a gradient of its own: the KV loss's alone. The projection's output sums both.
        received: list[Tensor] = []

        def on_kv(gradient: Tensor) -> None:
            received.append(gradient.transpose(1, 2).flatten(2).float())
            self._kv_squares.append(received[-1].square().sum())

        def on_total(gradient: Tensor) -> None:
            rest = gradient.flatten(2)[..., columns].float()
            self._rest_squares.append((rest - received.pop() if received else rest).square().sum())

        heads.register_hook(on_kv)
        output.register_hook(on_total)

    def squares(self) -> dict[str, Tensor]:
        """Both squared norms of the backward pass just run, as metrics whose sums over micro-batches and ranks give the
        ratio of the whole batch; empty where no gradient arrived.
        """
        if not self._rest_squares:
            return {}
        rest = torch.stack(self._rest_squares).sum()
        kv = torch.stack(self._kv_squares).sum() if self._kv_squares else torch.zeros_like(rest)
        return {"kv/gradient_squares_kv": kv, "kv/gradient_squares_rest": rest}

    def ratio(self) -> Tensor | None:
        """The ratio of the backward pass just run, or None where no KV gradient arrived."""
        if not self._kv_squares or not self._rest_squares:
            return None
        return (torch.stack(self._kv_squares).sum() / torch.stack(self._rest_squares).sum().clamp_min(1e-38)).sqrt()


class DistillationModule(nn.Module):
    """Student and aligner behind one forward that returns the loss of a micro-batch.

    ``loss = w_task · CE + w_kv · KV + w_kd · KD``, each part the micro-batch's sum over positions divided by the global
    step's mean count (``TokenBatch.label_normalizer``, ``position_normalizer``): averaged over ranks and
    micro-batches, as
    DeepSpeed does, it is the mean over the whole global batch, however it was split and padded.

    Args:
        student: A causal language model.
        aligner: From :func:`kvds.align.build_aligner`; None without KV alignment.
        rope: Capture keys ``"pre"`` or ``"post"`` rotary embedding.
        head_chunks: Chunks of positions at the language-model head, the same on every rank.
        kd_temperature: Temperature of logit distillation.
        kd_vocab_size: Entries of the vocabulary that carry tokens.
        offload_checkpoints: Keep what the student's forward saves for its backward pass in host memory; with gradient
            checkpointing that is each layer's input.
    """

    def __init__(
        self,
        student: nn.Module,
        aligner: KVAligner | AlignerGroup | None = None,
        *,
        rope: str = "pre",
        head_chunks: int = 1,
        kd_temperature: float = 1.0,
        kd_vocab_size: int | None = None,
        offload_checkpoints: bool = False,
    ) -> None:
        super().__init__()
        self.student = student
        self.aligner = aligner
        self._rope, self._head_chunks = rope, head_chunks
        self._kd_temperature, self._kd_vocab_size = kd_temperature, kd_vocab_size
        self._offload_checkpoints = offload_checkpoints
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
        if self.aligner is None:
            with self._storage(batch.input_ids):
                hidden = model(**inputs).last_hidden_state
        else:
            require_grad = torch.is_grad_enabled()
            capture = open_capture(model, self.aligner.reads, rope=self._rope, require_grad=require_grad)
            with capture, self._storage(batch.input_ids):
                hidden = model(**inputs).last_hidden_state
            states = capture.states
            if batch.step_ids is not None:
                states = pool_steps(states, batch.step_ids, batch.num_steps)  # type: ignore[type-var]
            if step.watch and torch.is_grad_enabled():
                self.gradient_watch = GradientWatch()
                self.gradient_watch.attach(capture)
            kv = self._kv_loss(states, step, metrics)

        teacher_hidden = step.teacher.hidden if step.teacher is not None and weights.logit_kd else None
        task, kd = head_losses(
            self.student.get_output_embeddings(),  # type: ignore[operator]
            hidden,
            step.labelled,
            num_chunks=self._head_chunks,
            teacher_head=step.teacher_head,
            teacher_hidden=teacher_hidden,
            temperature=self._kd_temperature,
            vocab_size=self._kd_vocab_size,
            scale=1 / batch.label_normalizer,
        )
        # At a weight of 0, too: ZeRO-3 gathers the last layer for its backward pass once its output has a gradient.
        loss = task if weights.task == 1.0 else weights.task * task
        metrics["loss/task"] = task.detach()
        if kv is not None and weights.kv:
            loss = loss + weights.kv * kv
        if teacher_hidden is not None:
            loss = loss + weights.logit_kd * kd
            metrics["loss/logit_kd"] = kd.detach()
        metrics["loss/total"] = loss.detach()
        return spoil_gradient(loss), metrics

    def _kv_loss(self, states: States, step: StepInput, metrics: dict[str, Tensor]) -> Tensor:
        """The KV loss of the teacher; of several the weighted sum, one after the other."""
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
            metrics |= _state_metrics(states, selection)
            if step.batch.step_ids is None:
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


@torch.no_grad()
def _state_metrics(states: States, selection: Selection | None) -> dict[str, Tensor]:
    """RMS norm and effective rank of the student's states, means over layers, of the tokens selected."""
    if selection is None:
        return {}
    metrics = {}
    for name in ("keys", "values", "hidden_states"):
        layers = getattr(states, name, ())
        if not layers:
            continue
        norms, ranks = [], []
        for layer in layers:
            rows = layer.detach().transpose(1, 2).flatten(2)  # [B, T, H·D]
            if selection.index is not None:
                rows = rows.gather(1, selection.index.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
            kept = rows[selection.mask].float()  # [N, H·D]
            if kept.shape[0] == 0:  # a micro-batch of padding alone, at the end of an epoch
                return {}
            norms.append(kept.square().sum(-1).mean().sqrt())
            # An eigenvalue solver raises on what is not finite; the step itself is left out and told of elsewhere.
            rank = torch.as_tensor(effective_rank(torch.nan_to_num(kept, 0.0, 0.0, 0.0)))
            ranks.append(torch.where(torch.isfinite(kept).all(), rank, torch.nan))
        metrics[f"kv/norm_{name}"] = torch.stack(norms).mean()
        metrics[f"kv/effective_rank_{name}"] = torch.stack(ranks).mean().to(metrics[f"kv/norm_{name}"])
    return metrics
