"""A start that is fitted: the layer mixes first, then the maps to states mixed by them."""

from __future__ import annotations

import copy

import pytest
import torch

from kvds.align.mix_fitting import MixFitting
from kvds.distillation.calibration import fit_to_batches
from kvds.kv import open_capture, select_tokens
from kvds.kv.families import backbone
from tests.harness.distillation_setup import batch_of, samples, setup


@pytest.mark.parametrize("layers", ["learned", "endpoint"])
def test_a_learned_mix_is_fitted_before_the_maps_and_no_other_is(layers: str) -> None:
    made = setup(map_start="ridge", alignment_mode="structured", layer_map=layers)
    student, teacher, batch = made.module.student, made.teacher, batch_of(list(samples()), (1.0, 1.0))
    selection = select_tokens("full", None, batch.segment_ids, batch.attention_mask)
    aligner, by_hand = copy.deepcopy(made.module.aligner), copy.deepcopy(made.module.aligner)
    assert aligner is not None and by_hand is not None
    start = {name: part.layer_mix().detach() for name, part in aligner.named_parts().items()}

    mixes = MixFitting(by_hand)
    with torch.no_grad(), open_capture(student, by_hand.reads) as capture:
        backbone(student)(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    states = teacher(batch).states
    assert states is not None
    if mixes.parts:
        mixes.update(capture.states, states, selection)
        mixes.apply()
    fit_to_batches(
        aligner, student, lambda: [batch], lambda batch: (teacher(batch), selection), rope="pre",
        all_reduce=lambda sums: None,
    )  # fmt: skip
    wanted = by_hand.named_parts()
    for name, part in aligner.named_parts().items():
        torch.testing.assert_close(part.layer_mix(), wanted[name].layer_mix(), rtol=1e-4, atol=1e-6)
        assert torch.allclose(part.layer_mix(), start[name], atol=1e-3) == (layers == "endpoint")
