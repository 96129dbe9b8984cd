"""The oracle: map projection and its loss as einsums over stacked layers, in any dtype, readable before fast."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def _selected(states: Sequence[Tensor], index: Tensor | None) -> Tensor:
    """Stack layers and take positions: ``[L, B, H, M, D]``."""
    stacked = torch.stack(tuple(states))
    if index is None:
        return stacked
    layers, _, heads, _, dim = stacked.shape
    return stacked.gather(3, index[None, :, None, :, None].expand(layers, -1, heads, -1, dim))


def _projected(selected: Tensor, layer_mix: Tensor, head_mix: Tensor, dim_proj: Tensor, bias: Tensor | None) -> Tensor:
    """``[L_x, B, H_x, M, D_x]`` to ``[L_y, B, H_y, M, D_y]``."""
    head_mix, dim_proj = head_mix.to(selected.dtype), dim_proj.to(selected.dtype)
    layer_mix = layer_mix.to(selected.dtype) if layer_mix.is_floating_point() else layer_mix
    if layer_mix.dim() == 2:
        mixed = torch.einsum("il,lbhmd->ibhmd", layer_mix, selected)
    elif layer_mix.is_floating_point():
        mixed = selected * layer_mix[:, None, None, None, None]
    else:
        mixed = selected[layer_mix]
    heads = "jh" if head_mix.dim() == 2 else "ijh"
    mixed = torch.einsum(f"{heads},ibhmd->ibjmd", head_mix, mixed)
    dims = {2: "de", 3: "ide", 4: "ijde"}[dim_proj.dim()]
    projected = torch.einsum(f"ibjmd,{dims}->ibjme", mixed, dim_proj)
    return projected if bias is None else projected + bias.to(projected.dtype)[:, None, :, None, :]


def map_projection_reference(
    source: Sequence[Tensor],
    layer_mix: Tensor,
    head_mix: Tensor,
    dim_proj: Tensor,
    bias: Tensor | None,
    source_index: Tensor | None,
) -> Tensor:
    """``[L_y, B, H_y, M, D_y]``; arguments as in :func:`kvds.ops.map_projection`."""
    return _projected(_selected(source, source_index), layer_mix, head_mix, dim_proj, bias)


def penalty(residual: Tensor, loss: str) -> Tensor:
    """ρ(residual), elementwise: ``mse`` r², ``l1`` |r|, ``smooth_l1`` r²/2 below 1 and |r| − 1/2 above."""
    if loss == "mse":
        return residual.square()
    if loss == "l1":
        return residual.abs()
    return F.smooth_l1_loss(residual, torch.zeros_like(residual), reduction="none")


def map_projection_loss_reference(
    source: Sequence[Tensor],
    target: Sequence[Tensor],
    layer_mix: Tensor,
    head_mix: Tensor,
    dim_proj: Tensor,
    bias: Tensor | None,
    source_index: Tensor | None,
    target_index: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    loss: str,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scalar and ``[L_y]``; arguments as in :func:`kvds.ops.map_projection_loss`. Sums in at least fp32."""
    selected = _selected(source, source_index)
    wanted = _selected(target, target_index)
    if mask is not None:
        # Filled, not multiplied: what lies under the mask may be anything, also NaN, on either side.
        hidden = ~mask[None, :, None, :, None]
        selected, wanted = selected.masked_fill(hidden, 0), wanted.masked_fill(hidden, 0)
    projected = _projected(selected, layer_mix, head_mix, dim_proj, bias)
    residual = projected - wanted.to(projected.dtype)
    if residual.dtype in (torch.bfloat16, torch.float16):
        residual = residual.float()
    if scale is not None:
        residual = residual / scale.to(residual.dtype)[:, None, None, None, None]
    elements = penalty(residual, loss)
    if weight is not None:
        elements = elements * weight.to(elements.dtype)[None, :, None, :, None]
    if mask is None:
        per_layer = elements.mean(dim=(1, 2, 3, 4)) if elements.numel() else elements.sum(dim=(1, 2, 3, 4))
    else:
        count = (mask.sum() * elements.shape[2] * elements.shape[4]).clamp_min(1)
        per_layer = elements.masked_fill(hidden, 0).sum(dim=(1, 2, 3, 4)) / count
    return per_layer.mean(), per_layer.detach()
