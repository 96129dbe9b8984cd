"""What programs leave, summed over all of them and folded into gradients of the operation's parameters: two launches.

Each program of a launch leaves arrays in padding of its own: ``d_mix``, ``d_proj``, ``d_bias``, losses. Where in them a
layer, a head, a dimension stands is said by axes; one kernel sums whatever is so described, in a fixed order, another
takes products of weights apart.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import triton
from torch import Tensor

from kvds.ops.gradients import PARAMETERS, LossProblem, Wanted
from kvds.ops.kernel_arguments import Axis, FoldForm, FusedForm, Maps, ProjectForm, StageForm, Sum
from kvds.ops.sum_kernels import fold_kernel, sum_kernel

Form = StageForm | FusedForm | ProjectForm
_Found = dict[str, tuple[int, int, int, tuple[Axis, ...], tuple[Axis, ...]]]
"""Of each array: stage, size, start, axes, over (see Sum)."""


class Left(NamedTuple):
    """What a launch leaves: ``partial [problems, splits, form.size]``."""

    partial: Tensor
    splits: int
    form: Form


class Shape(NamedTuple):
    """A problem's, as far as its parameters' gradients go. ``sparse``: ``layer_mix`` is a vector."""

    layers: tuple[int, int]
    heads: tuple[int, int]
    dims: tuple[int, int]
    sparse: bool
    head_mix_dim: int
    dim_proj_dim: int


class SumPlan(NamedTuple):
    """Arrays to sum, and how many blocks of so many elements they are.

    Attributes:
        places: Where gradients of parameters begin in the output.
        gradients, size: Where arrays begin that are none, and elements in all.
        fold: How arrays are folded, or None.
        fold_blocks: H_y, L_x, H_x rounded up to powers of two.
    """

    sums: tuple[Sum, ...]
    blocks: dict[int, int]
    places: dict[str, int]
    gradients: int
    size: int
    fold: FoldForm | None
    fold_blocks: tuple[int, int, int]


def _rows(form: Form, layers: int, heads: int) -> tuple[Axis, Axis]:
    """Along target layers and heads, counted in rows of a program's arrays."""
    if isinstance(form, ProjectForm):
        return Axis(layers, heads, 0), Axis(heads, 1, 0)
    side_by_side = form.head_problems if isinstance(form, StageForm) else 1
    layer = Axis(layers, side_by_side, 0) if form.layers_y == 1 else Axis(layers, 0, form.heads_y)
    return layer, Axis(heads, 1, 0) if side_by_side > 1 else Axis(heads, 0, 1)


def _wider(axes: Sequence[Axis], elements: int) -> tuple[Axis, ...]:
    """The same with rows of so many elements."""
    return tuple(axis._replace(elements=axis.elements * elements) for axis in axes)


def _turns(form: Form, dim_y: int) -> tuple[Axis, Axis, int, int]:
    """What losses and d_bias are further summed over, in elements; columns of a d_bias row and of a d_proj row."""
    if isinstance(form, FusedForm):
        return Axis(form.sizes[3] // 64, 0, 64), Axis(1, 0, 0), dim_y, dim_y
    if isinstance(form, ProjectForm):
        return Axis(128, 0, 1), Axis(128 // dim_y, 0, dim_y), dim_y, dim_y
    return Axis(form.tokens, 0, form.rows_y), Axis(form.tokens, 0, form.rows_y * form.block_dy), *(form.block_dy,) * 2


def _mix_sum(form: StageForm | FusedForm, shape: Shape) -> tuple[str, tuple[Axis, ...], tuple[Axis, ...]]:
    """Which array d_mix is: ``products [L_y, H_y, L_x, H_x]`` of both weights, or one weight's own gradient."""
    (layers_x, layers_y), (heads_x, heads_y) = shape.layers, shape.heads
    kind, columns = (form.kind, form.block_x) if isinstance(form, StageForm) else ("dense", 64)
    turn = Axis(1, 0, 0)
    if isinstance(form, StageForm) and not form.in_columns:  # a block for each token stands on the diagonal
        turn = Axis(form.tokens, 0, form.rows_y * columns + form.rows_x)
    if kind == "heads":
        return "layer_mix", (Axis(layers_y, 0, columns), Axis(layers_x, 0, 1)), (Axis(heads_x, 1, 0), turn)
    row, source_head = Axis(heads_y, 0, columns), Axis(heads_x, 0, 1)
    if kind == "dense":
        axes = Axis(layers_y, 0, heads_y * columns), row, Axis(layers_x, 0, heads_x), source_head
        return "products", axes, (turn,)
    layer = Axis(layers_y, 1, 0)
    if shape.sparse:
        return "products", (layer, row, source_head), (turn,)
    if shape.head_mix_dim == 3:
        return "head_mix", (layer, row, source_head), (turn,)
    return "head_mix", (row, source_head), (layer, turn)


@functools.cache
def plan_sums(forms: tuple[Form | None, ...], shape: Shape, wanted: Wanted, loss: bool) -> SumPlan:
    """How what launches of these forms leave is summed up; the last one projects. None: nothing is left."""
    (_, layers_y), (_, heads_y), (dim_x, dim_y) = shape.layers, shape.heads, shape.dims
    found: _Found = {}
    for stage, form in enumerate(forms):
        if form is not None and not isinstance(form, ProjectForm) and wanted.mix and form.sizes[0]:
            name, axes, over = _mix_sum(form, shape)
            found[name] = stage, form.size, 0, axes, over
    last = len(forms) - 1
    form = forms[last]
    if form is not None:
        *_, proj_start, bias_start, loss_start = form.starts
        rows = _rows(form, layers_y, heads_y)
        loss_turn, bias_turn, bias_columns, proj_columns = _turns(form, dim_y)
        if wanted.dim_proj:
            own = shape.dim_proj_dim - 2  # its leading axes: layers, heads
            over = tuple(axis._replace(elements=0) for axis in rows[own:] if axis.problems)
            axes = *_wider(rows[:own], 0), Axis(dim_x, 0, proj_columns), Axis(dim_y, 0, 1)
            found["dim_proj"] = last, form.size, proj_start, axes, over
        if wanted.bias:
            axes = *_wider(rows, bias_columns), Axis(dim_y, 0, 1)
            found["bias"] = last, form.size, bias_start, axes, (bias_turn,)
        if loss:
            found["losses"] = last, form.size, loss_start, (rows[0],), (rows[1], loss_turn)
    return _lay_out(found, shape, wanted, loss)


def _lay_out(found: _Found, shape: Shape, wanted: Wanted, loss: bool) -> SumPlan:
    """The output: gradients of parameters first, then arrays that are none."""
    (layers_x, layers_y), (heads_x, heads_y), (_, dim_y) = shape.layers, shape.heads, shape.dims
    own_heads, places, end = shape.head_mix_dim == 3, {}, 0
    counts = {name: math.prod(axis.length for axis in axes) for name, (*_, axes, _) in found.items()}
    if "products" in found:
        counts["layer_mix"] = layers_y * (1 if shape.sparse else layers_x)
        counts["head_mix"] = (layers_y if own_heads else 1) * heads_y * heads_x
    gradients = 0
    for name in (*PARAMETERS, "products", "losses"):
        if name in counts:
            places[name], end = end, end + -(-counts[name] // 4) * 4
        if name == PARAMETERS[-1]:
            gradients = end
    fold = None
    if loss or "products" in found:
        fold = FoldForm(
            layers_y, heads_y, 1 if shape.sparse else layers_x, heads_x, heads_y * dim_y, own_heads,
            places.get("products"), places.get("losses"), places.get("layer_mix", 0), places.get("head_mix", 0),
        )  # fmt: skip
    sums = tuple(
        Sum(stage, size, start, places[name], axes, over) for name, (stage, size, start, axes, over) in found.items()
    )
    blocks = {block: sum(-(-array.count // block) for array in sums) for block in (128, 512)}
    places = {name: at for name, at in places.items() if getattr(wanted, name, False)}
    fold_blocks = tuple(triton.next_power_of_2(n) for n in (heads_y, 1 if shape.sparse else layers_x, heads_x))
    return SumPlan(sums, blocks, places, gradients, end, fold, fold_blocks)


class Sums(NamedTuple):
    """Gradients of the parameters, views of ``buffer``; the loss, the losses per layer and the factor that gradients
    lack in fp16 (None in a mode without loss)."""

    parameters: dict[str, Tensor]
    buffer: Tensor | None
    loss: Tensor | None
    per_layer: Tensor | None
    lacking: Tensor | None


def sum_up(
    left: Sequence[Left | None], problem: LossProblem, maps: Maps, wanted: Wanted, valid: Tensor | None, loss: bool
) -> Sums:
    """From what the launches of all stages left."""
    shape = Shape(
        (len(problem.source), len(problem.target)), problem.heads, problem.dims, problem.sparse, problem.head_mix.dim(),
        problem.dim_proj.dim(),
    )  # fmt: skip
    plan = plan_sums(tuple(None if part is None else part.form for part in left), shape, wanted, loss)
    filled = [part for part in left if part is not None]
    if not plan.sums:
        return Sums({}, None, None, None, None)
    some = filled[0].partial
    out = some.new_empty(plan.size)
    splits = [1 if part is None else part.splits for part in (*left, None, None)][:3]
    block, rows = (128, 16) if max(splits) > 16 else (512, 4)
    partials = tuple(some if part is None else part.partial for part in left)
    sum_kernel[(plan.blocks[block],)](partials, *splits, out, SUMS=plan.sums, BLOCK=block, ROWS=rows, num_warps=4)
    losses = total = None
    fold = plan.fold
    if fold is not None:
        losses, total = (some.new_empty(fold.layers_y + 1), some.new_empty(())) if loss else (out, out)
        fold_kernel[(fold.layers_y + 1,)](
            out, maps, problem.tokens, valid, losses, total, fold, *plan.fold_blocks, num_warps=4
        )
    parameters = {}
    for name, at in plan.places.items():
        parameter: Tensor = getattr(problem, name)
        parameters[name] = out[at : at + parameter.numel()].view(parameter.shape)
    buffer = out[: plan.gradients] if parameters else None
    if not loss or losses is None or fold is None:
        return Sums(parameters, buffer, None, None, None)
    return Sums(parameters, buffer, total, losses[: fold.layers_y], losses[fold.layers_y])
