"""Hidden states of one forward, read off the decoder layers or their attention by hooks, with their graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kvds.errors import InputError
from kvds.kv.families import attention_modules, decoder_layers
from kvds.kv.forward_capture import Capture, Watched
from kvds.kv.states import KVShape


class HiddenStates(NamedTuple):
    """What each decoder layer of one forward, or its attention, put out: ``[batch, 1, tokens, hidden_size]`` per layer.

    The layout of keys and values with one head as wide as the model, so that what maps these maps those.
    """

    hidden_states: tuple[Tensor, ...]

    def detach(self) -> HiddenStates:
        """The same without a graph."""
        return HiddenStates(tuple(layer.detach() for layer in self.hidden_states))

    def check(self, shape: KVShape, *, side: str) -> None:
        """Compare with the shape that a configuration promises, as :func:`hidden_shape` gives it.

        Raises:
            InputError: another number of layers, or another width.
        """
        expected = (shape.num_hidden_layers, shape.head_dim)
        for layer in self.hidden_states:
            found = (len(self.hidden_states), layer.shape[3])
            if found != expected:
                raise InputError(
                    f"{side}: its first batch has {found[0]} layers × {found[1]} hidden dimensions; expected "
                    f"{expected[0]} × {expected[1]} as its configuration says (do the weights belong to it?)"
                )


def hidden_shape(shape: KVShape) -> KVShape:
    """The shape of a model's hidden states: as many layers, one head, ``hidden_size`` dimensions.

    Raises:
        InputError: the width is not known.
    """
    if shape.hidden_size < 1:
        raise InputError(f"hidden_size={shape.hidden_size}: expected the width of the model to match hidden states")
    return replace(shape, num_key_value_heads=1, head_dim=shape.hidden_size)


class HiddenCapture(Capture[HiddenStates]):
    """Context manager: after a forward of ``model`` inside it, ``states`` holds every decoder layer's output.

    Views of the residual stream behind each layer, before the final norm; or of what each layer's attention adds to it,
    the output of its output projection. Gradients sent into them reach the layer and
    all below, also under gradient checkpointing. Of several forwards the last one counts; a recomputed layer is none.

    Args:
        model: A causal language model or its backbone.
        require_grad: Raise where a captured tensor has no graph, instead of training on nothing.
        at: ``"layer"`` or ``"attention"``; the layers are plain ones then, not compiled.

    Raises:
        InputError: its layers are not found.
        RuntimeError: on reading ``states``, where a layer was not run, or where ``require_grad`` finds a tensor without
            a graph.
    """

    def __init__(self, model: nn.Module, *, require_grad: bool = False, at: str = "layer") -> None:
        super().__init__(model)
        found = attention_modules if at == "attention" else decoder_layers
        self._layers: list[nn.Module] = list(found(self._backbone))  # type: ignore[operator]
        self._require_grad = require_grad
        self._outputs: dict[int, Tensor] = {}

    def _hook_layers(self) -> Iterator[RemovableHandle]:
        for number, layer in enumerate(self._layers):
            yield layer.register_forward_hook(self._output_hook(number))

    def _collect(self) -> HiddenStates:
        if missing := [i for i in range(len(self._layers)) if i not in self._outputs]:
            raise RuntimeError(f"no forward ran through decoder layers {missing} inside HiddenCapture")
        bare = [i for i, output in self._outputs.items() if output.grad_fn is None]
        if self._require_grad and bare:
            raise RuntimeError(
                f"captured hidden states of layers {bare} carry no graph, so an alignment would train nothing: the "
                "forward ran under no_grad or on frozen weights"
            )
        return HiddenStates(tuple(self._outputs[i].unsqueeze(1) for i in range(len(self._layers))))

    @property
    def watched(self) -> list[Watched]:
        """Per layer."""
        views = enumerate(self.states.hidden_states)
        return [Watched(view, self._outputs[i], lambda output: output.unsqueeze(1)) for i, view in views]

    def _forget(self) -> None:
        super()._forget()
        self._outputs.clear()

    def _output_hook(self, number: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor | tuple[Tensor, ...]) -> None:
            self._outputs.setdefault(number, output[0] if isinstance(output, tuple) else output)

        return hook
