"""Captures see through what is put around a model, and refuse modules that serve two layers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from kvds.errors import InputError
from kvds.kv import KVCapture
from kvds.kv.families import backbone, unwrapped
from kvds.kv.hidden import HiddenCapture
from kvds.kv.selected import SelectedCapture
from tests.kv.test_capture import inputs, make_model


class Adapted(nn.Module):
    """The shape of PEFT's wrapper: a tuner as ``base_model``, the model in it, everything else asked of the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model
        self.peft_config = SimpleNamespace()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model.model, name)

    def forward(self, **batch: Any) -> Any:
        return self.base_model.model(**batch)


class Engine(nn.Module):
    """The shape of DeepSpeed's engine."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **batch: Any) -> Any:
        return self.module(**batch)


pytestmark = pytest.mark.usefixtures("alone")


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "fsdp": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True),
    "engine": Engine,
    "peft": Adapted,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "ddp of peft": lambda model: DistributedDataParallel(Adapted(model)),
    "engine of compiled peft": lambda model: Engine(torch.compile(Adapted(model), backend="eager")),
}


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_model_is_captured_as_the_model_is(name: str, family: str) -> None:
    model = make_model(family)
    with KVCapture(model) as plain:
        model(**inputs())
    wrapped = WRAPPERS[name](model)
    assert unwrapped(wrapped) is model and backbone(wrapped) is backbone(model)
    with KVCapture(wrapped) as capture, HiddenCapture(wrapped) as hidden:
        # A compiled forward has its hooks from the time it was compiled: the model inside is what is run here.
        (model if "compiled" in name else wrapped)(**inputs())
    assert len(hidden.states.hidden_states) == 3
    for found, expected in zip([*capture.states.keys, *capture.states.values],
                               [*plain.states.keys, *plain.states.values], strict=True):  # fmt: skip
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("other", [nn.Linear(2, 2), Engine(nn.Linear(2, 2))])
def test_what_holds_no_model_is_refused(other: nn.Module) -> None:
    with pytest.raises(InputError, match=r"(Linear|Engine): holds no model of transformers; expected one"):
        KVCapture(other)


@pytest.mark.parametrize("part", ["layer", "attention", "projection"])
@pytest.mark.parametrize("kind", [KVCapture, HiddenCapture, lambda model: SelectedCapture(backbone(model), None)])
def test_a_module_that_serves_two_layers_is_refused(part: str, kind: Any) -> None:
    model: Any = make_model("llama")
    layers = model.model.layers
    if part == "layer":
        layers[2] = layers[0]
    elif part == "attention":
        layers[2].self_attn = layers[0].self_attn
    else:
        layers[2].self_attn.v_proj = layers[0].self_attn.v_proj
    if kind is HiddenCapture and part != "layer":
        HiddenCapture(model)  # it reads the layers themselves
        return
    with pytest.raises(InputError, match="layers 0 and 2 share one Llama|layers 0 and 2 share one Linear"):
        kind(model)
