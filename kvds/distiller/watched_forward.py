"""A forward of the student that somebody else calls, watched for the keys and values that the KV loss compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

from torch import Tensor

from kvds.data.batches import TokenBatch
from kvds.kv import Capture, States

KVLoss = Callable[[States, Mapping[str, Any] | TokenBatch, float | None], tuple[Tensor, dict[str, Tensor]]]


class WatchedForward:
    """Context manager: the last forward of the student inside it is the one whose KV loss :meth:`loss` returns.

    Args:
        capture: Of the student.
        kv_loss: From states, the model's inputs and a normalizer to the weighted KV loss and its metrics.

    Attributes:
        metrics: Of the last :meth:`loss`, detached, under the keys of ``metrics.jsonl``.
    """

    def __init__(self, capture: Capture[Any], kv_loss: KVLoss) -> None:
        self._capture, self._kv_loss = capture, kv_loss
        self.metrics: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        self._capture.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._capture.__exit__(*error)

    def loss(self, inputs: Mapping[str, Any] | TokenBatch, *, position_normalizer: float | None = None) -> Tensor:
        """``kv_weight · KV`` of the forward, to be added to the task loss; runs the teacher.

        Args:
            inputs: What the forward was called with: ``input_ids``, ``attention_mask``, ``labels``, ``segment_ids``.
            position_normalizer: What the sum over selected positions is divided by; None: their number, for the mean.
        """
        loss, self.metrics = self._kv_loss(self._capture.states, inputs, position_normalizer)
        return loss
