"""What a cache holds for a micro-batch: the stored numbers themselves, read once, ahead of a step and within bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvds.data.batches import TokenBatch, collate, collate_packed
from kvds.data.encoding import EncodedSample
from kvds.data.model_inputs import repacked, unpacked
from kvds.kv import Selection, select_tokens
from kvds.teacher.cache_shards import ShardReader, shard_path, write_shard
from kvds.teacher.cached import CachedTeacher
from kvds.teacher.stored_batches import MOST_AHEAD, StoredBatches, read_ahead_bytes

CPU = torch.device("cpu")
LENGTHS = (5, 9, 3, 12, 7, 4)
LAYERS, HEADS, DIM = 3, 2, 4


def write(folder: Path, store: str, method: str, budget: Any, parts: str = "keys values") -> None:
    """A cache of two shards of the samples of :data:`LENGTHS`, of random numbers."""
    generator = torch.Generator().manual_seed(7)
    folder.mkdir()
    counts = [int(chosen(alone(number), method, budget).mask.sum()) for number in range(len(LENGTHS))]
    counts = list(LENGTHS) if method == "full" else counts
    records = []
    for shard in range(2):
        states = {
            name: [torch.randn(count, LAYERS, HEADS, DIM, generator=generator) for count in counts[3 * shard :][:3]]
            for name in parts.split()
        }
        write_shard(folder, shard, states, store)
        records.append(json.loads(shard_path(folder, shard).with_suffix(".json").read_text()))
    manifest = {"store": store, "shards": records, "fingerprint": {"parts": parts}}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def sample(number: int) -> EncodedSample:
    length = LENGTHS[number]
    return EncodedSample((1,) * length, (1, 2) + (3,) * (length - 2), number)


def alone(number: int) -> TokenBatch:
    return collate([sample(number)], [number], 0, 1.0, 1.0)


def chosen(batch: TokenBatch, method: str, budget: Any) -> Selection:
    rows = unpacked(batch)
    return repacked(select_tokens(method, budget, rows.segment_ids, rows.attention_mask), batch)


def batches() -> dict[str, TokenBatch]:
    rows = {number: sample(number) for number in range(len(LENGTHS))}
    ids = [4, 1, -1, 3]
    padded = collate([rows.get(i) for i in ids], ids, 0, 1.0, 1.0)
    packed = collate_packed([rows.get(i) for i in ids], ids, 0, 1.0, 1.0, capacity=16)
    one_row = collate_packed([rows[i] for i in (5, 0, 3)], [5, 0, 3], 0, 1.0, 1.0, capacity=32, one_row=True)
    wide = collate_packed(
        [rows[i] for i in (5, 0, 3)], [5, 0, 3], 0, 1.0, 1.0, capacity=32, one_row=True, width=lambda n: n + 3
    )  # type: ignore[arg-type]
    empty = collate([None, None], [-1, -1], 0, 1.0, 1.0)
    return {"padded": padded, "packed": packed, "one row": one_row, "one row, wide": wide, "empty": empty}


def expected(batch: TokenBatch, selection: Selection | None, reader: ShardReader, part: str) -> list[Tensor]:
    """By loops: for each row its samples' stored positions in order, in the slots that count, and zeros elsewhere."""
    slots = batch.input_ids.shape[1] if selection is None or selection.index is None else selection.index.shape[1]
    layers = [torch.zeros(len(batch.row_samples), HEADS, slots, DIM, dtype=reader.dtype) for _ in range(LAYERS)]
    for row, numbers in enumerate(batch.row_samples):
        stored = [position for number in numbers for position in reader.sample(number)[part]]
        if selection is None or selection.index is None:
            places = list(range(len(stored)))
        else:
            places = selection.mask[row].nonzero()[:, 0].tolist()
        assert len(places) == len(stored)
        for place, position in zip(places, stored, strict=True):
            for layer in range(LAYERS):
                layers[layer][row, :, place] = position[layer]
    return layers


@pytest.mark.parametrize(("method", "budget"), [("full", None), ("right_crop", 3), ("uniform", 0.5)])
@pytest.mark.parametrize("store", ["fp32", "bf16", "int8", "fp8"])
@pytest.mark.parametrize("parts", ["keys values", "values"])
def test_states_are_what_is_stored_to_the_bit(tmp_path: Path, store: str, method: str, budget: Any, parts: str) -> None:
    write(tmp_path / "cache", store, method, budget, parts)
    for dtype in (torch.float32, torch.bfloat16):
        teacher = CachedTeacher(tmp_path / "cache", dtype=dtype, device=CPU, fingerprint={"parts": parts})
        reader = ShardReader(tmp_path / "cache", dtype, parts=parts.split())
        for name, batch in batches().items():
            selection = chosen(batch, method, budget)
            teacher.read_ahead(batch)
            states = teacher(batch, selection).states
            for part in ("keys", "values"):
                found = getattr(states, part)
                if part not in parts.split():
                    assert found == ()
                    continue
                assert len(found) == LAYERS and found[0].dtype == dtype and found[0].stride(3) == 1
                assert len({layer.stride() for layer in found}) == 1  # as the fused operation wants them
                counts = torch.ones(()) if selection.index is None else selection.mask[:, None, :, None]
                for layer, wanted in zip(found, expected(batch, selection, reader, part), strict=True):
                    assert torch.equal(layer * counts, wanted), name


def test_no_more_is_read_ahead_than_has_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "cache", "fp32", "full", None)
    stored = StoredBatches(ShardReader(tmp_path / "cache", torch.float32), pin_memory=False)
    reads: list[int] = []
    read = ShardReader.sample
    monkeypatch.setattr(ShardReader, "sample", lambda self, i: reads.append(i) or read(self, i))
    # The same rows come twice where an epoch is a step.
    order = [0, 1, 1, 2, 3, 4]
    for number in order:
        stored.want(alone(number))
        assert len(stored._read_ahead) <= MOST_AHEAD
    for done, number in enumerate(order, 1):
        assert len(stored.take(alone(number)).parts["keys"]) == LENGTHS[number] + 1
        assert len(stored._read_ahead) == min(MOST_AHEAD, len(order) - done)
    assert sorted(reads) == order
    for number in (0, 1, 2, 3):
        stored.want(alone(number))
    stored.take(alone(3))  # asked for before its turn: read for whoever asks, and not once more
    assert [rows for rows, _ in stored._read_ahead] == [((0,),), ((1,),)] and list(stored._wanted) == [((2,),)]
    stored.drop()
    assert not stored._read_ahead and not stored._wanted


def test_what_goes_wrong_in_reading_is_told_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "cache", "bf16", "full", None)
    teacher = CachedTeacher(tmp_path / "cache", dtype=torch.bfloat16, device=CPU, fingerprint={"parts": "keys values"})
    read = ShardReader.sample

    def unreadable(self: ShardReader, number: int) -> dict[str, Tensor]:
        if number == 1:
            raise OSError("the disk is gone")
        return read(self, number)

    monkeypatch.setattr(ShardReader, "sample", unreadable)
    for number in (0, 1, 2):
        teacher.read_ahead(alone(number))
    teacher(alone(0))
    with pytest.raises(OSError, match="the disk is gone"):
        teacher(alone(1))
    teacher(alone(2))


def test_pinned_memory_comes_in_powers_of_two() -> None:
    held = MOST_AHEAD + 2
    assert read_ahead_bytes(1000, pinned=False) == held * 1000
    assert [read_ahead_bytes(size, pinned=True) for size in (1000, 1024, 1025)] == [
        held * n for n in (1024, 1024, 2048)
    ]
