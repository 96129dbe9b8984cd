"""The same batch twice gives the same bits: padded, packed and single rows, kept and checkpointed, bf16 and fp32.

On a GPU torch is told to be deterministic, and not only to warn: told to warn, its flash and memory-efficient attention
go on summing gradients in any order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kvds.data.batches import TokenBatch, collate, collate_packed
from kvds.data.encoding import EncodedSample
from kvds.data.labels import LabelledPositions
from kvds.data.model_inputs import repacked, unpacked
from kvds.distillation.step import LossWeights, StepInput
from kvds.kv import KVShape, select_tokens
from kvds.kv.row_attention import ROW_ATTENTION
from kvds.teacher.teacher import Teacher
from tests.kv.test_row_attention import VOCAB, config_of, train_module

# Several blocks of any attention kernel, and a sample that fills none.
LENGTHS = {"cuda": (700, 130, 512, 61, 300, 5), "cpu": (40, 9, 33, 5)}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device on which sums have a fixed order."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without, cuBLAS refuses to be deterministic
    torch.use_deterministic_algorithms(True)
    yield torch.device(request.param)
    torch.use_deterministic_algorithms(False)


def samples(lengths: tuple[int, ...]) -> Any:
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, VOCAB, (n,), generator=draw).tolist() for n in lengths]
    rows = [EncodedSample(tuple(own), (1, 1, *(2,) * (len(own) - 3), 3), i) for i, own in enumerate(ids)]
    return rows, list(range(len(rows))), 0, 30.0, 40.0


def masked(*given: Any) -> TokenBatch:
    """Padded rows of which nobody knows where the padding is: attention gets a mask."""
    return dataclasses.replace(collate(*given), pads_right=False)


def in_one_row(*given: Any) -> TokenBatch:
    return collate_packed(*given, capacity=4096, one_row=True, longest=max(len(row.input_ids) for row in given[0]))


def in_shared_rows(*given: Any) -> TokenBatch:
    longest = max(len(row.input_ids) for row in given[0])
    return collate_packed(*given, capacity=longest, longest=longest)


LAYOUTS: dict[str, Callable[..., TokenBatch]] = {
    "padded": collate, "masked": masked, "packed": in_shared_rows, "one row": in_one_row,
}  # fmt: skip


class Step:
    """Two small models on a device, and one step of them as often as it is asked for."""

    def __init__(self, device: torch.device, dtype: torch.dtype, *, checkpointing: bool, family: str) -> None:
        self.device = device
        student, teacher = (self._model(family, layers, dtype) for layers in (2, 3))
        shapes = [KVShape.from_config(model.config) for model in (student, teacher)]
        self.module = train_module(student, shapes).to(device).train()
        self.teacher = Teacher(teacher, device=device, wants_hidden=True)
        if checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})

    def _model(self, family: str, layers: int, dtype: torch.dtype) -> Any:
        torch.manual_seed(layers)
        config = config_of(family, layers, 16 * layers, 16 if family == "mistral" else None)
        config.max_position_embeddings = 1024
        model = AutoModelForCausalLM.from_config(config, attn_implementation=ROW_ATTENTION)
        return model.to(self.device, dtype)

    def run(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Losses and gradients."""
        self.module.zero_grad(set_to_none=True)
        labelled = LabelledPositions.from_labels(batch.labels).to(self.device)
        batch = batch.to(self.device)
        own = unpacked(batch)
        selection = repacked(select_tokens("right_crop", 0.5, own.segment_ids, own.attention_mask), batch)
        weights = LossWeights(task=0.7, kv=1.5, logit_kd=0.4)
        teacher = self.teacher(batch, selection)
        loss, metrics = self.module(StepInput(batch, labelled, selection, teacher, self.teacher.head, weights))
        loss.backward()
        found = {name: p.grad.clone() for name, p in self.module.named_parameters() if p.grad is not None}
        return found | {name: value.clone() for name, value in metrics.items() if name.startswith("loss/")}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("family", ["qwen2", "mistral"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_batch_twice(
    device: torch.device, layout: str, family: str, dtype: torch.dtype, checkpointing: bool
) -> None:
    given = samples(LENGTHS[device.type])
    made = Step(device, dtype, checkpointing=checkpointing, family=family)
    first = made.run(LAYOUTS[layout](*given))
    for _ in range(3):
        again = made.run(LAYOUTS[layout](*given))
        assert again.keys() == first.keys()
        assert [name for name, value in first.items() if not torch.equal(value, again[name])] == []
    assert float(first["loss/kv"]) > 0 and float(first["loss/logit_kd"]) > 0
