"""Report of an experiment: ``report.md`` with a verdict drawn from the numbers, CSV files, two pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvds.experiment.plan import ExperimentPlan
from kvds.experiment.results import Row, value, write_csv, write_curves_csv
from kvds.experiment.statistics import (
    LEVEL,
    PairedComparison,
    bootstrap_interval,
    compare_paired,
    holm,
    mean_and_deviation,
)
from kvds.tracking.run_report import MISSING

SIGNIFICANCE = 1 - LEVEL
# Column of a row → title, factor, digits. A column that no run has is left out of the table.
_COLUMNS: dict[str, tuple[str, float, str]] = {
    "auc/exact_match": ("AUC of exact match %", 100, ".1f"),
    "auc/cross_entropy": ("AUC of dev CE", 1, ".4f"),
    "final/exact_match": ("final exact match %", 100, ".1f"),
    "final/cross_entropy": ("final dev CE", 1, ".4f"),
    "final/kv_loss": ("KV loss (held-out)", 1, ".4f"),
    "stability": ("stability (unsteadiness)", 1, ".4f"),
    "last/kv/norm_ratio": ("KV norm ratio", 1, ".2f"),
    "last/kv/effective_rank_keys": ("rank K", 1, ".1f"),
    "last/kv/effective_rank_values": ("rank V", 1, ".1f"),
    "parameters/student": ("student parameters", 1, ",.0f"),
    "parameters/aligner": ("map parameters", 1, ",.0f"),
    "train_cpu_seconds": ("CPU s", 1, ".0f"),
    "train_wall_seconds": ("wall s", 1, ".0f"),
    "perf/tokens_per_second": ("real tokens/s", 1, ",.0f"),
    "perf/peak_memory_bytes": ("peak memory MiB", 2**-20, ",.0f"),
}


@dataclass(frozen=True)
class Comparison:
    """One line of the table of comparisons: arm against reference, and its p-value corrected for the family."""

    arm: str
    reference: str
    paired: PairedComparison
    p_holm: float


def by_arm(plan: ExperimentPlan, rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """Arm → seed → row, in the plan's order, arms without any result left out."""
    found: dict[str, dict[int, Row]] = {arm: {} for arm in plan.arms}
    for row in sorted(rows, key=lambda row: row["seed"]):
        found[row["arm"]][row["seed"]] = row
    return {arm: seeds for arm, seeds in found.items() if seeds}


def compare_arms(plan: ExperimentPlan, arms: dict[str, dict[int, Row]]) -> list[Comparison]:
    """The plan's family of comparisons by its primary metric, over the seeds that both arms of a pair have."""
    pairs = [(arm, reference) for arm, reference in plan.pairs if arm in arms and reference in arms]
    return _corrected(pairs, _compare(plan, arms, pairs))


def compare_with_baseline(
    plan: ExperimentPlan, arms: dict[str, dict[int, Row]], planned: Sequence[Comparison]
) -> list[Comparison]:
    """Each arm that the plan compares with others than its baseline against the baseline all the same.

    What was planned keeps its p-values; these are corrected for both families together, so that looking further costs
    the further looks.
    """
    known = [(c.arm, c.reference) for c in planned]
    pairs = [(arm, plan.baseline) for arm in arms if arm != plan.baseline and (arm, plan.baseline) not in known]
    if plan.baseline not in arms:
        return []
    everything = _corrected([*known, *pairs], [*(c.paired for c in planned), *_compare(plan, arms, pairs)])
    return everything[len(known) :]


def _compare(
    plan: ExperimentPlan, arms: dict[str, dict[int, Row]], pairs: Sequence[tuple[str, str]]
) -> list[PairedComparison]:
    results = {arm: {seed: value(row, plan.primary) for seed, row in seeds.items()} for arm, seeds in arms.items()}
    return [compare_paired(results[arm], results[reference]) for arm, reference in pairs]


def _corrected(pairs: Sequence[tuple[str, str]], paired: Sequence[PairedComparison]) -> list[Comparison]:
    corrected = holm([comparison.p_t for comparison in paired])
    return [Comparison(*pair, p, c) for pair, p, c in zip(pairs, paired, corrected, strict=True)]


def verdict(plan: ExperimentPlan, comparisons: Sequence[Comparison]) -> str:
    """One paragraph: what the primary metric shows for each comparison, and "no effect shown" where it shows none."""
    title, factor, form = _shape(plan.primary)
    sentences = []
    for c in comparisons:
        p = c.paired
        if math.isnan(c.p_holm):
            sentences.append(f"{c.arm} against {c.reference}: too few pairs ({p.seeds}) to say anything.")
            continue
        size = f"{factor * p.difference:+{form}} [{factor * p.t_low:+{form}}, {factor * p.t_high:+{form}}]"
        evidence = f"{size}, Holm {_p_of(c.p_holm)}, {p.seeds} pairs"
        if c.p_holm >= SIGNIFICANCE:
            alone = f", though {_p_of(p.p_t)} without the correction" if p.p_t < SIGNIFICANCE else ""
            sentences.append(f"{c.arm} against {c.reference}: no effect shown ({evidence}{alone}).")
        else:
            good = (p.difference > 0) == plan.higher_is_better
            sentences.append(f"{c.arm} is {'better' if good else 'worse'} than {c.reference} ({evidence}).")
    direction = "higher" if plan.higher_is_better else "lower"
    return f"By {title} ({direction} is better; difference with its 95 % interval): " + " ".join(sentences)


def _shape(column: str) -> tuple[str, float, str]:
    return _COLUMNS.get(column, (column, 1, ".4g"))


def _p(p: float) -> str:
    return MISSING if math.isnan(p) else "< 1e-6" if p < 1e-6 else f"{p:.2g}"


def _p_of(p: float) -> str:
    text = _p(p)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary_table(plan: ExperimentPlan, arms: dict[str, dict[int, Row]]) -> str:
    """Mean ± standard deviation over seeds of each number, a row per arm."""
    every = [row for seeds in arms.values() for row in seeds.values()]
    wanted = [plan.primary, *(column for column in _COLUMNS if column != plan.primary)]
    columns = [column for column in wanted if any(math.isfinite(value(row, column)) for row in every)]
    lines = []
    for arm, seeds in arms.items():
        cells = [arm, str(len(seeds))]
        for column in columns:
            _, factor, form = _shape(column)
            mean, deviation = mean_and_deviation([factor * value(row, column) for row in seeds.values()])
            exact = column.startswith("parameters/") and deviation == 0
            spread = f" ± {deviation:{form}}" if math.isfinite(deviation) and not exact else ""
            cells.append(f"{mean:{form}}{spread}" if math.isfinite(mean) else MISSING)
        lines.append(cells)
    return _table(["arm", "seeds", *(_shape(column)[0] for column in columns)], lines)


def comparison_table(plan: ExperimentPlan, comparisons: Sequence[Comparison]) -> str:
    """Paired differences with intervals, tests and effect sizes, a row per comparison."""
    title, factor, form = _shape(plan.primary)
    lines = []
    for c in comparisons:
        p = c.paired

        def interval(low: float, high: float) -> str:
            return MISSING if math.isnan(low) else f"[{factor * low:+{form}}, {factor * high:+{form}}]"

        lines.append([
            f"{c.arm} − {c.reference}", str(p.seeds), f"{factor * p.difference:+{form}}", interval(p.t_low, p.t_high),
            interval(p.low, p.high), f"{p.better}/{p.seeds}", MISSING if math.isnan(p.cohen_d) else f"{p.cohen_d:+.2f}",
            _p(p.p_t), _p(p.p_wilcoxon), _p(c.p_holm),
        ])  # fmt: skip
    header = [f"difference in {title}", "pairs", "mean", "95 % (t)", "95 % (bootstrap)", "higher in", "Cohen's d",
              "p (t)", "p (Wilcoxon)", "p (t, Holm)"]  # fmt: skip
    return _table(header, lines)


def chosen_table(arms: dict[str, dict[int, Row]], common: dict[str, Any]) -> str:
    """What each arm sets differently from the plan's common settings, chosen values among it."""
    lines = []
    for arm, seeds in arms.items():
        settings = next(iter(seeds.values())).get("settings", {})
        own = {k: v for k, v in settings.items() if k != "seed" and (k not in common or _plain(common[k]) != v)}
        weights = [value(row, "last/kv/weight") for row in seeds.values()]
        mean, _ = mean_and_deviation(weights)
        text = " ".join(f"`{key}={item}`" for key, item in own.items()) or MISSING
        lines.append([arm, text, f"{mean:.3g}" if math.isfinite(mean) else MISSING])
    return _table(["arm", "settings", "KV weight at the end"], lines)


def write_ab_report(plan: ExperimentPlan, rows: Sequence[Row], failed: Sequence[Row], folder: Path) -> list[Path]:
    """Write ``report.md``, ``runs.csv``, ``curves.csv``, ``arms.png`` and ``learning_curves.png`` into ``folder``.

    Args:
        plan: Names the primary metric and the comparisons.
        rows: Finished runs.
        failed: Runs that ended with an error.
        folder: Exists.
    """
    from kvds.experiment.figures import save_arms, save_learning_curves

    arms = by_arm(plan, rows)
    ordered = [row for seeds in arms.values() for row in seeds.values()]
    comparisons = compare_arms(plan, arms)
    paths = [folder / name for name in ("report.md", "runs.csv", "curves.csv", "arms.png", "learning_curves.png")]
    write_csv(ordered, paths[1])
    write_curves_csv(ordered, paths[2])
    title, factor, _ = _shape(plan.primary)
    numbers = {arm: [factor * value(row, plan.primary) for row in seeds.values()] for arm, seeds in arms.items()}
    save_arms(numbers, title, {arm: bootstrap_interval(found) for arm, found in numbers.items()}, paths[3])
    save_learning_curves(arms, paths[4])
    counts = {arm.name: (len(arms.get(arm.name, {})), len(arm.seeds or plan.seeds)) for arm in plan.arms.values()}
    missing = [f"{arm} ({found} of {expected})" for arm, (found, expected) in counts.items() if found < expected]
    notes = []
    odd = [f"{row['arm']} seed {row['seed']}" for row in ordered if not math.isfinite(value(row, plan.primary))]
    if odd:
        notes.append(f"No finite {title}, in no mean, difference or test: {', '.join(odd)}.")
    if missing:
        notes.append("Seeds not finished: " + ", ".join(missing) + ".")
    if failed:
        told = [f"{row['arm']} seed {row['seed']} ({row['error']})" for row in failed]
        notes.append("Failed: " + "; ".join(told) + ".")
    further = compare_with_baseline(plan, arms, comparisons)
    beside = [
        f"Not among the plan's comparisons: the other arms against the baseline, {plan.baseline}. Holm's correction is "
        "over both tables together.",
        comparison_table(plan, further),
    ]
    revisions = sorted({str(row.get("git_revision")) for row in ordered})
    paths[0].write_text(
        "\n\n".join(
            [
                f"# {plan.name}",
                verdict(plan, comparisons),
                *notes,
                f"Primary metric, fixed in the plan: {title} (`{plan.primary}`). Mean ± standard deviation over seeds:",
                summary_table(plan, arms),
                "The plan's comparisons, paired by seed; Holm's correction is over this table.",
                comparison_table(plan, comparisons),
                *(beside if further else []),
                f"![Primary metric per arm]({paths[3].name})",
                f"![Learning curves]({paths[4].name})",
                chosen_table(arms, plan.common),
                "AUC: mean over the evaluations of a run. CE: nats per token of rationale and answer; the final one is "
                "the task loss on held-out rows. Unsteadiness: standard deviation of the change of the smoothed "
                "training loss; 0 is the steadiest. KV loss: standardised residual on held-out rows, comparable only "
                "between arms that match the same thing. Intervals are not corrected. Cohen's d: mean difference over "
                "the standard deviation of the differences. Seconds: a run from its data to its last evaluation, "
                "without imports and launcher; they and tokens/s depend on what else the machine does. Revision: "
                f"{', '.join(revisions)}.",
            ]
        )
        + "\n",
        encoding="utf-8",
    )
    return paths


def _plain(value: object) -> object:
    """As JSON has kept it in a row."""
    return list(value) if isinstance(value, tuple) else value
