"""Small random pairs of every family, and rows with prompts of several lengths."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvds.data.encoding import EncodedSample

VOCAB = 50


def model_of(family: str, *, seed: int, layers: int, heads: int = 4, groups: int = 2, dim: int = 8, **more: Any) -> Any:
    """fp64, so that what is equal is equal; large weights, so that tokens differ."""
    sizes: dict[str, Any] = {
        "num_hidden_layers": layers, "hidden_size": heads * dim, "intermediate_size": 24, "num_attention_heads": heads,
        "num_key_value_heads": groups, "head_dim": dim, "max_position_embeddings": 64, "initializer_range": 0.3,
        "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
    }  # fmt: skip
    if family == "gpt2":
        sizes = {
            "n_layer": layers, "n_embd": heads * dim, "n_head": heads, "n_positions": 64, "initializer_range": 0.3,
            "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
        }  # fmt: skip
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, vocab_size=VOCAB, **(sizes | more))
    return AutoModelForCausalLM.from_config(config).double().eval()


def rows_of(lengths: list[tuple[int, int, int]], seed: int = 0) -> list[EncodedSample]:
    """Rows of random tokens, with so many of prompt, rationale and answer."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, counts in enumerate(lengths):
        ids = torch.randint(2, VOCAB, (sum(counts),), generator=generator).tolist()
        segments = tuple(segment for segment, count in enumerate(counts, 1) for _ in range(count))
        rows.append(EncodedSample(tuple(ids), segments, number))
    return rows
