"""Greedy depth pruning: the order in which layers leave a model, each time the one whose absence costs the least."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kvds.data.encoding import EncodedSample
from kvds.evaluation.model import completion_losses
from kvds.kv.families import decoder_layers


@torch.no_grad()
def removal_order(
    model: nn.Module,
    samples: Sequence[EncodedSample],
    count: int,
    *,
    pad: int,
    batch_size: int,
    removed: Sequence[int] = (),
    progress: bool = True,
) -> Iterator[tuple[int, float]]:
    """Layers of ``model`` in the order in which they leave it, with the cross entropy of what is left.

    One layer at a time: each that is left is tried, the one without which the completions of ``samples`` have the
    least cross entropy goes. What a layer's absence costs is computed from its own input on: the layers below it run
    once per batch for all that are tried, so that a round costs half of as many forwards.

    Args:
        model: Whole, in the mode and dtype it is judged in; unchanged afterwards.
        samples: Calibration rows.
        count: How many layers are to leave.
        pad: Token id that fills rows up.
        batch_size: Rows per forward.
        removed: Layers that have left before.
        progress: Show a bar.

    Yields:
        ``(layer, cross entropy in nats per token)``; ties go to the upper layer.
    """
    layers = decoder_layers(model)
    gone = set(removed)
    # Long rows with long ones, short with short: little padding.
    rows = sorted(samples, key=lambda sample: -len(sample.input_ids))
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    tokens = sum(sample.label_count for sample in rows)
    left = len(layers) - len(gone)
    total = len(batches) * sum(left - round_ for round_ in range(count))
    with tqdm(total=total, desc="prune", unit="forward", disable=not progress, mininterval=0.5) as bar:
        for _ in range(count):
            candidates = [number for number in range(len(layers)) if number not in gone]
            losses = dict.fromkeys(candidates, 0.0)
            for batch in batches:
                with _skipping(layers, gone) as inputs:
                    completion_losses(model, batch, pad)
                for number in candidates:
                    with _starting_above(layers, number, inputs[number], gone):
                        losses[number] += sum(completion_losses(model, batch, pad))
                    bar.update()
            layer = min(reversed(candidates), key=lambda number: losses[number])
            gone.add(layer)
            bar.set_postfix_str(f"layer {layer} left, cross entropy {losses[layer] / tokens:.3f}")
            yield layer, losses[layer] / tokens


@torch.no_grad()
def mean_loss(model: nn.Module, samples: Sequence[EncodedSample], *, pad: int, batch_size: int) -> float:
    """Cross entropy of the completions of ``samples``, in nats per token."""
    batches = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
    return sum(sum(completion_losses(model, batch, pad)) for batch in batches) / sum(s.label_count for s in samples)


@contextlib.contextmanager
def _replaced(layers: nn.ModuleList, stubs: dict[int, Callable[..., Any]]) -> Iterator[None]:
    """Within it, the layers that ``stubs`` names compute what it says."""
    for number, stub in stubs.items():
        layers[number].forward = stub  # an attribute of the instance, which hides the method
    try:
        yield
    finally:
        for number in stubs:
            del layers[number].forward


@contextlib.contextmanager
def _skipping(layers: nn.ModuleList, gone: set[int]) -> Iterator[dict[int, Tensor]]:
    """Within it, the layers ``gone`` hand their input on; each other one's input is kept in what is yielded."""
    inputs: dict[int, Tensor] = {}
    stubs: dict[int, Callable[..., Any]] = {}
    for number, layer in enumerate(layers):
        stubs[number] = _pass_on if number in gone else _keeping(layer.forward, inputs, number)
    with _replaced(layers, stubs):
        yield inputs


def _keeping(forward: Callable[..., Any], inputs: dict[int, Tensor], number: int) -> Callable[..., Any]:
    def stub(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        inputs[number] = hidden_states
        return forward(hidden_states, *args, **kwargs)

    return stub


def _pass_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


@contextlib.contextmanager
def _starting_above(layers: nn.ModuleList, number: int, hidden: Tensor, gone: set[int]) -> Iterator[None]:
    """Within it, the model runs as if layer ``number`` were not there, from that layer's input ``hidden`` on."""
    stubs: dict[int, Callable[..., Any]] = dict.fromkeys((*range(1, number + 1), *gone), _pass_on)
    if number > 0 or 0 in gone:
        stubs[0] = lambda *_, **__: hidden
    else:
        stubs[0] = _pass_on
    with _replaced(layers, stubs):
        yield
