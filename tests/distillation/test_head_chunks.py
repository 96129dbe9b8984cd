"""How many chunks of logits, and where ranks must agree on it."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from kvds.config.recipe import parse_run_config
from kvds.distillation.head_chunks import agreed_chunks, chunk_count
from tests.harness.scaled_families import SCALED, small_scaled_config

VOCAB = 3000


def settings(**changes: object) -> Any:
    flags = {
        "model_name": "any",
        "datasets": "synthetic",
        "deepspeed_config": "ds_configs/zero3.json",
        "output_dir": "outputs/x",
        **changes,
    }
    return parse_run_config([token for name, value in flags.items() for token in (f"--{name}", str(value))])


@pytest.mark.parametrize(
    ("tokens", "vocab", "size"), [(1, 10, 4), (2807, 151_936, 2), (12_000, 151_936, 2), (8192, 50_257, 4)]
)
def test_no_chunk_holds_more_than_the_limit_and_none_is_idle(tokens: int, vocab: int, size: int) -> None:
    chunks = chunk_count(tokens, vocab, size, distilled=False)
    assert -(-tokens // chunks) * vocab * size <= 2**29 + vocab * size
    assert chunks == 1 or -(-tokens // (chunks - 1)) * vocab * size > 2**29 - vocab * size


def test_chunks_of_known_batches() -> None:
    assert [chunk_count(n, 151_936, 2, distilled=False) for n in (0, 1766, 1767, 2807, 12_000)] == [1, 1, 2, 2, 7]
    assert [chunk_count(n, 151_936, 2, distilled=True) for n in (0, 883, 884, 2807)] == [1, 1, 2, 4]


@pytest.mark.parametrize(
    ("changes", "agreed"),
    [
        ({}, False),
        ({"logit_kd_weight": 0.5}, False),
        ({"teacher_placement": "zero3"}, False),  # its head is not called
        ({"teacher_placement": "zero3", "logit_kd_weight": 0.5}, True),
        ({"teacher_placement": "zero3_offload", "logit_kd_weight": 0.5}, True),
    ],
)
def test_ranks_agree_where_a_chunk_gathers_the_teachers_head(changes: dict[str, object], agreed: bool) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=VOCAB, **sizes))
    found = agreed_chunks(settings(**changes), model, 100_000)
    assert found == (5 if agreed else None)


@pytest.mark.parametrize("family", SCALED)
def test_ranks_agree_where_the_students_own_forward_makes_logits(family: str) -> None:
    model = AutoModelForCausalLM.from_config(small_scaled_config(family, vocab_size=VOCAB))
    assert agreed_chunks(settings(), model, 100_000) == 3
