"""Launches of the kernels for compute capability 9.0."""

from __future__ import annotations

import functools

import torch

from kvds.ops.gluon_fused import fused_kernel
from kvds.ops.gluon_project import project_kernel
from kvds.ops.kernel_arguments import FusedForm, Maps, ProjectForm, Stage, Weights
from kvds.ops.triton_launch import ELEMENTS, Call, Launch, SidesOfStage, processors
from kvds.ops.triton_plan import even_splits
from kvds.ops.triton_sums import Left

_fused_form = functools.cache(FusedForm)
_project_form = functools.cache(ProjectForm)


def prepare_fused(stage: Stage, dims: tuple[int, int], call: Call, sides: SidesOfStage, maps: Maps) -> Launch:
    """Everything in one pass over all tokens."""
    device = sides.source.rows.table.device
    form = _fused_form(
        ELEMENTS[call.dtype], stage.layers_x, stage.heads_x, stage.layers_y, stage.heads_y, *dims, call.loss,
        call.normalize, sides.source_grad is not None, sides.target_grad is not None,
    )  # fmt: skip
    programs = min(processors(device), call.tokens)
    partial = torch.empty(1, programs, form.size, dtype=torch.float32, device=device)
    start = sides.arguments, maps, call.tokens, call.positions, call.mask, call.valid, partial
    return Launch(fused_kernel, programs, lambda *_: (*start, programs, form), 4, Left(partial, programs, form))


def prepare_project(
    stage: Stage, dims: tuple[int, int], call: Call, sides: SidesOfStage, weights: Weights, tokens: int
) -> Launch:
    """A stage in which each row has a projection, for ranges of up to ``tokens``. Gradients go over the source and
    to the target's place."""
    device = sides.source.rows.table.device
    form = _project_form(
        ELEMENTS[call.dtype], call.layers_y, stage.head_problems, *dims, call.loss, call.normalize,
        sides.target_grad is not None,
    )  # fmt: skip
    splits = even_splits(stage.problems, -(-tokens // 64), processors(device))
    partial = torch.empty(stage.problems, splits, form.size, dtype=torch.float32, device=device)
    rows = sides._replace(source_grad=None).arguments
    start = rows, weights, call.tokens, call.positions, call.mask, call.valid, partial
    programs, left = stage.problems * splits, Left(partial, splits, form)
    return Launch(project_kernel, programs, lambda a, b: (*start, a, b, splits, form), 4, left)
