"""Fit of an aligner before step 1: statistics of both sides, and closed-form starts of the dimension maps.

Moments are summed in fp64 over batches and ranks, then written once, so that every rank starts from the same numbers
whatever the number of ranks. Layers are mixed as the aligner does now: a learned mix is fitted before, in a pass of its
own (:mod:`kvds.align.mix_fitting`). With ``x`` the mixed source rows and ``y`` the target rows of a dimension map
``P``, both centred and in units of ``source_scale`` and ``target_scale``:

* ``random``: ``P`` stays as it was drawn;
* ``pca``: the directions in which the teacher's rows vary most, its own side alone (``P`` takes the teacher's rows to
  their leading coordinates, or the student's rows, read as such coordinates, back);
* ``procrustes``: the semi-orthogonal ``P`` for which ``x P`` agrees best with ``y``, ``U Vᵀ`` of the SVD of ``xᵀy``;
* ``ridge``: ``(xᵀx + λ N I)⁻¹ xᵀy``, with the λ that explains held-out rows best (:mod:`kvds.align.ridge`).

The bias is then set so that the residual has mean zero. A shared map is fitted to the moments of all its uses together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from kvds.align.aligner import KVAligner
from kvds.align.aligner_part import AlignerPart
from kvds.align.ridge import Moments, fit_ridge
from kvds.errors import InputError
from kvds.kv import Selection, States, gather_positions

CHUNK = 2048  # positions in fp64 at a time
_BLOCKS = 4  # of a row's positions, by turns in either half


class PartSums(ABC):
    """What a fit sums over positions for the keys, or the values, of one aligner.

    Args:
        part: Read here, written by :meth:`apply` alone.
    """

    def __init__(self, part: AlignerPart) -> None:
        self._part = part

    def update(
        self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], selection: Selection, halves: Tensor
    ) -> None:
        """Add one batch; ``halves`` as :func:`halves_of` has them."""
        source, target = self.sides(student, teacher)
        rows = selected_rows(source, selection), selected_rows(target, selection)
        self.add_states(*rows, halves, selected_weights(selection))

    def sides(
        self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """``source`` and ``target`` of the part, see :meth:`AlignerPart.sides`."""
        return self._part.sides(student, teacher)

    @abstractmethod
    def add_states(self, source: Tensor, target: Tensor, halves: Tensor, weights: Tensor | None = None) -> None:
        """Add positions, a chunk of them in fp64 at a time.

        Args:
            source: ``[L_x, N, H_x, D_x]``.
            target: ``[L_y, N, H_y, D_y]``.
            halves: ``[N]``, 0 or 1: which half each belongs to.
            weights: ``[N]``, how much each counts; None = all alike.
        """

    @property
    @abstractmethod
    def tensors(self) -> Sequence[Tensor]:
        """All sums, to be added over ranks."""

    @abstractmethod
    def apply(self) -> None:
        """Write into the part what the sums say."""


_Sums = TypeVar("_Sums", bound=PartSums)


class FitPass(Generic[_Sums]):
    """One pass of a fit over batches: ``update`` per batch, ``reduce`` over ranks, then what there is to be written.

    Args:
        aligner: Whole (not sharded), on the device of the states.
        parts: The sums of those of its parts that are fitted.
    """

    def __init__(self, aligner: KVAligner, parts: dict[str, _Sums]) -> None:
        self._aligner, self.parts = aligner, parts

    @torch.no_grad()
    def update(self, student: States, teacher: States, selection: Selection, samples: Tensor | None = None) -> None:
        """Add one batch, ``samples`` as :func:`halves_of` takes them.

        Raises:
            InputError: its shapes are not those of the configurations.
        """
        self._aligner.check_states(student, teacher)
        halves = halves_of(selection.mask, samples)
        for name, part in self.parts.items():
            part.update(getattr(student, f"{name}s"), getattr(teacher, f"{name}s"), selection, halves)

    def reduce(self, all_reduce: Callable[[Tensor], None]) -> None:
        """Sum over ranks in place; every rank makes the same calls, whatever its batches held."""
        for part in self.parts.values():
            for tensor in part.tensors:
                all_reduce(tensor)


class PartMoments(PartSums):
    """Moments of both sides, and the statistics and start that they give a part.

    Only what the start needs is summed, per target layer and map: at most ``xᵀx``, ``xᵀy`` or ``yᵀy`` of one head
    (flat: of one layer), never products between layers. The mixing weights are those of the aligner as it is.

    Args:
        part: As of :class:`PartSums`.
        start: ``map_start``.
    """

    def __init__(self, part: AlignerPart, start: str) -> None:
        super().__init__(part)
        self._start = start
        maps, *widths = part.map_shape
        width = dict(zip("xy", widths, strict=True))
        products = {"pca": "yy" if part.to_teacher else "xx", "procrustes": "xy", "ridge": "xx xy", "random": ""}[start]
        # A start that is judged keeps two halves apart: [halves, L_y, maps, …].
        halves = 2 if start == "ridge" else 1
        self.count = torch.zeros(halves, dtype=torch.float64, device=part.target_scale.device)
        self.sums = {
            name: self.count.new_zeros(halves, part.num_targets, maps, *(width[side] for side in name if side in width))
            for name in ("x", "y", "x²", "y²", *products.split())
        }
        self.held_out_r2: list[float] | None = None

    @property
    def tensors(self) -> Sequence[Tensor]:
        """As of :class:`PartSums`."""
        return self.count, *self.sums.values()

    def add_states(self, source: Tensor, target: Tensor, halves: Tensor, weights: Tensor | None = None) -> None:
        """As of :class:`PartSums`."""
        weights = self.count.new_ones(len(halves)) if weights is None else weights.to(self.count)
        if len(self.count) == 1:
            halves = torch.zeros_like(halves)
        for x, y, places, counts in zip(*(rows.split(CHUNK, 1) for rows in (source, target)),
                                        halves.split(CHUNK), weights.split(CHUNK), strict=True):  # fmt: skip
            rows = self._part.source_rows(x.to(self.count)), self._part.target_rows(y.to(self.count))
            for half in range(len(self.count)):
                # Zeros in place of the others: no shape depends on what is selected.
                kept = counts * (places == half)
                self.count[half] += kept.sum()
                root = kept.sqrt()[:, None]
                self._add(half, root, *(row * root for row in rows))

    def _add(self, half: int, root: Tensor, x: Tensor, y: Tensor) -> None:
        rows = {"x": x, "y": y}  # [L_y, maps, N, width], times root [N, 1]: so are their products times its square
        for name, sums in self.sums.items():
            total = sums[half]
            if len(name) == 1:
                total += (rows[name] * root).sum(2)
            elif name[1] == "²":
                total += rows[name[0]].square().sum(2)
            else:
                total += rows[name[0]].transpose(2, 3) @ rows[name[1]]

    def apply(self) -> None:
        """Write statistics, bias and, unless the start is random, the dimension maps into the part."""
        part, count = self._part, self.count.sum()
        if not count > 0:
            raise InputError(
                "calibration: no position is selected in the calibration batches; expected at least one (more "
                "--calibration_batches, or other --kv_method and --kv_budget)"
            )
        mean = {name: self.sums[name].sum(0) / count for name in ("x", "y")}
        power = {name: self.sums[f"{name}²"].sum(0) / count for name in ("x", "y")}
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
        if self._start == "ridge":
            self._fit_ridge()
        elif self._start != "random":
            self._fit_closed_form(mean, count)
        part.set_offset(mean["x"], mean["y"])

    def _fit_closed_form(self, mean: dict[str, Tensor], count: Tensor) -> None:
        part = self._part
        unit = {"x": part.source_scale.double()[:, None, None], "y": part.target_scale.double()[:, None, None]}
        centre = {name: mean[name] / unit[name] for name in ("x", "y")}  # [L_y, maps, width]
        products = {
            name: self.sums[name].sum(0) / count / (unit[name[0]] * unit[name[1]])[..., None]
            - centre[name[0]].unsqueeze(-1) * centre[name[1]].unsqueeze(-2)
            for name in self.sums
            if name in ("xx", "xy", "yy")
        }
        assert part.projection is not None
        if part.projection.dim() == 2:
            products = {name: value.mean((0, 1)) for name, value in products.items()}
        fitted = closed_form(self._start, products, (centre["x"].shape[-1], centre["y"].shape[-1]))
        part.projection.copy_(fitted.reshape(part.projection.shape))

    def _fit_ridge(self) -> None:
        part = self._part
        assert part.projection is not None
        shared = part.projection.dim() == 2
        maps, *widths = part.map_shape
        uses = [(layer, number) for layer in range(part.num_targets) for number in range(maps)]
        left, mean_left = self.count.new_zeros(part.num_targets), self.count.new_zeros(part.num_targets)
        projection = part.projection.detach().view(-1, *widths)
        for place, group in enumerate([uses] if shared else [[use] for use in uses]):
            whole = [self._moments(slice(None), *use) for use in group]
            halves = tuple([self._moments(slice(half, half + 1), *use) for use in group] for half in (0, 1))
            # A cosine has no mean to fall back on: the smallest map has a direction, none has not.
            fitted, rest, of_mean = fit_ridge(whole, halves, may_be_none=part.regresses)  # type: ignore[arg-type]
            projection[place].copy_(fitted)
            layers = torch.tensor([layer for layer, _ in group], device=left.device)
            left.index_add_(0, layers, rest)
            mean_left.index_add_(0, layers, of_mean)
        explained = 1 - left / mean_left.clamp_min(1e-300)
        self.held_out_r2 = torch.where(mean_left > 0, explained, torch.zeros_like(explained)).tolist()

    def _moments(self, halves: slice, layer: int, number: int) -> Moments:
        """Of one use of a map, in the part's units."""
        part = self._part
        unit = {"x": part.source_scale[layer].double(), "y": part.target_scale[layer].double()}
        count = self.count[halves].sum()

        def mean(name: str, scale: Tensor) -> Tensor:
            return self.sums[name][halves, layer, number].sum(0) / (count.clamp_min(1) * scale)

        x, y = mean("x", unit["x"]), mean("y", unit["y"])
        xx = mean("xx", unit["x"].square()) - torch.outer(x, x)
        # As in _deviation: what rounding leaves of rows that do not vary is nothing to map.
        varies = (xx.trace() > 1e-12 * x.square().sum()).to(xx)
        return Moments(
            count, x, y,
            xx=xx * varies,
            xy=(mean("xy", unit["x"] * unit["y"]) - torch.outer(x, y)) * varies,
            yy=(mean("y²", unit["y"].square()) - y.square()).sum(),
        )  # fmt: skip


def halves_of(mask: Tensor, samples: Tensor | None = None) -> Tensor:
    """Which half, 0 or 1, each selected position belongs to: ``[N]``, of a sample the same whatever stands beside it.

    A sample's selected positions are cut into four runs that belong to either half by turns: neighbours, which look
    alike, are mostly in one half, and each half has of the beginning and of the end. Samples of an odd number of
    positions begin with the other half.

    Args:
        mask: ``[B, M]`` bool: the positions that are selected.
        samples: ``[B, M]`` a number for each sample; None: every row is one.
    """
    if samples is None:
        samples = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)
    _, sample, counts = samples[mask].unique_consecutive(return_inverse=True, return_counts=True)
    place = torch.arange(len(sample), device=mask.device) - (counts.cumsum(0) - counts)[sample]
    count = counts[sample]
    return (place * count.clamp_max(_BLOCKS) // count + count) % 2


def selected_rows(layers: tuple[Tensor, ...], selection: Selection) -> Tensor:
    """``[L, N, H, D]`` of the selected positions, in the dtype of the states."""
    return torch.stack([gather_positions(x, selection.index).transpose(1, 2)[selection.mask] for x in layers])


def selected_weights(selection: Selection) -> Tensor | None:
    """``[N]``, how much each selected position counts; None = all alike."""
    return None if selection.weight is None else selection.weight[selection.mask]


def _deviation(power: Tensor, mean: Tensor) -> Tensor:
    """``[L_y]`` root mean square, over maps and channels, of what varies around a channel's mean; 1 if nothing does."""
    variance = (power - mean.square()).mean((1, 2))
    # A layer that does not vary has no unit of its own; rounding of its square leaves about 1e-16 of it.
    varies = variance > 1e-12 * power.mean((1, 2))
    return torch.where(varies, variance, torch.ones_like(variance)).sqrt()


def closed_form(start: str, products: dict[str, Tensor], widths: tuple[int, int]) -> Tensor:
    """``[…, D_x, D_y]`` dimension maps by ``pca`` or ``procrustes``, from the covariances that the start needs."""
    if start == "pca":
        covariance = products.get("xx", products.get("yy"))
        assert covariance is not None
        directions = torch.linalg.eigh(covariance)[1].flip(-1)[..., : min(widths)]  # columns, largest variance first
        # An eigenvector's sign is free: its largest entry is made positive, whatever library computed it.
        largest = directions.gather(-2, directions.abs().argmax(-2, keepdim=True))
        directions = directions * torch.where(largest < 0, -1.0, 1.0)
        return directions if "xx" in products else directions.transpose(-1, -2)
    left, _, right = torch.linalg.svd(products["xy"], full_matrices=False)
    return left @ right


class AlignmentMoments(FitPass[PartMoments]):
    """Streaming moments of calibration batches: ``update`` per batch, ``reduce`` over ranks, ``apply`` once.

    Args:
        aligner: Whole (not sharded), on the device of the states; read for its shapes and starting mixes, written by
            :meth:`apply` alone.
    """

    @torch.no_grad()
    def __init__(self, aligner: KVAligner) -> None:
        start = aligner.settings.map_start
        super().__init__(aligner, {name: PartMoments(part, start) for name, part in aligner.named_parts().items()})

    @torch.no_grad()
    def apply(self) -> dict[str, list[float]]:
        """Write statistics and starts into the aligner.

        Returns:
            Part → R² of held-out rows for each target layer, of starts that were judged (``ridge``).

        Raises:
            InputError: no position was selected, or states are not finite.
        """
        for part in self.parts.values():
            part.apply()
        return {name: part.held_out_r2 for name, part in self.parts.items() if part.held_out_r2 is not None}


def fit_aligner(
    aligner: KVAligner,
    batches: Iterable[tuple[States, States, Selection]],
    *,
    all_reduce: Callable[[Tensor], None] | None = None,
) -> dict[str, list[float]]:
    """Fit ``aligner`` on batches of student states, teacher states and selection, in one pass.

    Returns:
        As :meth:`AlignmentMoments.apply`.
    """
    moments = AlignmentMoments(aligner)
    for student, teacher, selection in batches:
        moments.update(student, teacher, selection)
    if all_reduce is not None:
        moments.reduce(all_reduce)
    return moments.apply()
