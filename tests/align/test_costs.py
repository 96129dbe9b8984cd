"""What an alignment costs, as ``kvds plan`` counts it, against the maps really built and the products really done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kvds.align import ALIGNERS, KVAligner, build_aligner
from kvds.align.diagnostics import parameter_counts
from kvds.config import AlignmentSettings, RunConfig
from kvds.config.alignment_modes import ALIGNMENT_MODES
from kvds.kv import AttentionStates, HiddenStates, KVShape, KVStates, LayerQueries, Selection, States
from kvds.plan.states import aligner_size
from kvds.plan.work import aligner_flops

QWEN2 = KVShape(24, 2, 64, 14, hidden_size=896), KVShape(28, 2, 128, 12, hidden_size=1536)
# Many heads, so that layers and heads are mixed one after the other, and groups of unequal numbers of layers.
SMALL = KVShape(3, 4, 6, 8, hidden_size=20), KVShape(5, 8, 8, 8, hidden_size=28)
PAIRS = {"qwen2": QWEN2, "small": SMALL}
BACK = {"direction": "teacher_to_student"}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "shared": {"map_proj_share_dim": True},
    "endpoint": {"layer_map": "endpoint"},
    "learned": {"layer_map": "learned"},
    "both parts": {"kv_parts": "kv"},
    "frozen": {"aligner_update": "frozen", "map_start": "pca"},
    "towards the student": BACK,
    "towards the student, learned": {**BACK, "layer_map": "learned"},
    "towards the student, frozen": {**BACK, "aligner_update": "frozen", "map_start": "pca"},
    "groups": {"layer_groups": 2, "head_groups": 2},
    "without attention": {"attention_loss_weight": 0.0},
    "cosine": {"relation_kind": "cosine", "relation_heads": 2},
    "several sources": {"source_layers_per_target": 3},
    "several sources, back": {"source_layers_per_target": 2, **BACK},
}
MODES = [name for name, mode in ALIGNMENT_MODES.items() if mode.aligned]
OF_ONE_MODE = {"without attention": "structural_kv", "cosine": "relation", "groups": "structured"}
OF_ONE_MODE |= {"several sources": "flat", "several sources, back": "flat"}


def _cases() -> list[tuple[str, str, str]]:
    """Mode, variant and pair, where the mode can have the variant."""
    found = []
    for mode in MODES:
        for name, changes in VARIANTS.items():
            only = ALIGNMENT_MODES[mode].only
            allowed = all(value in only[key].values for key, value in changes.items() if key in only)
            if allowed and OF_ONE_MODE.get(name, mode) == mode:
                found += [(mode, name, pair) for pair in PAIRS if pair == "small" or name in ("default", "shared")]
    return found


def states(shape: KVShape, reads: str, rows: int, slots: int, grad: bool) -> States:
    def layers(heads: int, width: int) -> tuple[Tensor, ...]:
        empty = [torch.empty(rows, heads, slots, width, device="meta") for _ in range(shape.num_hidden_layers)]
        return tuple(layer.requires_grad_(grad) for layer in empty)

    if reads == "hidden":
        return HiddenStates(layers(1, shape.hidden_size))
    kv = KVStates(*(layers(shape.num_key_value_heads, shape.head_dim) for _ in range(2)))
    if reads == "kv":
        return kv
    queries = layers(shape.num_attention_heads, shape.head_dim)
    return AttentionStates(*kv, tuple(LayerQueries(layer, 0.1, None) for layer in queries))


def counted(aligner: KVAligner, pair: tuple[KVShape, KVShape], rows: int, slots: int) -> int:
    """FLOPs of matrix products in one forward and backward pass of ``rows`` rows."""

    def in_place(_: Any, left: Any, right: Any, *more: Any, out_shape: Any = None, **options: Any) -> int:
        batch, (n, k), m = (left[0] if len(left) == 3 else 1), left[-2:], right[-1]
        return 2 * batch * n * k * m

    aten = torch.ops.aten
    known = {aten.addmm_: in_place, aten.baddbmm_: in_place}
    student, teacher = (
        states(shape, reads, rows, slots, grad)
        for shape, reads, grad in zip(pair, (aligner.reads, aligner.teacher_reads), (True, False), strict=True)
    )
    selection = Selection(None, torch.ones(rows, slots, dtype=torch.bool, device="meta"))
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        loss = aligner(student, teacher, selection).loss
        if not ALIGNMENT_MODES[aligner.settings.alignment_mode].fused:  # whose forward computes gradients on its way
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("mode", "variant", "sizes"), _cases())
def test_plan_counts_the_parameters_and_products_of_the_maps_really_built(mode: str, variant: str, sizes: str) -> None:
    cfg = RunConfig(
        **{"model_name": "gpt2", "output_dir": "x", "impl": "lean", "alignment_mode": mode, **VARIANTS[variant]}
    )
    pair = PAIRS[sizes]
    with torch.device("meta"):
        aligner = build_aligner(*pair, cfg)
    trained = sum(p.numel() for p in aligner.parameters() if p.requires_grad)
    assert aligner_size(*pair, cfg) == trained
    slots = 8
    # What two further rows add: what a micro-batch costs once is none of a position's.
    more = counted(aligner, pair, 4, slots) - counted(aligner, pair, 2, slots)
    assert aligner_flops(cfg, *pair, slots) * 2 * slots == more > 0


def test_the_qwen2_pair_by_hand() -> None:
    found = {
        mode: aligner_flops(RunConfig(model_name="gpt2", output_dir="x", alignment_mode=mode), *QWEN2, 512) / 1e6
        for mode in MODES
    }
    keys, forward_and_backward = 2 * 128 * 256 / 1e6, 3
    assert found["flat"] == pytest.approx(forward_and_backward * 24 * keys)
    # Two maps, the way back through one, and attentions of 14 heads over 512 tokens, six products in all.
    attention = 6 * 2 * 24 * 512 * 14 * 64 / 1e6
    assert found["structural_kv"] == pytest.approx((2 * forward_and_backward + 1) * 24 * keys + attention)
    mixed = 2 * 28 * 24 * 896 / 1e6
    assert found["hidden"] == pytest.approx(forward_and_backward * (28 * 2 * 896 * 1536 / 1e6 + mixed))
    assert round(forward_and_backward * 28 * 2 * 896 * 1536 / 1e6) == 231


def test_every_mode_that_aligns_has_an_aligner_and_no_other() -> None:
    assert ALIGNERS.keys() == set(MODES)


@pytest.mark.parametrize("mode", MODES)
def test_profile_counts_every_mode_under_its_own_settings(mode: str) -> None:
    counts = parameter_counts(*SMALL, AlignmentSettings(alignment_mode=mode))
    assert {name.split(",")[0] for name in counts} == set(MODES)
    for name, count in counts.items():
        other, _, shared = name.partition(", ")
        parts = "auto" if "kv_parts" in ALIGNMENT_MODES[other].only else ALIGNMENT_MODES[mode].parts
        own = AlignmentSettings(alignment_mode=other, kv_parts=parts, map_proj_share_dim=bool(shared))
        assert count == sum(p.numel() for p in build_aligner(*SMALL, own).parameters()), name
