"""The alignment loss of both aligners against plain fp64 loops written from the formula."""

from __future__ import annotations

import copy
import io
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvds.align import aligner_config_dict, aligner_from_config_dict, build_aligner
from kvds.align.layer_map import endpoint_map, last_aligned_map, near_diagonal_logits
from kvds.errors import InputError
from kvds.kv import KVShape, KVStates, Selection, group_slices, select_tokens
from kvds.settings import AlignmentSettings

STUDENT, TEACHER = KVShape(3, 2, 2, 4), KVShape(4, 4, 3, 4)
DIRECTIONS = ("student_to_teacher", "teacher_to_student")
MAPS = ("learned", "endpoint", "last_aligned")
# Written out by hand: the teacher layer of each of 3 student layers.
TEACHER_LAYER = {"endpoint": [0, 2, 3], "last_aligned": [1, 2, 3]}


def settings(**kwargs: Any) -> AlignmentSettings:
    return AlignmentSettings(**{"impl": "reference", **kwargs})


def randomise(aligner: nn.Module, seed: int = 0) -> None:
    """Every number of the aligner away from its start, statistics too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in aligner.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in aligner.named_buffers():
            noise = torch.randn(buffer.shape, generator=generator)
            buffer.copy_(0.5 + noise.abs() if name.endswith("scale") else noise)


def states(shape: KVShape, seed: int, batch: int = 2, tokens: int = 5, dtype: torch.dtype = torch.float64) -> KVStates:
    generator = torch.Generator().manual_seed(seed)
    size = (batch, shape.num_key_value_heads, tokens, shape.head_dim)
    made = [
        torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(2 * shape.num_hidden_layers)
    ]
    return KVStates(tuple(made[: shape.num_hidden_layers]), tuple(made[shape.num_hidden_layers :]))


INDEX = torch.tensor([[1, 2, 4], [0, 3, 4]])
MASK = torch.tensor([[True, True, False], [True, False, True]])


def rho(r: float, loss: str) -> float:
    if loss == "mse":
        return r * r
    if loss == "l1":
        return abs(r)
    return r * r / 2 if abs(r) < 1 else abs(r) - 0.5


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


def oracle_part(
    aligner: nn.Module, name: str, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], selection: Selection
) -> list[float]:
    """Losses per target layer of one part, from parameters by name and DESIGN's formula alone."""
    cfg: Any = aligner.settings
    part: Any = aligner.parts[name]  # type: ignore[index]
    flat, to_teacher = cfg.alignment_mode == "flat", cfg.direction == "student_to_teacher"
    layer_map = cfg.layer_map or ("endpoint" if flat else "learned")
    src, tgt = (student, teacher) if to_teacher else (teacher, student)
    x, y = [layer.tolist() for layer in src], [layer.tolist() for layer in tgt]
    mean, scale = part.statistics.mean.tolist(), part.statistics.scale.tolist()
    lx, ly, hx, hy = len(x), len(y), len(x[0][0]), len(y[0][0])
    dx, dy = len(x[0][0][0][0]), len(y[0][0][0][0])
    if layer_map == "learned":
        groups = 1 if flat else cfg.layer_groups
        rows = [(i, i, [0.0] * lx) for i in range(ly)]
        logits = part.layer_logits.tolist()
        for g in range(groups):
            inside = list(range(g * lx // groups, (g + 1) * lx // groups))
            for i in range(g * ly // groups, (g + 1) * ly // groups):
                for layer, weight in zip(inside, softmax([logits[i][layer] for layer in inside]), strict=True):
                    rows[i][2][layer] = weight
    else:
        pairs = list(enumerate(TEACHER_LAYER[layer_map]))
        rows = []
        for s, t in pairs:
            from_layer, to_layer = (s, t) if to_teacher else (t, s)
            rows.append((s, to_layer, [float(layer == from_layer) for layer in range(lx)]))
    out = []
    for at, to_layer, mix in rows:
        if to_teacher:
            unit, offset = scale[to_layer], mean[to_layer]
        elif layer_map == "learned":  # the teacher's units at the same relative depth
            depth = to_layer * (lx - 1) / (ly - 1)
            unit = sum(
                w * s for w, s in zip(softmax([-2 * (depth - layer) ** 2 for layer in range(lx)]), scale, strict=True)
            )
            offset = [[0.0] * dy for _ in range(hy)]
        else:
            unit, offset = scale[TEACHER_LAYER[layer_map][at]], [[0.0] * dy for _ in range(hy)]
        gain = unit if to_teacher else 1.0
        total, count = 0.0, 0
        for b, m in itertools.product(range(INDEX.shape[0]), range(selection.mask.shape[1])):
            if not selection.mask[b, m]:
                continue
            position = m if selection.index is None else int(selection.index[b, m])
            mixed = [
                [sum(mix[layer] * x[layer][b][h][position][d] for layer in range(lx)) for d in range(dx)]
                for h in range(hx)
            ]
            for j, e in itertools.product(range(hy), range(dy)):
                if flat:
                    weight, bias = part.weight[at].tolist(), part.bias[at].tolist()
                    moved = sum(mixed[h][d] * weight[h * dx + d][j * dy + e] for h in range(hx) for d in range(dx))
                    shift = bias[j * dy + e]
                else:
                    heads = (part.head_mix if part.head_mix.dim() == 2 else part.head_mix[at])[j].tolist()
                    dims = (part.dim_proj if part.dim_proj.dim() == 2 else part.dim_proj[at, j]).tolist()
                    allowed = [h for h in range(hx) if h * cfg.head_groups // hx == j * cfg.head_groups // hy]
                    moved = sum(heads[h] * mixed[h][d] * dims[d][e] for h in allowed for d in range(dx))
                    shift = float(part.bias[at, j, e])
                projected = gain * moved + unit * shift + offset[j][e]
                total += rho((projected - y[to_layer][b][j][position][e]) / unit, cfg.kv_loss)
                count += 1
        out.append(total / count)
    return out


def check_against_oracle(selection: Selection = Selection(INDEX, MASK), **kwargs: Any) -> None:
    aligner = build_aligner(STUDENT, TEACHER, settings(**kwargs)).double()
    randomise(aligner)
    student, teacher = states(STUDENT, 1), states(TEACHER, 2)
    found = aligner(student=student, teacher=teacher, selection=selection)
    parts = {"kv": ("key", "value"), "k": ("key",), "v": ("value",)}[kwargs.get("kv_parts", "kv")]
    means = []
    for name in ("key", "value"):
        loss, layers = getattr(found, f"{name}_loss"), getattr(found, f"{name}_layers")
        if name not in parts:
            assert loss is None and layers is None
            continue
        expected = oracle_part(aligner, name, getattr(student, f"{name}s"), getattr(teacher, f"{name}s"), selection)
        torch.testing.assert_close(layers.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
        means.append(sum(expected) / len(expected))
        assert float(loss) == pytest.approx(means[-1], rel=1e-5)
        assert not loss.requires_grad and not layers.requires_grad
    assert float(found.loss.detach()) == pytest.approx(sum(means) / len(means), rel=1e-5)
    assert found.loss.dim() == 0 and found.loss.requires_grad


@pytest.mark.parametrize("groups", [(1, 1), (2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("layer_map", MAPS)
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_structured_equals_loops(direction: str, share: bool, layer_map: str, groups: tuple[int, int]) -> None:
    for loss, parts in (("mse", "kv"), ("l1", "k"), ("smooth_l1", "v")):
        check_against_oracle(
            direction=direction, map_proj_share_dim=share, layer_map=layer_map, layer_groups=groups[0],
            head_groups=groups[1], kv_loss=loss, kv_parts=parts,
        )  # fmt: skip


@pytest.mark.parametrize("loss", ["mse", "l1", "smooth_l1"])
@pytest.mark.parametrize("parts", ["kv", "k", "v"])
@pytest.mark.parametrize("mode", ["flat", "structured"])
def test_losses_and_parts_equal_loops(mode: str, parts: str, loss: str) -> None:
    check_against_oracle(alignment_mode=mode, kv_parts=parts, kv_loss=loss)


@pytest.mark.parametrize("layer_map", [*MAPS, None])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_flat_equals_loops(direction: str, layer_map: str | None) -> None:
    for loss, parts in (("mse", "kv"), ("l1", "k"), ("smooth_l1", "v")):
        check_against_oracle(
            alignment_mode="flat", direction=direction, layer_map=layer_map, kv_loss=loss, kv_parts=parts
        )


@pytest.mark.parametrize("mode", ["flat", "structured"])
def test_selection_without_index_equals_loops(mode: str) -> None:
    mask = torch.tensor([[False, True, True, True, False], [False, False, False, False, True]])
    check_against_oracle(Selection(None, mask), alignment_mode=mode)


def test_layer_maps_by_hand() -> None:
    assert endpoint_map(3, 4) == [0, 2, 3] and endpoint_map(4, 28) == [0, 9, 18, 27]
    assert endpoint_map(1, 5) == [4] and endpoint_map(5, 5) == [0, 1, 2, 3, 4]
    assert endpoint_map(3, 2) == [0, 1, 1]
    assert last_aligned_map(3, 4) == [1, 2, 3] and last_aligned_map(4, 2) == [0, 0, 0, 1]
    for students, teachers in itertools.product(range(2, 9), range(1, 9)):
        exact = [i * (teachers - 1) / (students - 1) for i in range(students)]
        assert endpoint_map(students, teachers) == [math.floor(depth + 0.5) for depth in exact]


def test_learned_mix_starts_near_the_diagonal_or_uniform() -> None:
    part: Any = build_aligner(STUDENT, TEACHER, settings()).parts["key"]  # type: ignore[index, union-attr]
    assert part.layer_mix().argmax(1).tolist() == near_diagonal_logits(4, 3).argmax(1).tolist() == [0, 1, 1, 2]
    assert float(part.layer_mix()[0, 0]) > 0.7
    uniform: Any = build_aligner(STUDENT, TEACHER, settings(map_proj_init_uniform=True)).parts["key"]  # type: ignore[index, union-attr]
    torch.testing.assert_close(uniform.layer_mix(), torch.full((4, 3), 1 / 3))
    torch.testing.assert_close(uniform.head_mix, torch.full((4, 4, 2), 0.5))


def test_more_groups_than_layers_or_heads_is_an_input_error() -> None:
    with pytest.raises(InputError, match="layer_groups=4.*at most 3"):
        build_aligner(STUDENT, TEACHER, settings(layer_groups=4))
    with pytest.raises(InputError, match="head_groups=3.*at most 2"):
        build_aligner(STUDENT, TEACHER, settings(head_groups=3))


@pytest.mark.parametrize("layer_map", MAPS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("mode", ["flat", "structured"])
def test_equal_states_with_an_identity_map_have_loss_zero(mode: str, direction: str, layer_map: str) -> None:
    aligner = build_aligner(
        TEACHER, TEACHER, settings(alignment_mode=mode, direction=direction, layer_map=layer_map)
    ).double()
    randomise(aligner)
    with torch.no_grad():
        for part in aligner.parts.values():  # type: ignore[operator, union-attr]
            mean, scale = part.statistics.mean, part.statistics.scale
            if layer_map == "learned":
                part.layer_logits.copy_(1e4 * torch.eye(4))
            identity = torch.eye(12 if mode == "flat" else 3, dtype=torch.float64)
            weight = part.weight if mode == "flat" else part.dim_proj
            if mode == "structured":
                part.head_mix.copy_(torch.eye(4))
            if direction == "student_to_teacher":
                weight.copy_(identity / scale.view(-1, *[1] * (weight.dim() - 1)))
                part.bias.copy_(-(mean / scale[:, None, None]).view(part.bias.shape))
            else:
                weight.copy_(identity.expand_as(weight))
                part.bias.zero_()
    both = states(TEACHER, 4)
    loss = float(aligner(student=both, teacher=both, selection=Selection(INDEX, MASK)).loss.detach())
    assert loss < 1e-25
    moved = KVStates(tuple(key + 0.1 for key in both.keys), both.values)
    assert float(aligner(student=moved, teacher=both, selection=Selection(INDEX, MASK)).loss.detach()) > 1e-5


def with_gradient(given: KVStates) -> KVStates:
    return KVStates(*(tuple(layer.clone().requires_grad_() for layer in side) for side in given))


VARIANTS = [
    dict(alignment_mode=mode, direction=direction, layer_map=layer_map, **more)
    for mode, direction, layer_map in itertools.product(("flat", "structured"), DIRECTIONS, ("learned", "endpoint"))
    for more in ([{}] if mode == "flat" else [{}, {"map_proj_share_dim": True, "layer_groups": 2, "head_groups": 2}])
]
IDS = ["-".join(str(value) for value in variant.values()) for variant in VARIANTS]


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_empty_selection_is_zero_with_a_graph(variant: dict[str, Any]) -> None:
    aligner = build_aligner(STUDENT, TEACHER, settings(**variant))
    randomise(aligner)
    student, teacher = with_gradient(states(STUDENT, 1, dtype=torch.float32)), states(TEACHER, 2, dtype=torch.float32)
    found = aligner(student=student, teacher=teacher, selection=Selection(INDEX, torch.zeros_like(MASK)))
    assert float(found.loss.detach()) == 0 and float(found.key_layers.abs().sum()) == 0
    found.loss.backward()
    hard = variant["layer_map"] == "endpoint"
    assert hard or all(layer.grad is not None for side in student for layer in side)
    for tensor in (*aligner.parameters(), *student.keys, *student.values):
        assert tensor.grad is not None and float(tensor.grad.abs().sum()) == 0


@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_what_lies_under_the_mask_changes_neither_loss_nor_gradient(variant: dict[str, Any], rubbish: float) -> None:
    aligner = build_aligner(STUDENT, TEACHER, settings(**variant))
    randomise(aligner)
    results = []
    for dirty in (False, True):
        student = states(STUDENT, 1, dtype=torch.float32)
        teacher = states(TEACHER, 2, dtype=torch.float32)
        if dirty:
            for layer in (*student.keys, *student.values, *teacher.keys, *teacher.values):
                for b in range(2):
                    kept = INDEX[b][MASK[b]].tolist()
                    for t in range(5):
                        if t not in kept:
                            layer[b, :, t] = rubbish
        student = with_gradient(student)
        aligner.zero_grad()
        loss = aligner(student=student, teacher=teacher, selection=Selection(INDEX, MASK)).loss
        loss.backward()
        tensors = [*student.keys, *student.values, *aligner.parameters()]
        results.append([loss.detach(), *(t.grad if t.grad is not None else torch.zeros_like(t) for t in tensors)])
    for clean, dirty_ in zip(*results, strict=True):
        assert torch.isfinite(clean).all()
        torch.testing.assert_close(dirty_, clean, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_gradcheck(variant: dict[str, Any]) -> None:
    aligner = build_aligner(KVShape(2, 2, 1, 2), KVShape(2, 2, 2, 2), settings(**variant)).double()
    randomise(aligner)
    # One row of three tokens, one of them masked: a numeric derivative costs two forwards for each element.
    selection = Selection(torch.tensor([[0, 2]]), torch.tensor([[True, True]]))
    selection = selection if variant["layer_map"] == "learned" else Selection(None, torch.tensor([[True, False, True]]))
    student = with_gradient(states(KVShape(2, 2, 1, 2), 1, batch=1, tokens=3))
    teacher = states(KVShape(2, 2, 2, 2), 2, batch=1, tokens=3)
    parameters = list(aligner.parameters())
    count = len(student.keys)

    def loss(*tensors: Tensor) -> Tensor:
        given = KVStates(tensors[:count], tensors[count : 2 * count])
        return aligner(student=given, teacher=teacher, selection=selection).loss

    tensors = (*student.keys, *student.values, *parameters)
    assert torch.autograd.gradcheck(loss, tensors, fast_mode=False, atol=1e-7)


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_frozen_aligner_sends_gradient_to_the_student_alone(variant: dict[str, Any]) -> None:
    aligner = build_aligner(STUDENT, TEACHER, settings(**variant, aligner_update="frozen"))
    assert not any(p.requires_grad for p in aligner.parameters()) and any(True for _ in aligner.parameters())
    student, teacher = with_gradient(states(STUDENT, 1, dtype=torch.float32)), states(TEACHER, 2, dtype=torch.float32)
    aligner(student=student, teacher=teacher, selection=Selection(INDEX, MASK)).loss.backward()
    for layer in (*student.keys, *student.values):
        assert layer.grad is not None and float(layer.grad.abs().sum()) > 0
    assert all(p.grad is None for p in aligner.parameters())


@pytest.mark.parametrize("mode", ["flat", "structured"])
def test_order_of_samples_does_not_matter(mode: str) -> None:
    aligner = build_aligner(STUDENT, TEACHER, settings(alignment_mode=mode)).double()
    student, teacher = states(STUDENT, 1), states(TEACHER, 2)
    flipped = [KVStates(*(tuple(layer.flip(0) for layer in side) for side in given)) for given in (student, teacher)]
    one = aligner(student=student, teacher=teacher, selection=Selection(INDEX, MASK)).loss
    other = aligner(student=flipped[0], teacher=flipped[1], selection=Selection(INDEX.flip(0), MASK.flip(0))).loss
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_configuration_and_weights_survive_a_file(variant: dict[str, Any]) -> None:
    aligner = build_aligner(STUDENT, TEACHER, settings(**variant, kv_loss="l1", kv_parts="v"))
    randomise(aligner)
    file = io.BytesIO()
    torch.save({"config": aligner_config_dict(aligner), "state_dict": aligner.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = aligner_from_config_dict(saved["config"])
    again.load_state_dict(saved["state_dict"])
    assert aligner_config_dict(again) == aligner_config_dict(aligner)
    arguments = dict(
        student=states(STUDENT, 1, dtype=torch.float32),
        teacher=states(TEACHER, 2, dtype=torch.float32),
        selection=Selection(INDEX, MASK),
    )
    assert torch.equal(again(**arguments).loss, aligner(**arguments).loss)
    assert any(name.endswith("statistics.mean") for name in saved["state_dict"])


def test_seed_decides_the_start() -> None:
    def start(seed: int) -> Tensor:
        cfg = aligner_config_dict(build_aligner(STUDENT, TEACHER, settings()))
        cfg["settings"]["seed"] = seed
        return aligner_from_config_dict(cfg).parts["key"].dim_proj  # type: ignore[index, union-attr]

    assert torch.equal(start(1), start(1)) and not torch.equal(start(1), start(2))


@pytest.mark.parametrize("mode", ["flat", "structured"])
def test_start_keeps_the_variance_of_its_input(mode: str) -> None:
    """Unit-variance rows, whatever the widths, come out with about unit variance where a map does not mix heads."""
    for dims in ((4, 4), (3, 8), (8, 3)):
        shapes = [KVShape(1, 1, d, 1) for d in dims]
        aligner: Any = build_aligner(*shapes, settings(alignment_mode=mode))
        part = aligner.parts["key"]
        weight = part.weight[0] if mode == "flat" else part.dim_proj[0, 0]
        assert float(weight.square().sum()) == pytest.approx(dims[1], rel=1e-4)


def test_mask_of_groups_is_the_group_slices() -> None:
    part: Any = build_aligner(STUDENT, TEACHER, settings(layer_groups=2)).parts["key"]  # type: ignore[index, union-attr]
    mix = part.layer_mix()
    for g, (y, x) in enumerate(zip(group_slices(4, 2), group_slices(3, 2), strict=True)):
        outside = copy.deepcopy(mix.detach()[y])
        outside[:, x] = 0
        assert float(outside.abs().sum()) == 0, g
    torch.testing.assert_close(mix.sum(1), torch.ones(4))


def test_selection_of_a_micro_batch_that_is_padding_alone() -> None:
    nothing = torch.zeros(2, 5, dtype=torch.int64)
    attention = torch.tensor([[1, 0, 0, 0, 0]] * 2)
    selection = select_tokens("full", None, nothing, attention)
    aligner = build_aligner(STUDENT, TEACHER, settings())
    found = aligner(
        student=with_gradient(states(STUDENT, 1, dtype=torch.float32)),
        teacher=states(TEACHER, 2, dtype=torch.float32),
        selection=selection,
    )
    assert float(found.loss.detach()) == 0 and found.loss.requires_grad
