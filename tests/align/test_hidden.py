"""Hidden-state matching is the flat alignment on hidden states: against loops, and as a mode of its own."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kvds.align import HiddenAligner, aligner_config_dict, aligner_from_config_dict, build_aligner
from kvds.align.diagnostics import describe_aligner, parameter_counts, save_heatmaps
from kvds.align.fitting import fit_aligner
from kvds.config.settings import AlignmentSettings
from kvds.errors import InputError
from kvds.kv import HiddenStates, KVShape, Selection

STUDENT, TEACHER = KVShape(3, 2, 3, 2, hidden_size=4), KVShape(5, 4, 4, 4, hidden_size=6)
PENALTIES = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}
MASK = torch.tensor([[False, True, True, True, True, False], [True, True, True, False, False, False]])
SELECTION = Selection(
    torch.tensor([[0, 2, 3, 5], [1, 2, 4, 5]]), torch.tensor([[False, True, True, True], [True, True, False, False]])
)


def settings(**changes) -> AlignmentSettings:
    return AlignmentSettings(alignment_mode="hidden", **changes)


def random_states(shape: KVShape, seed: int, dtype=torch.float64) -> HiddenStates:
    generator = torch.Generator().manual_seed(seed)
    size = 2, 1, 6, shape.hidden_size
    layers = [3 + torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(shape.num_hidden_layers)]
    return HiddenStates(tuple(layer.to(dtype) for layer in layers))


def randomised(aligner: HiddenAligner) -> HiddenAligner:
    generator = torch.Generator().manual_seed(3)
    aligner.double()
    with torch.no_grad():
        for name, tensor in aligner.state_dict().items():
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(values.abs() + 0.5 if name.endswith("scale") else values)
    return aligner


def slow_loss(aligner: HiddenAligner, student: HiddenStates, teacher: HiddenStates) -> Tensor:
    """Token by token and layer by layer, from the parameters by their names."""
    chosen, own = aligner.settings, aligner.parts["hidden_state"].state_dict(keep_vars=True)
    to_teacher = chosen.direction == "student_to_teacher"
    xs, ys = (side.hidden_states for side in ((student, teacher) if to_teacher else (teacher, student)))
    ends = {0: 0, 1: 2, 2: 4}  # the endpoint map of 3 on 5 layers
    losses = []
    for i in range(len(ys) if chosen.layer_map == "learned" else 3):
        if chosen.layer_map == "learned":
            weights, target = own["layer_logits"][i].exp() / own["layer_logits"][i].exp().sum(), ys[i]
        else:
            weights, target = (
                F.one_hot(torch.tensor(i if to_teacher else ends[i]), len(xs)),
                ys[ends[i] if to_teacher else i],
            )
        elements = []
        for b, m in itertools.product(range(2), range(4)):
            if SELECTION.mask[b, m]:
                t = SELECTION.index[b, m]
                x = sum(w * layer[b, 0, t] for w, layer in zip(weights, xs, strict=True))
                matrix = own["weight"] if chosen.map_proj_share_dim else own["weight"][i]
                projected = own["target_scale"][i] * (x / own["source_scale"][i] @ matrix + own["bias"][i])
                elements.append((projected + own["target_mean"][i, 0] - target[b, 0, t]) / own["target_scale"][i])
        residual = torch.stack(elements)
        losses.append(PENALTIES[chosen.kv_loss](residual, torch.zeros_like(residual)))
    return torch.stack(losses).mean()


CASES = [
    {"layer_map": layer_map, "map_proj_share_dim": share, "kv_loss": loss, "direction": direction}
    for layer_map, share, direction in itertools.product(
        ("learned", "endpoint"), (False, True), ("student_to_teacher", "teacher_to_student")
    )
    for loss in (PENALTIES if layer_map == "learned" and not share else ("mse",))
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_loss_and_gradients_equal_loops(case):
    aligner = randomised(build_aligner(STUDENT, TEACHER, settings(**case)))
    student, teacher = random_states(STUDENT, 1), random_states(TEACHER, 2)
    variables = [*(layer.requires_grad_() for layer in student.hidden_states), *aligner.parameters()]
    found, expected = aligner(student, teacher, SELECTION), slow_loss(aligner, student, teacher)
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=0)
    assert found.key_loss is None and found.value_loss is None
    pairs = zip(torch.autograd.grad(found.loss, variables), torch.autograd.grad(expected, variables), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_the_default_is_a_learned_mix_near_the_diagonal_towards_the_teacher():
    aligner = build_aligner(STUDENT, TEACHER, settings())
    part = aligner.parts["hidden_state"]
    assert list(aligner.parts) == ["hidden_state"] and aligner.settings.layer_map == "learned"
    assert part.layer_mix().argmax(1).tolist() == [0, 0, 1, 1, 2] or part.layer_mix().argmax(1)[[0, 2, 4]].tolist() == [
        0, 1, 2,
    ]  # fmt: skip
    assert part.weight.shape == (5, 4, 6) and part.bias.shape == (5, 6)
    assert (aligner.reads, aligner.teacher_reads) == ("hidden", "hidden")


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("start", ["random", "pca", "procrustes", "ridge"])
def test_statistics_and_starts_come_from_the_fixed_side(start, share):
    aligner = build_aligner(STUDENT, TEACHER, settings(map_start=start, map_proj_share_dim=share)).double()
    student, teacher = random_states(STUDENT, 1), random_states(TEACHER, 2)
    fit_aligner(aligner, [(student, teacher, Selection(None, MASK))])
    part = aligner.parts["hidden_state"]
    for i, layer in enumerate(teacher.hidden_states):
        rows = layer[:, 0].numpy()[MASK.numpy()]
        np.testing.assert_allclose(part.target_mean[i, 0].numpy(), rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(part.target_scale[i].item(), np.sqrt(rows.var(0).mean()), rtol=1e-12)
    loss = aligner(student, teacher, Selection(None, MASK)).loss
    [gradient] = torch.autograd.grad(loss, [part.bias])
    assert gradient.abs().max() < 1e-9  # the residual starts with mean zero
    broken = HiddenStates((*teacher.hidden_states[:4], teacher.hidden_states[4] * float("nan")))
    with pytest.raises(InputError, match="the teacher's hidden states are not finite"):
        fit_aligner(aligner, [(student, broken, Selection(None, MASK))])


def test_what_lies_under_the_mask_does_not_matter_and_an_empty_one_keeps_the_graph():
    aligner = build_aligner(STUDENT, TEACHER, settings())
    student, teacher = (random_states(shape, seed, torch.float32) for seed, shape in ((1, STUDENT), (2, TEACHER)))
    dirty = HiddenStates(tuple(layer.masked_fill(~MASK[:, None, :, None], float("nan")) for layer in teacher[0]))
    expected = aligner(student, teacher, Selection(None, MASK)).loss
    assert torch.equal(aligner(student, dirty, Selection(None, MASK)).loss, expected)
    for layer in student.hidden_states:
        layer.requires_grad_()
    loss = aligner(student, teacher, Selection(None, torch.zeros_like(MASK))).loss
    loss.backward()
    assert loss.item() == 0 and all(p.grad is not None and not p.grad.any() for p in aligner.parameters())


@pytest.mark.parametrize("share", [False, True])
def test_it_is_saved_profiled_and_counted_as_every_aligner(share, tmp_path):
    aligner = build_aligner(STUDENT, TEACHER, settings(map_proj_share_dim=share))
    again = aligner_from_config_dict(aligner_config_dict(aligner))
    again.load_state_dict(aligner.state_dict())
    states = random_states(STUDENT, 1, torch.float32), random_states(TEACHER, 2, torch.float32)
    assert torch.equal(again(*states, SELECTION).loss, aligner(*states, SELECTION).loss)
    description = describe_aligner(aligner)
    counts = parameter_counts(STUDENT, TEACHER, aligner.settings)
    assert counts["hidden, share_dim" if share else "hidden"] == description["parameters"]
    assert save_heatmaps(aligner, tmp_path / "aligner.png").stat().st_size > 1000


def test_settings_and_widths_that_cannot_serve_are_explained():
    for changes, message in (
        ({"kv_parts": "v"}, "kv_parts=v: expected auto or kv with --alignment_mode hidden"),
        ({"head_groups": 2}, "head_groups=2: expected 1 with --alignment_mode hidden"),
    ):
        with pytest.raises(InputError, match=message):
            build_aligner(STUDENT, TEACHER, settings(**changes))
    with pytest.raises(InputError, match="hidden_size=0"):
        build_aligner(dataclasses.replace(STUDENT, hidden_size=0), TEACHER, settings())
    aligner = build_aligner(STUDENT, TEACHER, settings())
    with pytest.raises(InputError, match="student: its first batch has 5 layers × 6 hidden dimensions; expected 3 × 4"):
        aligner(random_states(TEACHER, 1), random_states(TEACHER, 2), SELECTION)
