"""A teacher whose heads are dealt out to a few ranks, in AutoTP's shards: keys and values for each rank's own rows.

Each rank of a group holds some heads of every layer and a slice of every MLP. The ranks' micro-batches are run one
after the other by the whole group; as soon as a layer has computed its keys and values, the chosen positions of every
rank's heads go to the rank whose rows they are, and the rest is let go.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import deepspeed
import torch
from deepspeed.module_inject.layers import set_autotp_mode
from torch import Tensor, nn
from torch import distributed as dist

from kvds.data.batches import TokenBatch
from kvds.data.model_inputs import model_inputs
from kvds.data.packing import Packing
from kvds.errors import InputError
from kvds.kv import KVShape, KVStates
from kvds.kv.families import FAMILIES, family_of
from kvds.kv.last_layer import only_keys_and_values
from kvds.kv.selected import SelectedCapture
from kvds.kv.states import KV_PARTS
from kvds.models.buffers import buffers_kept


class _Groups:
    """The form in which DeepSpeed's inference engine is told of a group that is not all ranks."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._group


def check_heads(config: Any, size: int, world_size: int) -> None:
    """Refuse a teacher or a number of ranks that cannot be cut into groups of ``size``.

    Raises:
        InputError: naming the number that does not divide.
    """
    place = f"teacher_tp_size={size}"
    if world_size % size:
        raise InputError(f"{place}: {world_size} ranks are no multiple; expected a divisor of the number of ranks")
    shape = KVShape.from_config(config)
    for count, what in ((shape.num_key_value_heads, "key-value"), (shape.num_attention_heads, "attention")):
        if count % size:
            raise InputError(
                f"{place}: the teacher has {count} {what} heads; expected a divisor of that (or --teacher_placement "
                "zero3)"
            )
    if not family_of(config).tensor_parallel:
        known = [name for name, family in FAMILIES.items() if family.tensor_parallel]
        raise InputError(
            f"teacher_placement=tensor_parallel: heads of {config.model_type} are not known to be found again once "
            f"they are dealt out; expected one of {', '.join(known)} (or --teacher_placement zero3)"
        )


class HeadShards:
    """This rank's heads of a model, and the exchange with the ranks that hold the others.

    Args:
        backbone: Whole, on the CPU or the device; replaced in place by this rank's shards.
        size: Ranks of a group; consecutive ones form it.
        dtype: Of the parameters.
    """

    def __init__(self, backbone: nn.Module, size: int, dtype: torch.dtype) -> None:
        config: Any = backbone.config
        check_heads(config, size, dist.get_world_size())
        shape = KVShape.from_config(config)
        begins = range(0, dist.get_world_size(), size)
        groups = [dist.new_group(list(range(begin, begin + size))) for begin in begins]  # all ranks make all groups
        self._group: Any = groups[dist.get_rank() // size]
        self._size, self._rank, self._dtype = size, dist.get_rank() % size, dtype
        with buffers_kept(backbone), contextlib.redirect_stdout(io.StringIO()):  # AutoTP prints what it found
            deepspeed.init_inference(
                backbone, dtype=dtype, replace_with_kernel_inject=False,
                # The engine takes its size from the one and shards by the other.
                tensor_parallel={"tp_size": size, "tp_group": self._group, "mpu": _Groups(self._group)},
            )  # fmt: skip
        own = copy.deepcopy(config)
        own.head_dim = shape.head_dim
        own.num_attention_heads, own.num_key_value_heads = (
            count // size for count in (shape.num_attention_heads, shape.num_key_value_heads)
        )
        backbone.config = own
        self._backbone = backbone

    def states(
        self, batch: TokenBatch, index: Tensor | None, *, rope: str, parts: Sequence[str] = KV_PARTS
    ) -> KVStates:  # fmt: skip
        """Keys and values of this rank's ``batch`` with the heads of all; every rank of the group calls it.

        Args:
            batch: On the device.
            index: ``[B, M]`` positions that alone are kept; None = all.
            rope: ``"pre"`` or ``"post"``.
            parts: ``keys``, ``values`` or both: what is exchanged.

        Returns:
            Per layer ``[B, num_key_value_heads, M or T, head_dim]``; no layers of a part that was not asked for.
        """
        sizes = self._sizes(batch, index)
        mine: KVStates | None = None
        for owner, (rows, tokens, columns, positions, ends, longest) in enumerate(sizes):
            own = owner == self._rank
            bounds = None
            if ends:
                bounds = self._from(owner, _bounds(batch) if own else None, (ends,))
            shared = self._from(owner, _columns(batch) if own else None, (columns, rows, tokens))
            chosen = self._from(owner, index if own else None, (rows, positions)) if positions >= 0 else None
            inputs = model_inputs(_batch_of(batch, shared, bounds, longest), self._backbone.config, self._dtype)
            deliver = self._delivery(owner)
            capture = SelectedCapture(self._backbone, chosen, rope=rope, parts=parts, deliver=deliver)
            with capture, only_keys_and_values(self._backbone), _torch_collectives():
                self._backbone(use_cache=False, **inputs)
            if own:
                mine = capture.states
        assert mine is not None
        return mine

    def _sizes(self, batch: TokenBatch, index: Tensor | None) -> list[list[int]]:
        """Rows, tokens, columns, positions, bounds and longest sample of each rank's batch. The host waits here: it
        must know the shapes.
        """
        packing = batch.packing
        packed = [2, 0, 0] if packing is None else [4, len(packing.bounds), packing.longest]
        positions = -1 if index is None else index.shape[1]
        own = torch.tensor([*batch.input_ids.shape, packed[0], positions, *packed[1:]])
        own = own.to(batch.input_ids.device)
        gathered = [torch.empty_like(own) for _ in range(self._size)]
        dist.all_gather(gathered, own, group=self._group)
        return torch.stack(gathered).tolist()

    def _from(self, owner: int, tensor: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        if tensor is None:
            tensor = torch.empty(shape, dtype=torch.int64, device=next(self._backbone.parameters()).device)
        tensor = tensor.contiguous()
        dist.broadcast(tensor, group=self._group, group_src=owner)
        return tensor

    def _delivery(self, owner: int) -> Callable[[Tensor], Tensor | None]:
        """From this rank's heads ``[B, H / size, M, D]`` of a layer to all heads on the rank ``owner``."""
        own = owner == self._rank

        def deliver(heads: Tensor) -> Tensor | None:
            heads = heads.contiguous()
            parts = [torch.empty_like(heads) for _ in range(self._size)] if own else None
            dist.gather(heads, parts, group=self._group, group_dst=owner)
            return None if parts is None else torch.cat(parts, dim=1)

        return deliver


@contextlib.contextmanager
def _torch_collectives() -> Iterator[None]:
    """Within it AutoTP's layers sum over their group; in its inference mode, on a CPU, over all ranks of the host."""
    set_autotp_mode(training=True)
    try:
        yield
    finally:
        set_autotp_mode(training=False)


def _columns(batch: TokenBatch) -> Tensor:
    """``[2 or 4, B, T]`` int64: what the backbone must know of a batch."""
    own = [batch.input_ids, batch.attention_mask]
    if batch.packing is not None:
        own += [batch.packing.document_ids, batch.packing.position_ids]
    return torch.stack(own)


def _bounds(batch: TokenBatch) -> Tensor:
    assert batch.packing is not None
    return batch.packing.bounds.long()


def _batch_of(like: TokenBatch, columns: Tensor, bounds: Tensor | None, longest: int) -> TokenBatch:
    """The inverse of :func:`_columns`, for the backbone's eyes alone: of ``like`` nothing else is meant."""
    ids, mask, *packed = columns.unbind(0)
    nothing, packing = ids.new_zeros(0, 0), None
    if bounds is not None:
        packing = Packing(packed[0], packed[1], nothing, nothing.bool(), bounds.int(), 1, longest)
    return replace(
        like, input_ids=ids, attention_mask=mask, packing=packing, reasoning_step_ids=None, teacher_text=None
    )
