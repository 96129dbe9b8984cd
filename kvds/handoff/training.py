"""Training of a cache map between two frozen models: first towards the student's attention, then towards its answers.

The closed form makes keys and values alike; what counts is what the student makes of them. So the map is first moved to
lessen the attention-output error, layer by layer, and then the cross entropy of the student that reads the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from kvds.data.batches import TokenBatch, collate
from kvds.data.encoding import EncodedSample
from kvds.handoff.attention_error import attention_output_error, own_attention
from kvds.handoff.cache_map import CacheMap
from kvds.handoff.continuation import Continuation
from kvds.handoff.use import answers_cross_entropy, mapped_prompts
from kvds.models.own_logits import head_of, is_plain_head


class MapTraining:
    """Steps of a map on rows with answers. Neither model changes.

    Args:
        teacher: In evaluation mode.
        student: Likewise.
        cache_map: On the student's device, in fp32; trained in place.
        rows: Of the training split.
        batch_size: Rows per step.
        seed: Of their order.
        pad: Id that stands in for padding.
    """

    def __init__(
        self, teacher: nn.Module, student: nn.Module, cache_map: CacheMap, rows: Sequence[EncodedSample], *,
        batch_size: int = 16, seed: int = 0, pad: int = 0,
    ) -> None:  # fmt: skip
        for model in (teacher, student):
            model.requires_grad_(False)
        self._teacher, self._student, self._map, self._pad = teacher, student, cache_map, pad
        self._rows, self._batch_size, self._seed = rows, batch_size, seed
        self._head = head_of(student, plain=is_plain_head(student))

    def attention(self, steps: int, lr: float) -> list[float]:
        """Lessen the attention-output error, the mean over layers; its values."""
        return self._train(steps, lr, self._attention_error)

    def answers(self, steps: int, lr: float) -> list[float]:
        """Lessen the cross entropy per token of the student's answers; its values."""
        return self._train(steps, lr, self._cross_entropy)

    def _train(self, steps: int, lr: float, loss_of: Callable[[TokenBatch], Tensor]) -> list[float]:
        optimizer = torch.optim.AdamW(self._map.parameters(), lr=lr, weight_decay=0.0)
        losses = []
        for step, batch in zip(range(steps), self._batches(), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / steps)
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._map.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses).tolist() if losses else []

    def _batches(self) -> Iterator[TokenBatch]:
        generator = torch.Generator().manual_seed(self._seed)
        while True:
            for numbers in torch.randperm(len(self._rows), generator=generator).split(self._batch_size):
                some = numbers.tolist()
                yield collate([self._rows[i] for i in some], some, self._pad, 1.0, 1.0)

    def _placed(self, batch: TokenBatch) -> tuple[TokenBatch, Continuation]:
        device = next(self._student.parameters()).device
        return batch.to(device), Continuation.from_batch(batch).to(device)

    def _attention_error(self, batch: TokenBatch) -> Tensor:
        batch, row = self._placed(batch)
        own = own_attention(self._student, batch.input_ids, batch.attention_mask)
        mapped = mapped_prompts(self._teacher, self._map, batch, row)
        return attention_output_error(self._student, own, mapped, row).mean()

    def _cross_entropy(self, batch: TokenBatch) -> Tensor:
        batch, row = self._placed(batch)
        mapped = mapped_prompts(self._teacher, self._map, batch, row)
        return answers_cross_entropy(self._student, self._head, mapped, row, batch.input_ids)
