"""A new alignment mode and new selection methods, added by CONTRIBUTING's recipes alone: flags, plan and a step."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kvds.align import ALIGNERS, KVAligner
from kvds.align.aligner_part import AlignerPart
from kvds.align.layer_map import LayerPlan
from kvds.config import AlignmentSettings, RunConfig
from kvds.config.alignment_modes import ALIGNMENT_MODES, AlignmentMode, Only
from kvds.config.selection_methods import SELECTION_METHODS, SelectionMethod
from kvds.config.setting_rules import check
from kvds.config.teacher_rules import cache_rules
from kvds.data.labels import LabelledPositions
from kvds.distillation.step import LossWeights, StepInput
from kvds.errors import InputError
from kvds.kv import KVShape, gather_positions
from kvds.kv.observed import ObservedLayer, ObservingRows
from kvds.kv.scores import SCORES
from kvds.kv.select import CHOICES
from kvds.plan.estimate import Machine, RunPlan
from kvds.teacher.teacher import Teacher
from kvds.teacher.token_selection import TokenChoice
from tests.harness.distillation_setup import CPU, batch_of, samples, setup
from tests.harness.plan_recipe import config

REPOSITORY = Path(__file__).resolve().parents[2]


# -- what the files of their own would hold ----------------------------------------------------------------------------


class NormPart(AlignerPart):
    """``loss_i = mean over tokens of (gain_i · ‖source_i‖ / √W_x − ‖target_i‖ / √W_y)²``."""

    regresses = False

    def __init__(self, student: KVShape, teacher: KVShape, settings: AlignmentSettings, seed: int) -> None:
        super().__init__(student, teacher, settings, seed)
        self.gain = nn.Parameter(torch.ones(self.num_targets))

    @classmethod
    def parameter_count(cls, student: KVShape, teacher: KVShape, settings: AlignmentSettings) -> int:
        return LayerPlan.of(student, teacher, settings).targets

    @classmethod
    def flops_per_position(cls, student: KVShape, teacher: KVShape, settings: AlignmentSettings, slots: int) -> float:
        return 0.0

    @property
    def projection(self) -> None:
        return None

    @property
    def map_shape(self) -> tuple[int, int, int]:
        source, target = self.source_shape, self.target_shape
        return 1, source.num_key_value_heads * source.head_dim, target.num_key_value_heads * target.head_dim

    def set_offset(self, mean_x: Tensor, mean_y: Tensor) -> None:
        pass

    def source_rows(self, rows: Tensor) -> Tensor:
        return rows.flatten(2).unsqueeze(1)

    target_rows = source_rows

    def forward(
        self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], index: Tensor | None, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        def norms(layer: Tensor) -> Tensor:
            return gather_positions(layer, index).square().mean((1, 3)).sqrt()

        source, target = self.sides(student, teacher)
        distances = [self.gain[i] * norms(x) - norms(y) for i, (x, y) in enumerate(zip(source, target, strict=True))]
        layers = torch.stack([d.masked_fill(~mask, 0).square().sum() / mask.sum().clamp_min(1) for d in distances])
        return layers.mean(), layers.detach()


class NormAligner(KVAligner):
    part_class = NormPart


def short_keys(layer: ObservedLayer, rows: ObservingRows, real: Tensor, weight: float) -> Tensor:
    return -layer.keys().norm(dim=-1)


def right_half(eligible: Tensor, kept: Tensor, drawn: Tensor | None) -> Tensor:
    return eligible & (eligible.flip(1).cumsum(1).flip(1) <= (kept[:, None] + 1) // 2)


# -- the lines ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    hard = Only(("endpoint", "last_aligned", None), "norms of pairs of layers are compared")
    facts = AlignmentMode(doc="lengths of keys and values", layer_map="endpoint", only={"layer_map": hard})
    monkeypatch.setitem(ALIGNMENT_MODES, "norms", facts)
    monkeypatch.setitem(ALIGNERS, "norms", NormAligner)
    monkeypatch.setitem(SELECTION_METHODS, "short_keys", SelectionMethod(doc="the shortest keys", reads_keys=True))
    monkeypatch.setitem(SCORES, "short_keys", short_keys)
    monkeypatch.setitem(SELECTION_METHODS, "right_half", SelectionMethod(doc="the last, half as many"))
    monkeypatch.setitem(CHOICES, "right_half", right_half)


# -- what follows by itself --------------------------------------------------------------------------------------------


def test_flags_and_rules_know_them(added: None, recipe: Path) -> None:
    cfg = config(recipe, alignment_mode="norms", kv_method="short_keys", kv_budget=4)
    assert (cfg.alignment_mode, cfg.kv_method) == ("norms", "short_keys") and cfg.uses_kv
    for changes, message in (
        ({"layer_map": "learned"}, "layer_map=learned: expected endpoint or last_aligned with --alignment_mode norms"),
        ({"layer_groups": 2}, "layer_groups=2: expected 1 with --alignment_mode norms"),
        ({"relation_heads": 2}, "relation_heads=2: expected none with --alignment_mode norms"),
        ({"kv_method": "short_keys"}, "kv_budget=none: expected a number of tokens"),
        ({"kv_method": "short_keys", "kv_budget": 4, "packing": "true"}, "--no_packing with --kv_method short_keys"),
        ({"kv_method": "short_key", "kv_budget": 4}, "did you mean short_keys"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            config(recipe, **{"alignment_mode": "norms", **changes})
    with pytest.raises(InputError, match="no --teacher_cache with --kv_method short_keys, which reads"):
        check(cache_rules(cfg, "x"))
    cfg = config(recipe, alignment_mode="norms", kv_method="right_half", kv_budget=4)
    check(cache_rules(cfg, "x"))
    with pytest.raises(
        InputError, match="full, right_crop, uniform, random or right_half with --alignment_mode hidden"
    ):
        config(recipe, alignment_mode="hidden", kv_method="short_keys", kv_budget=4)


def test_a_plan_counts_them(added: None, recipe: Path) -> None:
    plan = RunPlan(
        config(recipe, alignment_mode="norms", kv_method="right_half", kv_budget=4), Machine(1, 1, 80 * 2**30)
    )
    assert plan.aligner_parameters == 2 * 24  # keys and values, the student's layers
    assert plan.rows.largest.slots == 4 and plan.work is not None and plan.work.aligner == 0
    assert plan.peak > plan.states().held and plan.step.aligner > 0


@pytest.mark.parametrize("method", ["short_keys", "right_half"])
def test_a_step_trains_with_them(added: None, method: str) -> None:
    made = setup(alignment_mode="norms")
    cfg = RunConfig(model_name="x", output_dir="x", alignment_mode="norms", kv_method=method, kv_budget=4)
    choice = TokenChoice(cfg, cfg.seed)
    teacher = Teacher(made.teacher_model, device=CPU, observe=choice.observing)
    rows = list(samples())
    batch = batch_of(rows, (float(sum(row.label_count for row in rows)), 4.0 * len(rows)))
    output, selection = choice.with_teacher(teacher, batch)
    if method == "short_keys":  # of the first row the shortest, on average over layers and heads, the first left out
        keys = made.teacher_model(batch.input_ids[:1], use_cache=True).past_key_values.layers
        length = len(rows[0].input_ids)
        norms = torch.cat([layer.keys[0] for layer in keys]).norm(dim=-1).mean(0)[1:length]
        assert selection.index is not None and selection.mask.all()
        assert selection.index[0].tolist() == sorted((norms.argsort()[:4] + 1).tolist())
    else:
        assert selection.mask.sum(1).tolist() == [2] * len(rows)
    step = StepInput(
        batch, LabelledPositions.from_labels(batch.labels), selection, output, teacher.head, LossWeights(0.0, 1.0, 0.0)
    )
    optimizer = torch.optim.SGD(made.module.parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        loss, metrics = made.module(step=step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(metrics["loss/kv"]))
    gains = [value for name, value in made.module.named_parameters() if name.endswith("gain")]
    assert len(gains) == 2 and all((gain != 1).all() for gain in gains)
    assert losses[0] > losses[1] > losses[2] > 0


# -- the tables --------------------------------------------------------------------------------------------------------


def test_every_method_is_computed_where_its_facts_say() -> None:
    assert SCORES.keys() == {name for name, method in SELECTION_METHODS.items() if method.reads_keys}
    others = {name for name, method in SELECTION_METHODS.items() if method.budget and not method.reads_keys}
    assert others == CHOICES.keys()


def test_no_mode_or_method_is_named_outside_its_own_file_and_the_tables() -> None:
    own = {
        "config/alignment_modes.py", "config/selection_methods.py", "align/build.py", "kv/scores.py", "kv/select.py",
        "commands/quickstart.py",  # which two it shows is its own choice, no fact of them
    }  # fmt: skip
    names = [*(set(ALIGNMENT_MODES) - {"none", "hidden"}), *(set(SELECTION_METHODS) - {"full", "random"})]
    quoted = re.compile(rf"""(?<![\w`])["']({"|".join(names)})["'](?!`)""")
    found = []
    for path in sorted((REPOSITORY / "kvds").rglob("*.py")):
        name = path.relative_to(REPOSITORY / "kvds").as_posix()
        if name not in own:
            lines = path.read_text().splitlines()
            found += [f"{name}: {line.strip()}" for line in lines if quoted.search(line)]
    # The default of a flag is no fact of a mode.
    assert [line for line in found if not re.search(r'default="structured"|: "structured",$', line)] == []
