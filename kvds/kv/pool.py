"""Keys and values of reasoning steps: the means over the tokens of each."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from kvds.kv.hidden import HiddenStates
from kvds.kv.select import Selection
from kvds.kv.states import KVStates

Poolable = TypeVar("Poolable", KVStates, HiddenStates)


def pool_reasoning_steps(states: Poolable, step_ids: Tensor, num_steps: int) -> Poolable:
    """``pooled[b,h,s] = mean of states[b,h,t] over the tokens t of step s + 1``, zero where a row has no such step.

    Args:
        states: Per layer ``[B, H, T, D]``.
        step_ids: ``[B, T]`` int64, the step of each token, counted from 1; 0 = in no step. What lies there may be
            anything, also NaN.
        num_steps: S, the number of slots.

    Returns:
        Per layer ``[B, H, S, D]``, in at least fp32.
    """
    member = step_ids[:, None] == torch.arange(1, num_steps + 1, device=step_ids.device)[:, None]  # [B, S, T]
    counted = (step_ids > 0)[:, None, :, None]
    count = member.sum(2, keepdim=True).clamp_min(1)

    def pooled(layer: Tensor) -> Tensor:
        dtype = torch.promote_types(torch.float32, layer.dtype)
        rows = torch.where(counted, layer.to(dtype), layer.new_zeros((), dtype=dtype))
        return (member.to(dtype) / count)[:, None] @ rows

    return type(states)(*(tuple(pooled(layer) for layer in part) for part in states))


def common_reasoning_steps(student_ids: Tensor, teacher_ids: Tensor, num_steps: int) -> Selection:
    """Steps that both texts of a row have, by number: ``mask [B, S]`` over :func:`pool_reasoning_steps`'s slots."""
    common = torch.minimum(student_ids.amax(1), teacher_ids.amax(1))  # steps are numbered without gaps
    return Selection(None, torch.arange(num_steps, device=student_ids.device) < common[:, None])
