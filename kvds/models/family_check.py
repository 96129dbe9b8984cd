"""A family that nobody listed, tried on a small model of it: are its keys and values found, does it keep samples apart.

The small model has a run's configuration, less layers, a narrow MLP and a short vocabulary, with random weights on the
CPU: what is tried is the code of the family, before any of its weights are read.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig

from kvds.errors import InputError, one_line
from kvds.kv import KVCapture, ObservingRows
from kvds.kv.families import FAMILIES, attention_layouts, backbone
from kvds.kv.observed import attention_rows
from kvds.kv.row_attention import ROW_ATTENTION, bounds_as_mask, run_attention
from kvds.kv.states import check_causal
from kvds.models.own_logits import check_own_logits
from kvds.models.pruning import pruned_config

_WIDTHS = ("intermediate_size", "moe_intermediate_size", "ffn_dim", "n_inner")
_NARROW, _VOCAB, _TOKENS = 16, 64, 7
_TOLERANCE = 1e-4


def check_family(config: PreTrainedConfig, place: str) -> None:
    """Refuse a model whose keys and values are not found, or are not those of its own cache and attention.

    Args:
        config: Of the model.
        place: What named it, for the message.

    Raises:
        InputError: saying what was not found, or what differs.
    """
    if config.model_type not in FAMILIES and (reason := _refusal(_key(config))):
        raise InputError(f"{place}: {reason}")


def check_losses(config: PreTrainedConfig, place: str) -> None:
    """Refuse a model whose logits are not made of its hidden states as losses make them, or see what comes later.

    Args:
        config: Of the model.
        place: What named it, for the message.

    Raises:
        InputError: saying what differs.
    """
    check_causal(config)
    if config.model_type not in FAMILIES and (reason := _wrong_losses(_key(config))):
        raise InputError(f"{place}: {reason}")


def keeps_samples_apart(config: PreTrainedConfig) -> bool:
    """Whether samples that share a row are computed as if each were alone, by their bounds."""
    return config.model_type in FAMILIES or _keeps_apart(_key(config))


def attention_of(config: PreTrainedConfig, setting: str) -> str:
    """From ``--attn_implementation`` to the attention that a run's model is built with."""
    return run_attention(setting) if keeps_samples_apart(config) else setting


def _key(config: PreTrainedConfig) -> str:
    return json.dumps(config.to_dict(), sort_keys=True, default=str)


def _small_model(key: str, attention: str) -> Any:
    values = json.loads(key)
    kinds = values.get("layer_types") or []
    config = AutoConfig.for_model(**values)
    # The fewest layers with one of each kind.
    layers = max([2, *(kinds.index(kind) + 1 for kind in set(kinds))])
    config = pruned_config(config, range(min(layers, config.num_hidden_layers)))
    small: dict[str, Any] = {name: _NARROW for name in _WIDTHS if isinstance(getattr(config, name, None), int)}
    small |= {f"{name}_token_id": 0 for name in ("pad", "bos", "eos")}
    config = type(config).from_dict(config.to_dict() | small | {"vocab_size": min(config.vocab_size, _VOCAB)})
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
        # Biases and norms away from zero and one, so that leaving one out shows.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _differs(found: Tensor, expected: Tensor) -> bool:
    return found.shape != expected.shape or bool((found - expected).norm() > _TOLERANCE * expected.norm())


@functools.cache
@torch.no_grad()
def _refusal(key: str) -> str:
    """Why a model of this configuration cannot be captured; empty where it can."""
    try:
        with torch.device("meta"):
            attention_layouts(AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(key))))
        return _difference(_small_model(key, "eager"))
    except InputError as error:
        return str(error)
    except Exception as error:  # a family that nobody has seen
        return (
            f"model_type={json.loads(key)['model_type']}: a small model of its configuration cannot be run "
            f"({one_line(error)}); expected one of {', '.join(sorted(FAMILIES))} (or --alignment_mode none)"
        )


def _difference(model: nn.Module) -> str:
    """What of captured keys, values and queries is not the model's own; empty where all are."""
    ids = torch.arange(3, 3 + _TOKENS)[None]
    rows = torch.arange(_TOKENS)[None]
    every = torch.ones_like(rows, dtype=torch.bool)
    cache = DynamicCache()
    attentions = model(input_ids=ids, use_cache=True, past_key_values=cache, output_attentions=True).attentions
    with KVCapture(model, rope="post", query_rows=rows) as capture:
        backbone(model)(input_ids=ids, use_cache=False)
    seen = ObservingRows(rows, every)
    for number, layer in enumerate(cache.layers):
        observed = capture.observed[number]
        probabilities = attention_rows(observed, observed.keys(), seen, every).flatten(1, 2)
        for what, found, expected in (
            ("keys", capture.states.keys[number], layer.keys),
            ("values", capture.states.values[number], layer.values),
            ("attention", probabilities, attentions[number]),
        ):
            if _differs(found, expected):
                kind = model.config.model_type  # type: ignore[union-attr]
                return (
                    f"model_type={kind}: the {what} of layer {number} as captured are not the model's own; expected "
                    f"one of {', '.join(sorted(FAMILIES))} (or --alignment_mode none)"
                )
    return ""


@functools.cache
@torch.no_grad()
def _wrong_losses(key: str) -> str:
    """What of the losses of a model of this configuration would be wrong; empty where nothing is, or nobody knows."""
    ids = torch.arange(3, 3 + _TOKENS)
    try:
        model = _small_model(key, "eager")
        other = ids.clone()
        other[-1] += 1
        body = backbone(model)
        seen, changed = (body(input_ids=row[None], use_cache=False).last_hidden_state for row in (ids, other))
    except Exception:  # the model itself is asked when it is there
        return ""
    if _differs(changed[:, :-1], seen[:, :-1]):
        return f"model_type={model.config.model_type}: its tokens see what comes later; expected a causal model"
    try:
        check_own_logits(model, ids)
    except InputError as error:
        return str(error)
    return ""


@functools.cache
@torch.no_grad()
def _keeps_apart(key: str) -> bool:
    try:
        plain, model = (_small_model(key, attention) for attention in ("eager", ROW_ATTENTION))
        ids = torch.arange(3, 3 + _TOKENS)
        lengths = (_TOKENS - 3, 3)
        samples = [part[None] for part in ids.split(lengths)]
        alone = [backbone(plain)(input_ids=sample, use_cache=False).last_hidden_state for sample in samples]
        bounds = torch.tensor([0, lengths[0], _TOKENS], dtype=torch.int32)
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        together = backbone(model)(
            input_ids=ids[None], position_ids=positions, attention_mask=bounds_as_mask(bounds, bounds.device),
            max_length_q=lengths[0], use_cache=False,
        ).last_hidden_state  # fmt: skip
        return not _differs(together, torch.cat(alone, 1))
    except Exception:  # a family that nobody has seen: its samples get rows of their own
        return False
