"""The public functions of the operation: validate, choose an implementation, call it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvds.errors import InputError
from kvds.ops.reference import map_projection_loss_reference, map_projection_reference

LOSSES = ("mse", "l1", "smooth_l1")
IMPLEMENTATIONS = ("auto", "reference")


def _check_states(name: str, states: Sequence[Tensor], index: Tensor | None) -> tuple[int, int, int, int, int]:
    """Layers, batch, heads, selected positions, dimension."""
    if not states:
        raise InputError(f"{name}: expected at least one layer")
    first = states[0]
    if first.dim() != 4 or any(layer.shape != first.shape for layer in states):
        raise InputError(
            f"{name}: expected layers of one shape [batch, heads, tokens, head_dim], got {[tuple(s.shape) for s in states[:3]]}"
        )
    batch, heads, tokens, dim = first.shape
    if index is not None and (index.dim() != 2 or index.shape[0] != batch):
        raise InputError(f"{name}_index: expected [{batch}, M], got {tuple(index.shape)}")
    return len(states), batch, heads, tokens if index is None else index.shape[1], dim


def _check_maps(
    source: tuple[int, int, int, int, int], layer_mix: Tensor, head_mix: Tensor, dim_proj: Tensor, bias: Tensor | None
) -> tuple[int, int, int]:
    """Layers, heads and dimension of the target as the maps say."""
    layers_x, _, heads_x, _, dim_x = source
    if layer_mix.dim() != 2 or layer_mix.shape[1] != layers_x:
        raise InputError(f"layer_mix: expected [L_y, {layers_x}], got {tuple(layer_mix.shape)}")
    layers = layer_mix.shape[0]
    heads, dim = head_mix.shape[-2], dim_proj.shape[-1]
    shapes = {
        "head_mix": (head_mix, {(heads, heads_x), (layers, heads, heads_x)}),
        "dim_proj": (dim_proj, {(dim_x, dim), (layers, dim_x, dim), (layers, heads, dim_x, dim)}),
    }
    if bias is not None:
        shapes["bias"] = (bias, {(layers, heads, dim)})
    for name, (tensor, allowed) in shapes.items():
        if tuple(tensor.shape) not in allowed:
            raise InputError(f"{name}: expected one of {sorted(allowed, key=len)}, got {tuple(tensor.shape)}")
    return layers, heads, dim


def _check_impl(impl: str) -> None:
    if impl not in IMPLEMENTATIONS:
        raise InputError(f"impl={impl}: expected one of {', '.join(IMPLEMENTATIONS)}")


def map_projection(
    source: Sequence[Tensor],
    layer_mix: Tensor,
    head_mix: Tensor,
    dim_proj: Tensor,
    *,
    bias: Tensor | None = None,
    source_index: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Project keys or values through a layer map, a head map and a dimension map.

    ``out[i,b,j,m,:] = Σ_l layer_mix[i,l] Σ_h head_mix[(i,)j,h] · source[l][b,h,index[b,m],:] @ dim_proj[(i,(j,))] + bias[i,j,:]``

    Args:
        source: L_x tensors ``[B, H_x, T, D_x]``, any strides with a contiguous last dimension.
        layer_mix: ``[L_y, L_x]``.
        head_mix: ``[H_y, H_x]``, or ``[L_y, H_y, H_x]``.
        dim_proj: ``[D_x, D_y]``, ``[L_y, D_x, D_y]`` or ``[L_y, H_y, D_x, D_y]``.
        bias: ``[L_y, H_y, D_y]`` or None.
        source_index: ``[B, M]`` int64 positions; None = every position in order.
        impl: ``"auto"`` or ``"reference"``.

    Returns:
        ``[L_y, B, H_y, M, D_y]``.

    Raises:
        InputError: shapes that do not fit together, or an unknown ``impl``.
    """
    _check_impl(impl)
    _check_maps(_check_states("source", source, source_index), layer_mix, head_mix, dim_proj, bias)
    return map_projection_reference(source, layer_mix, head_mix, dim_proj, bias, source_index)


def map_projection_loss(
    source: Sequence[Tensor],
    target: Sequence[Tensor],
    layer_mix: Tensor,
    head_mix: Tensor,
    dim_proj: Tensor,
    *,
    bias: Tensor | None = None,
    source_index: Tensor | None = None,
    target_index: Tensor | None = None,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    loss: str = "mse",
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The distance between the projection of ``source`` and ``target``.

    ``loss_i = mean over valid (b,j,m,d) of ρ((projected_i − target_i) / scale_i)``, ``loss = mean_i loss_i``.

    Args:
        source: L_x tensors ``[B, H_x, T_x, D_x]``, any strides with a contiguous last dimension.
        target: L_y tensors ``[B, H_y, T_y, D_y]``, likewise.
        layer_mix: ``[L_y, L_x]``.
        head_mix: ``[H_y, H_x]``, or ``[L_y, H_y, H_x]``.
        dim_proj: ``[D_x, D_y]``, ``[L_y, D_x, D_y]`` or ``[L_y, H_y, D_x, D_y]``.
        bias: ``[L_y, H_y, D_y]`` or None.
        source_index: ``[B, M]`` int64 positions in the source; None = every position in order.
        target_index: ``[B, M]`` int64 positions in the target (the same tensor when both read the same text).
        mask: ``[B, M]`` bool, True = counts; None = all. All False gives 0 with a graph.
        scale: ``[L_y]``, the unit in which layer i's residual is measured; None = 1.
        loss: ``"mse"``, ``"l1"`` or ``"smooth_l1"``.
        impl: ``"auto"`` or ``"reference"``.

    Returns:
        The scalar loss with a graph and the losses per target layer ``[L_y]`` without one, fp32 (fp64 for fp64 input).

    Raises:
        InputError: shapes that do not fit together, an unknown ``loss`` or ``impl``.
    """
    _check_impl(impl)
    if loss not in LOSSES:
        raise InputError(f"loss={loss}: expected one of {', '.join(LOSSES)}")
    source_shape = _check_states("source", source, source_index)
    layers, heads, dim = _check_maps(source_shape, layer_mix, head_mix, dim_proj, bias)
    target_shape = _check_states("target", target, target_index)
    expected = (layers, source_shape[1], heads, source_shape[3], dim)
    if target_shape != expected:
        raise InputError(f"target: expected (layers, batch, heads, positions, head_dim) = {expected}, got {target_shape}")
    if mask is not None and tuple(mask.shape) != (expected[1], expected[3]):
        raise InputError(f"mask: expected {(expected[1], expected[3])}, got {tuple(mask.shape)}")
    if scale is not None and tuple(scale.shape) != (layers,):
        raise InputError(f"scale: expected [{layers}], got {tuple(scale.shape)}")
    return map_projection_loss_reference(
        source, target, layer_mix, head_mix, dim_proj, bias, source_index, target_index, mask, scale, loss
    )
