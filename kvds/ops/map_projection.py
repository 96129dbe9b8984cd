"""The public functions of the operation: validate, choose an implementation, call it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from kvds.errors import InputError
from kvds.ops.gradients import LossProblem, loss_with_gradients
from kvds.ops.lean import compute_lean
from kvds.ops.reference import map_projection_loss_reference, map_projection_reference

LOSSES = ("mse", "l1", "smooth_l1")
IMPLEMENTATIONS = ("auto", "reference", "lean", "compile", "triton")


def _check_states(name: str, states: Sequence[Tensor], index: Tensor | None) -> tuple[int, int, int, int, int]:
    """Layers, batch, heads, selected positions, dimension."""
    if not states:
        raise InputError(f"{name}: expected at least one layer")
    first = states[0]
    if first.dim() != 4 or len(set(map(attrgetter("shape"), states))) > 1:
        found = [tuple(layer.shape) for layer in states[:3]]
        raise InputError(f"{name}: expected layers of one shape [batch, heads, tokens, head_dim], got {found}")
    if len(set(map(attrgetter("dtype", "device"), states))) > 1:
        raise InputError(f"{name}: expected layers of one dtype on one device")
    batch, heads, tokens, dim = first.shape
    if index is not None and (index.dim() != 2 or index.shape[0] != batch or index.dtype != torch.int64):
        raise InputError(f"{name}_index: expected int64 [{batch}, M], got {index.dtype} {tuple(index.shape)}")
    return len(states), batch, heads, tokens if index is None else index.shape[1], dim


def _check_maps(
    source: tuple[int, int, int, int, int], layer_mix: Tensor, head_mix: Tensor, dim_proj: Tensor, bias: Tensor | None
) -> tuple[int, int, int]:
    """Layers, heads and dimension of the target as the maps say."""
    layers_x, _, heads_x, _, dim_x = source
    if layer_mix.dtype == torch.int64:
        fits = layer_mix.dim() == 1
        if fits and layer_mix.numel() and not layer_mix.is_cuda:  # on a GPU the check would make the host wait
            fits = int(layer_mix.min()) >= 0 and int(layer_mix.max()) < layers_x
    else:
        fits = layer_mix.dim() in (1, 2) and layer_mix.shape[-1] == layers_x
    if not fits or not layer_mix.shape[0]:
        form = f"[L_y, {layers_x}], [{layers_x}] with source[i] alone for target i, or int64 [L_y] of source layers"
        raise InputError(f"layer_mix: expected {form}, got {layer_mix.dtype} {tuple(layer_mix.shape)}")
    return _fitting(
        layer_mix.shape[0], heads_x, dim_x, head_mix.shape, dim_proj.shape, None if bias is None else bias.shape
    )


@functools.lru_cache(maxsize=256)
def _fitting(
    layers: int, heads_x: int, dim_x: int, head_mix: torch.Size, dim_proj: torch.Size, bias: torch.Size | None
) -> tuple[int, int, int]:
    """Layers, heads and dimension of the target where shapes fit together."""
    heads, dim = head_mix[-2] if len(head_mix) >= 2 else 0, dim_proj[-1] if dim_proj else 0
    shapes = {
        "head_mix": (head_mix, {(heads, heads_x), (layers, heads, heads_x)}),
        "dim_proj": (dim_proj, {(dim_x, dim), (layers, dim_x, dim), (layers, heads, dim_x, dim)}),
    }
    if bias is not None:
        shapes["bias"] = (bias, {(layers, heads, dim)})
    for name, (shape, allowed) in shapes.items():
        if shape not in allowed:
            raise InputError(f"{name}: expected one of {sorted(allowed, key=len)}, got {tuple(shape)}")
    return layers, heads, dim


def _choose(
    impl: str,
    source: tuple[Tensor, ...],
    target: tuple[Tensor, ...] | None,
    dims: tuple[int, int],
    heads: tuple[int, int],
    layers_y: int,
    weighted: bool = False,
) -> str:
    """The implementation to run: ``impl`` itself, or for ``"auto"`` the fastest one that can take the input."""
    if impl not in IMPLEMENTATIONS:
        raise InputError(f"impl={impl}: expected one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "triton" or (impl == "auto" and source[0].is_cuda):
        from kvds.ops.triton_plan import unsupported  # imports no triton

        reason: str | None = "its kernel takes no weights of positions"
        if not weighted:
            reason = unsupported(source, target, dims, heads, layers_y)
        if reason is None:
            return "triton"
        if impl == "triton":
            raise InputError(f"impl=triton: {reason} (impl=auto chooses another implementation)")
    return "lean" if impl == "auto" else impl


def _one_to_one(source: tuple[Tensor, ...], layer_mix: Tensor, like: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """A vector of source layers as the chosen layers with weights of 1; other forms as they are."""
    if layer_mix.dtype != torch.int64:
        return source, layer_mix
    return tuple(source[i] for i in layer_mix.tolist()), like.new_ones(layer_mix.shape)


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

    ``out[i,b,j,m,:] =
    Σ_l layer_mix[i,l] Σ_h head_mix[(i,)j,h] · source[l][b,h,index[b,m],:] @ dim_proj[(i,(j,))] + bias[i,j,:]``

    Args:
        source: L_x tensors ``[B, H_x, T, D_x]``, any strides with a contiguous last dimension.
        layer_mix: ``[L_y, L_x]``; or sparse, ``[L_y]``: then ``source`` holds L_y layers, ``source[i]`` (weighted with
            ``layer_mix[i]``) is the only one that target layer i reads, and one tensor may stand at several places.
        head_mix: ``[H_y, H_x]``, or ``[L_y, H_y, H_x]``.
        dim_proj: ``[D_x, D_y]``, ``[L_y, D_x, D_y]`` or ``[L_y, H_y, D_x, D_y]``.
        bias: ``[L_y, H_y, D_y]`` or None. Maps may have a wider dtype than the source: they are rounded inside.
        source_index: ``[B, M]`` int64 positions; None = every position in order. With ``impl="triton"`` a row must not
            repeat a position.
        impl: ``"auto"``, ``"reference"``, ``"lean"`` (here the same as reference), ``"compile"`` or ``"triton"``.

    Returns:
        ``[L_y, B, H_y, M, D_y]`` in the source's dtype.

    Raises:
        InputError: shapes that do not fit together, an unknown ``impl``, or ``"triton"`` for what it cannot take.
    """
    source = tuple(source)
    source_shape = _check_states("source", source, source_index)
    layers, heads, dim = _check_maps(source_shape, layer_mix, head_mix, dim_proj, bias)
    source, layer_mix = _one_to_one(source, layer_mix, dim_proj)
    chosen = _choose(impl, source, None, (source_shape[4], dim), (source_shape[2], heads), layers)
    if chosen == "triton":
        from kvds.ops.triton_compute import map_projection_triton

        return map_projection_triton(source, layer_mix, head_mix, dim_proj, bias, source_index)
    if chosen == "compile":
        from kvds.ops.compiled import map_projection_compiled

        return map_projection_compiled(source, layer_mix, head_mix, dim_proj, bias, source_index)
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
    weight: Tensor | None = None,
    loss: str = "mse",
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The distance between the projection of ``source`` and ``target``.

    ``loss_i = mean over valid (b,j,m,d) of weight[b,m] · ρ((projected_i − target_i) / scale_i)``, ``loss = mean_i
    loss_i``, with ``projected`` as in :func:`map_projection`.

    ``lean`` and ``triton`` compute the gradients of whatever requires one (source, target, maps, bias; not ``scale``)
    in the forward pass and never write the projection. Double backward needs ``impl="reference"``.

    A depth map with one source layer per target layer is passed sparse: choose the layers, and give their weights as a
    vector. ``map_projection_loss([source[s] for s in chosen], target, torch.ones(len(target)), …)`` reads each chosen
    layer once per target layer and costs no layer mixing; gradients of a layer chosen twice add up as usual.
    Groups of layers or heads are calls of their own, with the lists sliced, or the heads of each tensor as a view.

    Args:
        source: L_x tensors ``[B, H_x, T_x, D_x]``, any strides with a contiguous last dimension.
        target: L_y tensors ``[B, H_y, T_y, D_y]``, likewise.
        layer_mix: ``[L_y, L_x]``; or sparse, ``[L_y]``: source layer i, so weighted, is all that target layer i reads;
            or sparse, int64 ``[L_y]`` (best on the CPU): the source layer that target layer i reads, with weight 1.
        head_mix: ``[H_y, H_x]``, or ``[L_y, H_y, H_x]``.
        dim_proj: ``[D_x, D_y]``, ``[L_y, D_x, D_y]`` or ``[L_y, H_y, D_x, D_y]``.
        bias: ``[L_y, H_y, D_y]`` or None. Maps and bias may have a wider dtype than the states (fp32 maps beside bf16
            states are best): they are rounded inside, and their gradients are not.
        source_index: ``[B, M]`` int64 positions in the source; None = every position in order. Positions that count
            must not repeat within a row (``reference`` and ``lean`` add such gradients up, ``triton`` does not).
        target_index: ``[B, M]`` int64 positions in the target (the same tensor when both read the same text).
        mask: ``[B, M]`` bool, True = counts; None = all. What it hides is never used, NaN included. All False gives 0
            with a graph.
        scale: ``[L_y]``, the unit in which layer i's residual is measured; None = 1. Gets no gradient.
        weight: ``[B, M]`` finite factors of the positions, at least 0; None = 1. The mean is over as many positions
            as without. Gets no gradient; ``triton`` takes none.
        loss: ``"mse"``, ``"l1"`` or ``"smooth_l1"``.
        impl: ``"reference"`` (einsum, the oracle), ``"compile"`` (torch.compile of it), ``"lean"`` (chunks of tokens,
            any device), ``"triton"`` (one pass on a GPU), or ``"auto"``: triton on a GPU where the kernel takes the
            shape, else lean.

    Returns:
        The scalar loss with a graph and the losses per target layer ``[L_y]`` without one, fp32 (fp64 for fp64 input).

    Raises:
        InputError: shapes that do not fit together, an unknown ``loss`` or ``impl``, or ``impl="triton"`` for what its
            kernel cannot take.
    """
    source, target = tuple(source), tuple(target)
    if loss not in LOSSES:
        raise InputError(f"loss={loss}: expected one of {', '.join(LOSSES)}")
    source_shape = _check_states("source", source, source_index)
    layers, heads, dim = _check_maps(source_shape, layer_mix, head_mix, dim_proj, bias)
    target_shape = _check_states("target", target, target_index)
    expected = (layers, source_shape[1], heads, source_shape[3], dim)
    if target_shape != expected:
        raise InputError(
            f"target: expected (layers, batch, heads, positions, head_dim) = {expected}, got {target_shape}"
        )
    if mask is not None and (tuple(mask.shape) != (expected[1], expected[3]) or mask.dtype != torch.bool):
        raise InputError(f"mask: expected bool {(expected[1], expected[3])}, got {mask.dtype} {tuple(mask.shape)}")
    if scale is not None:
        if tuple(scale.shape) != (layers,):
            raise InputError(f"scale: expected [{layers}], got {tuple(scale.shape)}")
        scale = scale.detach()
    if weight is not None:
        if tuple(weight.shape) != (expected[1], expected[3]) or not weight.is_floating_point():
            found = f"{weight.dtype} {tuple(weight.shape)}"
            raise InputError(f"weight: expected floating {(expected[1], expected[3])}, got {found}")
        weight = weight.detach()
    if target[0].dtype != source[0].dtype:
        target = tuple(layer.to(source[0].dtype) for layer in target)
    chosen = _choose(
        impl, source, target, (source_shape[4], dim), (source_shape[2], heads), layers, weighted=weight is not None
    )
    if chosen != "lean":  # which reads and differentiates a layer once, however many target layers name it
        source, layer_mix = _one_to_one(source, layer_mix, dim_proj)
    arguments = (
        source, target, layer_mix, head_mix, dim_proj, bias, source_index, target_index, mask, scale, loss,
        weight,
    )  # fmt: skip
    if chosen == "triton":
        from kvds.ops.triton_compute import compute_triton

        return loss_with_gradients(compute_triton, LossProblem(*arguments))
    if chosen == "compile":
        from kvds.ops.compiled import map_projection_loss_compiled

        return map_projection_loss_compiled(*arguments)
    if chosen == "lean":
        return loss_with_gradients(compute_lean, LossProblem(*arguments))
    return map_projection_loss_reference(*arguments)
