"""Small model folders of several families, whole and damaged, for tests of what is loaded from them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, Qwen2Config

_SIZES = {
    "vocab_size": 24, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 16, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


def small_config(family: str, *, tied: bool) -> PreTrainedConfig:
    """Two layers of width 8."""
    if family == "gpt2":
        return GPT2Config(
            vocab_size=24, n_embd=8, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=1,
            tie_word_embeddings=tied,
        )  # fmt: skip
    kind = {"qwen2": Qwen2Config, "llama": LlamaConfig}[family]
    return kind(**_SIZES, tie_word_embeddings=tied)


@cache
def _weights(family: str, tied: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(family, tied=tied))
    state = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    if tied:
        del state["lm_head.weight"]
    return state


def small_weights(family: str, *, tied: bool) -> dict[str, Tensor]:
    """What ``model.safetensors`` of :func:`small_config` holds, all numbers different."""
    return dict(_weights(family, tied))


def write_model(folder: Path, config: PreTrainedConfig, tensors: dict[str, Tensor], *, parts: int = 1) -> Path:
    """A folder with ``config.json`` and these tensors, in one file or dealt out to ``parts`` with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    config.save_pretrained(folder)
    contents = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if parts == 1:
        save_file(contents, folder / "model.safetensors", {"format": "pt"})
        return folder
    where = {name: f"model-{i % parts + 1:05d}-of-{parts:05d}.safetensors" for i, name in enumerate(sorted(contents))}
    for file in set(where.values()):
        save_file({n: t for n, t in contents.items() if where[n] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
