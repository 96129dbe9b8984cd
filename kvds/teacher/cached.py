"""A teacher on disk: its selected keys and values written once, and read in place of running it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kvds.data.batches import TokenBatch, collate
from kvds.data.encoding import EncodedSample
from kvds.durable_files import json_text
from kvds.errors import InputError
from kvds.identity.folder_owner import create_once
from kvds.kv import KVStates, Selection
from kvds.teacher.cache_fingerprint import check_fingerprint, parts_in
from kvds.teacher.cache_shards import MANIFEST, ShardReader, finish_cache, shard_is_written, write_shard
from kvds.teacher.stored_batches import StoredBatches
from kvds.teacher.teacher import Teacher, TeacherOutput

_FINGERPRINT = "fingerprint.json"


def write_teacher_cache(
    folder: Path,
    teacher: Teacher,
    samples: Sequence[EncodedSample],
    select: Callable[[TokenBatch], Selection],
    *,
    fingerprint: dict[str, str],
    store: str,
    batch_size: int,
    shard_samples: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int], None] = lambda count: None,
) -> bool:
    """Write this process's shards of a cache, leaving those that are there.

    Args:
        folder: Of the cache; made if missing.
        teacher: Captures keys and values.
        samples: The whole corpus, in the loader's numbering.
        select: The positions of an unpacked batch that count; all tokens of a row are kept where it has no index.
        fingerprint: What the cache is made of, its parts among that.
        store: ``"fp32"``, ``"bf16"``, ``"int8"`` or ``"fp8"``.
        batch_size: Rows per teacher forward.
        shard_samples: Samples per shard.
        device: Where the teacher runs.
        rank: Of this process: it writes every ``world_size``-th shard.
        world_size: Number of processes.
        progress: Told how many samples have been written.

    Returns:
        Whether the cache is finished now.

    Raises:
        InputError: the folder holds the cache of something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made_of = {**fingerprint, "store": store, "samples per shard": str(shard_samples)}
    mark = folder / _FINGERPRINT
    if mark.is_file() or not create_once(mark, json_text(made_of, indent=1) + "\n"):
        check_fingerprint(_fingerprint_in(mark), made_of, folder, goes_on=True)
    shards = -(-len(samples) // shard_samples)
    for number in range(rank, shards, world_size):
        numbers = range(number * shard_samples, min(len(samples), (number + 1) * shard_samples))
        if not shard_is_written(folder, number):
            kept = _states_of(teacher, samples, numbers, select, batch_size, device, parts_in(fingerprint))
            parts = {name: [kept[i][name] for i in numbers] for name in parts_in(fingerprint)}
            write_shard(folder, number, parts, store)
        progress(len(numbers))
    return finish_cache(folder, shards, {"fingerprint": fingerprint, "store": store})


def _fingerprint_in(mark: Path) -> dict[str, str]:
    try:
        found = json.loads(mark.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise InputError(f"{mark}: damaged; expected what `kvds cache` wrote (remove the folder, or another --output)")
    return found


def _states_of(
    teacher: Teacher, samples: Sequence[EncodedSample], numbers: Sequence[int],
    select: Callable[[TokenBatch], Selection], batch_size: int, device: torch.device, parts: Sequence[str],
) -> dict[int, dict[str, Tensor]]:  # fmt: skip
    kept: dict[int, dict[str, Tensor]] = {}
    order = sorted(numbers, key=lambda i: -len(samples[i].input_ids))  # of like length, for little padding
    for begin in range(0, len(order), batch_size):
        mine = order[begin : begin + batch_size]
        batch = collate([samples[i] for i in mine], mine, 0, 1.0, 1.0).to(device)
        selection = select(batch)
        states = teacher(batch, selection).states
        assert isinstance(states, KVStates)
        # [B, M or T, L, H, D]
        stacked = {name: torch.stack(getattr(states, name)).permute(1, 3, 0, 2, 4) for name in parts}
        wanted = batch.segment_ids != 0 if selection.index is None else selection.mask
        for row, i in enumerate(mine):
            kept[i] = {name: side[row][wanted[row]].cpu() for name, side in stacked.items()}
    return kept


class CachedTeacher:
    """Stands where a :class:`kvds.teacher.teacher.Teacher` stands, and reads what that one once computed.

    Args:
        folder: A finished cache.
        dtype: Of the states it returns.
        device: Where they are wanted.
        fingerprint: Of the run; the parts that it names are read.
        verify: Also compare checksums (one rank is enough).

    Raises:
        InputError: the cache is unfinished, damaged, or made of something else.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        fingerprint: dict[str, str],
        verify: bool = True,
    ) -> None:
        reader = ShardReader(folder, dtype, parts=parts_in(fingerprint), verify=verify)
        check_fingerprint(reader.manifest["fingerprint"], fingerprint, folder / MANIFEST)
        self._device, self._stored = device, StoredBatches(reader, pin_memory=device.type == "cuda")

    def read_ahead(self, batch: TokenBatch) -> None:
        """Have threads read what a later call with this very batch will want; returns at once."""
        self._stored.want(batch)

    def settle(self) -> None:
        """Wait until what is being read ahead has been."""
        self._stored.settle()

    def drop_ahead(self) -> None:
        """Let go of what was read for calls that will not come."""
        self._stored.drop()

    def __call__(self, batch: TokenBatch, selection: Selection | None = None) -> TeacherOutput:
        """The states of the batch's samples: all positions, or with a selection's index those in its slots. A part that
        the run does not match has no layers.

        They are copied to the device as they lie in the shards, and given as views of that.
        """
        stored, tokens = self._stored.take(batch), batch.input_ids.shape[1]
        places = None
        if selection is not None and selection.index is not None:
            # The j-th slot that counts holds the j-th stored position.
            places = stored.places((selection.mask.cumsum(1) - 1).clamp_min(0))
        elif len(batch.row_samples) > 1:
            places = stored.places(torch.arange(tokens, device=self._device)[None])
        parts = {name: self._states(part, places, tokens) for name, part in stored.parts.items()}
        return TeacherOutput(KVStates(parts.get("keys", ()), parts.get("values", ())), None)

    def head(self, hidden: Tensor) -> Tensor:
        """Not stored: configuration refuses logit distillation from a cache."""
        raise RuntimeError("a teacher cache holds no logits")

    def _states(self, part: Tensor, places: Tensor | None, tokens: int) -> tuple[Tensor, ...]:
        """``[N + 1, L, H, D]`` on the CPU → L times ``[B, H, M, D]`` on the device, zeros where nothing is stored."""
        if places is None and len(part) < tokens:
            rows = part.new_empty(tokens, *part.shape[1:], device=self._device)
            rows[: len(part)].copy_(part, non_blocking=True)
            rows[len(part) :].zero_()
        else:
            rows = part.to(self._device, non_blocking=True)
        placed = rows[None, :tokens] if places is None else _rows_at(rows, places)  # [B, M, L, H, D]
        return placed.permute(2, 0, 3, 1, 4).unbind(0)


def _rows_at(rows: Tensor, places: Tensor) -> Tensor:
    return rows.index_select(0, places.flatten()).unflatten(0, places.shape)
