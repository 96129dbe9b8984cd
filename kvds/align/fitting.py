"""What an aligner learns before step 1: statistics of the teacher, and closed-form starts of the dimension maps.

Moments are summed in fp64 over batches and ranks, then written once, so that every rank starts from the same numbers
whatever the number of ranks. Starts of the map ``P`` from centred source rows ``x`` to centred target rows ``t``:

* ``pca``: the directions in which the teacher's rows vary most (its own side alone);
* ``procrustes``: the semi-orthogonal ``P`` closest to taking ``x`` to ``t``, times the best scalar towards the teacher;
* ``ridge``: the least-squares ``P``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvds.align.flat import FlatAligner, FlatPart
from kvds.align.structured import StructuredPart
from kvds.errors import InputError
from kvds.kv import KVStates, Selection, gather_positions

_RIDGE = 1e-3  # of the mean variance of the source


def _rows(layer: Tensor, selection: Selection) -> Tensor:
    """Selected tokens of one layer, fp64 ``[N, H, D]``."""
    return gather_positions(layer, selection.index).transpose(1, 2)[selection.mask].double()


class PartMoments:
    """Sums over tokens for the keys, or the values, of one aligner."""

    def __init__(self, part: StructuredPart | FlatPart, start: str) -> None:
        self._part, self._start = part, start
        self.sums: dict[str, Tensor] = {}

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def update(self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], selection: Selection) -> None:
        """Add one batch."""
        teacher_rows = [_rows(layer, selection) for layer in teacher]
        self._add(
            "count", torch.tensor([float(teacher_rows[0].shape[0])], dtype=torch.float64, device=teacher_rows[0].device)
        )
        self._add("sum", torch.stack([rows.sum(0) for rows in teacher_rows]))  # [L_t, H, D]
        self._add("square", torch.stack([rows.square().sum((0, 2)) for rows in teacher_rows]))  # [L_t, H]
        if self._start == "random":
            return
        student_rows = [_rows(layer, selection) for layer in student]
        if self._part.pairs is not None:
            student_rows = [student_rows[i] for i, _ in self._part.pairs]
            teacher_rows = [teacher_rows[i] for _, i in self._part.pairs]
        source, target = (student_rows, teacher_rows) if self._part.to_teacher else (teacher_rows, student_rows)
        mix = self._part.layer_mix().double()
        for i, wanted in enumerate(target):
            # A hard map's row names one layer; a learned one weighs all.
            x = source[i] if self._part.pairs is not None else torch.einsum("l,lnhd->nhd", mix[i], torch.stack(source))
            self._cross(i, x, wanted)

    def _cross(self, layer: int, x: Tensor, y: Tensor) -> None:
        if isinstance(self._part, StructuredPart):
            head_mix = self._part.head_mix.double()
            x = torch.einsum("jh,nhd->njd", head_mix[layer] if head_mix.dim() == 3 else head_mix, x)
            x, y = x.transpose(0, 1), y.transpose(0, 1)  # [H, N, D]
        else:
            x, y = x.flatten(1)[None], y.flatten(1)[None]  # [1, N, H·D]
        self._add(f"x{layer}", x.sum(1))
        self._add(f"y{layer}", y.sum(1))
        wanted = {
            "pca": ("yy",) if self._part.to_teacher else ("xx",),
            "procrustes": ("xx", "xy"),
            "ridge": ("xx", "xy"),
        }
        for name in wanted[self._start]:
            left, right = (x if name[0] == "x" else y), (x if name[1] == "x" else y)
            self._add(f"{name}{layer}", left.transpose(1, 2) @ right)

    def apply(self) -> None:
        """Write statistics and start into the part."""
        part, count = self._part, self.sums["count"]
        if not count > 0:
            raise InputError(
                "calibration: no position is selected in the calibration batches; expected at least one (check "
                "kv_method and kv_budget)"
            )
        mean = self.sums["sum"] / count
        variance = (self.sums["square"].sum(1) / count - mean.square().sum((1, 2))) / (mean.shape[1] * mean.shape[2])
        scale = variance.clamp_min(0).sqrt()
        # A layer that does not vary has no unit of its own; one keeps its residual finite.
        scale = torch.where(scale > 1e-12, scale, torch.ones_like(scale))
        part.statistics.mean.copy_(mean)
        part.statistics.scale.copy_(scale)
        if self._start == "random":
            return
        projections, biases = self._solve(count)
        if isinstance(part, StructuredPart):
            part.dim_proj.copy_(projections if part.dim_proj.dim() == 4 else projections[0, 0])
            part.bias.copy_(biases)
        else:
            part.weight.copy_(projections[:, 0])
            part.bias.copy_(biases[:, 0])

    def _solve(self, count: Tensor) -> tuple[Tensor, Tensor]:
        """Projections ``[L, G, D_x, D_y]`` and biases ``[L, G, D_y]`` in standardised units, G heads or 1."""
        part = self._part
        scale = part.target_statistics()[1].double()
        layers = range(part.bias.shape[0])
        mean_x = torch.stack([self.sums[f"x{i}"] for i in layers]) / count
        mean_y = torch.stack([self.sums[f"y{i}"] for i in layers]) / count

        def centred(name: str) -> Tensor:
            left, right = (mean_x if name[0] == "x" else mean_y), (mean_x if name[1] == "x" else mean_y)
            raw = torch.stack([self.sums[f"{name}{i}"] for i in layers]) / count
            return raw - left.unsqueeze(-1) * right.unsqueeze(-2)

        # Towards the teacher the map works in units of its standard deviation, so the cross moments lose one factor of
        # it.
        unit = scale[:, None, None, None] if part.to_teacher else torch.ones_like(scale)[:, None, None, None]
        moments = {name: centred(name) for name in ("xx", "xy", "yy") if f"{name}0" in self.sums}
        if "xy" in moments:
            moments["xy"] = moments["xy"] / unit
        if "yy" in moments:
            moments["yy"] = moments["yy"] / unit.square()
        shared = isinstance(part, StructuredPart) and part.dim_proj.dim() == 2
        if shared:
            moments = {name: value.mean((0, 1), keepdim=True) for name, value in moments.items()}
        projection = _projection(self._start, moments, mean_x.shape[-1], mean_y.shape[-1], part.to_teacher)
        bias = -(mean_x.unsqueeze(-2) @ projection).squeeze(-2)
        if not part.to_teacher:
            bias = (bias + (mean_y if self._start == "ridge" else 0)) / scale[:, None, None]
        return projection, bias


def _projection(start: str, moments: dict[str, Tensor], dim_x: int, dim_y: int, to_teacher: bool) -> Tensor:
    if start == "pca":
        directions = torch.linalg.eigh(moments["yy" if to_teacher else "xx"])[1].flip(-1)  # largest first, in columns
        if not to_teacher:
            return directions[..., :dim_y]
        rows = directions.transpose(-1, -2)[..., :dim_x, :]
        return torch.nn.functional.pad(rows, (0, 0, 0, dim_x - rows.shape[-2]))
    if start == "procrustes":
        left, singular, right = torch.linalg.svd(moments["xy"], full_matrices=False)
        projection = left @ right
        if to_teacher:
            power = moments["xx"].diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(1e-30)
            projection = projection * (singular.sum(-1) / power)[..., None, None]
        return projection
    variance = moments["xx"].diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(dim_x, dtype=variance.dtype, device=variance.device)
    return torch.linalg.solve(moments["xx"] + (_RIDGE * variance + 1e-12) * eye, moments["xy"])


class AlignmentMoments:
    """Streaming moments for all parts of an aligner.

    Args:
        aligner: Structured or flat; read for its shapes and starting mixes, written by :meth:`apply` alone.
    """

    def __init__(self, aligner: Any) -> None:
        settings: Any = aligner.settings
        self._shapes = aligner.student_shape, aligner.teacher_shape
        self._parts = {name: PartMoments(part, settings.map_start) for name, part in aligner.parts.items()}
        self._checked = False
        if settings.map_start == "pca" and settings.direction == "teacher_to_student":
            _check_width(aligner)

    @torch.no_grad()
    def update(self, student: KVStates, teacher: KVStates, selection: Selection) -> None:
        """Add one batch.

        Raises:
            InputError: the first batch's shapes are not those of the configurations.
        """
        if not self._checked:
            student.check(self._shapes[0], side="student")
            teacher.check(self._shapes[1], side="teacher")
            self._checked = True
        for name, part in self._parts.items():
            part.update(getattr(student, f"{name}s"), getattr(teacher, f"{name}s"), selection)

    def reduce(self, all_reduce: Callable[[Tensor], None]) -> None:
        """Sum over ranks; every rank has seen equally many batches, so all hold the same names."""
        for part in self._parts.values():
            for name in sorted(part.sums):
                part.sums[name] = part.sums[name].contiguous()
                all_reduce(part.sums[name])

    @torch.no_grad()
    def apply(self) -> None:
        """Write statistics and starts into the aligner."""
        for part in self._parts.values():
            part.apply()


def _check_width(aligner: Any) -> None:
    student, teacher = aligner.student_shape, aligner.teacher_shape
    flat = isinstance(aligner, FlatAligner)
    widths = [s.head_dim * (s.num_key_value_heads if flat else 1) for s in (student, teacher)]
    if widths[0] > widths[1]:
        raise InputError(
            f"map_start=pca: the student's {widths[0]} dimensions are more than the teacher's {widths[1]} has "
            "directions to give; expected a teacher at least as wide (or --map_start ridge, or --direction "
            "student_to_teacher)"
        )
