"""Token-token relations equal loops over heads and tokens; padding, batch companions and chunks change nothing."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kvds.align import aligner_config_dict, aligner_from_config_dict, build_aligner
from kvds.align import relation as relation_module
from kvds.align.diagnostics import describe_aligner, effective_rank, parameter_counts, save_heatmaps
from kvds.align.fitting import fit_aligner
from kvds.config.settings import AlignmentSettings
from kvds.errors import InputError
from kvds.kv import KVShape, KVStates, Selection

# Other head counts and dimensions on either side; by default two relation heads, of 6 and of 10 dimensions.
STUDENT, TEACHER = KVShape(3, 2, 6, 2), KVShape(5, 4, 5, 4)
SELECTION = Selection(
    torch.tensor([[0, 2, 3, 5], [1, 2, 4, 5]]), torch.tensor([[False, True, True, True], [True, True, False, False]])
)
PENALTIES = {"mse": lambda r: r * r, "l1": abs, "smooth_l1": lambda r: r * r / 2 if abs(r) < 1 else abs(r) - 0.5}


def settings(**changes) -> AlignmentSettings:
    return AlignmentSettings(alignment_mode="relation", **changes)


def random_states(shape: KVShape, seed: int, *, batch: int = 2, tokens: int = 6, dtype=torch.float64) -> KVStates:
    generator = torch.Generator().manual_seed(seed)

    def layers() -> tuple[Tensor, ...]:
        size = batch, tokens, shape.num_key_value_heads, shape.head_dim  # strides as captured
        made = [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(shape.num_hidden_layers)]
        return tuple((0.5 + layer).to(dtype).transpose(1, 2) for layer in made)

    return KVStates(layers(), layers())


def with_grad(states: KVStates) -> KVStates:
    return KVStates(*(tuple(layer.detach().clone().requires_grad_() for layer in part) for part in states))


def randomised(aligner):
    generator = torch.Generator().manual_seed(3)
    aligner.double()
    with torch.no_grad():
        for name, tensor in aligner.state_dict().items():
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(values.abs() + 0.5 if name.endswith("scale") else values)
    return aligner


def slow_loss(aligner, student: KVStates, teacher: KVStates) -> Tensor:
    """Token by token, from the equations of the module and the parameters by their names."""
    chosen = aligner.settings
    parts = []
    for name, part in aligner.parts.items():
        own = part.state_dict(keep_vars=True)
        xs, ys = getattr(student, f"{name}s"), getattr(teacher, f"{name}s")
        losses = []
        for i in range(5 if chosen.layer_map == "learned" else 3):
            if chosen.layer_map == "learned":
                weights, target = own["layer_logits"][i].exp() / own["layer_logits"][i].exp().sum(), ys[i]
            else:
                weights, target = F.one_hot(torch.tensor(i), 3), ys[(0, 2, 4)[i]]
            mixed = sum(w * layer for w, layer in zip(weights, xs, strict=True))
            if chosen.relation_units == "standard":
                mixed = (mixed - own["source_mean"][i][:, None]) / own["source_scale"][i]
                target = (target - own["target_mean"][i][:, None]) / own["target_scale"][i]
            rows = []
            for b, a in itertools.product(range(2), range(chosen.relation_heads or 2)):
                pieces = []
                for side in (mixed, target):
                    tokens = [side[b, :, SELECTION.index[b, m]].flatten() for m in range(4) if SELECTION.mask[b, m]]
                    pieces.append([token.chunk(chosen.relation_heads or 2)[a] for token in tokens])
                rows += slow_rows(*pieces, chosen)
            losses.append(torch.stack(rows).mean())
        parts.append(torch.stack(losses).mean())
    return torch.stack(parts).mean()


def slow_rows(ours: list[Tensor], wanted: list[Tensor], chosen: AlignmentSettings) -> list[Tensor]:
    """The distance of each token's relations to all tokens of its row."""
    found = []
    for t in range(len(ours)):
        if chosen.relation_kind == "softmax":
            p, q = (
                torch.stack([torch.exp(side[t] @ other / math.sqrt(len(other))) for other in side])
                for side in (wanted, ours)
            )
            p, q = p / p.sum(), q / q.sum()
            found.append((p * (p / q).log()).sum())
        else:
            differences = [
                F.cosine_similarity(ours[t], ours[u], dim=0) - F.cosine_similarity(wanted[t], wanted[u], dim=0)
                for u in range(len(ours))
            ]
            found.append(torch.stack([PENALTIES[chosen.kv_loss](d) for d in differences]).mean())
    return found


CASES = [
    {"layer_map": layer_map, "relation_units": units, "relation_heads": heads, **kind}
    for layer_map, units, heads in itertools.product(("learned", "endpoint"), ("standard", "raw"), (None, 1))
    for kind in ({}, *({"relation_kind": "cosine", "kv_loss": loss} for loss in PENALTIES))
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_loss_and_gradients_equal_loops(case):
    aligner = randomised(build_aligner(STUDENT, TEACHER, settings(**case)))
    student, teacher = with_grad(random_states(STUDENT, 1)), with_grad(random_states(TEACHER, 2))
    variables = [*aligner.parameters(), *student.keys, *student.values]
    found, expected = aligner(student, teacher, SELECTION), slow_loss(aligner, student, teacher.detach())
    torch.testing.assert_close(found.loss, expected, rtol=1e-11, atol=0)
    torch.testing.assert_close((found.key_loss + found.value_loss) / 2, found.loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.key_layers.mean(), found.key_loss, rtol=1e-12, atol=0)
    found.loss.backward()
    assert all(layer.grad is None for layer in (*teacher.keys, *teacher.values))
    for variable, other in zip(variables, torch.autograd.grad(expected, variables, allow_unused=True), strict=True):
        torch.testing.assert_close(
            variable.grad, torch.zeros_like(variable) if other is None else other, rtol=1e-8, atol=1e-12
        )


def test_value_by_hand():
    # One head of one dimension, tokens 1 and 2 of the teacher, 0 and 0 of the student: q = 1/2 everywhere.
    shape = KVShape(1, 1, 1, 1)
    aligner = build_aligner(shape, shape, settings(kv_parts="v", layer_map="endpoint", relation_units="raw"))
    student, teacher = torch.zeros(1, 1, 2, 1), torch.tensor([1.0, 2.0]).view(1, 1, 2, 1)
    loss = aligner(
        KVStates((student,), (student,)), KVStates((teacher,), (teacher,)), Selection(None, torch.ones(1, 2).bool())
    )
    rows = [[1 / (1 + math.e), math.e / (1 + math.e)], [1 / (1 + math.e**2), math.e**2 / (1 + math.e**2)]]
    expected = sum(p * math.log(2 * p) for row in rows for p in row) / 2
    assert loss.loss.item() == pytest.approx(expected, rel=1e-6) and not list(aligner.parameters())


@pytest.mark.parametrize("kind", ["softmax", "cosine"])
def test_equal_relations_have_no_loss_whatever_the_rotation_and_dimension(kind):
    """A student whose heads hold the teacher's, rotated into more dimensions, relates its tokens alike."""
    teacher = random_states(KVShape(3, 2, 4, 2), 1)
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]
    scale = math.sqrt(9 / 4) ** 0.5  # the softmax divides by √d of its own side
    student = KVStates(*(tuple(F.pad(layer @ rotation * scale, (0, 5)) for layer in part) for part in teacher))
    aligner = build_aligner(
        KVShape(3, 2, 9, 2),
        KVShape(3, 2, 4, 2),
        settings(layer_map="endpoint", relation_units="raw", relation_kind=kind),
    )
    assert aligner(student, teacher, SELECTION).loss.item() == pytest.approx(0, abs=1e-12)
    other = KVStates(*(tuple(layer.flip(2) for layer in part) for part in student))
    assert aligner(other, teacher, SELECTION).loss.item() > 1e-3


@pytest.mark.parametrize("kind", ["softmax", "cosine"])
@pytest.mark.parametrize("layer_map", ["learned", "endpoint"])
def test_padding_companions_order_and_chunks_change_nothing(kind, layer_map, monkeypatch):
    aligner = randomised(build_aligner(STUDENT, TEACHER, settings(relation_kind=kind, layer_map=layer_map)))
    student, teacher = with_grad(random_states(STUDENT, 1)), random_states(TEACHER, 2)
    mask = torch.tensor([[False, True, True, True, True, False], [True, True, True, False, False, False]])
    loss = aligner(student, teacher, Selection(None, mask)).loss
    gradients = torch.autograd.grad(loss, [*aligner.parameters(), *student.keys, *student.values])

    def changed(states: KVStates) -> KVStates:
        """NaN under the mask, more padding, the samples the other way round and a third of padding alone."""

        def layer(tensor: Tensor) -> Tensor:
            tensor = torch.where(mask[:, None, :, None], tensor.detach(), torch.tensor(math.nan, dtype=tensor.dtype))
            tensor = F.pad(tensor, (0, 0, 0, 3), value=math.inf).flip(0)
            return torch.cat([tensor, torch.full_like(tensor[:1], math.nan)])

        return KVStates(*(tuple(layer(tensor) for tensor in part) for part in states))

    other = with_grad(changed(student))
    wider = torch.cat([F.pad(mask, (0, 3)).flip(0), torch.zeros(1, 9, dtype=torch.bool)])
    for elements in (2**26, 2 * 81, 1):  # all at once, one row and one head, and no less than that
        monkeypatch.setattr(relation_module, "_CHUNK_ELEMENTS", elements)
        again = aligner(other, changed(teacher), Selection(None, wider)).loss
        torch.testing.assert_close(again, loss, rtol=1e-12, atol=0)
        found = torch.autograd.grad(again, [*aligner.parameters(), *other.keys, *other.values])
        parameters = len(list(aligner.parameters()))
        for one, two in zip(found[:parameters], gradients[:parameters], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-13)
        for one, two in zip(found[parameters:], gradients[parameters:], strict=True):
            torch.testing.assert_close(one[:2].flip(0)[:, :, :6], two, rtol=1e-9, atol=1e-13)
            assert not one[2].any() and not one[:, :, 6:].any()
    # Each row on its own: the loss is the mean of the rows' own, weighed by their tokens.
    alone = [
        aligner(*(KVStates(*(tuple(t[b : b + 1] for t in part) for part in side)) for side in (student, teacher)),
                Selection(None, mask[b : b + 1])).loss for b in (0, 1)
    ]  # fmt: skip
    torch.testing.assert_close((4 * alone[0] + 3 * alone[1]) / 7, loss, rtol=1e-12, atol=0)
    whole = torch.zeros(2, 6, dtype=torch.bool).scatter(1, SELECTION.index, SELECTION.mask)
    torch.testing.assert_close(
        aligner(student, teacher, SELECTION).loss, aligner(student, teacher, Selection(None, whole)).loss
    )


@pytest.mark.parametrize("kind", ["softmax", "cosine"])
@pytest.mark.parametrize("layer_map", ["learned", "endpoint"])
def test_an_empty_mask_gives_zero_with_a_graph_through_everything_trained(kind, layer_map):
    aligner = build_aligner(STUDENT, TEACHER, settings(relation_kind=kind, layer_map=layer_map))
    student = with_grad(random_states(STUDENT, 1, dtype=torch.float32))
    teacher = random_states(TEACHER, 2, dtype=torch.float32)
    loss = aligner(student, teacher, Selection(None, torch.zeros(2, 6, dtype=torch.bool))).loss
    loss.backward()
    assert loss.item() == 0
    for tensor in (*aligner.parameters(), *student.keys, *student.values):
        assert tensor.grad is not None and not tensor.grad.any()


@pytest.mark.parametrize("kind", ["softmax", "cosine"])
def test_gradients_pass_gradcheck(kind):
    shapes = KVShape(2, 2, 2, 2), KVShape(3, 2, 3, 2)
    aligner = randomised(build_aligner(*shapes, settings(relation_kind=kind, kv_parts="v")))
    student, teacher = random_states(shapes[0], 1, batch=1, tokens=4), random_states(shapes[1], 2, batch=1, tokens=4)
    selection = Selection(None, torch.tensor([[True, False, True, True]]))

    def loss(first: Tensor, second: Tensor, logits: Tensor) -> Tensor:
        states = KVStates(student.keys, (first, second))
        parameters = {"parts.value.layer_logits": logits}
        return torch.func.functional_call(aligner, parameters, (states, teacher, selection)).loss

    inputs = [*(v.detach().clone() for v in student.values), aligner.parts["value"].layer_logits.detach().clone()]
    assert torch.autograd.gradcheck(loss, [tensor.requires_grad_() for tensor in inputs])


def test_statistics_are_measured_once_on_both_sides_and_scale_is_no_matter():
    aligner = build_aligner(STUDENT, TEACHER, settings(layer_map="endpoint")).double()
    student, teacher = random_states(STUDENT, 1), random_states(TEACHER, 2)
    mask = torch.ones(2, 6, dtype=torch.bool)
    fit_aligner(aligner, [(student, teacher, Selection(None, mask))])
    part = aligner.parts["key"]
    for i, layer in enumerate((0, 2, 4)):
        for states, mean, scale in (
            (student.keys[i], part.source_mean, part.source_scale),
            (teacher.keys[layer], part.target_mean, part.target_scale),
        ):
            rows = states.transpose(1, 2).flatten(0, 1).numpy()
            np.testing.assert_allclose(mean[i].numpy(), rows.mean(0), rtol=1e-12)
            np.testing.assert_allclose(scale[i].item(), np.sqrt(rows.var(0).mean()), rtol=1e-12)
    # A constant offset and another size of the teacher's keys are taken out; raw relations drown in them.
    moved = KVStates(tuple(100 + 7 * layer for layer in teacher.keys), teacher.values)
    other = build_aligner(STUDENT, TEACHER, settings(layer_map="endpoint")).double()
    fit_aligner(other, [(student, moved, Selection(None, mask))])
    before, after = (a(student, t, Selection(None, mask)).loss for a, t in ((aligner, teacher), (other, moved)))
    torch.testing.assert_close(after, before, rtol=1e-9, atol=0)


def test_bf16_states_are_compared_in_fp32():
    aligner = build_aligner(STUDENT, TEACHER, settings())
    student, teacher = (random_states(s, i, dtype=torch.bfloat16) for i, s in enumerate((STUDENT, TEACHER)))
    exact = aligner(*(KVStates(*(tuple(t.float() for t in p) for p in side)) for side in (student, teacher)), SELECTION)
    found = aligner.bfloat16()(student, teacher, SELECTION)
    assert found.loss.dtype == torch.float32 and aligner.parts["key"].source_mean.dtype == torch.float32
    torch.testing.assert_close(found.loss, exact.loss, rtol=2e-2, atol=0)  # bf16 layer logits


@pytest.mark.parametrize("kind", ["softmax", "cosine"])
def test_a_student_of_free_tensors_keeps_norm_and_rank(kind):
    shape = KVShape(2, 2, 4, 2)
    teacher, student = (random_states(shape, seed, batch=4, tokens=24, dtype=torch.float32) for seed in (0, 1))
    student = with_grad(student)
    everything = Selection(None, torch.ones(4, 24, dtype=torch.bool))
    aligner = build_aligner(shape, shape, settings(relation_kind=kind))
    fit_aligner(aligner, [(student.detach(), teacher, everything)])
    optimizer = torch.optim.Adam([*student.keys, *student.values, *aligner.parameters()], lr=3e-2)

    def size_and_rank() -> tuple[float, float]:
        rows = student.keys[0].detach().transpose(1, 2).reshape(-1, 8)
        return float(rows.norm()), float(effective_rank(rows))

    (norm, rank), losses = size_and_rank(), []
    for _ in range(150):
        optimizer.zero_grad()
        loss = aligner(student, teacher, everything).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    after = size_and_rank()
    assert losses[-1] < 0.3 * losses[0]
    assert after[0] > 0.5 * norm and after[1] > 0.8 * rank


@pytest.mark.parametrize("layer_map", ["learned", "endpoint"])
def test_it_is_saved_profiled_and_counted_as_every_aligner(layer_map, tmp_path):
    aligner = build_aligner(STUDENT, TEACHER, settings(layer_map=layer_map, relation_heads=2))
    again = aligner_from_config_dict(aligner_config_dict(aligner))
    again.load_state_dict(aligner.state_dict())
    states = random_states(STUDENT, 1, dtype=torch.float32), random_states(TEACHER, 2, dtype=torch.float32)
    assert torch.equal(again(*states, SELECTION).loss, aligner(*states, SELECTION).loss)
    description = describe_aligner(aligner)
    assert parameter_counts(STUDENT, TEACHER, aligner.settings)["relation"] == description["parameters"]
    assert save_heatmaps(aligner, tmp_path / "aligner.png").stat().st_size > 1000


def test_settings_that_cannot_serve_are_explained():
    for changes, message in (
        ({"relation_heads": 5}, r"relation_heads=5: .*student \(12\) and of the teacher \(20\), such as 4"),
        ({"direction": "teacher_to_student"}, "direction=teacher_to_student: expected student_to_teacher"),
        ({"map_start": "ridge"}, "map_start=ridge: expected auto or random with --alignment_mode relation"),
        ({"layer_groups": 2}, "layer_groups=2: expected 1"),
    ):
        with pytest.raises(InputError, match=message):
            build_aligner(STUDENT, TEACHER, settings(**changes))
