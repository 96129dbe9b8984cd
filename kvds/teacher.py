"""The teacher: placed on this rank or sharded over all, one forward without gradient per batch, its keys and values."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvds.data.batches import TokenBatch
from kvds.data.packing import model_inputs
from kvds.kv import KVCapture, KVShape, KVStates, Selection
from kvds.kv.last_layer import only_keys_and_values
from kvds.kv.selected import SelectedCapture
from kvds.models import backbone, kv_shape


@dataclass(frozen=True)
class TeacherOutput:
    """What one teacher forward leaves, without gradient.

    Attributes:
        states: Keys and values per layer, ``[B, num_key_value_heads, T, head_dim]`` (``M`` in place of ``T`` where only
            selected positions were asked for); None where no alignment reads them.
        hidden: ``[B, T, hidden]``, the backbone's output; None unless logit distillation reads it.
    """

    states: KVStates | None
    hidden: Tensor | None


class _TeacherModule(nn.Module):
    """Backbone and head behind one ``forward``: ZeRO-3 follows its trace of modules from the root it was given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, **masks: Tensor) -> Tensor:
        """``[B, T]`` ids → ``[B, T, hidden]``; or hidden states (no mask) → logits."""
        if not masks:
            return self.model.get_output_embeddings()(inputs)  # type: ignore[operator]
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
        wants_states: Capture keys and values.
        wants_hidden: Return hidden states for logit distillation.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device,
        engine_config: dict[str, Any] | None = None,
        rope: str = "pre",
        wants_states: bool = True,
        wants_hidden: bool = False,
    ) -> None:
        model.requires_grad_(False).eval()
        self.config, self._dtype = model.config, next(model.parameters()).dtype
        self._rope, self._wants_states, self._wants_hidden = rope, wants_states, wants_hidden
        module = _TeacherModule(model)
        if engine_config is None:
            self._forward: nn.Module = module.to(device)
        else:
            import deepspeed  # a replicated teacher runs where DeepSpeed is not installed

            self._forward = deepspeed.initialize(model=module, config=engine_config)[0]
            self._forward.eval()
        self._backbone = backbone(model)

    @property
    def shape(self) -> KVShape:
        """Layers, KV heads and head_dim of the keys and values it returns."""
        return kv_shape(self.config)

    # no_grad, not inference_mode: a trained aligner must be able to save these tensors for its backward pass.
    @torch.no_grad()
    def __call__(self, batch: TokenBatch, selection: Selection | None = None) -> TeacherOutput:
        """Run the backbone once; the language-model head is not touched.

        Args:
            batch: On the teacher's device.
            selection: The positions whose keys and values are wanted; None, or one without an index: all, without a
                copy.
        """
        inputs = model_inputs(batch, self.config, self._dtype)
        ids = inputs.pop("input_ids")
        if not self._wants_states:
            return TeacherOutput(None, self._forward(ids, **inputs))
        capture: KVCapture | SelectedCapture = KVCapture(self._backbone, rope=self._rope)
        if selection is not None and selection.index is not None:
            capture = SelectedCapture(self._backbone, selection.index, rope=self._rope)
        rest = contextlib.nullcontext() if self._wants_hidden else only_keys_and_values(self._backbone)
        with capture, rest:
            hidden = self._forward(ids, **inputs)
        return TeacherOutput(capture.states, hidden if self._wants_hidden else None)

    @torch.no_grad()
    def head(self, hidden: Tensor) -> Tensor:
        """Logits ``[n, vocab]`` of some hidden states ``[n, hidden]``."""
        return self._forward(hidden)
