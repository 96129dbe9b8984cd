"""The teacher: placed on this rank or sharded over all, one forward without gradient per batch, its keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from kvds.data.batches import TokenBatch
from kvds.kv import KVShape, States, open_capture, shuffled_states
from kvds.models import backbone, kv_shape


@dataclass(frozen=True)
class TeacherOutput:
    """What one teacher forward leaves, without gradient.

    Attributes:
        states: Keys and values per layer, ``[B, num_key_value_heads, T, head_dim]`` (or hidden states); None where no
            alignment reads them.
        hidden: ``[B, T, hidden]``, the backbone's output; None unless logit distillation reads it.
    """

    states: States | None
    hidden: Tensor | None


class _TeacherModule(nn.Module):
    """Backbone and head behind one ``forward``: ZeRO-3 follows its trace of modules from the root it was given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, attention_mask: Tensor | None) -> Tensor:
        """``[B, T]`` ids → ``[B, T, hidden]``; or hidden states (no mask) → logits."""
        if attention_mask is None:
            return self.model.get_output_embeddings()(inputs)  # type: ignore[operator]
        output = backbone(self.model)(input_ids=inputs, attention_mask=attention_mask, use_cache=False)
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
        reads: ``"kv"`` or ``"hidden"``, see :func:`kvds.kv.open_capture`.
        wants_hidden: Return hidden states for logit distillation.
        shuffled: Exchange the rows' keys and values, a control (:func:`kvds.kv.shuffled_states`).
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
        wants_hidden: bool = False,
        shuffled: bool = False,
    ) -> None:
        model.requires_grad_(False).eval()
        self.config = model.config
        self._rope, self._wants_states, self._wants_hidden = rope, wants_states, wants_hidden
        self._reads, self._shuffled = reads, shuffled
        module = _TeacherModule(model)
        if engine_config is None:
            self._forward: nn.Module = module.to(device)
        else:
            self._forward = deepspeed.initialize(model=module, config=engine_config)[0]
            self._forward.eval()
        self._backbone = backbone(model)

    @property
    def shape(self) -> KVShape:
        """Layers, KV heads and head_dim of the keys and values it returns."""
        return kv_shape(self.config)

    # no_grad, not inference_mode: a trained aligner must be able to save these tensors for its backward pass.
    @torch.no_grad()
    def __call__(self, batch: TokenBatch) -> TeacherOutput:
        """Run the backbone once; the language-model head is not touched."""
        if not self._wants_states:
            return TeacherOutput(None, self._forward(batch.input_ids, batch.attention_mask))
        with open_capture(self._backbone, self._reads, rope=self._rope) as capture:
            hidden = self._forward(batch.input_ids, batch.attention_mask)
        states = capture.states
        if self._shuffled:
            states = shuffled_states(states, batch.attention_mask, batch.sample_ids >= 0)
        return TeacherOutput(states, hidden if self._wants_hidden else None)

    @torch.no_grad()
    def head(self, hidden: Tensor) -> Tensor:
        """Logits ``[n, vocab]`` of some hidden states ``[n, hidden]``."""
        return self._forward(hidden, None)
