"""The teacher: placed on this rank or sharded over all, one forward without gradient per batch, its keys and values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvds.data.batches import TokenBatch
from kvds.data.model_inputs import model_inputs
from kvds.distributed.layer_gathering import gather_whole_layers
from kvds.kv import (
    Capture,
    KVCapture,
    KVShape,
    KVStates,
    Observed,
    ObservingRows,
    Selection,
    States,
    open_capture,
    pool_reasoning_steps,
    shuffled_states,
)
from kvds.kv.families import backbone
from kvds.kv.last_layer import only_keys_and_values
from kvds.kv.received import ReceivedAttention
from kvds.kv.selected import SelectedCapture
from kvds.kv.states import KV_PARTS
from kvds.models.buffers import buffers_kept
from kvds.models.compiled_layers import compile_as_asked, refuse_uncompiled
from kvds.models.own_logits import head_of, is_plain_head
from kvds.teacher.output_metric import from_output_metric, in_output_metric, output_roots


@dataclass(frozen=True)
class TeacherOutput:
    """What one teacher forward leaves, without gradient.

    Attributes:
        states: Keys and values per layer, ``[B, num_key_value_heads, T, head_dim]`` (``M`` in place of ``T`` where only
            selected positions were asked for; no layers of a part that nothing compares), or hidden states; None where
            no alignment reads them.
        hidden: ``[B, T, hidden]``, the backbone's output; None unless logit distillation reads it.
        observed: Query rows and keys for the selection of tokens; None where it reads none.
        received: ``[N, S]`` attention that each sample's tokens received (:class:`kvds.kv.received.ReceivedAttention`),
            a row each; None where nobody asked.
    """

    states: States | None
    hidden: Tensor | None
    observed: Observed | None = None
    received: Tensor | None = None


class _TeacherModule(nn.Module):
    """Backbone and head behind one ``forward``: ZeRO-3 follows its trace of modules from the root it was given."""

    def __init__(self, model: nn.Module, wants_logits: bool) -> None:
        super().__init__()
        self.model = model
        self._plain_head = wants_logits and is_plain_head(model)

    def _head(self, hidden: Tensor) -> Tensor:
        return head_of(self.model, plain=self._plain_head)(hidden)

    def forward(self, inputs: Tensor, **masks: Tensor) -> Tensor:
        """``[B, T]`` ids → ``[B, T, hidden]``; or hidden states (no mask) → logits."""
        if not masks:
            return self._head(inputs)
        output = backbone(self.model)(input_ids=inputs, use_cache=False, **masks)
        return output.last_hidden_state


class Teacher:
    """A frozen model whose keys and values are the target.

    It is no ``nn.Module``, so that it can never become a child of the student's engine, its optimizer or its
    checkpoint.

    Args:
        model: A causal language model. Its parameters are frozen and it is put in evaluation mode.
        device: Where its batches run.
        engine_config: A DeepSpeed inference configuration (``zero3`` and ``zero3_offload`` placement), or None:
            replicated.
        rope: Capture keys ``"pre"`` or ``"post"`` rotary embedding.
        wants_states: Capture what ``reads`` names.
        reads: ``"kv"``, ``"hidden"`` or ``"attention_output"``, see :func:`kvds.kv.open_capture`.
        parts: Of keys and values, those that are compared; the others are let go layer by layer, unless a selection
            looks at keys or the rows are exchanged.
        wants_hidden: Return hidden states for logit distillation.
        observe: From a batch to the tokens whose queries the selection reads, or to None; see
            :func:`kvds.kv.observing_rows`.
        shuffled: Exchange the rows' keys and values, a control (:func:`kvds.kv.shuffled_states`).
        tensor_parallel: Ranks that share one model, each with some of its heads; 1 = none. Then keys and values alone
            are wanted, and all ranks of a group call at the same time.
        compiled: ``--compile``.
        value_metric: ``"output"``: values are given in the metric of the attention output, see
            :mod:`kvds.teacher.output_metric`; of a whole model only.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device,
        engine_config: dict[str, Any] | None = None,
        rope: str = "pre",
        wants_states: bool = True,
        reads: str = "kv",
        parts: Sequence[str] = KV_PARTS,
        wants_hidden: bool = False,
        observe: Callable[[TokenBatch], ObservingRows | None] | None = None,
        shuffled: bool = False,
        tensor_parallel: int = 1,
        compiled: str = "off",
        value_metric: str = "states",
    ) -> None:
        model.requires_grad_(False).eval()
        self._roots = output_roots(model, model.config) if value_metric == "output" else None
        self.config, self._dtype = model.config, next(model.parameters()).dtype
        self._rope, self._wants_states, self._wants_hidden = rope, wants_states, wants_hidden
        self._reads, self._observe, self._shuffled = reads, observe, shuffled
        self._parts = tuple(parts)
        self._whole = model if engine_config is None and tensor_parallel == 1 else None
        module = _TeacherModule(model, wants_hidden)
        self._shards = None
        if tensor_parallel > 1:
            from kvds.teacher.tensor_parallel import HeadShards

            refuse_uncompiled(compiled, "its heads are dealt out to several ranks", flag="teacher")
            self._shards = HeadShards(backbone(model), tensor_parallel, self._dtype)
        elif engine_config is None:
            compile_as_asked(model, compiled, device, flag="teacher")
            self._forward: nn.Module = module.to(device)
        else:
            import deepspeed  # a replicated teacher runs where DeepSpeed is not installed

            whole = gather_whole_layers(model, engine_config)
            compile_as_asked(model, compiled, device, flag="teacher", layers=whole)
            with buffers_kept(module):
                self._forward = deepspeed.initialize(model=module, config=engine_config)[0]
            self._forward.eval()
        self._backbone = backbone(model)

    @property
    def shape(self) -> KVShape:
        """Layers, KV heads and head_dim of the keys and values it returns."""
        return KVShape.from_config(self.config)

    @property
    def whole_model(self) -> nn.Module | None:
        """The model, where this rank holds it whole."""
        return self._whole

    def plain_values(self, layer: int, rows: Tensor) -> Tensor:
        """Values ``[N, H, D]`` of a layer as attention mixes them, from those in the metric that it gives them in."""
        return rows if self._roots is None else from_output_metric(rows, self._roots[layer])

    # no_grad, not inference_mode: a trained aligner must be able to save these tensors for its backward pass.
    @torch.no_grad()
    def __call__(
        self, batch: TokenBatch, selection: Selection | None = None, *, received: bool = False
    ) -> TeacherOutput:
        """Run the backbone once, on the text that the teacher reads; the language-model head is not touched.

        With steps, the states are those of the steps, ``[B, heads, S, head_dim]``.

        Args:
            batch: On the teacher's device.
            selection: The positions that alone are read: keys and values of no others are kept. None, or one without
                an index: all, without a copy.
            received: Also say how much attention each token receives; of a teacher whose heads are all on this rank.
        """
        batch, steps = batch.teacher_text or batch, batch.num_reasoning_steps
        if self._shards is not None:
            index = None if selection is None or self._shuffled else selection.index
            own = self._shards.states(batch, index, rope=self._rope, parts=self._parts)
            return TeacherOutput(self._finished(own, batch, steps), None)
        inputs = model_inputs(batch, self.config, self._dtype)
        ids = inputs.pop("input_ids")
        if not self._wants_states:
            return TeacherOutput(None, self._forward(ids, **inputs))
        rows = None if self._observe is None else self._observe(batch)
        capture = self._capture(rows, None if selection is None else selection.index)
        with contextlib.ExitStack() as stack:
            stack.enter_context(capture)
            looks = stack.enter_context(self._received(batch)) if received else None
            if self._reads == "kv" and not self._wants_hidden:
                stack.enter_context(only_keys_and_values(self._backbone))
            hidden = self._forward(ids, **inputs)
        states = self._finished(capture.states, batch, steps)
        observed = Observed(rows, capture.observed) if rows is not None and isinstance(capture, KVCapture) else None
        mass = None if looks is None else looks.mass
        return TeacherOutput(states, hidden if self._wants_hidden else None, observed, mass)

    def _received(self, batch: TokenBatch) -> ReceivedAttention:
        packing = batch.packing
        if packing is None:
            return ReceivedAttention(self._backbone, batch.attention_mask.bool() & (batch.segment_ids != 0))
        return ReceivedAttention(self._backbone, packing.token_mask, packing.token_index)

    def _finished(self, states: States, batch: TokenBatch, steps: int) -> States:
        if self._roots is not None and isinstance(states, KVStates) and states.values:
            self._roots = [root.to(states.values[0].device) for root in self._roots]
            states = states._replace(values=in_output_metric(states.values, self._roots))
        if self._shuffled:
            states = shuffled_states(states, batch.attention_mask, batch.sample_ids >= 0)  # type: ignore[type-var]
        if batch.reasoning_step_ids is not None:
            states = pool_reasoning_steps(states, batch.reasoning_step_ids, steps)  # type: ignore[type-var]
        return states

    def _capture(self, rows: ObservingRows | None, index: Tensor | None) -> Capture | SelectedCapture:
        if rows is not None:
            return KVCapture(self._backbone, rope=self._rope, query_rows=rows.positions)
        if self._reads != "kv" or self._shuffled:
            return open_capture(self._backbone, self._reads, rope=self._rope)
        if index is None:
            capture = KVCapture(self._backbone, rope=self._rope, parts=self._parts)
            if self._parts == KV_PARTS or not capture.one_projection:
                return capture
        return SelectedCapture(self._backbone, index, rope=self._rope, parts=self._parts)

    @torch.no_grad()
    def head(self, hidden: Tensor) -> Tensor:
        """Logits ``[n, vocab]`` of some hidden states ``[n, hidden]``."""
        return self._forward(hidden)
