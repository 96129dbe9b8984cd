"""Tokens with their segments, and batches that are the same whatever the number of ranks."""

import copy

import pytest
import torch
from transformers import AutoTokenizer

from kvds.config import RunConfig
from kvds.data.batches import RowWidth, TokenBatch, collate
from kvds.data.encoding import EncodedSample, Segment, encode_examples, prompt_ids
from kvds.data.example import Example, answer_text, prompt_text, rationale_text
from kvds.data.loader import BatchLoader
from kvds.data.run_data import load_run_data
from kvds.data.tokenizer import train_problem_tokenizer
from kvds.errors import InputError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_problem_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def row(prompt: str, rationale: str, answer: str) -> Example:
    return Example(prompt, rationale, answer, "c", "f:1")


def sample(number: int, prompt: int, rationale: int, answer: int) -> EncodedSample:
    """A row of the given lengths; its ids tell the row and the position."""
    segments = (1,) * prompt + (2,) * rationale + (3,) * answer
    return EncodedSample(tuple(1000 * number + i for i in range(len(segments))), segments, number)


SAMPLES = [sample(i, 1 + i % 3, i % 4, 1 + i % 2) for i in range(23)]
PAD = -7


def loader(rank: int = 0, world_size: int = 1, batch_size: int = 8, **options) -> BatchLoader:
    options = {"gradient_accumulation_steps": 1, "seed": 3, "position_count": lambda length: length - 1, **options}
    return BatchLoader(
        options.pop("samples", SAMPLES),
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        pad_token_id=PAD,
        **options,
    )


class TestEncoding:
    def test_segments_cover_the_row_and_decode_back(self, tokenizer):
        example = row("Lee has 68 balls eats 2?", "68-2=48", "48")
        (encoded,) = encode_examples([example], tokenizer, 99).samples
        assert len(encoded.input_ids) == len(encoded.segment_ids)
        assert list(encoded.segment_ids) == sorted(encoded.segment_ids)  # prompt, rationale, answer in one piece each
        texts = {
            segment: tokenizer.decode(
                [i for i, s in zip(encoded.input_ids, encoded.segment_ids, strict=True) if s == segment]
            )
            for segment in Segment
        }
        assert texts == {
            Segment.PAD: "",
            Segment.PROMPT: prompt_text(example),
            Segment.RATIONALE: rationale_text(example),
            Segment.ANSWER: answer_text(example) + tokenizer.eos_token,
        }
        assert encoded.label_count == sum(segment in (2, 3) for segment in encoded.segment_ids)

    def test_a_row_without_rationale_has_no_rationale_tokens(self, tokenizer):
        (encoded,) = encode_examples([row("Lee has 68 balls?", "", "68")], tokenizer, 99).samples
        assert set(encoded.segment_ids) == {Segment.PROMPT, Segment.ANSWER}
        assert encoded.input_ids[-1] == tokenizer.eos_token_id and encoded.segment_ids[-1] == Segment.ANSWER

    def test_the_prompt_of_generation_is_the_prefix_of_training(self, tokenizer):
        rows = [row("Lee has 68 balls?", "68", "68"), row("Ann has 12 pens?", "", "12")]
        for ids, encoded in zip(prompt_ids(rows, tokenizer), encode_examples(rows, tokenizer, 99).samples, strict=True):
            count = sum(segment == Segment.PROMPT for segment in encoded.segment_ids)
            assert list(encoded.input_ids[:count]) == ids

    def test_rows_over_the_length_are_left_out_whole_and_counted(self, tokenizer):
        rows = [row("Lee has 68 balls?", "68" * n, "68") for n in (1, 9, 2)]
        lengths = [len(s.input_ids) for s in encode_examples(rows, tokenizer, 999).samples]
        corpus = encode_examples(rows, tokenizer, lengths[2])
        assert [s.example for s in corpus.samples] == [0, 2] and corpus.too_long == 1
        assert [len(s.input_ids) for s in corpus.samples] == [lengths[0], lengths[2]]
        assert encode_examples(rows, tokenizer, lengths[0] - 1).too_long == 3
        assert encode_examples([], tokenizer, 9).samples == []

    def test_a_begin_of_text_token_only_where_the_tokenizer_puts_one(self, tokenizer):
        class WithStart:
            """As Llama's tokenizer does: a start token in front of whatever it is given, unless told otherwise."""

            bos_token_id, eos_token_id, name_or_path = 7, 9, "x"

            def __init__(self, puts: bool) -> None:
                self.puts = puts

            def __call__(self, text, add_special_tokens=True, **_):
                def ids(t):
                    return [7] * (self.puts and add_special_tokens) + [20 + len(word) for word in t.split()]

                return {"input_ids": ids(text) if isinstance(text, str) else [ids(t) for t in text]}

        rows = [row("a bb", "ccc", "d")]
        (with_start,) = encode_examples(rows, WithStart(True), 99).samples
        assert with_start.input_ids == (7, 21, 22, 23, 24, 21, 9) and with_start.segment_ids == (1, 1, 1, 2, 3, 3, 3)
        assert prompt_ids(rows, WithStart(True)) == [[7, 21, 22]]
        (without,) = encode_examples(rows, WithStart(False), 99).samples
        assert without.input_ids == (21, 22, 23, 24, 21, 9)

    def test_a_tokenizer_without_an_end_is_explained(self, tokenizer):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.eos_token = None
        with pytest.raises(InputError, match="has no end-of-text token.*--tokenizer_name"):
            encode_examples([row("p", "r", "a")], tokenizer, 9)


class TestCollation:
    def test_a_batch_with_a_row_of_padding(self):
        batch = collate([sample(1, 2, 1, 1), None, sample(2, 1, 0, 1)], [4, -1, 9], PAD, 2.5, 3.5)
        assert batch.input_ids.tolist() == [[1000, 1001, 1002, 1003], [PAD] * 4, [2000, 2001, PAD, PAD]]
        assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]
        assert batch.segment_ids.tolist() == [[1, 1, 2, 3], [0, 0, 0, 0], [1, 3, 0, 0]]
        assert batch.labels.tolist() == [[-100, -100, 1002, 1003], [-100] * 4, [-100, 2001, -100, -100]]
        assert batch.sample_ids.tolist() == [4, -1, 9]
        assert (batch.label_normalizer, batch.position_normalizer) == (2.5, 3.5)
        tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
        assert len(tensors) == 5 and all(tensor.dtype == torch.int64 for tensor in tensors)

    def test_only_rows_of_padding(self):
        batch = collate([None, None], [-1, -1], PAD, 1.0, 1.0)
        assert batch.input_ids.tolist() == [[PAD], [PAD]] and batch.attention_mask.tolist() == [[1], [1]]

    def test_a_pad_token_that_is_the_end_token_stays_a_label_where_it_is_real(self):
        """GPT-2 has no pad token and pads with its end token: what counts is told by segment, never by id."""
        end = 50
        rows = [EncodedSample((1, 2, end), (1, 3, 3), 0), EncodedSample((1, 2, 3, 4, end), (1, 2, 2, 3, 3), 1)]
        batch = collate(rows, [0, 1], end, 1.0, 1.0)
        assert batch.labels.tolist() == [[-100, 2, end, -100, -100], [-100, 2, 3, 4, end]]
        assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1] * 5]

    def test_moving_keeps_values(self):
        batch = collate([sample(1, 2, 1, 1)], [4], PAD, 2.5, 3.5)
        moved = batch.to(torch.device("cpu"))
        assert isinstance(moved, TokenBatch) and (moved.label_normalizer, moved.position_normalizer) == (2.5, 3.5)
        for name in ("input_ids", "attention_mask", "labels", "segment_ids", "sample_ids"):
            assert torch.equal(getattr(moved, name), getattr(batch, name))
        assert batch.to(torch.device("meta")).labels.device.type == "meta"


class TestLoader:
    @pytest.mark.parametrize(
        ("world_size", "batch_size", "accumulation"),
        [(1, 8, 1), (1, 2, 4), (2, 4, 1), (2, 2, 2), (4, 2, 1), (4, 1, 2), (8, 1, 1)],
    )
    def test_a_global_step_is_the_same_on_any_number_of_ranks(self, world_size, batch_size, accumulation):
        one = loader()
        ranks = [
            loader(rank, world_size, batch_size, gradient_accumulation_steps=accumulation) for rank in range(world_size)
        ]
        for step in (0, 1, 2, 3, 7):
            expected = one.step(step)[0]
            found = [rank.step(step) for rank in ranks]
            assert all(len(micro) == accumulation for micro in found)
            ids = [i for micro in found for batch in micro for i in batch.sample_ids.tolist()]
            assert sorted(ids) == sorted(expected.sample_ids.tolist())
            by_id = {
                int(i): batch.input_ids[position][batch.attention_mask[position].bool()].tolist()
                for micro in found for batch in micro for position, i in enumerate(batch.sample_ids)
            }  # fmt: skip
            assert all(tokens == list(SAMPLES[i].input_ids) for i, tokens in by_id.items() if i >= 0)
            # Σ over the step, averaged over ranks and micro-batches, is the exact mean over its labels and positions.
            batches = [batch for micro in found for batch in micro]
            shares = world_size * accumulation
            for count, name in ((labels, "label_normalizer"), (positions, "position_normalizer")):
                mean = sum(count(batch) / getattr(batch, name) for batch in batches) / shares
                assert mean == pytest.approx(1.0, rel=1e-12)
                assert sum(map(count, batches)) == count(expected) == getattr(expected, name)

    def test_each_epoch_has_every_sample_once_in_another_order(self):
        batches = loader()
        assert batches.steps_per_epoch == 3
        epochs = [[i for s in range(3) for i in batches.sample_ids(3 * e + s) if i >= 0] for e in range(3)]
        assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 3
        assert [i for s in range(3) for i in loader(seed=4).sample_ids(s)] != epochs[0]

    def test_a_step_is_a_pure_function_of_its_number(self):
        straight = loader()
        wanted = [straight.step(n)[0] for n in range(9)]
        resumed = loader()
        for n in (8, 0, 5, 5, 2):
            assert torch.equal(resumed.step(n)[0].input_ids, wanted[n].input_ids)
            assert torch.equal(resumed.step(n)[0].sample_ids, wanted[n].sample_ids)

    def test_the_random_state_is_left_alone(self):
        state = torch.get_rng_state()
        loader().step(0)
        assert torch.equal(torch.get_rng_state(), state)

    def test_the_last_short_step_is_filled_with_rows_of_padding(self):
        ranks = [loader(rank, 4, 2) for rank in range(4)]  # 23 samples, 8 a step: one row short
        assert ranks[0].steps_per_epoch == 3
        last = [rank.step(2)[0] for rank in ranks]
        assert [batch.sample_ids.shape[0] for batch in last] == [2] * 4
        assert [int((batch.sample_ids < 0).sum()) for batch in last] == [0, 0, 0, 1]
        empty = last[3]
        assert empty.labels[1].eq(-100).all() and empty.segment_ids[1].eq(Segment.PAD).all()
        assert empty.attention_mask[1].tolist() == [1] + [0] * (empty.attention_mask.shape[1] - 1)

    def test_ranks_without_any_real_row(self):
        ranks = [loader(rank, 4, 2, samples=SAMPLES[:1]) for rank in range(4)]
        assert [rank.step(0)[0].sample_ids.tolist() for rank in ranks] == [[0, -1], [-1, -1], [-1, -1], [-1, -1]]
        assert {rank.step(5)[0].label_normalizer for rank in ranks} == {SAMPLES[0].label_count / 4}

    def test_a_step_without_labels_or_positions_divides_by_no_zero(self):
        # One token: a label that nothing predicts, and a position count of 0.
        (batch,) = loader(samples=[sample(0, 0, 0, 1)], batch_size=1).step(0)
        assert batch.label_normalizer == 1 and batch.position_normalizer == 1

    def test_the_first_token_of_a_row_is_no_label_as_nothing_predicts_it(self):
        (batch,) = loader(samples=[sample(0, 0, 1, 2)], batch_size=1).step(0)
        assert batch.label_normalizer == labels(batch) == 2

    def test_normalizers_by_hand(self):
        rows = [sample(0, 2, 1, 1), sample(1, 3, 0, 2), sample(2, 1, 4, 1)]  # 2, 2, 5 labels; 4, 5, 6 tokens
        batches = BatchLoader(
            rows, batch_size=1, gradient_accumulation_steps=2, rank=1, world_size=2, seed=0, pad_token_id=0,
            position_count=lambda length: min(length, 5) - 1, shuffle=False,
        ).step(0)  # fmt: skip
        assert [batch.sample_ids.tolist() for batch in batches] == [[1], [-1]]
        assert [batch.label_normalizer for batch in batches] == [9 / 4, 9 / 4]
        assert [batch.position_normalizer for batch in batches] == [(3 + 4 + 4) / 4] * 2

    def test_without_shuffling_the_order_is_that_of_the_samples(self):
        batches = loader(shuffle=False)
        assert batches.sample_ids(0) == batches.sample_ids(3) == list(range(8))
        assert batches.sample_ids(2) == [*range(16, 23), -1]

    def test_no_samples_is_an_error(self):
        with pytest.raises(InputError, match="expected at least one"):
            loader(samples=[])


def labels(batch: TokenBatch) -> int:
    return int((batch.labels[:, 1:] != -100).sum())


def positions(batch: TokenBatch) -> int:
    real = batch.attention_mask.sum(1)[batch.sample_ids >= 0]
    return int((real - 1).sum())


class TestRowWidth:
    @pytest.mark.parametrize(
        ("multiple", "most", "longest", "width"),
        [(1, None, 7, 7), (8, None, 7, 8), (8, None, 8, 8), (8, None, 9, 16), (8, 20, 17, 20), (64, 100, 3, 64)],
    )
    def test_the_first_multiple_that_holds_the_longest_and_no_more_than_is_needed(self, multiple, most, longest, width):
        assert RowWidth(multiple, most)(longest) == width

    @pytest.mark.parametrize("pack_to", [None, 12])
    def test_a_loader_meets_few_shapes_and_counts_the_same(self, pack_to):
        def batches(width):
            made = loader(width=width, pack_to=pack_to, position_count=lambda length: length - 1)
            return [made.step(step)[0] for step in range(made.steps_per_epoch)]

        narrow, wide = batches(RowWidth()), batches(RowWidth(5, 12))
        widths = {batch.input_ids.shape[1] for batch in wide}
        assert widths <= {5, 10, 12} and widths != {batch.input_ids.shape[1] for batch in narrow}
        for a, b in zip(narrow, wide, strict=True):
            more = b.input_ids.shape[1] - a.input_ids.shape[1]
            assert torch.equal(torch.nn.functional.pad(a.input_ids, (0, more), value=PAD), b.input_ids)
            assert torch.equal(torch.nn.functional.pad(a.attention_mask, (0, more)), b.attention_mask)
            assert torch.equal(torch.nn.functional.pad(a.labels, (0, more), value=-100), b.labels)
            assert (a.label_normalizer, a.position_normalizer) == (b.label_normalizer, b.position_normalizer)
            if b.packing is not None:
                assert b.packing.document_ids.shape == b.input_ids.shape
                assert b.packing.token_mask.sum() == (b.segment_ids != 0).sum()

    @pytest.mark.parametrize("flags", [{}, {"packing": True}])
    def test_a_run_asks_for_it_and_stays_within_max_length(self, flags, tokenizer):
        cfg = RunConfig(
            model_name="launch/quickstart_teacher", output_dir="unused", datasets=("synthetic",),
            synthetic_problems=60, batch_size=2, eval_subset_size=8, max_length=41, pad_to_multiple_of=14,
            data_cache="never", **flags,
        )  # fmt: skip
        data = load_run_data(cfg, tokenizer, rank=0, world_size=1)
        assert data.eval_loader is not None
        for made in (data.loader, data.eval_loader):
            widths = {made.step(step)[0].input_ids.shape[1] for step in range(made.steps_per_epoch)}
            assert widths <= {28, 41} and 41 in widths
