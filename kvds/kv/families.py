"""The model families whose keys and values are known to be captured right, and the way to their attention layers.

What most families share is found in the module tree (:mod:`kvds.kv.attention_layout`); a line here says what one does
otherwise, and that tests hold its keys and values against the model's own cache. Any other family that is built as most
are is taken, too, once its first row's keys and values are those of its cache (:mod:`kvds.kv.cache_check`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from kvds.errors import InputError
from kvds.kv.attention_layout import AttentionLayout, Family, attention_layout

FAMILIES: dict[str, Family] = {
    "gemma": Family(tensor_parallel=True),
    "gemma2": Family(),
    "gemma3_text": Family(norm_by_head=True),
    "gpt2": Family(fused="c_attn"),
    "gpt_neox": Family(fused="query_key_value", fused_by_head=True),
    "granite": Family(),
    "llama": Family(tensor_parallel=True),
    "mistral": Family(tensor_parallel=True),
    "mixtral": Family(),
    "olmo2": Family(),
    "phi3": Family(fused="qkv_proj"),
    "qwen2": Family(tensor_parallel=True),
    "qwen3": Family(tensor_parallel=True),
    "qwen3_moe": Family(),
    "smollm3": Family(),
    "stablelm": Family(norm_by_head=True),
}
_LAYERS = ("layers", "h")
_ATTENTIONS = ("self_attn", "attention", "attn")


def family_of(config: Any) -> Family:
    """What is known of a model's family; that of most where nothing is."""
    return FAMILIES.get(config.model_type, Family())


def window_of(config: Any, kind: str) -> int | None:
    """How many positions a query sees in layers of a kind of ``layer_types``, itself included; None = all before it."""
    return getattr(config, "sliding_window", None) if kind == "sliding_attention" else None


def layer_kinds(config: Any) -> list[str]:
    """The kinds of attention that a model's layers have, each once; of one that tells none, that of its window."""
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    return kinds or ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"]


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
        model: It or its backbone.

    Raises:
        InputError: there is no such list, or a layer that stands there twice, so that what is read off it could be
            either's.
    """
    body: Any = backbone(model)
    for name in _LAYERS:
        layers = getattr(body, name, None)
        if isinstance(layers, nn.ModuleList):
            check_each_once(layers)
            return layers
    raise InputError(
        f"model_type={body.config.model_type}: {type(body).__name__} has no list of decoder layers called "
        f"{' or '.join(_LAYERS)}; expected a model built as most are (or --alignment_mode none)"
    )


def layers_name(model: nn.Module) -> str:
    """What the backbone calls the list of :func:`decoder_layers`."""
    layers = decoder_layers(model)
    return next(name for name, child in backbone(model).named_children() if child is layers)


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention module of each of :func:`decoder_layers`.

    Raises:
        InputError: a layer has none, or shares another's.
    """
    attentions: list[nn.Module] = []
    for number, layer in enumerate(decoder_layers(model)):
        found = [getattr(layer, name) for name in _ATTENTIONS if isinstance(getattr(layer, name, None), nn.Module)]
        if not found:
            raise InputError(
                f"model_type={backbone(model).config.model_type}: layer {number} has no attention called "  # type: ignore[union-attr]
                f"{' or '.join(_ATTENTIONS)}; expected keys and values in every layer (or --alignment_mode none)"
            )
        attentions.append(found[0])
    check_each_once(attentions)
    return attentions


def attention_layouts(model: nn.Module, layers: Sequence[int] | None = None) -> list[AttentionLayout]:
    """Where each of :func:`attention_modules`, or of ``layers`` of them, computes queries, keys and values.

    Raises:
        InputError: an attention without what they are read off, or a projection that serves two layers.
    """
    family = family_of(backbone(model).config)
    attentions = attention_modules(model)
    chosen = attentions if layers is None else [attentions[layer] for layer in layers]
    layouts = [attention_layout(attention, family) for attention in chosen]
    for part in ("query", "key", "value"):
        check_each_once(getattr(layout, part).module for layout in layouts)
    return layouts


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
