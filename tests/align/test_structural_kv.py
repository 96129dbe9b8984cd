"""Cosine and attention losses equal loops over tokens; targets are constants; padding and selection change nothing."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config, Qwen3Config

from kvds.align import StructuralKVLoss, aligner_config_dict, aligner_from_config_dict, build_aligner
from kvds.align.diagnostics import describe_aligner, effective_rank, parameter_counts, save_heatmaps
from kvds.align.fitting import fit_aligner
from kvds.align.structural_kv import map_back
from kvds.config.settings import AlignmentSettings
from kvds.errors import InputError
from kvds.kv import AttentionStates, KVShape, KVStates, LayerQueries, Selection, open_capture

STUDENT, TEACHER = KVShape(3, 2, 4, 4), KVShape(5, 3, 6, 6)
SELECTION = Selection(
    torch.tensor([[0, 2, 3, 5], [1, 2, 4, 5]]), torch.tensor([[False, True, True, True], [True, True, False, False]])
)
ENDS = (0, 2, 4)  # the endpoint map of 3 on 5 layers


def settings(**changes) -> AlignmentSettings:
    return AlignmentSettings(alignment_mode="structural_kv", **changes)


def turn(states: Tensor) -> Tensor:
    """A rotation of each pair of dimensions by the position, as a rotary embedding's."""
    angle = 0.7 * torch.arange(states.shape[2], dtype=states.dtype)[:, None]
    first, second = states.chunk(2, -1)
    return torch.cat([first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()], -1)


def random_states(shape: KVShape, seed: int, *, batch=2, tokens=6, dtype=torch.float64, rotate=turn):
    generator = torch.Generator().manual_seed(seed)

    def layers(heads: int) -> tuple[Tensor, ...]:
        size = batch, tokens, heads, shape.head_dim
        made = [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(shape.num_hidden_layers)]
        return tuple((0.5 + layer).to(dtype).transpose(1, 2) for layer in made)

    kv = layers(shape.num_key_value_heads), layers(shape.num_key_value_heads)
    if shape.num_hidden_layers == TEACHER.num_hidden_layers:
        return KVStates(*kv)
    return AttentionStates(*kv, tuple(LayerQueries(q, 0.6, rotate) for q in layers(shape.num_attention_heads)))


def with_grad(states: AttentionStates) -> AttentionStates:
    kv = (tuple(layer.detach().clone().requires_grad_() for layer in part) for part in states[:2])
    queries = tuple(q._replace(queries=q.queries.detach().clone().requires_grad_()) for q in states.queries)
    return AttentionStates(*kv, queries)


def tensors(states: AttentionStates) -> list[Tensor]:
    return [*states.keys, *states.values, *(layer.queries for layer in states.queries)]


def randomised(aligner: StructuralKVLoss) -> StructuralKVLoss:
    generator = torch.Generator().manual_seed(3)
    aligner.double()
    with torch.no_grad():
        for name, tensor in aligner.state_dict().items():
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(values.abs() + 0.5 if name.endswith("scale") else values)
    return aligner


def chosen(selection: Selection, b: int, tokens: int) -> list[int]:
    """The positions of a sample that count."""
    places = range(tokens) if selection.index is None else selection.index[b].tolist()
    return [t for t, counts in zip(places, selection.mask[b].tolist(), strict=True) if counts]


def slow_losses(aligner, student: AttentionStates, teacher: KVStates, selection: Selection) -> dict[str, Tensor]:
    """Sample by sample and token by token, from the equations and the parameters by their names."""
    cosines: dict[str, list[Tensor]] = {"key": [], "value": []}
    attentions = []
    for (name, part), i in itertools.product(aligner.parts.items(), range(3)):
        own = part.state_dict(keep_vars=True)
        x, y = getattr(student, f"{name}s")[i], getattr(teacher, f"{name}s")[ENDS[i]]
        for b in range(x.shape[0]):
            tokens = chosen(selection, b, x.shape[2])
            for t in tokens:
                projected = x[b, :, t].flatten() / own["source_scale"][i] @ own["weight"][i] + own["bias"][i]
                wanted = (y[b, :, t] - own["target_mean"][i]) / own["target_scale"][i]
                pairs = zip(projected.chunk(3), wanted, strict=True)
                cosines[name].append(1 - torch.stack([F.cosine_similarity(p, w, dim=0) for p, w in pairs]).mean())
            if name == "key" and tokens:
                attentions += slow_attention(student.queries[i], x[b], y[b], own, i, b, tokens)
    found = {name: torch.stack(rows).mean() for name, rows in cosines.items()}
    return {**found, "attention": torch.stack(attentions).mean()}


def slow_attention(layer: LayerQueries, keys: Tensor, wanted: Tensor, own, i: int, b: int, tokens: list[int]):
    with torch.no_grad():
        rows = [((wanted[:, t] - own["target_mean"][i]) / own["target_scale"][i]).flatten() for t in tokens]
        matrix = own["weight"][i]
        ridge = 1e-3 * matrix.square().sum() / len(matrix)
        # The normal equations of a least-squares problem with as many extra rows as the ridge asks for.
        tall = torch.cat([matrix.T, ridge.sqrt() * torch.eye(len(matrix), dtype=matrix.dtype)])
        back = [
            torch.linalg.lstsq(tall, torch.cat([row, row.new_zeros(len(matrix))])[:, None]).solution[:, 0]
            for row in rows
        ]
        own_keys, back = keys[:, tokens], torch.stack(back, 1).unflatten(0, keys.shape[::2])  # [H, D, n]
        back = back.transpose(1, 2)
        mean, spread = back.mean(1, keepdim=True), own_keys.mean(1, keepdim=True)
        for h in range(len(back)):
            factor = (own_keys[h] - spread[h]).norm() / (back[h] - mean[h]).norm()
            back[h] = (back[h] - mean[h]) * factor + spread[h]
    found = []
    for h in range(layer.queries.shape[1]):
        for n, t in enumerate(tokens):
            attention = []
            for source in (keys[h // 2][tokens], back[h // 2]):
                rows = torch.zeros(1, 1, keys.shape[1], keys.shape[2], dtype=keys.dtype)
                rows = rows.index_put((torch.tensor(0), torch.tensor(0), torch.tensor(tokens)), source)
                used = rows[0, 0] if layer.rotate is None else layer.rotate(rows)[0, 0]
                scores = torch.stack([layer.scaling * layer.queries[b, h, t] @ used[u] for u in tokens[: n + 1]])
                attention.append(scores.exp() / scores.exp().sum())
            p = attention[1].detach()
            found.append((p * (p / attention[0]).log()).sum())
    return found


@pytest.mark.parametrize("rotate", [turn, None], ids=["rotated", "plain"])
@pytest.mark.parametrize("weight", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("whole", [False, True], ids=["index", "mask"])
def test_loss_and_gradients_equal_loops(rotate, weight, whole):
    aligner = randomised(build_aligner(STUDENT, TEACHER, settings(attention_loss_weight=weight)))
    student, teacher = with_grad(random_states(STUDENT, 1, rotate=rotate)), random_states(TEACHER, 2)
    mask = torch.tensor([[False, True, True, True, True, False], [True, True, True, False, False, False]])
    selection = Selection(None, mask) if whole else SELECTION
    found, expected = aligner(student, teacher, selection), slow_losses(aligner, student, teacher, selection)
    loss = (expected["key"] + expected["value"]) / 2 + weight * expected["attention"]
    torch.testing.assert_close(found.loss, loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.key_loss, expected["key"].detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(found.value_layers.mean(), expected["value"].detach(), rtol=1e-10, atol=0)
    if weight:
        torch.testing.assert_close(found.attention_loss, expected["attention"].detach(), rtol=1e-9, atol=0)
    assert (found.attention_loss is None) == (weight == 0) and expected["attention"] > 0.01
    variables = [*tensors(student), *aligner.parameters()]
    mine = torch.autograd.grad(found.loss, variables, allow_unused=True)
    expected = torch.autograd.grad(loss, variables, allow_unused=True)
    for variable, *pair in zip(variables, mine, expected, strict=True):
        one, other = (torch.zeros_like(variable) if gradient is None else gradient for gradient in pair)
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


def test_attention_by_hand():
    # Keys 0 and 1 of one dimension against a teacher that turns them round; the query of the second token is ln 3.
    shape = KVShape(1, 1, 1, 1)
    aligner = build_aligner(shape, shape, settings()).double()
    with torch.no_grad():
        aligner.parts["key"].weight.fill_(-2.0)
    keys = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 1, 2, 1)
    queries = torch.tensor([9.0, math.log(3)], dtype=torch.float64).view(1, 1, 2, 1)
    student = AttentionStates((keys,), (keys,), (LayerQueries(queries, 1.0, None),))
    loss = aligner(student, KVStates((keys + 5,), (keys,)), Selection(None, torch.ones(1, 2, dtype=torch.bool)))
    # −2 · −x gives the teacher: token 0 stands out, so that the student ought to see 3/4 where it sees 1/4.
    assert loss.attention_loss.item() == pytest.approx((0.75 * math.log(3) + 0.25 * math.log(1 / 3)) / 2, rel=1e-9)


def test_the_way_back_is_that_of_least_squares():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    orthogonal = torch.linalg.qr(torch.randn(6, 4, generator=generator, dtype=torch.float64))[0].T
    torch.testing.assert_close(map_back(orthogonal, rows @ orthogonal), rows / 1.001, rtol=1e-9, atol=0)
    any_map = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(map_back(any_map, rows @ any_map), rows, rtol=0.1, atol=0.1)
    assert map_back(torch.zeros(4, 6, dtype=torch.float64), rows @ any_map).isfinite().all()  # nothing was learned


@pytest.mark.parametrize("start", ["random", "procrustes"])
def test_a_student_that_is_the_teacher_rotated_has_no_loss(start):
    shape = KVShape(3, 2, 4, 4)
    student = random_states(shape, 1, batch=4, tokens=30)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]

    def rotated(layer: Tensor) -> Tensor:
        return (layer.transpose(1, 2).flatten(2) @ rotation).unflatten(2, (2, 4)).transpose(1, 2) * 3 + 1

    teacher = KVStates(*(tuple(rotated(layer) for layer in part) for part in student[:2]))
    aligner = build_aligner(shape, shape, settings(map_start=start)).double()
    everything = Selection(None, torch.ones(4, 30, dtype=torch.bool))
    fit_aligner(aligner, [(student, teacher, everything)])
    loss = aligner(student, teacher, everything)
    if start == "procrustes":
        assert loss.loss.item() == pytest.approx(0, abs=1e-5)
    else:
        assert loss.key_loss > 0.1 and loss.attention_loss > 0.01


def test_padding_companions_and_order_change_nothing():
    aligner = randomised(build_aligner(STUDENT, TEACHER, settings()))
    student, teacher = with_grad(random_states(STUDENT, 1)), random_states(TEACHER, 2)
    mask = torch.tensor([[False, True, True, True, True, False], [True, True, True, False, False, False]])
    loss = aligner(student, teacher, Selection(None, mask)).loss
    gradients = torch.autograd.grad(loss, [*aligner.parameters(), *tensors(student)])

    def layer(tensor: Tensor) -> Tensor:
        """NaN under the mask, more padding, the samples the other way round and a third of padding alone."""
        tensor = torch.where(mask[:, None, :, None], tensor.detach(), torch.tensor(math.nan, dtype=tensor.dtype))
        tensor = F.pad(tensor, (0, 0, 0, 3), value=math.inf).flip(0)
        return torch.cat([tensor, torch.full_like(tensor[:1], math.nan)])

    dirty = KVStates(*(tuple(layer(tensor) for tensor in part) for part in teacher))
    other = with_grad(
        AttentionStates(
            *(tuple(layer(tensor) for tensor in part) for part in student[:2]),
            tuple(q._replace(queries=layer(q.queries)) for q in student.queries),
        )
    )
    wider = torch.cat([F.pad(mask, (0, 3)).flip(0), torch.zeros(1, 9, dtype=torch.bool)])
    again = aligner(other, dirty, Selection(None, wider)).loss
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=0)
    found = torch.autograd.grad(again, [*aligner.parameters(), *tensors(other)])
    parameters = len(list(aligner.parameters()))
    for one, two in zip(found[:parameters], gradients[:parameters], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-13)
    for one, two in zip(found[parameters:], gradients[parameters:], strict=True):
        torch.testing.assert_close(one[:2].flip(0)[:, :, :6], two, rtol=1e-9, atol=1e-13)
        assert not one[2].any() and not one[:, :, 6:].any()
    empty = aligner(student, teacher, Selection(None, torch.zeros_like(mask)))
    empty.loss.backward()
    assert empty.loss.item() == 0
    assert all(t.grad is not None and not t.grad.any() for t in (*aligner.parameters(), *tensors(student)))


def test_a_student_of_free_tensors_keeps_norm_and_rank():
    shape, wide = KVShape(2, 2, 4, 4), KVShape(5, 2, 4, 4)
    student = with_grad(random_states(shape, 1, batch=4, tokens=24, dtype=torch.float32))
    teacher = random_states(wide, 2, batch=4, tokens=24, dtype=torch.float32)
    everything = Selection(None, torch.ones(4, 24, dtype=torch.bool))
    aligner = build_aligner(shape, wide, settings())
    fit_aligner(aligner, [(student.detach(), teacher, everything)])
    optimizer = torch.optim.Adam([*tensors(student), *aligner.parameters()], lr=3e-2)

    def sizes() -> list[tuple[float, float]]:
        rows = [
            x.detach().transpose(1, 2).flatten(2).flatten(0, 1)
            for x in (*student.keys, *(q.queries for q in student.queries))
        ]
        return [(float(x.norm()), float(effective_rank(x))) for x in rows]

    before, losses = sizes(), []
    for _ in range(150):
        optimizer.zero_grad()
        loss = aligner(student, teacher, everything)
        loss.loss.backward()
        optimizer.step()
        losses.append((loss.loss.item(), loss.attention_loss.item()))
    assert losses[-1][0] < 0.4 * losses[0][0] and losses[-1][1] < losses[0][1]
    for (norm, rank), (norm_before, rank_before) in zip(sizes(), before, strict=True):
        assert norm > 0.5 * norm_before and rank > 0.7 * rank_before


SIZES = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 30, "initializer_range": 0.3}  # fmt: skip
CONFIGS = {
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=6),
    "gpt2": GPT2Config(n_layer=2, n_embd=16, n_head=4, n_positions=32, vocab_size=30, initializer_range=0.3,
                       resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
}  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("family", CONFIGS)
def test_captured_queries_and_keys_give_the_models_own_attention(family, rope, checkpointing):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS[family], attn_implementation="eager").train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, 30, (2, 7), generator=torch.Generator().manual_seed(0))
    with open_capture(model, "attention", rope=rope, require_grad=True) as capture:
        model(ids, use_cache=False)
    states = capture.states
    with torch.no_grad():
        expected = model.eval()(ids, output_attentions=True).attentions
    for layer, wanted, keys in zip(states.queries, expected, states.keys, strict=True):
        keys = keys if layer.rotate is None else layer.rotate(keys)
        scores = layer.queries @ keys.repeat_interleave(layer.queries.shape[1] // keys.shape[1], 1).mT * layer.scaling
        causal = torch.ones(7, 7, dtype=torch.bool).tril()
        torch.testing.assert_close(scores.masked_fill(~causal, -1e9).softmax(-1), wanted, rtol=1e-4, atol=1e-6)
    states.queries[0].queries.square().sum().backward()
    grad = next(p for n, p in model.named_parameters() if "0" in n and ("q_proj.weight" in n or "c_attn.weight" in n))
    assert grad.grad.abs().sum() > 0


def test_it_is_saved_profiled_and_explained_as_every_aligner(tmp_path):
    aligner = build_aligner(STUDENT, TEACHER, settings())
    again = aligner_from_config_dict(aligner_config_dict(aligner))
    again.load_state_dict(aligner.state_dict())
    states = random_states(STUDENT, 1, dtype=torch.float32), random_states(TEACHER, 2, dtype=torch.float32)
    assert torch.equal(again(*states, SELECTION).loss, aligner(*states, SELECTION).loss)
    assert describe_aligner(aligner)["parts"]["key"]["layer_pairs"] == [(0, 0), (1, 2), (2, 4)]
    assert parameter_counts(STUDENT, TEACHER, aligner.settings)["structural_kv"] == sum(
        p.numel() for p in aligner.parameters()
    )
    assert save_heatmaps(aligner, tmp_path / "aligner.png").stat().st_size > 1000
    with pytest.raises(TypeError, match="queries"):
        aligner(KVStates(*states[0][:2]), states[1], SELECTION)
    for changes, message in (
        ({"layer_map": "learned"}, "layer_map=learned: expected endpoint or last_aligned"),
        ({"kv_parts": "k"}, "kv_parts=k: expected auto or kv with --alignment_mode structural_kv"),
        ({"direction": "teacher_to_student"}, "direction=teacher_to_student: expected student_to_teacher"),
        ({"attention_loss_weight": -1.0}, "attention_loss_weight=-1.0: expected a finite number, at least 0"),
    ):
        with pytest.raises(InputError, match=message):
            build_aligner(STUDENT, TEACHER, settings(**changes))
