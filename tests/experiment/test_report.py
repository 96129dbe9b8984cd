"""The report of an experiment: numbers from rows to tables, verdict, curves; and the plans that are shipped."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from kvds.config.settings import AlignmentSettings
from kvds.experiment.figures import aligned_curves
from kvds.experiment.plan import load_plan
from kvds.experiment.report import (
    by_arm,
    chosen_table,
    compare_arms,
    compare_with_baseline,
    comparison_table,
    summary_table,
    verdict,
    write_ab_report,
)
from kvds.experiment.results import summarise, unsteadiness, value
from kvds.tracking.run_report import RunRecord

EXPERIMENTS = Path(__file__).resolve().parents[2] / "launch" / "recipes" / "experiments"
PLAN = """
settings: {model_name: gpt2}
primary: auc/exact_match
seeds: 0-3
baseline: a
arms: {a: {}, b: {lr: 1.0}, c: {lr: 2.0}}
"""


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN)
    return load_plan(tmp_path / "plan.yaml")


def rows(**arms: list[float]) -> list[dict]:
    return [
        {"arm": arm, "seed": seed, "auc/exact_match": number, "status": "finished"}
        for arm, numbers in arms.items()
        for seed, number in enumerate(numbers)
    ]


def test_tables_and_verdict_say_what_the_numbers_say(plan):
    arms = by_arm(plan, rows(a=[0.1, 0.2, 0.1, 0.2], b=[0.5, 0.61, 0.5, 0.59], c=[0.1, 0.1, 0.2, 0.2]))
    comparisons = compare_arms(plan, arms)
    assert [(c.arm, c.reference, c.paired.seeds) for c in comparisons] == [("b", "a", 4), ("c", "a", 4)]
    # Differences of b: .4, .41, .4, .39: mean .4; of c: 0, −.1, .1, 0: mean 0.
    assert comparisons[0].p_holm == pytest.approx(2 * comparisons[0].paired.p_t) and comparisons[1].p_holm == 1.0
    text = verdict(plan, comparisons)
    assert "b is better than a (+40.0 [" in text and "c against a: no effect shown (+0.0 [" in text
    assert "| a | 4 | 15.0 ± 5.8 |" in summary_table(plan, arms)
    assert "| b − a | 4 | +40.0 |" in comparison_table(plan, comparisons)


def test_no_effect_after_correction_says_what_there_was_before_it(plan):
    # Differences of b in points: 1, 3, 4, 2: t = 2.5 / (1.291 / 2) = 3.873 with 3 degrees of freedom, p = 0.0305.
    arms = by_arm(plan, rows(a=[0.0] * 4, b=[0.01, 0.03, 0.04, 0.02], c=[0.0, 0.01, -0.01, 0.0]))
    b, c = compare_arms(plan, arms)
    text = verdict(plan, [b, c])
    assert "(+2.5 [+0.4, +4.6], Holm p = 0.061, 4 pairs, though p = 0.03 without the correction)" in text
    assert text.count("no effect shown") == 2 and text.endswith("(+0.0 [-1.3, +1.3], Holm p = 1, 4 pairs).")
    assert "b is better than a (+2.5 [+0.4, +4.6], Holm p < 1e-6, 4 pairs)." in verdict(plan, [replace(b, p_holm=1e-9)])


def test_every_arm_meets_the_baseline_and_looking_further_costs_the_further_looks(tmp_path):
    others = "c: {lr: 2.0, versus: [b]}, d: {lr: 3.0, versus: [b]}"
    (tmp_path / "plan.yaml").write_text(PLAN.replace("c: {lr: 2.0}", others))
    plan = load_plan(tmp_path / "plan.yaml")
    arms = by_arm(plan, rows(a=[0.1, 0.2, 0.1, 0.2], b=[0.5, 0.61, 0.5, 0.59], c=[0.52, 0.6, 0.57, 0.7], d=[0.2] * 4))
    planned = compare_arms(plan, arms)
    further = compare_with_baseline(plan, arms, planned)
    assert [(c.arm, c.reference) for c in planned] == [("b", "a"), ("c", "b"), ("d", "b")]
    assert [(c.arm, c.reference) for c in further] == [("c", "a"), ("d", "a")]
    p = {(c.arm, c.reference): c.paired.p_t for c in (*planned, *further)}
    for c in (*planned, *further):
        expected = stats.ttest_rel([arms[c.arm][s]["auc/exact_match"] for s in range(4)],
                                   [arms[c.reference][s]["auc/exact_match"] for s in range(4)])  # fmt: skip
        assert c.paired.p_t == pytest.approx(expected.pvalue)
        assert (c.paired.t_low, c.paired.t_high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    # Of five the smallest counts five times, and so on, never below the one before.
    order = sorted(p.values())
    for c in further:
        steps = [(5 - k) * order[k] for k in range(order.index(c.paired.p_t) + 1)]
        assert c.p_holm == pytest.approx(min(1.0, max(steps)))
    assert [c.p_holm for c in planned] == [c.p_holm for c in compare_arms(plan, arms)]
    write_ab_report(plan, [row for seeds in arms.values() for row in seeds.values()], [], tmp_path)
    before, after = (tmp_path / "report.md").read_text().split("Not among the plan's comparisons: ")
    assert "| b − a | 4 |" in before and "| c − a | 4 |" in after and "| c − a |" not in before


def test_a_run_whose_metric_is_not_finite_is_named(plan, tmp_path):
    found = rows(a=[0.1, 0.2, 0.1, 0.2], b=[0.5, 0.61, math.nan, 0.59], c=[0.1] * 4)
    write_ab_report(plan, found, [], tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "No finite AUC of exact match %, in no mean, difference or test: b seed 2." in text
    assert "| b − a | 3 |" in text
    assert "Not among the plan's comparisons" not in text


def test_the_summary_has_every_number_of_a_run(plan):
    found = rows(a=[0.1, 0.3])
    for row, factor in zip(found, (1, 3), strict=True):
        row |= {
            "final/cross_entropy": 0.5 * factor, "final/kv_loss": 0.01 * factor, "final/exact_match": 0.25 * factor,
            "stability": 0.1 * factor, "parameters/student": 1000, "parameters/aligner": 10, "wall_seconds": 99.0,
            "train_wall_seconds": 10.0 * factor, "train_cpu_seconds": 5.0 * factor,
            "perf/peak_memory_bytes": 2**20 * factor,
        }  # fmt: skip
    header, _, line = (line.split(" | ") for line in summary_table(plan, by_arm(plan, found)).splitlines())
    assert dict(zip(header[2:], (cell.removesuffix(" |") for cell in line[2:]), strict=True)) == {
        "AUC of exact match %": "20.0 ± 14.1", "final exact match %": "50.0 ± 35.4", "final dev CE": "1.0000 ± 0.7071",
        "KV loss (held-out)": "0.0200 ± 0.0141", "stability (unsteadiness)": "0.2000 ± 0.1414",
        "student parameters": "1,000", "map parameters": "10", "CPU s": "10 ± 7", "wall s": "20 ± 14",
        "peak memory MiB |": "2 ± 1",
    }  # fmt: skip


def test_lower_may_be_better_and_one_pair_says_nothing(plan, tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN + "better: lower\n")
    lower = load_plan(tmp_path / "plan.yaml")
    arms = by_arm(lower, rows(a=[0.1, 0.2, 0.1], b=[0.5, 0.61, 0.5], c=[0.3]))
    text = verdict(lower, compare_arms(lower, arms))
    assert "b is worse than a" in text and "c against a: too few pairs (1)" in text


def test_an_arm_lists_what_it_sets_differently_and_no_more():
    row = {"settings": {"datasets": ["synthetic"], "kv_parts": "v", "seed": 3}, "last/kv/weight": 2.0}
    table = chosen_table({"v_only": {3: row}}, {"datasets": ("synthetic",), "kv_parts": "kv"})
    assert "| v_only | `kv_parts=v` | 2 |" in table


def test_a_run_becomes_a_row():
    metrics = [{"step": step, "loss/task": loss} for step, loss in enumerate([4.0, 3.0, 2.0, 1.0], start=1)]
    metrics += [
        {"step": 2, "eval/all/exact_match": 0.2, "eval/all/cross_entropy": 3.0},
        {"step": 4, "eval/all/exact_match": 0.6, "eval/all/cross_entropy": 1.0, "kv/norm_ratio": math.nan},
    ]
    row = summarise(RunRecord("r", {}, metrics, {"exact_match": 0.6, "cross_entropy": 1.0, "samples": 7}))
    assert (row["auc/exact_match"], row["auc/cross_entropy"]) == pytest.approx((0.4, 2.0))
    assert row["final/exact_match"] == 0.6 and "final/samples" not in row and "last/kv/norm_ratio" not in row
    assert row["last/loss/task"] == 1.0 and row["curves"]["exact_match"] == [[2, 4], [0.2, 0.6]]
    assert math.isnan(value(row, "final/kv_loss"))


def test_unsteadiness_is_the_spread_of_the_smoothed_change():
    assert unsteadiness([float(-step) for step in range(20)]) == pytest.approx(0.0, abs=1e-12)
    # Smoothed over five: 0, 1, 0 → changes 1, −1: standard deviation sqrt 2.
    assert unsteadiness([0, 0, 0, 0, 0, 5, -5]) == pytest.approx(math.sqrt(2))
    assert math.isnan(unsteadiness([1.0] * 6))


def test_curves_meet_at_the_steps_that_all_have():
    steps, values = aligned_curves([[[1, 2, 3], [5.0, None, 7.0]], None, [[2, 3, 4], [1.0, 2.0, 3.0]]])
    assert steps.tolist() == [2, 3]
    np.testing.assert_array_equal(values, [[np.nan, 7.0], [1.0, 2.0]])
    assert aligned_curves([None, None])[1].shape == (0, 0)


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_plans_are_sound(path, monkeypatch):
    monkeypatch.chdir(EXPERIMENTS.parents[2])
    methods = AlignmentSettings.__dataclass_fields__["kv_method"].metadata["choices"]
    if path.stem == "problems_selection" and "rkv" not in methods:
        pytest.skip("needs token selection by query and key")
    plan = load_plan(path)
    sources = {arm.tuned_as or arm.name for arm in plan.arms.values() if arm.tuned_as or arm.tune}
    jobs = [*plan.preparation_jobs(), *plan.tuning_jobs(), *plan.report_jobs(dict.fromkeys(sources, {}))]
    assert len({job.key for job in jobs}) == len(jobs) and len({job.name for job in jobs}) == len(jobs)
    # Every evaluation lies equally far from the last: the AUC is the same kind of number for every arm.
    for job in jobs:
        steps, every = job.settings.get("max_steps"), job.settings.get("eval_steps")
        assert not steps or not every or (steps % every == 0)
    if plan.tuned_from:
        tuned = load_plan(path.with_name(f"{plan.tuned_from}.yaml"))
        assert sources <= {arm.name for arm in tuned.arms.values() if arm.tune}
