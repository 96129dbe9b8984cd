"""Labels: where the next token counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED_LABEL = -100


@dataclass(frozen=True)
class LabelledPositions:
    """Where the next token counts. Made from the batch on the CPU, so that no step waits for a device to count.

    Attributes:
        index: ``[N]`` int64, flat positions in ``[batch · tokens]`` whose **next** token is a label.
        target: ``[N]`` int64, those labels.
    """

    index: Tensor
    target: Tensor

    @classmethod
    def from_labels(cls, labels: Tensor) -> LabelledPositions:
        """From labels ``[B, T]`` in Hugging Face's convention (unshifted, -100 where not counted)."""
        shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL).reshape(-1)
        index = torch.nonzero(shifted != IGNORED_LABEL).squeeze(1)
        return cls(index, shifted[index])

    def to(self, device: torch.device) -> LabelledPositions:
        """The same on ``device``; from pinned memory where that is a GPU, which then need not be waited for."""
        index, target = self.index, self.target
        if device.type == "cuda" and not index.is_cuda:
            index, target = index.pin_memory(), target.pin_memory()
        return LabelledPositions(index.to(device, non_blocking=True), target.to(device, non_blocking=True))
