"""A tokenizer of bytes with the special tokens of ChatML, and chat templates that are good, marked, or unusable."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.harness.real_data import data_folder

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As those of reasoning models: of earlier turns the reasoning is left away.
FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.last %}"
    "<think>\n{{ message.reasoning_content | default('') }}\n</think>\n\n{% endif %}{{ message['content'] }}"
    "<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITHOUT_SYSTEM = CHATML.replace("%}<|im_start|>{{", "%}{% if message['role'] != 'system' %}<|im_start|>{{", 1).replace(
    "<|im_end|>\n{% endfor", "<|im_end|>\n{% endif %}{% endfor"
)
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + CHATML
BEGINS_THE_TRACE = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
WITHOUT_ANSWERS = CHATML.replace("{{ message['content'] }}", "{{ message['content'] if message['role'] == 'user' }}")
UNMARKED_TURN = MARKED.replace("message['role'] == 'assistant' %}", "message['role'] == 'assistant' and loop.last %}")


def chat_tokenizer(template: str | None = CHATML, *, ends_turns: bool = True) -> Any:
    """One token a byte; ``ends_turns``: what ends a turn ends a text, too."""
    special = ["<|im_end|>", "<|im_start|>", "<|end|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=special[0] if ends_turns else special[2], pad_token=special[2],
        additional_special_tokens=special,
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


def qwen2_tokenizer() -> Any:
    """The real one, with its chat template; skips the test where it is not at hand."""
    folder = data_folder() / "tokenizers/qwen2"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing: the tokenizer of Qwen2 with its chat template")
    return AutoTokenizer.from_pretrained(folder)


def turns(*said: str, **last: str) -> list[dict[str, str]]:
    """A conversation of ``"role: text"``; ``last``: more fields of the last turn."""
    messages = [dict(zip(("role", "content"), one.split(": ", 1), strict=True)) for one in said]
    messages[-1] |= last
    return messages
