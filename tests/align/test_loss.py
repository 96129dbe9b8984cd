"""The KV loss is the one of the equations: by hand, against loops, and under changes that must not matter."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kvds.align import KVAligner, build_aligner
from kvds.kv import KVShape, KVStates, Selection
from tests.harness.kv_settings import both_parts

STUDENT, TEACHER = KVShape(3, 2, 3, 2), KVShape(5, 4, 4, 4)


def random_states(shape: KVShape, seed: int, *, batch: int = 2, tokens: int = 6, dtype=torch.float64) -> KVStates:
    generator = torch.Generator().manual_seed(seed)

    def layers() -> tuple[Tensor, ...]:
        size = batch, tokens, shape.num_key_value_heads, shape.head_dim  # strides as captured
        return tuple(
            (2 + torch.randn(size, generator=generator, dtype=torch.float64)).to(dtype).transpose(1, 2)
            for _ in range(shape.num_hidden_layers)
        )

    return KVStates(layers(), layers())


def with_grad(states: KVStates) -> KVStates:
    return KVStates(*(tuple(layer.detach().clone().requires_grad_() for layer in part) for part in states))


def randomised(aligner: KVAligner, seed: int = 3) -> KVAligner:
    """Any parameters and statistics, fp64."""
    generator = torch.Generator().manual_seed(seed)
    aligner.double()
    with torch.no_grad():
        for name, tensor in aligner.state_dict().items():
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(values.abs() + 0.5 if name.endswith("scale") else values)
    return aligner


SELECTION = Selection(
    torch.tensor([[0, 2, 3, 5], [1, 2, 4, 5]]), torch.tensor([[False, True, True, True], [True, True, False, False]])
)

PENALTIES = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}


def grouped(count: int, groups: int) -> list[list[int]]:
    return [list(range(g * count // groups, (g + 1) * count // groups)) for g in range(groups)]


def slow_loss(
    aligner: KVAligner, student: KVStates, teacher: KVStates, selection: Selection
) -> tuple[Tensor, list[list[Tensor]]]:
    """The equations as loops over layers and heads, token by token gathered; parameters by their names alone."""
    settings = aligner.settings
    to_teacher = settings.direction == "student_to_teacher"
    parts: list[list[Tensor]] = []
    for name, part in aligner.parts.items():
        values = {**dict(part.named_parameters()), **dict(part.named_buffers())}
        xs, ys = (getattr(side, f"{name}s") for side in ((student, teacher) if to_teacher else (teacher, student)))
        num_students, num_teachers = len(student.keys), len(teacher.keys)
        if settings.layer_map == "learned":
            targets = list(range(len(ys)))
            weights = torch.zeros(len(ys), len(xs), dtype=torch.float64)
            groups = zip(grouped(len(ys), settings.layer_groups), grouped(len(xs), settings.layer_groups), strict=True)
            for rows, columns in groups:
                for i in rows:
                    exps = [torch.exp(values["layer_logits"][i, k]) for k in range(len(columns))]
                    for k, column in enumerate(columns):
                        weights = weights.index_put((torch.tensor(i), torch.tensor(column)), exps[k] / sum(exps))
        else:
            shift = num_teachers - num_students
            pairs = [
                (
                    i,
                    math.floor(i * (num_teachers - 1) / (num_students - 1) + 0.5)
                    if settings.layer_map == "endpoint"
                    else i + shift,
                )
                for i in range(num_students)
            ]
            targets = [t if to_teacher else s for s, t in pairs]
            weights = torch.zeros(len(pairs), len(xs), dtype=torch.float64)
            for i, (s, t) in enumerate(pairs):
                weights[i, s if to_teacher else t] = 1.0
        losses = []
        for i, target in enumerate(targets):
            x = sum(weights[i, k] * chosen_rows(layer, selection) for k, layer in enumerate(xs))  # [N, H_x, D_x]
            y = chosen_rows(ys[target], selection)  # [N, H_y, D_y]
            if settings.alignment_mode == "flat":
                projected = (
                    x.flatten(1) @ values["weight"][i] / values["source_scale"][i] + values["bias"][i]
                ).view_as(y)
            else:
                projected = structured_heads(settings, values, i, x, y)
            projected = values["target_scale"][i] * projected + values["target_mean"][i]
            residual = (projected - y) / values["target_scale"][i]
            losses.append(PENALTIES[settings.kv_loss](residual, torch.zeros_like(residual)))
        parts.append(losses)
    return torch.stack([torch.stack(losses).mean() for losses in parts]).mean(), parts


def chosen_rows(layer: Tensor, selection: Selection) -> Tensor:
    """``[N, H, D]``, one selected token after the other."""
    rows = []
    for b, m in itertools.product(*map(range, selection.mask.shape)):
        if selection.mask[b, m]:
            rows.append(layer[b, :, m if selection.index is None else int(selection.index[b, m])])
    return torch.stack(rows)


def structured_heads(settings, values: dict[str, Tensor], i: int, x: Tensor, y: Tensor) -> Tensor:
    heads = []
    for targets, sources in zip(*(grouped(side.shape[1], settings.head_groups) for side in (y, x)), strict=True):
        for j in targets:
            mix = values["head_mix"] if settings.map_proj_share_dim else values["head_mix"][i]
            mixed = sum(mix[j, k] * x[:, h] for k, h in enumerate(sources))
            matrix = values["dim_proj"] if settings.map_proj_share_dim else values["dim_proj"][i, j]
            heads.append(mixed @ matrix / values["source_scale"][i] + values["bias"][i, j])
    return torch.stack(heads, 1)


def combinations() -> list[dict[str, object]]:
    shared = {
        "direction": ("student_to_teacher", "teacher_to_student"),
        "layer_map": ("learned", "endpoint", "last_aligned"),
        "kv_loss": ("mse", "l1", "smooth_l1"),
        "kv_parts": ("kv", "k", "v"),
    }
    structured = shared | {"map_proj_share_dim": (False, True), "layer_groups": (1, 2), "head_groups": (1, 2)}
    cases = []
    for mode, choices in (("flat", shared), ("structured", structured)):
        cases += [
            {"alignment_mode": mode, **dict(zip(choices, c, strict=True))} for c in itertools.product(*choices.values())
        ]
    return cases


@pytest.mark.parametrize("case", combinations(), ids=lambda case: "-".join(str(value) for value in case.values()))
def test_loss_and_gradients_equal_loops(case):
    aligner = randomised(build_aligner(STUDENT, TEACHER, both_parts(**case)))
    student, teacher = with_grad(random_states(STUDENT, 1)), with_grad(random_states(TEACHER, 2))
    found = aligner(student, teacher, SELECTION)
    expected, parts = slow_loss(aligner, student, teacher.detach(), SELECTION)
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=1e-12)
    reported = [(found.key_loss, found.key_layers), (found.value_loss, found.value_layers)]
    kept = [pair for pair in reported if pair[0] is not None]
    assert [pair[0] is not None for pair in reported] == ["k" in case["kv_parts"], "v" in case["kv_parts"]]
    for (loss, layers), losses in zip(kept, parts, strict=True):
        torch.testing.assert_close(layers, torch.stack(losses).detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(loss, layers.mean(), rtol=1e-12, atol=1e-12)
        assert not loss.requires_grad and not layers.requires_grad

    variables = [*aligner.parameters(), *student.keys, *student.values]
    mine = torch.autograd.grad(found.loss, variables, allow_unused=True)
    theirs = torch.autograd.grad(expected, variables, allow_unused=True)
    for one, other in zip(mine, theirs, strict=True):
        zero = torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(
            one if one is not None else zero, other if other is not None else zero, rtol=1e-10, atol=1e-12
        )
    found = aligner(student, teacher, SELECTION)
    found.loss.backward()
    assert all(layer.grad is None for layer in (*teacher.keys, *teacher.values))


@pytest.mark.parametrize("mode", ["flat", "structured"])
def test_value_by_hand(mode):
    # One layer, one head, one dimension; token 1 counts: (2 · (3 · 5 / 0.5 + 0.25) + 1 − 7) / 2 = 27.25.
    shape = KVShape(1, 1, 1, 1)
    settings = both_parts(
        alignment_mode=mode, kv_parts="v", layer_map="endpoint", kv_loss="l1", map_proj_share_dim=True
    )
    aligner = build_aligner(shape, shape, settings)
    part = aligner.parts["value"]
    with torch.no_grad():
        part.projection.fill_(3.0)
        part.bias.fill_(0.25)
        part.source_scale.fill_(0.5)
        part.target_scale.fill_(2.0)
        part.target_mean.fill_(1.0)
    student, teacher = torch.tensor([9.0, 5.0]).view(1, 1, 2, 1), torch.tensor([4.0, 7.0]).view(1, 1, 2, 1)
    states = KVStates((student,), (student,)), KVStates((teacher,), (teacher,))
    loss = aligner(*states, Selection(None, torch.tensor([[False, True]])))
    assert loss.loss.item() == pytest.approx(27.25) and loss.key_loss is None and loss.key_layers is None


@pytest.mark.parametrize("direction", ["student_to_teacher", "teacher_to_student"])
@pytest.mark.parametrize("layer_map", ["learned", "endpoint", "last_aligned"])
@pytest.mark.parametrize("mode", ["flat", "structured"])
def test_student_equal_to_teacher_under_an_identity_map_has_no_loss(mode, layer_map, direction):
    aligner = build_aligner(TEACHER, TEACHER, both_parts(alignment_mode=mode, layer_map=layer_map, direction=direction))
    with torch.no_grad():
        for part in aligner.parts.values():
            part.projection.copy_(torch.eye(part.projection.shape[-1]).expand(part.projection.shape))
            if mode == "structured":
                part.head_mix.copy_(torch.eye(4).expand(part.head_mix.shape))
            if layer_map == "learned":
                part.layer_logits.copy_(1000 * torch.eye(5))
    states = random_states(TEACHER, 1, dtype=torch.float32)
    assert aligner(states, states, SELECTION).loss.item() == pytest.approx(0, abs=1e-12)


def test_a_constant_offset_of_the_teachers_keys_is_taken_out_by_the_mean():
    aligner = build_aligner(STUDENT, TEACHER, both_parts(kv_parts="k"))
    student, teacher = (random_states(shape, 1, dtype=torch.float32) for shape in (STUDENT, TEACHER))
    before = aligner(student, teacher, SELECTION).loss
    offset = 16 * torch.randint(-9, 9, (5, 4, 4)).float()  # exact in fp32 sums
    moved = KVStates(tuple(k + o[None, :, None] for k, o in zip(teacher.keys, offset, strict=True)), teacher.values)
    aligner.parts["key"].target_mean.add_(offset)
    torch.testing.assert_close(aligner(student, moved, SELECTION).loss, before, rtol=1e-4, atol=0)


CASES = [
    {"alignment_mode": mode, "direction": direction, "layer_map": layer_map}
    for mode in ("flat", "structured")
    for direction in ("student_to_teacher", "teacher_to_student")
    for layer_map in ("learned", "endpoint")
]


@pytest.mark.parametrize("case", CASES)
def test_what_lies_under_the_mask_and_the_order_of_samples_do_not_matter(case):
    aligner = randomised(build_aligner(STUDENT, TEACHER, both_parts(**case)))
    student, teacher = with_grad(random_states(STUDENT, 1)), random_states(TEACHER, 2)
    mask = torch.tensor([[False, True, True, True, True, False], [True, True, True, False, False, False]])
    loss = aligner(student, teacher, Selection(None, mask)).loss
    gradients = torch.autograd.grad(loss, [*aligner.parameters(), *student.keys, *student.values])

    def changed(states: KVStates) -> KVStates:
        """Other padding, more of it, and the samples the other way round."""

        def layer(tensor: Tensor) -> Tensor:
            tensor = torch.where(mask[:, None, :, None], tensor.detach(), torch.tensor(math.nan, dtype=tensor.dtype))
            return F.pad(tensor, (0, 0, 0, 3), value=math.inf).flip(0)

        return KVStates(*(tuple(layer(tensor) for tensor in part) for part in states))

    other = with_grad(changed(student))
    again = aligner(other, changed(teacher), Selection(None, F.pad(mask, (0, 3)).flip(0))).loss
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=0)
    parameters = len(list(aligner.parameters()))
    found = torch.autograd.grad(again, [*aligner.parameters(), *other.keys, *other.values])
    for one, two in zip(found[:parameters], gradients[:parameters], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
    for one, two in zip(found[parameters:], gradients[parameters:], strict=True):
        torch.testing.assert_close(one.flip(0)[:, :, :6], two, rtol=1e-9, atol=1e-12)
        assert not one[:, :, 6:].any() and not two[~mask[:, None].expand(-1, 2, -1)].any()


@pytest.mark.parametrize("case", CASES)
def test_an_index_selects_the_same_as_a_mask(case):
    aligner = randomised(build_aligner(STUDENT, TEACHER, both_parts(**case)))
    student, teacher = random_states(STUDENT, 1), random_states(TEACHER, 2)
    mask = torch.zeros(2, 6, dtype=torch.bool).scatter(1, SELECTION.index, SELECTION.mask)
    whole = aligner(student, teacher, Selection(None, mask))
    chosen = aligner(student, teacher, SELECTION)
    torch.testing.assert_close(whole.loss, chosen.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(whole.value_layers, chosen.value_layers, rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_an_empty_mask_gives_zero_with_a_graph_through_everything_trained(case):
    aligner = build_aligner(STUDENT, TEACHER, both_parts(**case))
    student, teacher = (
        with_grad(random_states(STUDENT, 1, dtype=torch.float32)),
        random_states(TEACHER, 2, dtype=torch.float32),
    )
    loss = aligner(student, teacher, Selection(None, torch.zeros(2, 6, dtype=torch.bool))).loss
    assert loss.item() == 0
    loss.backward()
    # Ranks must reduce the same tensors: a gradient that is zero, not one that is missing.
    for tensor in (*aligner.parameters(), *student.keys, *student.values):
        assert tensor.grad is not None and not tensor.grad.any()


@pytest.mark.parametrize("case", CASES)
def test_gradients_pass_gradcheck(case):
    shapes = KVShape(2, 2, 2, 2), KVShape(3, 2, 3, 2)
    aligner = randomised(build_aligner(*shapes, both_parts(**case, kv_parts="v", map_proj_share_dim=True)))
    student, teacher = random_states(shapes[0], 1, batch=1, tokens=3), random_states(shapes[1], 2, batch=1, tokens=3)
    selection = Selection(None, torch.tensor([[True, False, True]]))
    names = [name for name, _ in aligner.named_parameters()]

    def loss(*tensors: Tensor) -> Tensor:
        values = tensors[: len(shapes[0:1]) * 2]
        parameters = dict(zip(names, tensors[2:], strict=True))
        states = KVStates(student.keys, values)
        return torch.func.functional_call(aligner, parameters, (states, teacher, selection)).loss

    inputs = [*(v.detach().clone() for v in student.values), *(p.detach().clone() for p in aligner.parameters())]
    assert torch.autograd.gradcheck(loss, [tensor.requires_grad_() for tensor in inputs])


@pytest.mark.parametrize("case", CASES)
def test_bf16_states_and_parameters_give_an_fp32_loss_of_fp32_residuals(case):
    aligner = build_aligner(STUDENT, TEACHER, both_parts(**case, map_proj_share_dim=True))
    student, teacher = (random_states(shape, 1, dtype=torch.bfloat16) for shape in (STUDENT, TEACHER))
    offset = torch.tensor(100.0)
    with torch.no_grad():
        for part in aligner.parts.values():
            part.target_mean.fill_(100.3 if part.to_teacher else 0.0)
            for parameter in part.parameters():
                parameter.copy_(parameter.bfloat16())
    shifted = KVStates(*(tuple((t + offset).bfloat16() for t in part) for part in teacher))
    exact = aligner(
        *(KVStates(*(tuple(t.float() for t in part) for part in side)) for side in (student, shifted)), SELECTION
    ).loss
    aligner.bfloat16()
    assert aligner.parts["key"].target_mean.dtype == torch.float32
    assert {parameter.dtype for parameter in aligner.parameters()} == {torch.bfloat16}
    found = aligner(with_grad(student), shifted, SELECTION).loss
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=0)


def test_frozen_maps_still_send_gradients_to_the_student():
    for mode, direction in itertools.product(("flat", "structured"), ("student_to_teacher", "teacher_to_student")):
        settings = both_parts(alignment_mode=mode, direction=direction, aligner_update="frozen", map_start="pca")
        aligner = build_aligner(STUDENT, TEACHER, settings)
        student = with_grad(random_states(STUDENT, 1, dtype=torch.float32))
        aligner(student, random_states(TEACHER, 2, dtype=torch.float32), SELECTION).loss.backward()
        assert not [p for p in aligner.parameters() if p.requires_grad or p.grad is not None]
        assert len(list(aligner.parameters())) and all(v.grad is not None and v.grad.any() for v in student.values)
