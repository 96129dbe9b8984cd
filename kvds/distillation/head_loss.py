"""Cross entropy through a language-model head whose gradients are made in the forward pass, chunk by chunk.

The gradient of a sum of cross entropies by the logits, softmax minus one-hot, is known as soon as the logits are. So
each chunk of logits is made once, turned into its gradient in place, multiplied into the gradients of hidden states and
weight, and dropped: three matrix products where recomputing chunks in the backward pass takes four, and one addition to
the weight's gradient in place of a copy per chunk.

Source: the idea is that of Liger-Kernel's fused linear cross entropy (Hsu et al., 2024, section 3.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kvds.kv.module_forward import forward_of

# Elements that are widened at a time (128 MiB in fp32).
_SLICE = 2**25


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, chunks: int, scale: float
    ) -> Tensor:
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        total = torch.zeros((), dtype=torch.promote_types(torch.float32, rows.dtype), device=rows.device)
        d_rows = torch.empty_like(rows) if needs_rows else None
        d_weight = torch.zeros_like(weight) if needs_weight else None
        d_bias = torch.zeros_like(bias) if bias is not None and needs_bias else None
        begin = 0
        for chunk, labels in zip(rows.tensor_split(chunks), target.tensor_split(chunks), strict=True):
            logits = nn.functional.linear(chunk, weight, bias).to(total.dtype)
            normalizer = logits.logsumexp(1, keepdim=True)
            total += (normalizer - logits.gather(1, labels[:, None])).sum()
            gradient = logits.sub_(normalizer).exp_()
            gradient.scatter_add_(1, labels[:, None], -torch.ones_like(normalizer))
            gradient = gradient.mul_(scale).to(weight.dtype)  # scaled before it is rounded
            if d_rows is not None:
                d_rows[begin : begin + len(chunk)] = gradient @ weight
            if d_weight is not None:
                d_weight.addmm_(gradient.T, chunk)
            if d_bias is not None:
                d_bias += gradient.sum(0)
            begin += len(chunk)
        ctx.save_for_backward(d_rows, d_weight, d_bias)
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # The scalar is multiplied in, not looked at: nothing waits for the device.
        return *(None if g is None else _scaled(g, upstream) for g in ctx.saved_tensors), None, None, None


def _scaled(tensor: Tensor, scalar: Tensor) -> Tensor:
    """``tensor · scalar`` in the tensor's dtype; the scalar itself is never rounded to bf16, which would scale all."""
    if tensor.dtype == scalar.dtype:
        return tensor * scalar
    out = torch.empty_like(tensor)
    for source, target in zip(tensor.flatten().split(_SLICE), out.view(-1).split(_SLICE), strict=True):
        target.copy_(source.to(scalar.dtype) * scalar)
    return out


def summed_cross_entropy(
    head: nn.Linear, rows: Tensor, target: Tensor, *, num_chunks: int, scale: float = 1.0
) -> Tensor:
    """``scale · Σ_n −log softmax(head(rows_n))[target_n]``, with at most one chunk of logits alive.

    It runs as the forward of ``head``: there, and only there, ZeRO-3 has the whole weight. One call gathers it once.

    Args:
        head: The language-model head.
        rows: ``[N, hidden]``; N may be 0, which gives 0 with a graph.
        target: ``[N]`` int64.
        num_chunks: Chunks of rows.
        scale: Factor of the loss, best the whole of it: one that comes with the backward pass rounds bf16 gradients
            a second time.

    Returns:
        Scalar, fp32 (fp64 for fp64 rows).
    """

    def forward(rows: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = _SummedCrossEntropy.apply(rows, head.weight, head.bias, target, num_chunks, scale)
        return loss

    with forward_of(head, forward):
        loss: Tensor = head(rows, target)
    return loss
