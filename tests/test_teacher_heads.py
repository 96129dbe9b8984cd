"""Which teachers and how many ranks can share heads. What they compute is tested in test_train_zero3.py."""

from __future__ import annotations

import pytest
from transformers import GPT2Config, Qwen2Config

from kvds.errors import InputError
from kvds.teacher_heads import check_heads

QWEN2 = Qwen2Config(num_hidden_layers=2, hidden_size=96, num_attention_heads=12, num_key_value_heads=4)


@pytest.mark.parametrize(("size", "world_size"), [(2, 2), (2, 6), (4, 8)])
def test_numbers_that_divide_pass(size: int, world_size: int) -> None:
    check_heads(QWEN2, size, world_size)


@pytest.mark.parametrize(
    ("config", "size", "world_size", "message"),
    [
        (QWEN2, 4, 6, "teacher_tp_size=4: 6 ranks are no multiple"),
        (QWEN2, 8, 8, "teacher_tp_size=8: the teacher has 4 key-value heads; expected a divisor"),
        (GPT2Config(n_head=4, n_embd=32), 2, 2, "GPT-2 keeps queries, keys and values in one matrix"),
    ],
)
def test_what_cannot_be_dealt_out_is_refused(config: object, size: int, world_size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_heads(config, size, world_size)
