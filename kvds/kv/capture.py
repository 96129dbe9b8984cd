"""Keys, values and chosen query rows of one forward, read off the projections by hooks, with their graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kvds.errors import InputError
from kvds.kv.attention_layout import AttentionLayout
from kvds.kv.families import attention_layouts, attention_modules
from kvds.kv.forward_capture import Capture, Watched
from kvds.kv.observed import ObservedLayer, Rotation, gather_rows
from kvds.kv.states import KV_PARTS, KVShape, KVStates

Heads = Callable[[Tensor], Tensor]


class KVCapture(Capture[KVStates]):
    """Context manager: after a forward of ``model`` inside it, ``states`` holds every layer's keys and values.

    The tensors are views of the projections' outputs, ``[B, num_key_value_heads, T, head_dim]`` with a contiguous last
    dimension; no cache is needed and no second forward is run. Gradients sent into them reach the projections and all
    below, also under non-reentrant gradient checkpointing. Of several forwards the last one counts; the recomputation
    of checkpointed layers is none. Captures of one model nest, and one capture may be entered again.

    Args:
        model: A causal language model or its backbone, of a family in :data:`kvds.kv.families.FAMILIES` or built as
            those are; also inside DDP, FSDP, DeepSpeed's engine or PEFT.
        rope: ``"pre"``: keys as projected (and normalised, where the family does); ``"post"``: rotated as attention
            uses them.
        require_grad: Raise where a captured tensor has no graph, instead of training on nothing.
        layers: Which layers to capture, in this order; None = all.
        parts: ``keys``, ``values`` or both; of a part that is left out ``states`` has no layers. Queries need keys.
        query_rows: ``[B, Q]`` int64, the positions whose queries are captured, too, and no others; ``"all"`` = every
            position, without a copy; None = no queries.

    Attributes:
        key_outputs: Per layer, the projection's output tensor and how it is read as heads of keys.
        value_outputs: The same for values.
        key_heads: Per layer, the unrotated keys as views that only a loss on ``states`` sends gradients to.
        observed: Per layer, what attention compares: the query rows ``[B, num_attention_heads, Q, head_dim]`` and all
            keys, which it rotates whatever ``rope`` says (:class:`kvds.kv.observed.ObservedLayer`); empty without
            ``query_rows``.

    Raises:
        InputError: no keys and values are found, layers that differ in heads or head_dim or share a module, or a layer
            that is not there.
        RuntimeError: on leaving, where a layer was not run, or where ``require_grad`` finds a tensor without a graph.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rope: str = "pre",
        require_grad: bool = False,
        layers: Sequence[int] | None = None,
        parts: Sequence[str] = KV_PARTS,
        query_rows: Tensor | Literal["all"] | None = None,
    ) -> None:
        super().__init__(model)
        config: Any = self._backbone.config
        self._shape = KVShape.from_config(config)
        if rope not in ("pre", "post"):
            raise InputError(f"kv_rope={rope}: expected pre or post")
        attentions = attention_modules(self._backbone)
        self._layers = list(range(len(attentions)) if layers is None else layers)
        if absent := [layer for layer in self._layers if not 0 <= layer < len(attentions)]:
            raise InputError(f"layers={absent}: expected numbers from 0 to {len(attentions) - 1}")
        self._attentions: dict[int, nn.Module] = {layer: attentions[layer] for layer in self._layers}
        layouts = attention_layouts(self._backbone, self._layers)
        self._layouts: dict[int, AttentionLayout] = dict(zip(self._layers, layouts, strict=True))
        self._rope, self._require_grad = rope, require_grad
        self._query_rows = query_rows
        self._wants_keys = "keys" in parts or query_rows is not None
        self._wants_values = "values" in parts
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._queries: dict[int, Tensor] = {}
        self._rotations: dict[int, tuple[Tensor, Tensor]] = {}
        self._forget()

    def _hook_layers(self) -> Iterator[RemovableHandle]:
        for layer, layout in self._layouts.items():
            if layout.rotary is not None and self._wants_keys and self._rotates:
                hook = self._rotation_hook(layer)
                yield self._attentions[layer].register_forward_pre_hook(hook, with_kwargs=True)
            if self._wants_keys:
                yield layout.key.module.register_forward_hook(self._output_hook(self._keys, layer))
            if self._wants_values:
                yield layout.value.module.register_forward_hook(self._output_hook(self._values, layer))
            if self._query_rows is not None:
                yield layout.query.module.register_forward_hook(self._query_hook(layer, self._query_rows))

    @property
    def one_projection(self) -> bool:
        """Whether a module gives keys and values both, so that a view of either keeps the other alive."""
        return any(layout.key.module is layout.value.module for layout in self._layouts.values())

    @property
    def watched(self) -> list[Watched]:
        """Per layer, keys first."""
        views = [*self.key_heads, *self.states.values]
        outputs = [*self.key_outputs, *self.value_outputs]
        return [Watched(view, *output) for view, output in zip(views, outputs, strict=True)]

    def _forget(self) -> None:
        super()._forget()
        # Emptied in place: the open hooks hold these very dictionaries.
        self._keys.clear()
        self._values.clear()
        self._queries.clear()
        self._rotations.clear()
        self.observed: tuple[ObservedLayer, ...] = ()
        self.key_outputs: list[tuple[Tensor, Heads]] = []
        self.value_outputs: list[tuple[Tensor, Heads]] = []
        self.key_heads: list[Tensor] = []

    @staticmethod
    def _output_hook(slots: dict[int, Tensor], layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            slots.setdefault(layer, output)

        return hook

    def _query_hook(self, layer: int, rows: Tensor | Literal["all"]) -> Callable[..., None]:
        heads = self._layouts[layer].query.heads

        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            output = heads(output).transpose(1, 2).flatten(2)
            # With a graph the rows are picked after the forward: gathering saves tensors, and a checkpointed layer
            # must save the same in its recomputation, when these hooks may be gone. Without one, the rest is let go.
            if isinstance(rows, Tensor) and not output.requires_grad:
                output = gather_rows(output, rows)
            self._queries.setdefault(layer, output)

        return hook

    def _rotation_hook(self, layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rotation = kwargs.get("position_embeddings", args[1] if len(args) > 1 else None)
            if rotation is not None:
                self._rotations.setdefault(layer, rotation)

        return hook

    @property
    def _rotates(self) -> bool:
        return self._rope == "post" or self._query_rows is not None

    def _collect(self) -> KVStates:
        wanted = [
            slots for slots, wants in ((self._keys, self._wants_keys), (self._values, self._wants_values)) if wants
        ]
        if missing := [i for i in self._layers if any(i not in slots for slots in wanted)]:
            raise RuntimeError(f"no forward ran through attention layers {missing} inside KVCapture")
        keys: list[Tensor] = []
        values: list[Tensor] = []
        if self._wants_keys:
            self.key_outputs = [(self._keys[i], self._layouts[i].key.heads) for i in self._layers]
            keys = [self._heads("keys", i, *output) for i, output in zip(self._layers, self.key_outputs, strict=True)]
        if self._wants_values:
            self.value_outputs = [(self._values[i], self._layouts[i].value.heads) for i in self._layers]
            outputs = zip(self._layers, self.value_outputs, strict=True)
            values = [self._heads("values", i, *output) for i, output in outputs]
        self.key_heads = keys
        if self._wants_keys and self._rotates:
            rotations = self._layer_rotations()
            if self._query_rows is not None:
                self.observed = tuple(map(self._observed, self._layers, keys, rotations))
            if self._rope == "post":
                keys = [key if r is None else r.keys(key) for key, r in zip(keys, rotations, strict=True)]
        self._queries.clear()
        self._rotations.clear()
        return KVStates(tuple(keys), tuple(values))

    def _heads(self, part: str, layer: int, output: Tensor, heads: Heads) -> Tensor:
        states = heads(output)  # [B, H, T, D]
        expected = self._shape.num_key_value_heads, self._shape.head_dim
        if states.dim() != 4 or (states.shape[1], states.shape[3]) != expected:
            raise InputError(
                f"attention layer {layer}: its {part} are {_per_token(states)} per token; expected {expected[0]} KV "
                f"heads × {expected[1]} in every layer, as the configuration says (use a model whose layers are alike)"
            )
        if self._require_grad and output.grad_fn is None:
            raise RuntimeError(
                f"captured {part} of layer {layer} carry no graph, so a KV loss would train nothing: the forward ran "
                "under no_grad, on frozen weights, or under reentrant gradient checkpointing (use use_reentrant=False)"
            )
        return states

    def _observed(self, layer: int, keys: Tensor, rotation: Rotation | None) -> ObservedLayer:
        layout, shape = self._layouts[layer], self._shape
        rows = self._queries[layer]
        if rows.requires_grad and isinstance(self._query_rows, Tensor):
            rows = gather_rows(rows, self._query_rows)
        rows = rows.unflatten(-1, (shape.num_attention_heads, shape.head_dim)).transpose(1, 2)
        return ObservedLayer(rows, keys, rotation, layout.scaling, layout.sliding_window, layout.softcap)

    def _layer_rotations(self) -> list[Rotation | None]:
        """Per layer; layers that were given the same position embeddings share one."""
        rows = self._query_rows if isinstance(self._query_rows, Tensor) else None
        shared: dict[int, Rotation] = {}
        found: list[Rotation | None] = []
        for layer in self._layers:
            rotary = self._layouts[layer].rotary
            if rotary is None:
                found.append(None)
                continue
            if layer not in self._rotations:
                raise RuntimeError(f"attention layer {layer} was given no position embeddings to rotate its keys by")
            cos, sin = self._rotations[layer]
            if id(cos) not in shared:
                shared[id(cos)] = Rotation(rotary, cos, sin, rows)
            found.append(shared[id(cos)])
        return found


def _per_token(states: Tensor) -> tuple[int, ...]:
    """Heads and dimensions, or the width of what is no heads of any number."""
    return (states.shape[1], states.shape[3]) if states.dim() == 4 else tuple(states.transpose(1, 2).shape[2:])
