"""What ``benchmarks.train_step.bench`` makes of its numbers: rows of a CSV, a picture, a table as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PHASES = ("teacher", "forward", "align", "backward", "optimizer")


def csv_row(row: dict[str, Any]) -> dict[str, Any]:
    """An arm's numbers with six significant digits."""
    return {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}


def draw_picture(path: Path, table: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Seconds per phase, stacked, an arm a bar."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in table if "seconds_p50" in row][::-1]
    figure, axes = pyplot.subplots(figsize=(9, 0.45 * len(rows) + 1.6))
    left = [0.0] * len(rows)
    parts = stacked_parts(rows)
    for name, values in parts.items():
        widths = [1000 * value for value in values]
        axes.barh([row["arm"] for row in rows], widths, left=left, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for position, row in enumerate(rows):
        axes.text(left[position], position, f" {row['tokens_per_second']:,.0f} tok/s", va="center", fontsize=8)
    axes.set_xlabel(f"ms per step ({facts['clock']}), {facts['pair']}, batch {facts['batch_size']}, {facts['device']}")
    axes.set_xlim(0, max(left) * 1.3)  # room for the numbers behind the bars
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # beside the bars, never on them
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def stacked_parts(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Seconds of each part of a step, an entry an arm; a step whose parts nobody timed is one part by itself."""
    whole = [row["seconds_forward"] > 0 and row["seconds_backward"] == 0 for row in rows]

    def split(seconds: Any) -> list[float]:
        return [0.0 if alone else seconds(row) for row, alone in zip(rows, whole, strict=True)]

    # The map's forward lies inside the student's: shown apart, it is taken out of that.
    parts = {
        "teacher": [row["seconds_teacher"] for row in rows],
        "student forward": split(lambda row: max(0.0, row["seconds_forward"] - row["seconds_align"])),
        "alignment forward": split(lambda row: row["seconds_align"]),
        "backward": split(lambda row: row["seconds_backward"]),
        "whole step, parts not timed": [
            row["seconds_forward"] if alone else 0.0 for row, alone in zip(rows, whole, strict=True)
        ],
        "optimizer": [row["seconds_optimizer"] for row in rows],
    }
    return {name: values for name, values in parts.items() if any(values)}


def format_table(table: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The table as text."""
    lines = [", ".join(f"{key} {value}" for key, value in facts.items() if key != "command")]
    head = ("arm", "ms", "teacher", "fwd", "align", "bwd", "optim", "tok/s", "x (a+b)", "peak MiB", "MFU", "loss")
    lines.append(("{:<30}" + "{:>9}" * (len(head) - 1)).format(*head))
    for row in table:
        if "seconds_p50" not in row:
            lines.append(f"{row['arm']:<30} {row['note']}")
            continue
        cells = [f"{1000 * row['seconds_p50']:.1f}", *(f"{1000 * row[f'seconds_{phase}']:.1f}" for phase in PHASES)]
        cells.append(f"{row['tokens_per_second']:,.0f}")
        cells.append(f"{row['ratio_to_floor']:.3f}" if "ratio_to_floor" in row else "")
        cells.append(f"{row['peak_bytes'] / 2**20:,.0f}" if row.get("peak_bytes") else "")
        cells.append(f"{100 * row['mfu']:.1f} %" if row.get("mfu") else "")
        cells.append(f"{row['loss_first_batch']:.4f}" if row.get("loss_first_batch") is not None else "")
        lines.append(f"{row['arm']:<30}" + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines)
