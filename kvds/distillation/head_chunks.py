"""Chunks of positions in which logits are made: how many, and where ranks must agree on it.

Each chunk reads and writes the whole gradient of the head's weight, so that few large ones are fast. A micro-batch
knows on the CPU how many of its tokens are labelled, and that number decides, except where each chunk is a call of a
head that all ranks make together.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from kvds.config import RunConfig
from kvds.models.own_logits import is_plain_head
from kvds.ops.divergences import Divergence

# Logits of one chunk, the teacher's included: 2^28 elements in 16 bits, half as many in fp32.
_CHUNK_BYTES = 2**29


def chunk_count(tokens: int, vocab_size: int, element_size: int, *, distilled: bool) -> int:
    """How many chunks keep a chunk's logits, and the teacher's beside them, within the limit when ``tokens`` positions
    count.
    """
    return max(1, -(-tokens * vocab_size * element_size * (1 + distilled) // _CHUNK_BYTES))


def agreed_chunks(cfg: RunConfig, student: Any, tokens: int) -> int | None:
    """The chunks of every micro-batch of a run, of ``tokens`` at most; None: by the labelled tokens of each.

    Ranks have to agree where a chunk is a call that gathers weights on all of them together: that of a teacher's head
    whose weights are sharded, and that of a student whose own forward makes its logits (a plain head is called once,
    whatever the chunks). Whether the student's weights are sharded is not asked: a number that is fixed is right, too.
    """
    distilled = bool(cfg.logit_kd_weight)
    gathers = distilled and cfg.teacher_placement in ("zero3", "zero3_offload")
    if not gathers and makes_one_call(student):
        return None
    element = next(student.parameters()).element_size()
    return chunk_count(tokens, student.config.vocab_size, element, distilled=distilled)


def logit_divergence(cfg: RunConfig) -> Divergence:
    """What a run's logit distillation makes small."""
    return Divergence(cfg.logit_kd_loss, cfg.logit_kd_beta, cfg.logit_kd_top_k)


def makes_one_call(student: Any) -> bool:
    """Whether the losses of ``student`` are one call of its head, within which the chunks are made."""
    return is_plain_head(student) and isinstance(student.get_output_embeddings(), nn.Linear)
