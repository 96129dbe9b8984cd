"""Shape of a micro-batch, and what in memory follows from it by arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass

from kvds.config import RunConfig
from kvds.kv import KVShape
from kvds.ops.lean import CHUNK_ELEMENTS


@dataclass(frozen=True)
class BatchShape:
    """The largest micro-batch that a run meets.

    Attributes:
        rows: Per device.
        tokens: Of the longest row, to which the others are padded.
        labelled: Tokens of the micro-batch that the task loss counts.
        slots: Positions per row whose keys and values are compared.
        samples: That share the rows; 0: one each.
        handed: With ``--handoff_weight`` slots per row of the cache, the longest prompt less its last token; else 0.
        follow: And tokens per row of the forward over it; else 0.
    """

    rows: int
    tokens: int
    labelled: int
    slots: int
    samples: int = 0
    handed: int = 0
    follow: int = 0


def kv_bytes(shape: KVShape, batch: BatchShape, element: int) -> int:
    """Keys and values of one forward, ``2 · layers · KV heads · head_dim`` numbers per token."""
    numbers = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
    return numbers * batch.rows * batch.tokens * element


def lean_workspace(source: KVShape, target: KVShape, cfg: RunConfig, batch: BatchShape, device: str) -> int:
    """Bytes of the chunk buffers of :func:`kvds.ops.lean.compute_lean` (fp32)."""
    heads_x, heads_y = source.num_key_value_heads // cfg.head_groups, target.num_key_value_heads // cfg.head_groups
    layers_x = -(-source.num_hidden_layers // cfg.layer_groups)
    layers_y = -(-target.num_hidden_layers // cfg.layer_groups)
    hard = cfg.layer_map in ("endpoint", "last_aligned")
    if hard:
        layers_x = layers_y = min(source.num_hidden_layers, target.num_hidden_layers)
    widths = [
        layers_x * heads_x * source.head_dim,
        layers_y * heads_y * source.head_dim,
        layers_y * heads_y * target.head_dim,
    ]
    if not hard and heads_x * heads_y > 4:
        widths.append(layers_y * heads_x * source.head_dim)
    size = max(16, CHUNK_ELEMENTS[device] // max(widths))
    return 4 * sum(widths) * min(size, batch.rows * batch.slots)
