"""Several samples in a row: the same losses, gradients, selections and keys as in rows of their own."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

from kvds.align import build_aligner
from kvds.data.batches import AS_LONGEST, RowWidth, TokenBatch, collate, collate_packed
from kvds.data.encoding import EncodedSample
from kvds.data.labels import LabelledPositions
from kvds.data.loader import BatchLoader
from kvds.data.model_inputs import model_inputs, repacked, unpacked
from kvds.data.packing import pack_lengths
from kvds.distillation.module import DistillationModule
from kvds.distillation.step import LossWeights, StepInput
from kvds.kv import KVCapture, KVShape, Selection, select_tokens
from kvds.kv.families import backbone
from kvds.teacher.teacher import Teacher
from tests.harness.kv_settings import both_parts

VOCAB = 50
LENGTHS = [(4, 5, 2), (3, 0, 2), (6, 7, 3), (2, 3, 1), (1, 4, 1)]


def samples() -> list[EncodedSample]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number, (prompt, rationale, answer) in enumerate(LENGTHS):
        ids = torch.randint(1, VOCAB, (prompt + rationale + answer,), generator=generator).tolist()
        rows.append(EncodedSample(tuple(ids), (1,) * prompt + (2,) * rationale + (3,) * answer, number))
    return rows


def model_of(family: str, layers: int, hidden: int, seed: int, attention: str) -> Any:
    torch.manual_seed(seed)
    if family == "gpt2":
        config: Any = GPT2Config(
            vocab_size=VOCAB, n_embd=hidden, n_layer=layers, n_head=2, n_positions=64, initializer_range=0.15,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
    else:
        config = Qwen2Config(
            vocab_size=VOCAB, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.15,
        )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def both(capacity: int = 20, width: RowWidth = AS_LONGEST) -> tuple[TokenBatch, TokenBatch]:
    rows = samples()
    arguments: Any = (rows, [row.example for row in rows], 0, 30.0, 40.0)
    return collate(*arguments, width=width), collate_packed(*arguments, capacity=capacity, width=width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_is_what_attention_makes_of_a_bool_one_in_aligned_rows(dtype: torch.dtype) -> None:
    packing = both(capacity=22)[1].packing
    assert packing is not None
    documents = packing.document_ids
    rows, tokens = documents.shape
    sees = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]
    mask = packing.attention_mask("sdpa", dtype)
    assert mask.dtype == dtype and mask.shape == (rows, 1, tokens, tokens) and tokens % 8
    assert torch.equal(mask, torch.zeros((), dtype=dtype).where(sees, -torch.inf))
    assert all(stride % 8 == 0 for stride in mask.stride()[:-1]) and mask.stride(-1) == 1
    q, k, v = torch.randn(3, rows, 2, tokens, 8, generator=torch.Generator().manual_seed(2)).to(dtype).unbind(0)
    found, expected = (nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=m) for m in (mask, sees))
    assert torch.equal(found, expected)


def test_rows_are_full_cheap_and_never_over_the_capacity() -> None:
    # As many tokens as in two rows, and less to attend to.
    assert pack_lengths([5, 5, 5, 5], 10) == [[0], [1], [2], [3]]
    assert pack_lengths([10, 5, 5, 5, 5], 20) == [[0], [1, 3], [2, 4]]
    assert pack_lengths([10, 1, 9, 2], 11) == [[0, 1], [2, 3]]
    assert pack_lengths([600, 300, 300, 20], 1300) == [[0, 3], [1, 2]]
    assert pack_lengths([7], 7) == [[0]]
    assert pack_lengths([], 7) == [[]]
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        lengths = torch.randint(1, 101, (12,), generator=generator).tolist()
        rows = pack_lengths(lengths, 100)
        assert sorted(i for row in rows for i in row) == list(range(12))
        assert max(sum(lengths[i] for i in row) for row in rows) <= 100
        fullest = max(sum(lengths[i] for i in row) for row in rows)
        assert sum(lengths) > 0.75 * len(rows) * fullest  # padding


def test_layout_of_a_packed_batch() -> None:
    padded, packed = both()
    packing = packed.packing
    assert packing is not None
    rows, tokens = packed.input_ids.shape
    assert tokens <= 20 and rows * tokens < padded.input_ids.numel()
    assert int(packed.attention_mask.sum()) == int((padded.segment_ids != 0).sum()) == sum(map(sum, LENGTHS))
    for number, sample in enumerate(samples()):
        places = (packing.document_ids == number).nonzero()
        assert places[:, 0].unique().numel() == 1  # in one row, side by side, counted from 0
        row, begin = places[0].tolist()
        stretch = slice(begin, begin + len(sample.input_ids))
        assert places[:, 1].tolist() == list(range(stretch.start, stretch.stop))
        assert packing.position_ids[row, stretch].tolist() == list(range(len(sample.input_ids)))
        assert tuple(packed.input_ids[row, stretch].tolist()) == sample.input_ids
        assert tuple(packed.segment_ids[row, stretch].tolist()) == sample.segment_ids
        assert packed.labels[row, begin] == -100
    assert (packed.labels != -100).sum() == sum(sample.label_count for sample in samples())
    again = unpacked(packed)
    for name in ("segment_ids", "attention_mask", "labels"):
        expected = getattr(padded, name)
        assert torch.equal(getattr(again, name), expected), name
    assert unpacked(padded) is padded
    assert packed.to(torch.device("cpu")).packing is not None


def test_a_row_that_starts_with_a_counted_token_is_predicted_by_nobody() -> None:
    rows = [EncodedSample((1, 2, 3), (1, 2, 3), 0), EncodedSample((4, 5), (2, 3), 1)]
    packed = collate_packed(rows, [0, 1], 0, 3.0, 3.0, capacity=5)
    assert packed.labels.tolist() == [[-100, 2, 3, -100, 5]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_keys_and_hidden_states_of_each_sample_are_those_of_its_own_row(family: str, attention: str) -> None:
    model = model_of(family, 3, 16, 1, attention).eval()
    padded, packed = both()
    packing = packed.packing
    assert packing is not None
    found = []
    for batch in (padded, packed):
        with torch.no_grad(), KVCapture(model, rope="post") as capture:
            hidden = backbone(model)(**model_inputs(batch, model.config, torch.float32)).last_hidden_state
        found.append((hidden, capture.states))
    (own, own_states), (shared, shared_states) = found
    real = padded.segment_ids != 0
    torch.testing.assert_close(
        shared.flatten(0, 1)[packing.token_index][packing.token_mask], own[real], rtol=1e-5, atol=1e-6
    )
    for a, b in zip((*shared_states.keys, *shared_states.values), (*own_states.keys, *own_states.values), strict=True):
        rows = a.transpose(1, 2).flatten(0, 1)[packing.token_index][packing.token_mask]
        torch.testing.assert_close(rows, b.transpose(1, 2)[real], rtol=1e-5, atol=1e-6)


BUDGETS = [("full", None), ("right_crop", 3), ("right_crop", 0.4)]


def select(batch: TokenBatch, method: str, budget: Any) -> Selection:
    rows = unpacked(batch)
    return repacked(select_tokens(method, budget, rows.segment_ids, rows.attention_mask), batch)


@pytest.mark.parametrize(("method", "budget"), BUDGETS)
def test_the_same_tokens_are_selected(method: str, budget: Any) -> None:
    padded, packed = both()
    assert packed.packing is not None

    def chosen(selection: Selection, shape: torch.Size) -> Tensor:
        if selection.index is None:
            return selection.mask
        assert bool((selection.index.diff(dim=1) > 0).all())
        return torch.zeros(shape, dtype=torch.bool).scatter_(1, selection.index, selection.mask)

    own = chosen(select(padded, method, budget), padded.input_ids.shape)
    shared = chosen(select(packed, method, budget), packed.input_ids.shape)
    assert torch.equal(shared.flatten()[packed.packing.token_index] & packed.packing.token_mask, own)
    assert 0 < int(shared.sum()) == int(own.sum())


@dataclasses.dataclass
class Setup:
    module: DistillationModule
    teacher: Teacher

    def run(self, batches: list[TokenBatch], method: str, budget: Any) -> tuple[list[float], dict[str, Tensor]]:
        self.module.zero_grad(set_to_none=True)
        parts = [0.0, 0.0, 0.0]
        for batch in batches:
            selection = select(batch, method, budget)
            step = StepInput(
                batch, LabelledPositions.from_labels(batch.labels), selection, self.teacher(batch, selection),
                self.teacher.head, LossWeights(task=0.7, kv=1.5, logit_kd=0.4), watch=True,
            )  # fmt: skip
            loss, metrics = self.module(step)
            loss.backward()
            for i, name in enumerate(("loss/task", "loss/kv", "loss/logit_kd")):
                parts[i] += float(metrics[name])
        return parts, {name: p.grad.clone() for name, p in self.module.named_parameters() if p.grad is not None}


def setup(family: str, mode: str, rope: str, attention: str = "sdpa", **kwargs: Any) -> Setup:
    student, teacher = model_of(family, 2, 16, 1, attention), model_of(family, 3, 24, 2, attention)
    shapes = [KVShape.from_config(model.config) for model in (student, teacher)]
    aligner: nn.Module = build_aligner(*shapes, both_parts(alignment_mode=mode))
    module = DistillationModule(student, aligner, rope=rope, head_chunks=2, kd_temperature=2.0, **kwargs)
    return Setup(module, Teacher(teacher, device=torch.device("cpu"), rope=rope, wants_hidden=True))


def same(found: tuple[list[float], dict[str, Tensor]], expected: tuple[list[float], dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5) and min(expected[0]) > 0
    assert found[1].keys() == expected[1].keys()
    largest = max(float(gradient.abs().max()) for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=2e-6 * largest, msg=name)


@pytest.mark.parametrize(("method", "budget"), BUDGETS)
@pytest.mark.parametrize(
    ("family", "mode", "rope", "attention"),
    [
        ("qwen2", "structured", "post", "sdpa"),
        ("qwen2", "flat", "pre", "eager"),
        ("gpt2", "structured", "pre", "sdpa"),
    ],
)
def test_losses_and_gradients_are_those_of_unpacked_training(
    family: str, mode: str, rope: str, attention: str, method: str, budget: Any
) -> None:
    made = setup(family, mode, rope, attention)
    padded, packed = both()
    expected = made.run([padded], method, budget)
    same(made.run([packed], method, budget), expected)
    same(made.run([both(capacity=60)[1]], method, budget), expected)  # all in one row
    wider = both(width=RowWidth(13))
    assert wider[0].input_ids.shape[1] == 26 and wider[1].input_ids.shape[1] % 13 == 0
    for batch in wider:  # more padding than the longest row needs
        same(made.run([batch], method, budget), expected)
    rows = samples()
    halves = [
        collate_packed(part, [row.example for row in part], 0, 30.0, 40.0, capacity=20) for part in (rows[:2], rows[2:])
    ]
    same(made.run(halves, method, budget), expected)
    wrong = dataclasses.replace(packed, packing=None)  # the samples of a row seeing each other is another loss
    assert made.run([wrong], method, budget)[0] != pytest.approx(expected[0], rel=1e-3)


def test_a_micro_batch_without_samples_is_zero_with_a_graph() -> None:
    made = setup("qwen2", "structured", "pre")
    empty = collate_packed([None, None], [-1, -1], 0, 30.0, 40.0, capacity=20)
    assert empty.sample_ids.tolist() == [-1] and empty.input_ids.shape == (1, 1)
    selection = select(empty, "full", None)
    step = StepInput(
        empty, LabelledPositions.from_labels(empty.labels), selection, made.teacher(empty), None, LossWeights(kv=1.0)
    )
    loss, _ = made.module(step)
    loss.backward()
    assert float(loss) == 0 and all(
        torch.isfinite(p.grad).all() for p in made.module.parameters() if p.grad is not None
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpoints_in_host_memory_change_no_gradient(checkpointing: bool) -> None:
    kept, moved = setup("qwen2", "structured", "post"), setup("qwen2", "structured", "post", offload_checkpoints=True)
    kept.module.train()
    moved.module.train()
    expected = kept.run([both()[0]], "full", None)
    if checkpointing:
        moved.module.student.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    packed_tensors: list[Tensor] = []
    hooks = torch.autograd.graph.save_on_cpu(pin_memory=False)
    pack = hooks.pack_hook
    hooks.pack_hook = lambda tensor: packed_tensors.append(tensor) or pack(tensor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd.graph, "save_on_cpu", lambda pin_memory: hooks)
        found = moved.run([both()[0]], "full", None)
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], gradient) for name, gradient in expected[1].items())
    wide = [tensor for tensor in packed_tensors if tensor.dim() == 3 and tensor.shape[-1] == 32]
    assert packed_tensors and bool(wide) != checkpointing  # with checkpointing no MLP activation is saved


def loader(rows: list[EncodedSample], **how: Any) -> BatchLoader:
    values = {"batch_size": 2, "gradient_accumulation_steps": 1, "rank": 0, "world_size": 1, "seed": 5, **how}
    return BatchLoader(rows, pad_token_id=0, position_count=lambda length: length, **values)


def many(count: int) -> list[EncodedSample]:
    lengths = torch.randint(4, 60, (count,), generator=torch.Generator().manual_seed(2)).tolist()
    return [EncodedSample((7,) * n, (1,) + (2,) * (n - 1), i) for i, n in enumerate(lengths)]


def test_a_packing_loader_deals_out_the_same_samples() -> None:
    rows = many(21)
    plain, packing = loader(rows, batch_size=8), loader(rows, batch_size=8, pack_to=60)
    for step in range(plain.steps_per_epoch):
        [a], [b] = plain.step(step), packing.step(step)
        assert [i for i in a.sample_ids.tolist() if i >= 0] == b.sample_ids.tolist()
        assert (a.label_normalizer, a.position_normalizer) == (b.label_normalizer, b.position_normalizer)
        assert int((a.labels != -100).sum()) == int((b.labels != -100).sum())
        assert b.packing is not None and b.input_ids.numel() <= a.input_ids.numel()


def test_grouping_by_length_saves_padding_and_is_the_same_for_any_number_of_ranks() -> None:
    rows = many(401)
    plain, grouped = loader(rows, batch_size=8), loader(rows, batch_size=8, group_by_length=True)

    def padding(made: BatchLoader) -> float:
        batches = [made.step(step)[0] for step in range(made.steps_per_epoch)]
        return 1 - sum(map(lambda b: int((b.segment_ids != 0).sum()), batches)) / sum(
            b.input_ids.numel() for b in batches
        )

    assert padding(grouped) < 0.25 * padding(plain)
    steps = range(grouped.steps_per_epoch)
    everyone = [i for step in steps for i in grouped.sample_ids(step)]
    assert sorted(i for i in everyone if i >= 0) == list(range(401)) and everyone[-7:] == [-1] * 7
    assert [grouped.sample_ids(step) for step in steps] != [grouped.sample_ids(step + len(steps)) for step in steps]
    for rank in (0, 1):
        two = loader(rows, batch_size=4, world_size=2, rank=rank, group_by_length=True)
        assert all(two.sample_ids(step) == grouped.sample_ids(step) for step in steps)
    lengths = [max(len(rows[i].input_ids) for i in grouped.sample_ids(step) if i >= 0) for step in steps]
    assert lengths != sorted(lengths) and lengths != sorted(lengths, reverse=True)
