"""A recipe of two small models for every test of the plan."""

from pathlib import Path

import pytest
from transformers import Qwen2Config

from kvds.data.tokenizer import train_problem_tokenizer
from tests.harness.plan_recipe import QWEN

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Configurations alone of Qwen2's 1.5B and 0.5B, and a small tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for name, sizes in QWEN.items():
        Qwen2Config(num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True, **sizes).save_pretrained(
            folder / name
        )
    train_problem_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture
def recipe(models, tmp_path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"teacher_name: {models / 'teacher'}\nstudent_name: {models / 'student'}\nmap_proj_share_dim: true\n"
        f"tokenizer_name: {models / 'tokenizer'}\ndatasets: [synthetic]\nsynthetic_problems: 50\nmax_length: 64\n"
        f"deepspeed_config: {REPOSITORY / 'ds_configs/zero3.json'}\nbatch_size: 4\nkv_parts: kv\n"
    )
    return file
