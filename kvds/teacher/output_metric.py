"""Values in the metric of the attention output: what a difference of values makes at the output of attention.

Attention mixes values and maps what each query head mixed by its part of the output projection, ``W_h``. A residual
``r`` of a KV head's values so moves the output by ``Σ_h ‖W_h r‖² = ‖L_jᵀ r‖²`` over the query heads of that KV head,
with ``L_j L_jᵀ = Σ_h W_hᵀ W_h``: the rows ``v L_j`` are the values in that metric. An aligner that is given the
teacher's values so weighs each direction by its use, and its map takes in the factor: nothing else changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvds.errors import InputError
from kvds.kv import KVShape
from kvds.kv.attention_layout import OUTPUTS, output_projection
from kvds.kv.families import attention_modules

_LEAST = 1e-6  # of the mean eigenvalue: what keeps a metric definite that ignores a direction


def output_roots(model: nn.Module, config: Any) -> list[Tensor]:
    """``[num_key_value_heads, head_dim, head_dim]`` per layer: ``L_j``, lower triangular, fp64, of mean eigenvalue 1.

    Args:
        model: Whole, on this rank.
        config: Its configuration.

    Raises:
        InputError: an attention without an output projection that is known.
    """
    shape = KVShape.from_config(config)
    return [_root(_output_weight(module, config.model_type), shape) for module in attention_modules(model)]


def _output_weight(attention: nn.Module, model_type: str) -> Tensor:
    """``[hidden, query heads · head_dim]``."""
    module = output_projection(attention)
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return weight.detach() if isinstance(module, nn.Linear) else weight.detach().T  # GPT-2's are transposed
    raise InputError(
        f"value_metric=output: the attention of model_type={model_type} has no output projection called "
        f"{', '.join(OUTPUTS)}; expected one (or --value_metric states)"
    )


def _root(weight: Tensor, shape: KVShape) -> Tensor:
    by_head = weight.double().unflatten(1, (shape.num_key_value_heads, -1, shape.head_dim))  # [hidden, H, group, D]
    gram = torch.einsum("ohgd,ohge->hde", by_head, by_head)
    gram = gram / gram.diagonal(dim1=1, dim2=2).mean().clamp_min(1e-300)
    gram.diagonal(dim1=1, dim2=2).add_(_LEAST)
    return torch.stack([torch.linalg.cholesky(head) for head in gram])


def in_output_metric(values: tuple[Tensor, ...], roots: list[Tensor]) -> tuple[Tensor, ...]:
    """Values ``[B, H, T, D]`` per layer times ``L_j`` of their layer and head, in fp32 at least, in their own dtype."""
    found = []
    for layer, root in zip(values, roots, strict=True):
        dtype = torch.promote_types(torch.float32, layer.dtype)
        found.append((layer.to(dtype) @ root.to(layer.device, dtype)).to(layer.dtype))
    return tuple(found)


def from_output_metric(values: Tensor, root: Tensor) -> Tensor:
    """The way back of one layer: rows ``[N, H, D]`` times the inverse of ``L_j``, in fp64."""
    rows = values.double().transpose(0, 1)  # [H, N, D]
    return torch.linalg.solve_triangular(root.to(rows.device), rows, upper=False, left=False).transpose(0, 1)
