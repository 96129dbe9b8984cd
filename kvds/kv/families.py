"""Where the supported model families compute queries, keys and values: one entry a family.

A family says which sub-modules' outputs hold an attention layer's queries, keys and values before the rotary embedding,
in which columns of the output, and how attention compares them. None of these families caps its attention logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from kvds.errors import InputError


@dataclass(frozen=True)
class AttentionLayout:
    """The modules of one attention layer whose outputs hold queries, keys and values.

    Attributes:
        query_module: As ``key_module``, for queries; its heads are the ``num_attention_heads``.
        query_columns: As ``key_columns``, for queries.
        key_module: Its output ends as ``[B, T, heads · head_dim]`` or ``[B, T, heads, head_dim]``.
        key_columns: Which part of the last dimension holds keys.
        value_module: As ``key_module``, for values.
        value_columns: As ``key_columns``, for values.
        rotary: Function ``(q, k, cos, sin) -> (q, k)`` of the model, or None where positions are learned.
        scaling: What attention multiplies ``q · k`` by.
        sliding_window: A query sees itself and the ``sliding_window - 1`` positions before it; None = all before it.
    """

    query_module: nn.Module
    query_columns: slice
    key_module: nn.Module
    key_columns: slice
    value_module: nn.Module
    value_columns: slice
    rotary: Callable[..., Any] | None
    scaling: float
    sliding_window: int | None


ALL = slice(None)


def _separate(attention: Any, rotary: Callable[..., Any]) -> AttentionLayout:
    window = getattr(attention, "sliding_window", None)
    return AttentionLayout(
        attention.q_proj, ALL, attention.k_proj, ALL, attention.v_proj, ALL, rotary, attention.scaling, window
    )


def _qwen2(attention: Any) -> AttentionLayout:
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    return _separate(attention, apply_rotary_pos_emb)


def _llama(attention: Any) -> AttentionLayout:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    return _separate(attention, apply_rotary_pos_emb)


def _mistral(attention: Any) -> AttentionLayout:
    from transformers.models.mistral.modeling_mistral import apply_rotary_pos_emb

    # The window is the configuration's, the same for all layers.
    return replace(_separate(attention, apply_rotary_pos_emb), sliding_window=attention.config.sliding_window)


def _gemma(attention: Any) -> AttentionLayout:
    from transformers.models.gemma.modeling_gemma import apply_rotary_pos_emb

    return _separate(attention, apply_rotary_pos_emb)


def _qwen3(attention: Any) -> AttentionLayout:
    from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

    # Queries and keys are normalised per head before they are rotated: what attention compares is the norm's output.
    separate = _separate(attention, apply_rotary_pos_emb)
    return replace(separate, query_module=attention.q_norm, key_module=attention.k_norm)


def _gpt2(attention: Any) -> AttentionLayout:
    width = attention.split_size
    queries, keys, values = (slice(i * width, (i + 1) * width) for i in range(3))
    fused = attention.c_attn
    return AttentionLayout(fused, queries, fused, keys, fused, values, None, attention.scaling, None)


@dataclass(frozen=True)
class Family:
    """How to walk from a backbone to its attention layers.

    Attributes:
        layers: Name of the backbone's list of layers.
        attention: Name of a layer's attention module.
        layout: From an attention module to its :class:`AttentionLayout`.
    """

    layers: str
    attention: str
    layout: Callable[[Any], AttentionLayout]


FAMILIES: dict[str, Family] = {
    "gemma": Family("layers", "self_attn", _gemma),
    "gpt2": Family("h", "attn", _gpt2),
    "llama": Family("layers", "self_attn", _llama),
    "mistral": Family("layers", "self_attn", _mistral),
    "qwen2": Family("layers", "self_attn", _qwen2),
    "qwen3": Family("layers", "self_attn", _qwen3),
}


def sliding_window_of(config: Any) -> int | None:
    """How many positions a query sees, itself included, where all layers are of one kind; None = all before it."""
    kinds = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) if not kinds or kinds[0] == "sliding_attention" else None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model of transformers inside what others put around it: DDP, FSDP and DeepSpeed's engine (``.module``), PEFT
    (``.base_model.model``), ``torch.compile`` (``._orig_mod``), one in the other as well.

    Raises:
        InputError: there is none.
    """
    inner = model
    while not isinstance(inner, PreTrainedModel):
        base = getattr(inner, "base_model", None)
        candidates = [getattr(inner, "module", None), getattr(inner, "_orig_mod", None)]
        candidates += [getattr(base, "model", None), getattr(inner, "model", None)]
        found = next((module for module in candidates if isinstance(module, nn.Module)), None)
        if found is None:
            raise InputError(
                f"{type(model).__name__}: holds no model of transformers; expected one, or one inside DDP, FSDP, "
                "DeepSpeed's engine or PEFT"
            )
        inner = found
    return inner


def backbone(model: nn.Module) -> nn.Module:
    """The transformer without its language-model head, also of a wrapped model; the model itself where it has none."""
    model = unwrapped(model)
    return getattr(model, str(getattr(model, "base_model_prefix", "")), model)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of a model's decoder layers.

    Args:
        model: Of a family in :data:`FAMILIES`; it or its backbone.

    Raises:
        InputError: another family, or a layer that stands there twice, so that what is read off it could be either's.
    """
    body: Any = backbone(model)
    kind = body.config.model_type
    if kind not in FAMILIES:
        raise InputError(f"layers of a {kind} model are not known; expected one of {', '.join(FAMILIES)}")
    layers = getattr(body, FAMILIES[kind].layers)
    assert isinstance(layers, nn.ModuleList)
    check_each_once(layers)
    return layers


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention module of each of :func:`decoder_layers`."""
    body: Any = backbone(model)
    name = FAMILIES[body.config.model_type].attention
    attentions: list[nn.Module] = [getattr(layer, name) for layer in decoder_layers(body)]
    check_each_once(attentions)
    return attentions


def check_each_once(modules: Iterable[nn.Module]) -> None:
    """Refuse modules, one of each layer, of which one serves two layers.

    Raises:
        InputError: naming both.
    """
    first: dict[int, int] = {}
    for layer, module in enumerate(modules):
        if first.setdefault(id(module), layer) != layer:
            raise InputError(
                f"layers {first[id(module)]} and {layer} share one {type(module).__name__}, whose outputs would be "
                "taken for either's; expected modules of its own in every layer"
            )
