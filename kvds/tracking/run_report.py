"""One table and one figure for one or more finished (or running) runs: ``report.md``, ``report.csv``,
``loss_curves.png``.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from kvds.config.alignment_modes import ALIGNMENT_MODES
from kvds.config.extras import installed, missing
from kvds.errors import InputError
from kvds.tracking.metrics_file import METRICS_FILE, read_metrics
from kvds.tracking.provenance import PROVENANCE_FILE

log = logging.getLogger("kvds")

MISSING = "–"
# Okabe and Ito's palette without black and its pale yellow: told apart under the common kinds of colour blindness.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LINES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says about a run.

    Attributes:
        name: Of the folder.
        settings: ``config.yaml``; empty where it is missing.
        metrics: The records of ``metrics.jsonl``.
        held_out: ``eval.json["all"]``; empty where the run has not finished or has no evaluation.
        provenance: ``provenance.json``; empty where it is missing.
    """

    name: str
    settings: dict[str, Any]
    metrics: list[dict[str, float]]
    held_out: dict[str, float]
    provenance: dict[str, Any] = field(default_factory=dict)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and finite values of one metric."""
        points = [(record["step"], record[key]) for record in self.metrics if math.isfinite(record.get(key, math.nan))]
        return [step for step, _ in points], [value for _, value in points]


def read_run(run_dir: str | Path) -> RunRecord:
    """Read a run folder.

    Raises:
        InputError: no such folder, no ``metrics.jsonl`` in it, or a file that is not what a run writes.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected the --output_dir of a run")
    if not (folder / METRICS_FILE).is_file():
        raise InputError(f"{folder}: holds no {METRICS_FILE}; expected the --output_dir of a run")
    held_out = _mapping(folder / "eval.json", json.loads).get("all", {})
    if not isinstance(held_out, dict) or not all(isinstance(value, int | float | None) for value in held_out.values()):
        raise InputError(f'{folder / "eval.json"}: "all" holds no numbers; expected the file that a run writes')
    held_out = {name: math.nan if value is None else value for name, value in held_out.items()}
    settings = _mapping(folder / "config.yaml", yaml.safe_load)
    provenance = _mapping(folder / PROVENANCE_FILE, json.loads)
    return RunRecord(folder.resolve().name, settings, read_metrics(folder / METRICS_FILE), held_out, provenance)


def _mapping(path: Path, parse: Any) -> dict[str, Any]:
    """A file's content, or nothing where the file is not there (yet)."""
    if not path.is_file():
        return {}
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: not readable ({reason}); expected what a run writes") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}; expected the mapping that a run writes")
    return content


def read_runs(run_dirs: Sequence[str | Path]) -> list[RunRecord]:
    """Read several; folders of one name are told apart by the folder above, or by number."""
    if not run_dirs:
        raise InputError("no run folder is given; expected at least one --output_dir of a run")
    runs = [read_run(folder) for folder in run_dirs]
    names = [run.name for run in runs]
    longer = [f"{Path(folder).resolve().parent.name}/{name}" for folder, name in zip(run_dirs, names, strict=True)]
    names = [long if names.count(name) > 1 else name for name, long in zip(names, longer, strict=True)]
    names = [f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]
    return [replace(run, name=name) for name, run in zip(names, runs, strict=True)]


def _alignment(settings: dict[str, Any]) -> str:
    mode = settings.get("alignment_mode")
    if mode is None:
        return MISSING
    if mode == "none" or settings.get("kv_weight") in (0, 0.0):
        return "none"
    method, budget = settings.get("kv_method", "full"), settings.get("kv_budget")
    facts = ALIGNMENT_MODES.get(mode)  # None: of a run of another version
    shared = ", shared dim" if facts and facts.shares_dim and settings.get("map_proj_share_dim") else ""
    shared += ", by step" if settings.get("align_tokens") == "segment" else ""
    return f"{mode}{shared}" + ("" if method == "full" else f", {method} {budget}")


def _number(value: float | None, form: str) -> str:
    return MISSING if value is None or not math.isfinite(value) else format(value, form)


def table_rows(runs: Sequence[RunRecord]) -> list[list[str]]:
    """Header and one row of texts per run; a piece that a run has not left is a dash."""
    header = [
        "run", "alignment", "task loss (held-out)", "exact match %", "KV loss (held-out)", "real tokens/s",
        "peak memory per rank (MiB)",
    ]  # fmt: skip
    rows = [header]
    for run in runs:
        match = run.held_out.get("exact_match")
        # The first interval holds the warm-up of allocator, kernels and file caches.
        speed = run.series("perf/tokens_per_second")[1][1:]
        peak = run.series("perf/peak_memory_bytes")[1]
        rows.append(
            [
                run.name,
                _alignment(run.settings),
                _number(run.held_out.get("cross_entropy"), ".4f"),
                _number(None if match is None else 100 * match, ".1f"),
                _number(run.held_out.get("kv_loss"), ".4f"),
                _number(statistics.median(speed) if speed else None, ",.0f"),
                _number(max(peak) / 2**20 if peak else None, ",.0f"),
            ]
        )
    return rows


def format_table(runs: Sequence[RunRecord]) -> str:
    """The runs as a Markdown table that is also aligned for a terminal: texts to the left, numbers to the right."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in table_rows(runs)]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    left = [column < 2 for column in range(len(widths))]

    def line(row: Sequence[str]) -> str:
        cells = (c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(row, widths, left, strict=True))
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * w if to_left else "-" * (w - 1) + ":" for w, to_left in zip(widths, left, strict=True)]
    return "\n".join([line(rows[0]), line(rule), *(line(row) for row in rows[1:])])


def _made_by(runs: Sequence[RunRecord]) -> str:
    """A Markdown list of revision, versions and command of each run that says them."""
    lines = []
    for run in runs:
        facts = {name: str(value) for name, value in run.provenance.items()}
        command = facts.pop("command", None)
        if facts or command:
            told = ", ".join(f"{name} {value}" for name, value in facts.items())
            lines.append(f"- {run.name}: {told}" + (f"\n  `{command}`" if command else ""))
    return "\n".join(["", "Made by", "", *lines, ""]) if lines else ""


def _write_csv(runs: Sequence[RunRecord], path: Path) -> None:
    """The table's cells, an empty one where it shows a dash, and what each run was made with."""
    header, *rows = table_rows(runs)
    facts = list(dict.fromkeys(name for run in runs for name in run.provenance))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*header, *facts])
        for run, row in zip(runs, rows, strict=True):
            cells = ["" if cell == MISSING else cell.replace(",", "") if n >= 2 else cell for n, cell in enumerate(row)]
            writer.writerow([*cells, *(run.provenance.get(name, "") for name in facts)])


def write_report(run_dirs: Sequence[str | Path], output: str | Path) -> list[Path]:
    """Write ``report.md`` (table, figure, origin), ``report.csv`` and ``loss_curves.png`` into the folder ``output``.

    Args:
        run_dirs: Folders of runs, finished or not.
        output: Folder, made if missing.

    Returns:
        The files written.

    Raises:
        InputError: a folder that no run wrote, or an ``output`` that cannot be written.
    """
    runs = read_runs(run_dirs)
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        figure, report, rows = folder / "loss_curves.png", folder / "report.md", folder / "report.csv"
        drawn = installed("matplotlib")
        if drawn:
            save_curves(runs, figure)
        else:
            log.warning("no %s: %s", figure.name, missing("matplotlib"))
        title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
        report.write_text(
            f"# {title}\n\n{format_table(runs)}\n\n"
            f"Task loss: nats per token of rationale and answer. KV loss: mean standardised residual of the "
            f"keys and values matched, by default the values alone. Real tokens: without padding, over all ranks, "
            f"median after the first interval. "
            f"{MISSING}: not recorded.\n\n{f'![Loss curves]({figure.name})' if drawn else ''}\n{_made_by(runs)}",
            encoding="utf-8",
        )
        _write_csv(runs, rows)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"--output {folder}: {reason}; expected a folder that can be written") from error
    return [report, figure, rows] if drawn else [report, rows]


def save_curves(runs: Sequence[RunRecord], path: Path) -> None:
    """Draw task loss, KV loss and, where evaluated at least twice, exact match over optimizer steps; a line per run."""
    # The figure without pyplot: no display is looked for and no state is left behind.
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    panels = [("loss/task", "task loss (nats/token)", True)]
    if any(run.series("loss/kv")[0] for run in runs):
        panels.append(("loss/kv", "KV loss (standardised)", True))
    if any(len(run.series("eval/all/exact_match")[0]) >= 2 for run in runs):
        panels.append(("eval/all/exact_match", "held-out exact match (%)", False))

    figure = Figure(figsize=(4.4 * len(panels), 3.9 + 0.22 * len(runs)), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharex=True)[0]
    star: dict[str, Any] = {
        "color": "white", "linestyle": "none", "marker": "*", "markersize": 11, "markeredgecolor": "black",
        "markeredgewidth": 0.6,
    }  # fmt: skip
    for axis, (key, label, logarithmic) in zip(axes, panels, strict=True):
        drawn: list[float] = []
        for number, run in enumerate(runs):
            steps, values = run.series(key)
            if key == "eval/all/exact_match":
                values = [100 * value for value in values]
            marker = _MARKERS[number % len(_MARKERS)] if len(steps) <= 30 else None
            axis.plot(steps, values, marker=marker, markersize=3.5, linewidth=1.5, **_style(number))
            drawn += values
            if key == "loss/task":
                axis.plot(*run.series("eval/all/cross_entropy"), **{**star, "color": _style(number)["color"]}, zorder=3)
        if logarithmic and drawn and min(drawn) > 0:
            axis.set_yscale("log")
            _plain_log_ticks(axis.yaxis, drawn)
        elif not logarithmic:
            axis.set_ylim(-3, 103)
        if not drawn:
            axis.text(0.5, 0.5, "nothing logged", ha="center", va="center", transform=axis.transAxes)
        axis.set_title(label, fontsize=10)
        axis.set_ylabel(label)
        axis.set_xlabel("optimizer step")
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axis.grid(True, which="both", alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    handles = [
        Line2D([], [], marker=_MARKERS[n % len(_MARKERS)], markersize=4, label=run.name, **_style(n))
        for n, run in enumerate(runs)
    ]
    if any(run.series("eval/all/cross_entropy")[0] for run in runs):
        handles.append(Line2D([], [], label="held-out task loss", **star))
    columns = 2 if len(panels) > 1 else 1
    figure.legend(handles=handles, loc="outside lower left", fontsize=8, frameon=False, ncols=columns)
    # Without the version of matplotlib in it, the same numbers give the same file.
    figure.savefig(path, metadata={"Software": None})


def _plain_log_ticks(axis: Any, values: Sequence[float]) -> None:
    """Numbers such as 0.5 instead of 5e-01; within one decade all minor ticks carry them, else those at 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    narrow = max(values) / min(values) < 10
    axis.set_minor_locator(LogLocator(subs=range(2, 10) if narrow else (2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _style(number: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _LINES[(number // len(_COLOURS) + number) % len(_LINES)],
    }
