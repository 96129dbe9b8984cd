"""Which decoder layers ZeRO-3 gathers whole. That losses and weights stay what they are: ``test_train_zero3.py``."""

from typing import Any

import pytest
from deepspeed.utils import z3_leaf_module
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from kvds.distributed.layer_gathering import gather_whole_layers

SIZES: dict[str, Any] = dict(
    vocab_size=16, num_hidden_layers=3, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=1
)
CONFIGS = [Qwen2Config(**SIZES), LlamaConfig(**SIZES), GPT2Config(vocab_size=16, n_layer=3, n_embd=8, n_head=2)]
STAGE_3 = {"zero_optimization": {"stage": 3}}


def marked(model: nn.Module) -> list[str]:
    return [name.rsplit(".", 1)[-1] for name, module in model.named_modules() if z3_leaf_module(module)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_all_layers_of_a_student_and_all_but_the_last_of_a_teacher(config):
    student = AutoModelForCausalLM.from_config(config)
    assert len(gather_whole_layers(student, STAGE_3)) == 3 and marked(student) == ["0", "1", "2"]
    teacher = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    assert len(gather_whole_layers(teacher, STAGE_3)) == 2 and marked(teacher) == ["0", "1"]


@pytest.mark.parametrize(
    "zero",
    [
        pytest.param({"stage": 2}, id="stage 2"),
        pytest.param({"stage": 3, "leaf_module": {"classes": []}}, id="leaf_module"),
        pytest.param({"stage": 3, "stage3_module_granularity_threshold": 9}, id="granularity"),
    ],
)
def test_what_the_file_says_stands(zero):
    student = AutoModelForCausalLM.from_config(CONFIGS[0])
    assert len(gather_whole_layers(student, {"zero_optimization": zero})) == 0 and marked(student) == []


def test_a_model_that_trains_in_part_stays_in_parts():
    student = AutoModelForCausalLM.from_config(CONFIGS[0])
    student.get_input_embeddings().weight.requires_grad = False
    assert len(gather_whole_layers(student, STAGE_3)) == 0 and marked(student) == []
