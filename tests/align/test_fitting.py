"""Statistics and closed-form starts equal numpy's, what was planted, and themselves however the data arrives."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from kvds.align import build_aligner
from kvds.align.fitting import AlignmentMoments, fit_aligner
from kvds.errors import InputError
from kvds.kv import KVShape, KVStates, Selection
from tests.harness.kv_settings import both_parts

STUDENT, TEACHER = KVShape(3, 2, 3, 2), KVShape(4, 2, 5, 2)
STARTS = ("random", "pca", "procrustes", "ridge")
DIRECTIONS = ("student_to_teacher", "teacher_to_student")


def everything(states: KVStates) -> Selection:
    batch, _, tokens, _ = states.keys[0].shape
    return Selection(None, torch.ones(batch, tokens, dtype=torch.bool))


def normal_states(shape: KVShape, seed: int, batch: int = 4, tokens: int = 50, dtype=torch.float64) -> KVStates:
    """Correlated channels with an offset, another size for each layer."""
    generator = torch.Generator().manual_seed(seed)

    def layers() -> tuple[Tensor, ...]:
        made = []
        for layer in range(shape.num_hidden_layers):
            size = batch, shape.num_key_value_heads, tokens, shape.head_dim
            mixing = torch.randn(shape.head_dim, shape.head_dim, generator=generator, dtype=torch.float64)
            rows = torch.randn(size, generator=generator, dtype=torch.float64) @ mixing
            offset = 3 * torch.randn(1, size[1], 1, size[3], generator=generator, dtype=torch.float64)
            made.append(((layer + 1) * (rows + offset)).to(dtype))
        return tuple(made)

    return KVStates(layers(), layers())


def mapped(states: KVStates, function) -> KVStates:
    return KVStates(*(tuple(function(i, layer) for i, layer in enumerate(part)) for part in states))


def rotation(size: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


# -- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("mode", ["flat", "structured"])
def test_statistics_of_the_teacher_equal_numpys(mode, start):
    settings = both_parts(alignment_mode=mode, layer_map="endpoint", map_start=start)
    aligner = build_aligner(STUDENT, TEACHER, settings).double()
    student, teacher = normal_states(STUDENT, 1), normal_states(TEACHER, 2)
    index = torch.tensor([[0, 3, 4, 9]] * 4)
    mask = torch.tensor([[True, True, False, True]] * 3 + [[False] * 4])
    fit_aligner(aligner, [(student, teacher, Selection(index, mask))])
    for name, layers in (("key", teacher.keys), ("value", teacher.values)):
        part = aligner.parts[name]
        for i, layer in enumerate((0, 2, 3)):  # the layers that the endpoint map names
            rows = layers[layer].transpose(1, 2).numpy()[:3, [0, 3, 9]].reshape(9, 2, 5)
            np.testing.assert_allclose(part.target_mean[i].numpy(), rows.mean(0), rtol=1e-12)
            np.testing.assert_allclose(part.target_scale[i].item(), np.sqrt(rows.var(0).mean()), rtol=1e-12)
        # One source layer for each pair: its own deviation (structured: after the heads are mixed).
        if mode == "flat":
            rows = getattr(student, f"{name}s")[1].transpose(1, 2).numpy()[:3, [0, 3, 9]].reshape(9, 6)
            np.testing.assert_allclose(part.source_scale[1].item(), np.sqrt(rows.var(0).mean()), rtol=1e-12)


@pytest.mark.parametrize("mode", ["flat", "structured"])
def test_the_unit_towards_the_student_is_the_mix_of_the_teachers_layers(mode):
    settings = both_parts(
        alignment_mode=mode,
        layer_map="learned",
        direction="teacher_to_student",
        map_proj_init_uniform=True,
        aligner_update="frozen",
        map_start="pca",
    )
    student, teacher = normal_states(STUDENT, 1), normal_states(TEACHER, 2)
    units = []
    for factor in (1.0, 100.0):
        aligner = build_aligner(STUDENT, TEACHER, settings).double()
        fit_aligner(aligner, [(mapped(student, lambda _, x, f=factor: f * x), teacher, everything(student))])
        units.append(aligner.parts["key"].target_scale.clone())
        assert not aligner.parts["key"].target_mean.any()
    # Every row mixes all layers (and heads) alike; the student's own size plays no part in its unit.
    mixed = sum(layer for layer in teacher.keys) / 4
    if mode == "structured":
        mixed = mixed.mean(1, keepdim=True)
    expected = np.sqrt(mixed.transpose(1, 2).flatten(0, 1).numpy().var(0).mean())
    for unit in units:
        np.testing.assert_allclose(unit.numpy(), [expected] * 3, rtol=1e-6)


@pytest.mark.parametrize(
    "mode,direction,layer_map,start",
    itertools.product(("flat", "structured"), DIRECTIONS, ("learned", "endpoint"), STARTS),
)
def test_the_residual_starts_with_mean_zero(mode, direction, layer_map, start):
    settings = both_parts(alignment_mode=mode, direction=direction, layer_map=layer_map, map_start=start, kv_loss="mse")
    aligner = build_aligner(STUDENT, TEACHER, settings).double()
    student, teacher = normal_states(STUDENT, 1), normal_states(TEACHER, 2)
    fit_aligner(aligner, [(student, teacher, everything(student))])
    loss = aligner(student, teacher, everything(student)).loss
    gradients = torch.autograd.grad(loss, [part.bias for part in aligner.parts.values()])
    for gradient in gradients:  # of a squared error, the gradient on the bias is the mean residual
        assert gradient.abs().max() < 1e-7


def test_a_teacher_that_does_not_vary_keeps_unit_scale():
    student, teacher = (
        normal_states(STUDENT, 1),
        mapped(normal_states(TEACHER, 2), lambda _, x: torch.full_like(x, 7.3)),
    )
    aligner = build_aligner(STUDENT, TEACHER, both_parts())
    fit_aligner(aligner, [(student, teacher, everything(student))])
    assert aligner.parts["key"].target_scale.tolist() == [1.0] * 4


def test_statistics_survive_an_offset_a_thousand_times_their_size():
    student, teacher = normal_states(STUDENT, 1), normal_states(TEACHER, 2)
    aligners = [build_aligner(STUDENT, TEACHER, both_parts(map_start="ridge")).double() for _ in range(2)]
    fit_aligner(aligners[0], [(student, teacher, everything(student))])
    fit_aligner(aligners[1], [(student, mapped(teacher, lambda _, x: x + 1e4), everything(student))])
    for name in ("target_scale", "dim_proj"):
        one, two = (getattr(aligner.parts["key"], name) for aligner in aligners)
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


# -- closed-form starts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share_dim", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("mode", ["flat", "structured"])
def test_procrustes_recovers_a_planted_rotation(mode, direction, share_dim):
    shape = KVShape(3, 1, 4, 1)
    rotations = [rotation(4, 9 if share_dim else layer) for layer in range(6)]
    student = normal_states(shape, 1)
    keys = tuple(2.5 * x @ rotations[i] + i for i, x in enumerate(student.keys))
    values = tuple(0.1 * x @ rotations[i if share_dim else 3 + i] - 1 for i, x in enumerate(student.values))
    teacher = KVStates(keys, values)
    settings = both_parts(
        alignment_mode=mode,
        direction=direction,
        layer_map="endpoint",
        map_start="procrustes",
        map_proj_share_dim=share_dim,
    )
    aligner = build_aligner(shape, shape, settings).double()
    fit_aligner(aligner, [(student, teacher, everything(student))])
    for name, planted in (("key", rotations[0]), ("value", rotations[0 if share_dim else 3])):
        found = aligner.parts[name].projection
        found = found if found.dim() == 2 else found[0].reshape(4, 4)
        torch.testing.assert_close(
            found.detach(), planted if direction == DIRECTIONS[0] else planted.T, rtol=0, atol=1e-9
        )
    if direction == "student_to_teacher":
        assert aligner(student, teacher, everything(student)).loss.item() < 1e-12
    else:  # the teacher's unit, not the student's: equal up to the factor between them
        expected = np.mean([(1 - 1 / 2.5) ** 2, (1 - 1 / 0.1) ** 2])
        assert aligner(student, teacher, everything(student)).loss.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("mode", ["flat", "structured"])
def test_procrustes_of_other_widths_is_semi_orthogonal(mode, direction):
    settings = both_parts(alignment_mode=mode, direction=direction, map_start="procrustes")
    aligner = build_aligner(STUDENT, TEACHER, settings).double()
    student, teacher = normal_states(STUDENT, 1), normal_states(TEACHER, 2)
    fit_aligner(aligner, [(student, teacher, everything(student))])
    matrices = aligner.parts["key"].projection.detach()
    gram = matrices @ matrices.mT if matrices.shape[-2] < matrices.shape[-1] else matrices.mT @ matrices
    torch.testing.assert_close(gram, torch.eye(gram.shape[-1], dtype=torch.float64).expand_as(gram), rtol=0, atol=1e-10)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("mode,share_dim", [("flat", False), ("structured", False), ("structured", True)])
def test_ridge_recovers_a_planted_linear_map(mode, share_dim, direction):
    shapes = KVShape(2, 1, 3, 1), KVShape(2, 1, 5, 1)
    source = normal_states(shapes[0] if direction == DIRECTIONS[0] else shapes[1], 1)
    generator = torch.Generator().manual_seed(4)
    width = source.keys[0].shape[-1], 8 - source.keys[0].shape[-1]
    matrices = [torch.randn(width, generator=generator, dtype=torch.float64) for _ in range(2)]
    if share_dim:  # one map serves both layers where they differ by its unit alone
        source = KVStates(*((part[0], part[0]) for part in source))
        matrices[1] = matrices[0]
    target = mapped(source, lambda i, x: x @ matrices[i] + 2 * i - 1)
    student, teacher = (source, target) if direction == DIRECTIONS[0] else (target, source)
    settings = both_parts(
        alignment_mode=mode, direction=direction, layer_map="endpoint", map_start="ridge", map_proj_share_dim=share_dim
    )
    aligner = build_aligner(*shapes, settings).double()
    before = aligner(student, teacher, everything(student)).loss.item()
    fit_aligner(aligner, [(student, teacher, everything(student))])
    assert aligner(student, teacher, everything(student)).loss.item() < 1e-3 < before


@pytest.mark.parametrize("mode", ["flat", "structured"])
def test_pca_reconstruction_error_is_the_sum_of_the_dropped_eigenvalues(mode):
    shapes = KVShape(2, 1, 3, 1), KVShape(2, 1, 5, 1)
    teacher = normal_states(shapes[1], 2)
    settings = {"alignment_mode": mode, "layer_map": "endpoint", "map_start": "pca", "kv_parts": "k"}
    down = build_aligner(*shapes, both_parts(direction="teacher_to_student", **settings)).double()
    up = build_aligner(*shapes, both_parts(direction="student_to_teacher", **settings)).double()
    any_student = normal_states(shapes[0], 1)
    fit_aligner(down, [(any_student, teacher, everything(teacher))])
    # A student that holds the teacher's leading coordinates: what the map down gives, in the teacher's unit.
    part = down.parts["key"]
    codes, eigenvalues = [], []
    for i, layer in enumerate(teacher.keys):
        rows = layer - layer.mean((0, 1, 2))
        matrix = part.projection[i].reshape(5, 3).detach()
        codes.append(rows @ matrix)
        covariance = np.cov(rows.reshape(-1, 5).numpy().T, bias=True)
        eigenvalues.append(np.linalg.eigvalsh(covariance))
        variance = codes[i].reshape(-1, 3).numpy().var(0)
        np.testing.assert_allclose(variance, eigenvalues[i][::-1][:3], rtol=1e-9)
    student = KVStates(tuple(codes), tuple(codes))
    fit_aligner(up, [(student, teacher, everything(teacher))])
    # Measured in the teacher's unit on both sides, so that the coordinates come back in their own size.
    up.parts["key"].source_scale.copy_(up.parts["key"].target_scale)
    layers = up(student, teacher, everything(teacher)).key_layers
    for loss, scale, values in zip(layers, up.parts["key"].target_scale, eigenvalues, strict=True):
        assert loss.item() * scale.item() ** 2 * 5 == pytest.approx(values[:2].sum(), rel=1e-9)


def test_shared_pca_takes_the_directions_of_all_layers_together():
    shape, student = KVShape(2, 1, 4, 1), KVShape(2, 1, 1, 1)
    # Layer 0 varies along axis 2, layer 1 along axis 2 and, less, along axis 0: both in their own unit.
    generator = torch.Generator().manual_seed(0)
    rows = [
        torch.randn(1, 1, 400, 4, generator=generator, dtype=torch.float64) * torch.tensor(s)
        for s in ([0.1, 0.1, 1, 0.1], [0.8, 0.1, 1, 0.1])
    ]
    teacher = KVStates(tuple(rows), tuple(rows))
    settings = both_parts(
        map_proj_share_dim=True, layer_map="endpoint", map_start="pca", direction="teacher_to_student"
    )
    aligner = build_aligner(student, shape, settings).double()
    fit_aligner(aligner, [(normal_states(student, 1, 1, 400), teacher, everything(teacher))])
    direction = aligner.parts["key"].projection.detach().flatten()
    assert direction.abs().argmax() == 2 and direction[2] > 0.98


# -- however the data arrives -----------------------------------------------------------------------------------------

FITTED = [
    {"alignment_mode": mode, "direction": direction, "map_start": start, **extra}
    for mode, extras in (
        ("flat", ({}, {"layer_map": "learned"})),
        (
            "structured",
            ({}, {"map_proj_share_dim": True}, {"layer_map": "endpoint"}, {"layer_groups": 2, "head_groups": 2}),
        ),
    )
    for extra in extras
    for direction in DIRECTIONS
    for start in STARTS
]


def pieces(states: KVStates, size: int) -> list[KVStates]:
    return [mapped(states, lambda _, x, b=b: x[b : b + size]) for b in range(0, states.keys[0].shape[0], size)]


@pytest.mark.parametrize("settings", FITTED)
def test_streaming_and_two_ranks_equal_one_shot(settings):
    student, teacher = normal_states(STUDENT, 1), normal_states(TEACHER, 2)
    aligners = [build_aligner(STUDENT, TEACHER, both_parts(**settings)).double() for _ in range(4)]
    whole, streamed, *ranks = aligners
    fit_aligner(whole, [(student, teacher, everything(student))])
    batches = [(s, t, everything(s)) for s, t in zip(pieces(student, 1), pieces(teacher, 1), strict=True)]
    fit_aligner(streamed, batches)

    moments = [AlignmentMoments(aligner) for aligner in ranks]
    for rank, batch in enumerate(batches):
        moments[rank // 3].update(*batch)  # three batches on one rank, one and a row of padding alone on the other
    s, t, selection = batches[0]
    moments[1].update(s, t, Selection(None, torch.zeros_like(selection.mask)))
    seen: list[list[Tensor]] = [[], []]
    for rank in (0, 1):
        moments[rank].reduce(seen[rank].append)
    assert [x.shape for x in seen[0]] == [x.shape for x in seen[1]]
    for one, two in zip(*seen, strict=True):
        one += two
        two.copy_(one)
    for each in moments:
        each.apply()
    for other in (streamed, *ranks):
        for name, value in other.state_dict().items():
            torch.testing.assert_close(value, whole.state_dict()[name], rtol=1e-8, atol=1e-9, msg=name)
    for name, value in ranks[0].state_dict().items():
        assert torch.equal(value, ranks[1].state_dict()[name])


def test_many_positions_are_read_in_chunks(monkeypatch):
    student, teacher = normal_states(STUDENT, 1), normal_states(TEACHER, 2)
    aligners = [build_aligner(STUDENT, TEACHER, both_parts(map_start="ridge")).double() for _ in range(2)]
    fit_aligner(aligners[0], [(student, teacher, everything(student))])
    monkeypatch.setattr("kvds.align.fitting.CHUNK", 7)
    fit_aligner(aligners[1], [(student, teacher, everything(student))])
    for name, value in aligners[0].state_dict().items():
        torch.testing.assert_close(value, aligners[1].state_dict()[name], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("start", STARTS)
def test_moments_of_the_headline_pair_stay_small(start):
    student, teacher = KVShape(24, 2, 64, 14), KVShape(28, 2, 128, 12)
    for mode, direction in itertools.product(("flat", "structured"), DIRECTIONS):
        aligner = build_aligner(student, teacher, both_parts(alignment_mode=mode, direction=direction, map_start=start))
        moments = AlignmentMoments(aligner)
        sums = [s for part in moments.parts.values() for s in part.sums.values()]
        assert {len(s) for s in sums} == {2 if start == "ridge" else 1}  # the halves that judge each other
        assert sum(8 * s[0].numel() for s in sums) < 64 * 2**20


def test_only_the_dimension_maps_bias_and_statistics_are_written():
    student, teacher = normal_states(STUDENT, 1), normal_states(TEACHER, 2)
    for start in STARTS:
        aligner = build_aligner(STUDENT, TEACHER, both_parts(map_start=start))
        before = {name: value.clone() for name, value in aligner.state_dict().items()}
        fit_aligner(aligner, [(student, teacher, everything(student))])
        changed = {
            name.split(".")[-1] for name, value in aligner.state_dict().items() if not torch.equal(value, before[name])
        }
        written = {"target_mean", "target_scale", "source_scale", "bias"} | (
            {"dim_proj"} if start != "random" else set()
        )
        assert changed == written


def test_calibration_says_what_is_wrong():
    student, teacher = normal_states(STUDENT, 1), normal_states(TEACHER, 2)
    aligner = build_aligner(STUDENT, TEACHER, both_parts(map_start="ridge"))
    nothing = Selection(None, torch.zeros(4, 50, dtype=torch.bool))
    with pytest.raises(InputError, match="calibration: no position is selected"):
        fit_aligner(aligner, [(student, teacher, nothing)])
    with pytest.raises(InputError, match="calibration: no position is selected"):
        fit_aligner(aligner, [])
    broken = KVStates(teacher.keys, (*teacher.values[:2], teacher.values[2] * float("nan"), teacher.values[3]))
    with pytest.raises(InputError, match="the teacher's keys or values are not finite"):
        fit_aligner(aligner, [(student, broken, everything(student))])
    with pytest.raises(InputError, match="student: .*4 layers × 2 KV heads × 5 dimensions; expected 3 × 2 × 3"):
        fit_aligner(aligner, [(teacher, student, everything(student))])
