"""Keys and values of one forward, read off the projections by hooks, with their graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kvds.errors import InputError
from kvds.kv.families import FAMILIES, AttentionLayout
from kvds.kv.states import KVShape, KVStates


class KVCapture:
    """Context manager: after one forward of ``model`` inside it, ``states`` holds every layer's keys and values.

    The tensors are views of the projections' outputs, ``[B, num_key_value_heads, T, head_dim]`` with a contiguous last
    dimension; no cache is needed and no second forward is run. Gradients sent into them reach the projections and all
    below, also under non-reentrant gradient checkpointing.

    Args:
        model: A causal language model or its backbone, of a family in :data:`kvds.kv.families.FAMILIES`.
        rope: ``"pre"``: keys as projected (and normalised, where the family does); ``"post"``: rotated as attention
            uses them.
        require_grad: Raise where a captured tensor has no graph, instead of training on nothing.

    Attributes:
        states: The captured :class:`KVStates`.
        key_outputs: Per layer, the projection's output tensor and the columns of it that hold keys.
        value_outputs: The same for values.
        key_heads: Per layer, the unrotated keys as views that only a loss on ``states`` sends gradients to.

    Raises:
        InputError: unknown model family.
        RuntimeError: on leaving, where a layer was not run, or where ``require_grad`` finds a tensor without a graph.
    """

    def __init__(self, model: nn.Module, *, rope: str = "pre", require_grad: bool = False) -> None:
        config: Any = model.config
        self._shape = KVShape.from_config(config)
        if rope not in ("pre", "post"):
            raise InputError(f"kv_rope={rope}: expected pre or post")
        family = FAMILIES[config.model_type]
        backbone = getattr(model, getattr(model, "base_model_prefix", ""), model)
        self._attentions: list[nn.Module] = [
            getattr(layer, family.attention) for layer in getattr(backbone, family.layers)
        ]
        self._layouts: list[AttentionLayout] = [family.layout(attention) for attention in self._attentions]
        self._rope, self._require_grad = rope, require_grad
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> KVCapture:
        count = len(self._layouts)
        self.key_outputs: list[tuple[Tensor, slice]] = [()] * count  # type: ignore[list-item]
        self.value_outputs: list[tuple[Tensor, slice]] = [()] * count  # type: ignore[list-item]
        self._rotations: list[tuple[Tensor, Tensor] | None] = [None] * count
        for index, (attention, layout) in enumerate(zip(self._attentions, self._layouts, strict=True)):
            if self._rope == "post" and layout.rotary is not None:
                self._handles.append(attention.register_forward_pre_hook(self._rotation_hook(index), with_kwargs=True))
            for module, columns, outputs in (
                (layout.key_module, layout.key_columns, self.key_outputs),
                (layout.value_module, layout.value_columns, self.value_outputs),
            ):
                self._handles.append(module.register_forward_hook(self._output_hook(index, columns, outputs)))
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        # Gone before the backward pass: the recomputation of checkpointed layers must not be captured again.
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if exc_type is None:
            self.states = self._collect()
        self._rotations = []

    @staticmethod
    def _output_hook(index: int, columns: slice, outputs: list[tuple[Tensor, slice]]) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            outputs[index] = (output, columns)

        return hook

    def _rotation_hook(self, index: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rotation = kwargs.get("position_embeddings", args[1] if len(args) > 1 else None)
            self._rotations[index] = rotation

        return hook

    def _collect(self) -> KVStates:
        missing = [i for i, output in enumerate(self.key_outputs) if not output]
        if missing:
            raise RuntimeError(f"no forward ran through attention layers {missing} inside KVCapture")
        keys = [self._heads(*output) for output in self.key_outputs]
        values = [self._heads(*output) for output in self.value_outputs]
        if self._require_grad:
            for name, tensors in (("keys", keys), ("values", values)):
                for layer, tensor in enumerate(tensors):
                    if tensor.grad_fn is None:
                        raise RuntimeError(
                            f"captured {name} of layer {layer} carry no graph, so a KV loss would train nothing: the "
                            "forward "
                            f"ran under no_grad or reentrant gradient checkpointing (use use_reentrant=False)"
                        )
        self.key_heads = keys
        return KVStates(tuple(self._rotated(i, key) for i, key in enumerate(keys)), tuple(values))

    def _heads(self, output: Tensor, columns: slice) -> Tensor:
        if output.dim() == 3:
            output = output[..., columns].unflatten(-1, (-1, self._shape.head_dim))
        return output.transpose(1, 2)  # [B, H, T, D]

    def _rotated(self, index: int, key: Tensor) -> Tensor:
        rotary, rotation = self._layouts[index].rotary, self._rotations[index] if self._rotations else None
        if self._rope == "pre" or rotary is None:
            return key
        if rotation is None:
            raise RuntimeError(f"attention layer {index} was given no position embeddings to rotate its keys by")
        # The function rotates queries and keys alike; an empty query costs nothing.
        return rotary(torch.empty_like(key[:, :0]), key, *rotation)[1]
