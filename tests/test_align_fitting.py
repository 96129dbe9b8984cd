"""Statistics and closed-form starts: against numpy, and against maps planted in the data."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kvds.align import build_aligner
from kvds.align.fitting import AlignmentMoments
from kvds.errors import InputError
from kvds.kv import KVShape, KVStates, Selection
from kvds.settings import AlignmentSettings

MODES = ("flat", "structured")
DIRECTIONS = ("student_to_teacher", "teacher_to_student")
STUDENT, TEACHER = KVShape(2, 2, 3, 2), KVShape(3, 2, 4, 2)
BATCH, TOKENS = 12, 16


def make(student: KVShape = STUDENT, teacher: KVShape = TEACHER, **kwargs: Any) -> nn.Module:
    aligner = build_aligner(
        student, teacher, AlignmentSettings(impl="reference", layer_map=kwargs.pop("layer_map", "endpoint"), **kwargs)
    )
    with torch.no_grad():
        for part in aligner.parts.values():  # type: ignore[operator, union-attr]
            if hasattr(part, "head_mix") and part.head_mix.shape[-1] == part.head_mix.shape[-2]:
                part.head_mix.copy_(torch.eye(part.head_mix.shape[-1]))
    return aligner


def random_states(shape: KVShape, seed: int) -> KVStates:
    """Correlated dimensions, an offset per channel and another size for each layer."""
    generator = torch.Generator().manual_seed(seed)
    heads, dim = shape.num_key_value_heads, shape.head_dim
    made = []
    for layer in range(2 * shape.num_hidden_layers):
        rows = torch.randn(BATCH, TOKENS, heads * dim, generator=generator) @ torch.randn(
            heads * dim, heads * dim, generator=generator
        )
        rows = (layer + 1) * 0.5 * rows + 3 * torch.randn(heads * dim, generator=generator)
        made.append(rows.unflatten(-1, (heads, dim)).transpose(1, 2).contiguous())
    return KVStates(tuple(made[: shape.num_hidden_layers]), tuple(made[shape.num_hidden_layers :]))


def selection() -> Selection:
    generator = torch.Generator().manual_seed(9)
    index = torch.stack([torch.randperm(TOKENS, generator=generator)[:10].sort()[0] for _ in range(BATCH)])
    return Selection(index, torch.rand(BATCH, 10, generator=generator) < 0.8)


EVERYTHING = Selection(None, torch.ones(BATCH, TOKENS, dtype=torch.bool))


def cut(states: KVStates, chosen: Selection, rows: slice) -> tuple[KVStates, Selection]:
    index = None if chosen.index is None else chosen.index[rows]
    return KVStates(*(tuple(x[rows] for x in side) for side in states_sides(states))), Selection(
        index, chosen.mask[rows]
    )


def states_sides(states: KVStates) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return states.keys, states.values


def rows_of(layer: Tensor, chosen: Selection) -> np.ndarray:
    """Selected tokens ``[N, H, D]`` in numpy, one by one."""
    picked = []
    for b, m in itertools.product(*map(range, chosen.mask.shape)):
        if chosen.mask[b, m]:
            picked.append(layer[b, :, m if chosen.index is None else chosen.index[b, m]].double().numpy())
    return np.stack(picked)


def fit(aligner: nn.Module, student: KVStates, teacher: KVStates, chosen: Selection) -> nn.Module:
    moments = AlignmentMoments(aligner)
    moments.update(student, teacher, chosen)
    moments.apply()
    return aligner


def weights(aligner: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in aligner.state_dict().items()}


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


def loss_of(aligner: nn.Module, student: KVStates, teacher: KVStates, chosen: Selection) -> float:
    return float(aligner(student=student, teacher=teacher, selection=chosen).loss.detach())


@pytest.mark.parametrize("start", ["random", "ridge"])
@pytest.mark.parametrize("mode", MODES)
def test_statistics_equal_numpy(mode: str, start: str) -> None:
    student, teacher, chosen = random_states(STUDENT, 1), random_states(TEACHER, 2), selection()
    aligner = fit(make(alignment_mode=mode, map_start=start), student, teacher, chosen)
    for name, layers in (("key", teacher.keys), ("value", teacher.values)):
        statistics = aligner.parts[name].statistics  # type: ignore[index, union-attr]
        for i, layer in enumerate(layers):
            rows = rows_of(layer, chosen)
            np.testing.assert_allclose(statistics.mean[i].numpy(), rows.mean(0), rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(float(statistics.scale[i]), np.sqrt(rows.var(0).mean()), rtol=1e-5)


def test_a_constant_layer_has_unit_one() -> None:
    student, teacher = random_states(STUDENT, 1), random_states(TEACHER, 2)
    flat_layer = KVStates((torch.full_like(teacher.keys[0], 0.25), *teacher.keys[1:]), teacher.values)
    aligner: Any = fit(make(), student, flat_layer, EVERYTHING)
    assert float(aligner.parts["key"].statistics.scale[0]) == 1
    assert np.isfinite(loss_of(aligner, student, flat_layer, EVERYTHING))


@pytest.mark.parametrize("start", ["random", "pca", "procrustes", "ridge"])
@pytest.mark.parametrize("layer_map", ["learned", "endpoint"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_streaming_and_two_ranks_equal_one_shot(mode: str, direction: str, layer_map: str, start: str) -> None:
    student, teacher, chosen = random_states(STUDENT, 1), random_states(TEACHER, 2), selection()
    arguments: dict[str, Any] = dict(alignment_mode=mode, direction=direction, layer_map=layer_map, map_start=start)
    before = weights(make(**arguments))
    whole = weights(fit(make(**arguments), student, teacher, chosen))
    assert any(not torch.equal(whole[name], before[name]) for name in whole)

    def part(rows: slice) -> tuple[KVStates, KVStates, Selection]:
        cut_student, cut_chosen = cut(student, chosen, rows)
        return cut_student, cut(teacher, chosen, rows)[0], cut_chosen

    streamed = make(**arguments)
    moments = AlignmentMoments(streamed)
    for begin, end in ((0, 5), (5, 6), (6, 12)):
        moments.update(*part(slice(begin, end)))
    moments.apply()
    close(weights(streamed), whole)

    ranks = [make(**arguments), make(**arguments)]
    halves = [AlignmentMoments(aligner) for aligner in ranks]
    halves[0].update(*part(slice(0, 7)))
    halves[1].update(*part(slice(7, 12)))
    first: list[Tensor] = []
    halves[0].reduce(lambda tensor: first.append(tensor.clone()))
    sent = iter(first)
    halves[1].reduce(lambda tensor: tensor.add_(next(sent)))
    assert next(sent, None) is None
    halves[1].apply()
    close(weights(ranks[1]), whole)


def rotation(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double())[0].float()


def planted(shape: KVShape, maps: Any, *, normalised: bool = False) -> tuple[KVStates, KVStates]:
    """Source states and their image under ``maps(layer, flat rows [B, T, H, D])``, which is centred first."""
    given = random_states(shape, 5)
    sides, images = [], []
    for side in states_sides(given):
        layers, moved = [], []
        for i, layer in enumerate(side):
            rows = layer.transpose(1, 2)  # [B, T, H, D]
            if normalised:
                rows = rows / (rows - rows.mean((0, 1))).square().mean().sqrt()
            layers.append(rows.transpose(1, 2).contiguous())
            moved.append(maps(i, rows - rows.mean((0, 1))).transpose(1, 2).contiguous())
        sides.append(tuple(layers))
        images.append(tuple(moved))
    return KVStates(*sides), KVStates(*images)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_procrustes_recovers_a_planted_rotation(mode: str, direction: str, share: bool) -> None:
    shape = KVShape(3, 2, 4, 2)
    to_teacher = direction == "student_to_teacher"

    def maps(layer: int, rows: Tensor) -> Tensor:
        if mode == "flat":
            turned = (rows.flatten(2) @ rotation(8, layer)).unflatten(2, (2, 4))
        elif share:
            turned = rows @ rotation(4, 11)
        else:
            turned = torch.stack([rows[:, :, h] @ rotation(4, 2 * layer + h) for h in range(2)], 2)
        # Towards the teacher any size and any offset of each layer are found; towards the student the rotation alone.
        return (layer + 2) * turned + 5.0 * layer - 1 if to_teacher else turned

    # A fixed scalar serves all heads and layers only where their sources are of one size.
    source, image = planted(shape, maps, normalised=share)
    student, teacher = (source, image) if to_teacher else (image, source)
    aligner = make(
        shape, shape, alignment_mode=mode, direction=direction, map_proj_share_dim=share, map_start="procrustes"
    )
    assert loss_of(aligner, student, teacher, EVERYTHING) > 0.1
    fit(aligner, student, teacher, EVERYTHING)
    assert loss_of(aligner, student, teacher, EVERYTHING) < 1e-8
    part: Any = aligner.parts["key"]  # type: ignore[index, union-attr]
    for layer in range(3):
        weight = part.weight[layer] if mode == "flat" else part.dim_proj if share else part.dim_proj[layer, 1]
        wanted = rotation(8, layer) if mode == "flat" else rotation(4, 11 if share else 2 * layer + 1)
        torch.testing.assert_close(weight / weight.norm(), wanted / wanted.norm(), rtol=1e-4, atol=1e-4)
        gram = weight.detach().T @ weight.detach()
        torch.testing.assert_close(gram, gram[0, 0] * torch.eye(gram.shape[0]), rtol=1e-4, atol=1e-4)
        if not to_teacher:
            assert float(gram[0, 0]) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_ridge_recovers_a_planted_linear_map(mode: str, direction: str) -> None:
    wide, narrow = KVShape(2, 2, 4, 2), KVShape(2, 2, 3, 2)
    to_teacher = direction == "student_to_teacher"
    generator = torch.Generator().manual_seed(4)
    planted_maps = [torch.randn(8, 6, generator=generator) for _ in range(2)]
    if mode == "structured":
        planted_maps = [torch.block_diag(m[:4, :3], m[4:, 3:]) for m in planted_maps]

    def maps(layer: int, rows: Tensor) -> Tensor:
        return (rows.flatten(2) @ planted_maps[layer] * (layer + 1) + 4.0 - layer).unflatten(2, (2, 3))

    given = random_states(wide, 5)
    # Well conditioned sources: the penalty of the ridge is then all that is missing.
    white = KVStates(
        *(tuple(torch.randn(x.shape, generator=generator) + 2 for x in side) for side in states_sides(given))
    )
    image = KVStates(
        *(tuple(maps(i, x.transpose(1, 2)).transpose(1, 2) for i, x in enumerate(side)) for side in states_sides(white))
    )
    student, teacher = (white, image) if to_teacher else (image, white)
    shapes = (wide, narrow) if to_teacher else (narrow, wide)
    aligner: Any = make(*shapes, alignment_mode=mode, direction=direction, map_start="ridge")
    assert loss_of(aligner, student, teacher, EVERYTHING) > 0.1
    fit(aligner, student, teacher, EVERYTHING)
    assert loss_of(aligner, student, teacher, EVERYTHING) < 1e-5 * (1 if to_teacher else 10)
    part = aligner.parts["key"]
    for layer in range(2):
        unit = float(part.target_statistics()[1][layer]) if to_teacher else 1.0
        wanted = planted_maps[layer] * (layer + 1)
        found = part.weight[layer] if mode == "flat" else part.dim_proj[layer, 1]
        wanted = wanted if mode == "flat" else wanted[4:, 3:]
        torch.testing.assert_close(found.detach() * unit, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_ridge_equals_numpy(mode: str, direction: str) -> None:
    student, teacher, chosen = random_states(STUDENT, 1), random_states(TEACHER, 2), selection()
    aligner: Any = fit(make(alignment_mode=mode, direction=direction, map_start="ridge"), student, teacher, chosen)
    to_teacher = direction == "student_to_teacher"
    for name, pairs in (("key", (student.keys, teacher.keys)), ("value", (student.values, teacher.values))):
        part = aligner.parts[name]
        for layer, other in enumerate((0, 2)):  # endpoint: student layers 0 and 1 on teacher layers 0 and 2
            s, t = rows_of(pairs[0][layer], chosen), rows_of(pairs[1][other], chosen)
            unit = np.sqrt(t.var(0).mean())
            x, y = (s, t) if to_teacher else (t, s)
            groups = (
                [(x.reshape(len(x), -1), y.reshape(len(y), -1))]
                if mode == "flat"
                else [(x[:, h], y[:, h]) for h in range(2)]
            )
            for h, (rows, wanted) in enumerate(groups):
                centred, goal = rows - rows.mean(0), (wanted - wanted.mean(0)) / (unit if to_teacher else 1)
                gram = centred.T @ centred / len(rows)
                penalty = 1e-3 * np.trace(gram) / len(gram) * np.eye(len(gram))
                solved = np.linalg.solve(gram + penalty, centred.T @ goal / len(rows))
                found = part.weight[layer] if mode == "flat" else part.dim_proj[layer, h]
                np.testing.assert_allclose(found.detach().numpy(), solved, rtol=1e-4, atol=1e-5)
                bias = -rows.mean(0) @ solved if to_teacher else (wanted.mean(0) - rows.mean(0) @ solved) / unit
                found = part.bias[layer] if mode == "flat" else part.bias[layer, h]
                np.testing.assert_allclose(found.detach().numpy(), bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_pca_to_student_loses_the_dropped_eigenvalues(mode: str) -> None:
    student, teacher, chosen = random_states(STUDENT, 1), random_states(TEACHER, 2), selection()
    aligner: Any = fit(
        make(alignment_mode=mode, direction="teacher_to_student", map_start="pca"), student, teacher, chosen
    )
    part = aligner.parts["key"]
    for layer, other in enumerate((0, 2)):
        rows = rows_of(teacher.keys[other], chosen)
        groups = [rows.reshape(len(rows), -1)] if mode == "flat" else [rows[:, h] for h in range(2)]
        for h, x in enumerate(groups):
            centred = x - x.mean(0)
            projection = (part.weight[layer] if mode == "flat" else part.dim_proj[layer, h]).detach().double().numpy()
            error = np.square(centred - centred @ projection @ projection.T).sum(1).mean()
            dropped = np.sort(np.linalg.eigvalsh(centred.T @ centred / len(x)))[
                : projection.shape[0] - projection.shape[1]
            ]
            assert len(dropped) > 0
            np.testing.assert_allclose(error, dropped.sum(), rtol=1e-4)
            # The projected rows are centred: the map's bias takes the teacher's mean out.
            unit = float(part.target_statistics()[1][layer])
            bias = (part.bias[layer] if mode == "flat" else part.bias[layer, h]).detach().double().numpy() * unit
            np.testing.assert_allclose((x @ projection + bias).mean(0), 0, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_pca_to_teacher_spans_its_largest_directions(mode: str) -> None:
    student, teacher, chosen = random_states(STUDENT, 1), random_states(TEACHER, 2), selection()
    aligner: Any = fit(make(alignment_mode=mode, map_start="pca"), student, teacher, chosen)
    part = aligner.parts["value"]
    for layer, other in enumerate((0, 2)):
        rows = rows_of(teacher.values[other], chosen)
        x = rows.reshape(len(rows), -1) if mode == "flat" else rows[:, 1]
        eigenvectors = np.linalg.eigh(np.cov(x.T, bias=True))[1][:, ::-1]
        projection = (part.weight[layer] if mode == "flat" else part.dim_proj[layer, 1]).detach().double().numpy()
        wanted = eigenvectors[:, : projection.shape[0]].T
        np.testing.assert_allclose(np.abs(np.sum(projection * wanted, 1)), 1, rtol=1e-4)


def test_pca_needs_a_teacher_as_wide_as_the_student() -> None:
    for mode in MODES:
        with pytest.raises(InputError, match="map_start=pca"):
            AlignmentMoments(
                make(TEACHER, STUDENT, alignment_mode=mode, direction="teacher_to_student", map_start="pca")
            )
    AlignmentMoments(make(TEACHER, STUDENT, map_start="pca"))


def test_nothing_selected_is_an_input_error() -> None:
    nothing = Selection(None, torch.zeros(BATCH, TOKENS, dtype=torch.bool))
    with pytest.raises(InputError, match="no position is selected"):
        fit(make(), random_states(STUDENT, 1), random_states(TEACHER, 2), nothing)


def test_states_of_another_shape_are_an_input_error() -> None:
    with pytest.raises(InputError, match="student: its first batch has 3 layers"):
        fit(make(), random_states(TEACHER, 1), random_states(TEACHER, 2), EVERYTHING)
    with pytest.raises(InputError, match="teacher: its first batch has 2 layers"):
        fit(make(), random_states(STUDENT, 1), random_states(STUDENT, 2), EVERYTHING)


@pytest.mark.parametrize("mode", MODES)
def test_rows_under_the_mask_do_not_enter(mode: str) -> None:
    student, teacher, chosen = random_states(STUDENT, 1), random_states(TEACHER, 2), selection()
    expected = weights(fit(make(alignment_mode=mode, map_start="ridge"), student, teacher, chosen))
    real = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    assert chosen.index is not None
    real.scatter_(1, chosen.index, chosen.mask)
    for side in (*states_sides(student), *states_sides(teacher)):
        for layer in side:
            layer.transpose(1, 2)[~real] = float("nan")
    close(weights(fit(make(alignment_mode=mode, map_start="ridge"), student, teacher, chosen)), expected)
