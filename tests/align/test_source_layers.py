"""Several source layers side by side for each target layer: which ones, their map, its start."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvds.align import build_aligner
from kvds.align.fitting import fit_aligner
from kvds.align.layer_map import nearest_layers
from kvds.errors import InputError
from kvds.kv import KVShape, KVStates, Selection
from tests.harness.kv_settings import both_parts

STUDENT, TEACHER = KVShape(4, 2, 3, 2), KVShape(6, 2, 5, 4)
MASK = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) > 0.3


def states(shape: KVShape, seed: int) -> KVStates:
    draw = torch.Generator().manual_seed(seed)
    size = (3, shape.num_key_value_heads, 40, shape.head_dim)
    layers = [torch.randn(size, generator=draw, dtype=torch.float64) for _ in range(2 * shape.num_hidden_layers)]
    return KVStates(tuple(layers[::2]), tuple(layers[1::2]))


def test_the_nearest_layers_are_a_window_that_stays_inside() -> None:
    assert [list(nearest_layers(i, 3, 5)) for i in range(5)] == [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]
    assert [list(nearest_layers(i, 2, 4)) for i in range(4)] == [[0, 1], [0, 1], [1, 2], [2, 3]]
    assert [list(nearest_layers(i, 1, 3)) for i in range(3)] == [[0], [1], [2]]
    assert list(nearest_layers(2, 4, 4)) == [0, 1, 2, 3]


@pytest.mark.parametrize("direction", ["student_to_teacher", "teacher_to_student"])
def test_the_loss_is_that_of_a_map_from_each_of_them(direction: str) -> None:
    settings = both_parts(alignment_mode="flat", kv_parts="v", source_layers_per_target=3, direction=direction)
    aligner = build_aligner(STUDENT, TEACHER, settings).double()
    part: Any = aligner.parts["value"]
    for tensor in (*part.parameters(), *part.buffers()):
        with torch.no_grad():
            tensor += 0.2 * torch.rand(tensor.shape, generator=torch.Generator().manual_seed(3), dtype=tensor.dtype)
    both = states(STUDENT, 1), states(TEACHER, 2)
    leaves = [*both[0].values, *part.parameters()]
    for leaf in leaves:
        leaf.requires_grad_()
    found = aligner(*both, Selection(None, MASK))
    windows = {0: [0, 1, 2], 1: [0, 1, 2], 2: [1, 2, 3], 3: [1, 2, 3]}  # around each of the student's layers
    if direction == "teacher_to_student":
        windows = {0: [0, 1, 2], 1: [1, 2, 3], 2: [2, 3, 4], 3: [3, 4, 5]}  # its pairs are 0-0, 1-2, 2-3, 3-5
    source, target = both if direction == "student_to_teacher" else both[::-1]
    meets = [0, 2, 3, 5] if direction == "student_to_teacher" else [0, 1, 2, 3]
    expected, unit = [], part.target_scale
    for i, layer in enumerate(meets):
        rows = [source.values[drawn].transpose(1, 2).flatten(2)[MASK] for drawn in windows[i]]
        width = rows[0].shape[1]
        mapped = sum(row @ part.weight[i][place * width : (place + 1) * width] for place, row in enumerate(rows))
        wanted = (target.values[layer].transpose(1, 2).flatten(2)[MASK] - part.target_mean[i].flatten()) / unit[i]
        expected.append((mapped / part.source_scale[i] + part.bias[i] - wanted).square().mean())
    torch.testing.assert_close(found.value_layers, torch.stack(expected).detach(), rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(loss, leaves) for loss in (found.loss, torch.stack(expected).mean())]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-12)


def test_a_closed_form_start_finds_what_lies_in_the_layers_beside() -> None:
    student, draw = states(STUDENT, 1), torch.Generator().manual_seed(4)
    mixes = torch.randn(6, 4, 6, 10, generator=draw, dtype=torch.float64)
    flat = [layer.transpose(1, 2).flatten(2) for layer in student.values]
    made = []
    for layer, mix in enumerate(mixes):  # of the layers around the one at its depth
        near = nearest_layers(min(3, round(layer * 3 / 5)), 3, 4)
        made.append(sum(flat[i] @ mix[i] for i in near).unflatten(2, (2, 5)).transpose(1, 2))  # type: ignore[union-attr]
    teacher = KVStates(tuple(made), tuple(made))
    found = {}
    for several in (1, 3):
        settings = both_parts(
            alignment_mode="flat", kv_parts="v", map_start="ridge", source_layers_per_target=several
        )  # fmt: skip
        aligner = build_aligner(STUDENT, TEACHER, settings).double()
        found[several] = fit_aligner(aligner, [(student, teacher, Selection(None, MASK))])["value"]
        loss = aligner(student, teacher, Selection(None, MASK)).value_layers
        assert loss is not None and float(loss.mean()) == pytest.approx(1 - sum(found[several]) / 4, abs=0.2)
    assert min(found[3]) > 0.99 and max(found[1]) < 0.7


def test_more_layers_than_there_are_is_told() -> None:
    with pytest.raises(InputError, match="source_layers_per_target=5: expected at most 4, the layers of the model"):
        build_aligner(STUDENT, TEACHER, both_parts(alignment_mode="flat", source_layers_per_target=5))
