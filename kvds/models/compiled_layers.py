"""Decoder layers in compiled pieces, around projections that stay as they are.

A layer becomes ``norm | q, k, v | rotation | attention | output projection, norm, MLP``. Norm, rotation and rest are
compiled, once for all layers of a model. Projections of queries, keys and values stay modules, and attention is called
as a module, so that what hangs on their outputs (captured keys and values, the watch over gradients) sees the very
tensors that flow on, and a forward without a capture in between changes nothing. Attention itself is a call into
kernels that nothing could fuse with.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvds.config import RunConfig
from kvds.errors import InputError
from kvds.kv.families import decoder_layers
from kvds.kv.row_attention import ROW_ATTENTION, run_attention
from kvds.models.architecture import ModelConfigs

log = logging.getLogger("kvds")

BACKEND = "inductor"
"""Of ``torch.compile``."""
COMPILED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Families of one structure: RMS norms, rotated queries and keys, a gated MLP."""
# DeepSpeed puts a function of its own in place of F.linear, which a compiler cannot look into.
_linear = torch._C._nn.linear  # type: ignore[attr-defined]
# Of one piece: teacher and student, with and without gradient, one row or several.
_RECOMPILE_LIMIT = 64


def why_not_compiled(config: Any, attention: str = ROW_ATTENTION) -> str:
    """What of a model keeps its layers from being compiled; empty where nothing does.

    Args:
        config: Of the model.
        attention: That it runs with.
    """
    if config.model_type not in COMPILED_FAMILIES:
        return f"{config.model_type} has layers of another structure than {', '.join(COMPILED_FAMILIES)}"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}, not silu"
    if attention != ROW_ATTENTION:
        return f"its attention is {attention}, not that of --attn_implementation sdpa"
    return ""


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def _rotation(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[B, T, heads, head_dim]``, rotated by ``[B or 1, T, head_dim]``."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return _rotated(query, cos, sin), _rotated(key, cos, sin)


def _rest(
    residual: Tensor, attended: Tensor, out: tuple[Tensor, Tensor | None], norm: Tensor, eps: float,
    gate: tuple[Tensor, Tensor | None], up: tuple[Tensor, Tensor | None], down: tuple[Tensor, Tensor | None],
) -> Tensor:  # fmt: skip
    """What follows attention: output projection, norm and MLP with their residual connections."""
    residual = residual + _linear(attended, *out)
    x = _norm(residual, norm, eps)
    return residual + _linear(F.silu(_linear(x, *gate)) * _linear(x, *up), *down)


@dataclass(frozen=True)
class Pieces:
    """What a layer is put together from.

    Attributes:
        norm: ``(x, weight, eps)`` → an RMS norm.
        rotation: ``(query, key, cos, sin)`` → both rotated.
        rest: From the residual stream and what attention gives to the layer's output, as :func:`_rest`.
    """

    norm: Callable[..., Tensor]
    rotation: Callable[..., tuple[Tensor, Tensor]]
    rest: Callable[..., Tensor]


@functools.cache
def _pieces(backend: str) -> Pieces:
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _RECOMPILE_LIMIT)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * _RECOMPILE_LIMIT)
    # Any number of tokens by one kernel.
    made: list[Any] = [torch.compile(piece, dynamic=True, backend=backend) for piece in (_norm, _rotation, _rest)]
    return Pieces(*made)


def _weights(module: Any) -> tuple[Tensor, Tensor | None]:
    return module.weight, module.bias


class _Attention:
    """In place of an attention's forward: the same less its output projection.

    Args:
        attention: The module.
        pieces: Compiled.
    """

    def __init__(self, attention: Any, pieces: Pieces) -> None:
        self._attention, self._pieces = attention, pieces
        # Called ``past_key_values`` in earlier transformers.
        names = inspect.signature(type(attention).forward).parameters
        self._cache_argument = "cache" if "cache" in names else "past_key_values"

    def __call__(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        own = self._attention
        shape = (*hidden_states.shape[:-1], -1, own.head_dim)
        query, key = own.q_proj(hidden_states).view(shape), own.k_proj(hidden_states).view(shape)
        if hasattr(own, "q_norm"):
            query, key = own.q_norm(query), own.k_norm(key)
        value = own.v_proj(hidden_states).view(shape)
        query, key = self._pieces.rotation(query, key, *position_embeddings)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if (cache := kwargs.pop(self._cache_argument, None)) is not None:
            key, value = cache.update(key, value, own.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[own.config._attn_implementation]
        # Only mistral keeps its window in the configuration alone.
        window = getattr(own, "sliding_window", None)
        if own.config.model_type == "mistral":
            window = own.config.sliding_window
        heads, _ = attend(
            own, query, key, value, attention_mask, dropout=own.attention_dropout if own.training else 0.0,
            scaling=own.scaling, sliding_window=window, **kwargs,
        )  # fmt: skip
        return heads.flatten(2), None


@functools.cache
def _compiled_class(kind: type[nn.Module], pieces: Pieces) -> type[nn.Module]:
    """A decoder layer's class with another forward; as a class, since transformers wraps those into checkpointing."""
    base: Any = kind

    class CompiledLayer(base):
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            attention, mlp = self.self_attn, self.mlp
            if not isinstance(attention.forward, _Attention):  # somebody has another use for this layer for a while
                return super().forward(hidden_states, *args, **kwargs)
            first, second = self.input_layernorm, self.post_attention_layernorm
            normed = pieces.norm(hidden_states, first.weight, first.variance_epsilon)
            attended, _ = attention(normed, *args, **kwargs)
            return pieces.rest(
                hidden_states, attended, _weights(attention.o_proj), second.weight, second.variance_epsilon,
                _weights(mlp.gate_proj), _weights(mlp.up_proj), _weights(mlp.down_proj),
            )  # fmt: skip

    CompiledLayer.__name__, CompiledLayer.__qualname__ = kind.__name__, kind.__qualname__
    return CompiledLayer


def compile_layers(
    model: nn.Module,
    layers: Sequence[nn.Module] | None = None,
    *,
    backend: str | None = None,
    pieces: Pieces | None = None,
) -> int:
    """Give decoder layers of ``model`` a forward in compiled pieces: the same numbers up to rounding.

    A cache that is given is read and written as by plain layers. Nothing is compiled before the first forward.

    Args:
        model: A causal language model that :func:`why_not_compiled` has nothing against.
        layers: Of its decoder layers those to change; None: all. Under ZeRO-3 those that are gathered whole, as the
            pieces read the weights of several modules.
        backend: Of ``torch.compile``; None: :data:`BACKEND`.
        pieces: In place of compiled ones.

    Returns:
        How many layers were changed.
    """
    chosen = list(decoder_layers(model) if layers is None else layers)
    pieces = pieces or _pieces(BACKEND if backend is None else backend)
    for layer in chosen:
        kind: Any = type(layer)
        layer.__class__ = _compiled_class(kind, pieces)
        attention: Any = layer.self_attn
        attention.forward = _Attention(attention, pieces)
    return len(chosen)


def _plain(model: nn.Module) -> bool:
    """Whether the pieces, which read weights and biases of projections, compute what these do."""
    layer: Any = decoder_layers(model)[0]
    used = [layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj]
    return all(type(module) is nn.Linear for module in used)


def compile_as_asked(
    model: nn.Module, setting: str, device: torch.device, *, flag: str, layers: Sequence[nn.Module] | None = None
) -> bool:
    """Compile a run's model, or say why not.

    Args:
        model: As of :func:`compile_layers`, of any family.
        setting: ``--compile``.
        device: Where it runs: ``auto`` compiles on a GPU alone.
        flag: ``"teacher"`` or ``"student"``, for messages.
        layers: As of :func:`compile_layers`.

    Raises:
        InputError: under ``on``, where it cannot be compiled.
    """
    if setting == "off" or (setting == "auto" and device.type != "cuda"):
        return False
    config: Any = model.config
    reason = why_not_compiled(config, config._attn_implementation)
    if not reason and layers is not None and not layers:
        reason = "ZeRO-3 gathers its layers in parts, as the DeepSpeed file says"
    if not reason and not _plain(model):
        reason = "its projections are no plain ones: adapters or quantised weights"
    if reason:
        refuse_uncompiled(setting, reason, flag=flag)
        log.info("compile=%s: the %s stays as it is: %s", setting, flag, reason)
        return False
    compile_layers(model, layers)
    return True


def check_compilable(cfg: RunConfig, configs: ModelConfigs) -> None:
    """Refuse ``--compile on`` for models that cannot be compiled, before any weights are read.

    Raises:
        InputError: naming the model and what keeps it from that.
    """
    attention = run_attention(cfg.attn_implementation)
    refuse_uncompiled(cfg.compile, why_not_compiled(configs.student, attention), flag="student")
    for config in configs.teachers if cfg.teacher_cache is None else ():
        refuse_uncompiled(cfg.compile, why_not_compiled(config, attention), flag="teacher")


def refuse_uncompiled(setting: str, reason: str, *, flag: str) -> None:
    """Raise where compiling was asked for and there is a ``reason`` against it.

    Raises:
        InputError: naming the reason.
    """
    if setting == "on" and reason:
        raise InputError(
            f"compile=on: the {flag} cannot be compiled: {reason}; expected another one (or --compile auto)"
        )
