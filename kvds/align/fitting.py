"""Fit of an aligner before step 1: statistics of both sides, and closed-form starts of the dimension maps.

Moments are summed in fp64 over batches and ranks, then written once, so that every rank starts from the same numbers
whatever the number of ranks. With ``x`` the mixed source rows and ``y`` the target rows of a dimension map ``P``, both
centred and in units of ``source_scale`` and ``target_scale``:

* ``random``: ``P`` stays as it was drawn;
* ``pca``: the directions in which the teacher's rows vary most, its own side alone (``P`` takes the teacher's rows to
  their leading coordinates, or the student's rows, read as such coordinates, back);
* ``procrustes``: the semi-orthogonal ``P`` for which ``x P`` agrees best with ``y``, ``U Vᵀ`` of the SVD of ``xᵀy``;
* ``ridge``: ``(xᵀx + λ N I)⁻¹ xᵀy``.

The bias is then set so that the residual has mean zero. A shared map is fitted to the moments of all its uses together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from kvds.align.aligner import KVAligner
from kvds.align.aligner_part import AlignerPart
from kvds.errors import InputError
from kvds.kv import Selection, States, gather_positions

RIDGE = 1e-3  # λ, in units of the source's mean variance per channel
_JITTERS = (1e-12, 1e-9, 1e-6, 1e-3)  # in the same unit
_CHUNK = 2048  # positions in fp64 at a time


class PartMoments:
    """Sums over positions for the keys, or the values, of one aligner.

    Only what the start needs is summed, per target layer and map: at most ``xᵀx``, ``xᵀy`` or ``yᵀy`` of one head
    (flat: of one layer), never products between layers. The mixing weights are those of the aligner as it is.

    Args:
        part: Read here, written by :meth:`apply` alone.
        start: ``map_start``.
    """

    def __init__(self, part: AlignerPart, start: str) -> None:
        self._part, self._start = part, start
        maps, *widths = part.map_shape
        width = dict(zip("xy", widths, strict=True))
        products = {"pca": "yy" if part.to_teacher else "xx", "procrustes": "xy", "ridge": "xx xy", "random": ""}[start]
        self.count = torch.zeros((), dtype=torch.float64, device=part.target_scale.device)
        self.sums = {
            name: self.count.new_zeros(part.num_targets, maps, *(width[side] for side in name if side in width))
            for name in ("x", "y", "x²", "y²", *products.split())
        }

    def update(self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], selection: Selection) -> None:
        """Add one batch."""
        source, target = self.sides(student, teacher)
        self.add_rows(_selected(source, selection), _selected(target, selection))

    def sides(
        self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """``source`` and ``target`` of the part, see :meth:`AlignerPart.sides`."""
        return self._part.sides(student, teacher)

    def add_rows(self, source_rows: Tensor, target_rows: Tensor) -> None:
        """Add positions ``[L_x, N, H_x, D_x]`` and ``[L_y, N, H_y, D_y]``, a chunk of them in fp64 at a time."""
        self.count += source_rows.shape[1]
        for x, y in zip(source_rows.split(_CHUNK, 1), target_rows.split(_CHUNK, 1), strict=True):
            self._add(self._part.source_rows(x.to(self.count)), self._part.target_rows(y.to(self.count)))

    def _add(self, x: Tensor, y: Tensor) -> None:
        rows = {"x": x, "y": y}  # [L_y, maps, N, width]
        for name, total in self.sums.items():
            if len(name) == 1:
                total += rows[name].sum(2)
            elif name[1] == "²":
                total += rows[name[0]].square().sum(2)
            else:
                total += rows[name[0]].transpose(2, 3) @ rows[name[1]]

    def apply(self) -> None:
        """Write statistics, bias and, unless the start is random, the dimension maps into the part."""
        part = self._part
        if not self.count > 0:
            raise InputError(
                "calibration: no position is selected in the calibration batches; expected at least one (more "
                "--calibration_batches, or other --kv_method and --kv_budget)"
            )
        mean = {name: self.sums[name] / self.count for name in ("x", "y")}
        power = {name: self.sums[f"{name}²"] / self.count for name in ("x", "y")}
        for name in ("x", "y"):
            if not bool(power[name].isfinite().all()):
                model = "student" if (name == "x") == part.to_teacher else "teacher"
                raise InputError(
                    f"calibration: the {model}'s {part.what} are not finite; expected weights that compute finite "
                    f"states (is its checkpoint whole, its dtype bf16 or fp32?)"
                )
        deviation = {name: _deviation(power[name], mean[name]) for name in ("x", "y")}
        part.source_scale.copy_(deviation["x"])
        if part.to_teacher:
            part.target_mean.copy_(mean["y"].reshape(part.target_mean.shape))
            part.target_scale.copy_(deviation["y"])
        else:
            # The unit is the teacher's, here the source, as the map mixes its layers at the start.
            part.target_scale.copy_(deviation["x"])
        unit = {name: s.double()[:, None, None] for name, s in (("x", part.source_scale), ("y", part.target_scale))}
        centre = {name: mean[name] / unit[name] for name in ("x", "y")}  # [L_y, maps, width]
        if self._start != "random":
            products = {
                name: self.sums[name] / self.count / (unit[name[0]] * unit[name[1]])[..., None]
                - centre[name[0]].unsqueeze(-1) * centre[name[1]].unsqueeze(-2)
                for name in self.sums
                if name in ("xx", "xy", "yy")
            }
            assert part.projection is not None
            if part.projection.dim() == 2:
                products = {name: value.mean((0, 1)) for name, value in products.items()}
            fitted = closed_form(self._start, products, (centre["x"].shape[-1], centre["y"].shape[-1]))
            part.projection.copy_(fitted.reshape(part.projection.shape))
        part.set_offset(mean["x"], mean["y"])


def _selected(layers: tuple[Tensor, ...], selection: Selection) -> Tensor:
    """``[L, N, H, D]`` of the selected positions, in the dtype of the states."""
    return torch.stack([gather_positions(x, selection.index).transpose(1, 2)[selection.mask] for x in layers])


def _deviation(power: Tensor, mean: Tensor) -> Tensor:
    """``[L_y]`` root mean square, over maps and channels, of what varies around a channel's mean; 1 if nothing does."""
    variance = (power - mean.square()).mean((1, 2))
    # A layer that does not vary has no unit of its own; rounding of its square leaves about 1e-16 of it.
    varies = variance > 1e-12 * power.mean((1, 2))
    return torch.where(varies, variance, torch.ones_like(variance)).sqrt()


def closed_form(start: str, products: dict[str, Tensor], widths: tuple[int, int]) -> Tensor:
    """``[…, D_x, D_y]`` dimension maps from covariances ``xx``, ``xy`` or ``yy`` (those that the start needs)."""
    if start == "pca":
        covariance = products.get("xx", products.get("yy"))
        assert covariance is not None
        directions = torch.linalg.eigh(covariance)[1].flip(-1)[..., : min(widths)]  # columns, largest variance first
        # An eigenvector's sign is free: its largest entry is made positive, whatever library computed it.
        largest = directions.gather(-2, directions.abs().argmax(-2, keepdim=True))
        directions = directions * torch.where(largest < 0, -1.0, 1.0)
        return directions if "xx" in products else directions.transpose(-1, -2)
    if start == "procrustes":
        left, _, right = torch.linalg.svd(products["xy"], full_matrices=False)
        return left @ right
    xx = products["xx"]
    variance = xx.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)[..., None, None]
    identity = torch.eye(widths[0], dtype=xx.dtype, device=xx.device)
    return _solve(xx + RIDGE * variance * identity, products["xy"])


def _solve(positive: Tensor, right: Tensor) -> Tensor:
    """``positive⁻¹ right`` for symmetric matrices that are positive but for rounding, each by itself.

    A batch goes through LAPACK's LU with several threads, which was seen to fail on the CPU for thirty layers.

    Raises:
        InputError: a matrix is not positive, whatever is added to its diagonal.
    """
    shape = torch.broadcast_shapes(positive.shape[:-2], right.shape[:-2])
    lefts, rights = (x.expand(*shape, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (positive, right))
    solved = [torch.cholesky_solve(y, _cholesky(x)) for x, y in zip(lefts, rights, strict=True)]
    return torch.stack(solved).reshape(*shape, *right.shape[-2:])


def _cholesky(positive: Tensor) -> Tensor:
    """The lower triangle of ``positive``, more of whose mean variance is added to its diagonal until there is one."""
    scale = positive.diagonal().abs().mean()
    for jitter in (0.0, *_JITTERS):
        diagonal = (jitter * scale).expand(positive.shape[-1])
        factor, failed = torch.linalg.cholesky_ex(positive + torch.diag(diagonal))
        if not bool(failed) and bool(factor.isfinite().all()):
            return factor
    raise InputError(
        "map_start=ridge: the covariance of the student's or teacher's rows cannot be inverted; expected rows that are "
        "finite (more --calibration_batches, or --map_start procrustes)"
    )


class AlignmentMoments:
    """Streaming moments of calibration batches: ``update`` per batch, ``reduce`` over ranks, ``apply`` once.

    Args:
        aligner: Whole (not sharded), on the device of the states; read for its shapes and starting mixes, written by
            :meth:`apply` alone.
    """

    def __init__(self, aligner: KVAligner) -> None:
        self._aligner = aligner
        start = aligner.settings.map_start
        with torch.no_grad():
            self.parts = {name: PartMoments(part, start) for name, part in aligner.parts.items()}  # type: ignore[arg-type]

    @torch.no_grad()
    def update(self, student: States, teacher: States, selection: Selection) -> None:
        """Add one batch.

        Raises:
            InputError: its shapes are not those of the configurations.
        """
        self._aligner.check_states(student, teacher)
        for name, part in self.parts.items():
            part.update(getattr(student, f"{name}s"), getattr(teacher, f"{name}s"), selection)

    def reduce(self, all_reduce: Callable[[Tensor], None]) -> None:
        """Sum over ranks in place; every rank makes the same calls, whatever its batches held."""
        for part in self.parts.values():
            for tensor in (part.count, *part.sums.values()):
                all_reduce(tensor)

    @torch.no_grad()
    def apply(self) -> None:
        """Write statistics and starts into the aligner.

        Raises:
            InputError: no position was selected, or states are not finite.
        """
        for part in self.parts.values():
            part.apply()


def fit_aligner(
    aligner: KVAligner,
    batches: Iterable[tuple[States, States, Selection]],
    *,
    all_reduce: Callable[[Tensor], None] | None = None,
) -> None:
    """Fit ``aligner`` on batches of student states, teacher states and selection, in one pass."""
    moments = AlignmentMoments(aligner)
    for student, teacher, selection in batches:
        moments.update(student, teacher, selection)
    if all_reduce is not None:
        moments.reduce(all_reduce)
    moments.apply()
