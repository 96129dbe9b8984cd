"""The handoff model: teacher, map and student as one that generates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvds.errors import InputError
from kvds.handoff.cache_map import CacheMap
from kvds.handoff.reading import cache_argument, fill_cache, read_states, without_padding
from kvds.kv import KVShape, KVStates


class HandoffModel:
    """The teacher reads a prompt, the map makes the student's keys and values of the teacher's, the student writes.

    The student never reads the prompt but for its last token, whose logits begin the answer.

    Args:
        teacher: A causal language model or its backbone, in evaluation mode.
        student: A causal language model of the same tokenizer.
        cache_map: From one to the other; moved to the student's device and dtype.

    Raises:
        InputError: a map of other shapes.
    """

    def __init__(self, teacher: nn.Module, student: Any, cache_map: CacheMap) -> None:
        for side, model, shape in (("teacher", teacher, cache_map.teacher), ("student", student, cache_map.student)):
            found = KVShape.from_config(model.config)
            if found != shape:
                raise InputError(
                    f"handoff: the map is for a {side} of {_sizes(shape)}, this one has {_sizes(found)}; expected the "
                    f"{side} that it was fitted to"
                )
        self.teacher, self.student = teacher.eval(), student.eval()
        weight = next(student.parameters())
        self.map = cache_map.to(device=weight.device, dtype=weight.dtype)

    @torch.no_grad()
    def read(self, input_ids: Tensor, mask: Tensor) -> KVStates:
        """The student's keys, before the rotary embedding, and values of a text, as the map makes them.

        Args:
            input_ids: ``[B, T]`` on the student's device.
            mask: ``[B, T]`` bool.
        """
        own = next(self.student.parameters())
        place = next(self.teacher.parameters()).device
        read = read_states(self.teacher, input_ids.to(place), mask.to(place))
        moved = KVStates(*(tuple(layer.to(device=own.device, dtype=own.dtype) for layer in part) for part in read))
        return without_padding(self.map(moved), mask)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **generation: Any) -> Tensor:
        """As the student's own ``generate``: prompts and what was written after them.

        Args:
            input_ids: ``[B, T]`` on the student's device, padding on the left.
            attention_mask: ``[B, T]``, 1 = real token; None: all.
            **generation: What ``generate`` takes.

        Raises:
            InputError: padding on the right, after which nothing can be written.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        before = mask[:, :-1].bool()
        states = self.read(input_ids[:, :-1], before) if before.any() else None
        return generate_from(self.student, states, before, input_ids, mask, **generation)


def generate_from(
    student: Any, states: KVStates | None, before: Tensor, input_ids: Tensor, mask: Tensor, **generation: Any
) -> Tensor:
    """Let ``student`` write on from keys and values of all of a prompt but its last token.

    Args:
        student: A causal language model.
        states: Its keys before the rotary embedding and values, ``[B, H, T - 1, D]``; None: of no token.
        before: ``[B, T - 1]`` bool, which of them are real and may be seen.
        input_ids: ``[B, T]``.
        mask: ``[B, T]``, 1 = real token.
        **generation: What ``generate`` takes.
    """
    if not bool(mask[:, -1].all()):
        raise InputError("attention_mask: padding after a prompt; expected it before (tokenizer padding_side='left')")
    if states is None:  # not one prompt has a token before its last
        written = student.generate(input_ids=input_ids[:, -1:], attention_mask=mask[:, -1:], **generation)
        return torch.cat([input_ids[:, :-1], written], 1)
    cache = {cache_argument(student): fill_cache(student, states, before)}
    seen = torch.cat([before.to(mask), mask[:, -1:]], 1)
    return student.generate(input_ids=input_ids, attention_mask=seen, **cache, **generation)


def _sizes(shape: KVShape) -> str:
    return f"{shape.num_hidden_layers} layers × {shape.num_key_value_heads} KV heads × {shape.head_dim} dimensions"
