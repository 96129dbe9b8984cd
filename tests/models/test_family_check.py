"""Families that nobody listed: taken where a small model of theirs is captured right, else refused by what is not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kvds.config import RunConfig
from kvds.data.batches import collate
from kvds.data.encoding import EncodedSample
from kvds.data.labels import LabelledPositions
from kvds.data.tokenizer import train_problem_tokenizer
from kvds.distillation.module import DistillationModule
from kvds.distillation.step import LossWeights, StepInput
from kvds.errors import InputError
from kvds.kv import KVCapture
from kvds.kv.families import FAMILIES
from kvds.kv.row_attention import ROW_ATTENTION
from kvds.models import family_check
from kvds.models.architecture import load_model_configs
from kvds.models.family_check import attention_of, check_family, check_losses, keeps_samples_apart

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 100, "max_position_embeddings": 64,
    "pad_token_id": 0,
}  # fmt: skip
REFUSED = {
    "bloom": "model_type=bloom: layer 0 has no attention called self_attn or attention or attn",
    "cohere2": "model_type=cohere2: the keys of layer 3 as captured are not the model's own",  # not rotated
    "deepseek_v3": "DeepseekV3Attention has not head_dim or head_size, the size of a head",
    "gemma3n_text": "Gemma3nTextAttention has not keys and values of its own: it reads those of a layer before",
    "gpt_oss": "model_type=gpt_oss: a small model of its configuration cannot be run",  # its sinks take attention away
    "mpt": "model_type=mpt: MptModel has no list of decoder layers called layers or h",
    "qwen3_next": "model_type=qwen3_next: layer 0 has no attention called self_attn or attention or attn",
}


def config_of(family: str) -> Any:
    assert family not in FAMILIES
    own = {"num_kv_shared_layers": 2, "layer_types": ["full_attention"] * 4} if family == "gemma3n_text" else {}
    return AutoConfig.for_model(family, **SIZES, **own)


@pytest.mark.parametrize("family", ["glm", "olmoe", "starcoder2"])
def test_one_that_is_built_as_most_are_is_taken(family: str) -> None:
    config = config_of(family)
    check_family(config, "--student_name=X")
    assert keeps_samples_apart(config) and attention_of(config, "sdpa") == ROW_ATTENTION
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids, cache = torch.randint(3, 100, (2, 9)), DynamicCache()
    with torch.no_grad(), KVCapture(model, rope="post") as capture:
        model(input_ids=ids, use_cache=True, past_key_values=cache)
    for number, layer in enumerate(cache.layers):
        torch.testing.assert_close(capture.states.keys[number], layer.keys)
        torch.testing.assert_close(capture.states.values[number], layer.values)


@pytest.mark.parametrize("family", REFUSED)
def test_another_is_refused_by_what_is_missing(family: str) -> None:
    with pytest.raises(InputError) as caught:
        check_family(config_of(family), "--student_name=X")
    assert str(caught.value).startswith(f"--student_name=X: {REFUSED[family]}") and "expected" in str(caught.value)


@pytest.mark.parametrize("family", ["bloom", "gpt_oss", "mamba", "qwen3_next"])
def test_one_that_mixes_samples_of_a_row_gives_them_rows_of_their_own(family: str) -> None:
    config = config_of(family)
    assert not keeps_samples_apart(config) and attention_of(config, "sdpa") == "sdpa"


def test_a_norm_that_is_not_where_it_was_looked_for_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried shows a capture that is wrong: of a family that needs its line, without it."""
    config = AutoConfig.for_model("stablelm", **SIZES, qk_layernorm=True)
    check_family(config, "X")
    monkeypatch.delitem(FAMILIES, "stablelm")
    family_check._refusal.cache_clear()
    with pytest.raises(InputError, match="stablelm"):
        check_family(config, "X")


@pytest.mark.parametrize("family", ["bloom", "gpt_oss", "mamba"])
def test_losses_of_one_that_cannot_be_captured_are_those_of_its_own_logits(family: str) -> None:
    config = config_of(family)
    check_losses(config, "X")
    torch.manual_seed(2)
    student = AutoModelForCausalLM.from_config(config).eval()
    rows = [EncodedSample(tuple(range(2, 2 + n)), (1,) * 3 + (2,) * (n - 4) + (3,), i) for i, n in enumerate((9, 6))]
    batch = collate(rows, [0, 1], 0, 6.0, 6.0)
    labelled = LabelledPositions.from_labels(batch.labels)
    loss, _ = DistillationModule(student)(StepInput(batch, labelled, None, None, None, LossWeights()))
    logits = student(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    plain = F.cross_entropy(logits.flatten(0, 1)[labelled.index], labelled.target, reduction="sum")
    torch.testing.assert_close(loss, plain / batch.label_normalizer, rtol=1e-5, atol=1e-6)


def test_logits_that_pass_the_backbone_by_are_refused() -> None:
    with pytest.raises(InputError, match="X: OPTForCausalLM: its logits cannot be made of its hidden states"):
        check_losses(config_of("opt"), "X")


def test_a_model_that_sees_what_comes_later_is_refused() -> None:
    with pytest.raises(InputError, match="X: model_type=bert: its tokens see what comes later"):
        check_losses(config_of("bert"), "X")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    train_problem_tokenizer(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


def run_of(folder: Path, **settings: Any) -> RunConfig:
    return RunConfig(
        model_name=str(folder), teacher_init="random", student_init="random", max_length=16,
        output_dir=str(folder / "run"), **settings,
    )  # fmt: skip


def test_a_run_without_captures_takes_one_and_its_samples_get_rows_of_their_own(tmp_path: Path, tokenizer: Any) -> None:
    config = config_of("bloom")
    config.vocab_size = len(tokenizer)
    config.save_pretrained(tmp_path)
    plain = run_of(tmp_path, alignment_mode="none", logit_kd_weight=1.0)
    assert len(load_model_configs(plain, tokenizer).teachers) == 1
    with pytest.raises(InputError, match="packing=True: bloom does not tell samples of one row apart.*--no_packing"):
        load_model_configs(dataclasses.replace(plain, packing=True), tokenizer)
    with pytest.raises(InputError, match="tokens_per_batch=64: bloom does not .*--tokens_per_batch 0"):
        load_model_configs(dataclasses.replace(plain, tokens_per_batch=64), tokenizer)
    with pytest.raises(InputError, match="--student_name=.*: model_type=bloom: layer 0 has no attention called"):
        load_model_configs(run_of(tmp_path), tokenizer)
