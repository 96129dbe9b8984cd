"""Report of a handoff's evaluation: one table, one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvds.evaluation.handoff import Results

_WORDS = {
    "own": "its own", "mapped": "teacher's, mapped", "another": "another row's", "shuffled": "tokens shuffled",
    "zeros": "zeros", "none": "none",
}  # fmt: skip


def markdown_table(results: Results, fitted: Sequence[str]) -> str:
    """A line per condition: exact match and cross entropy of each corpus, and the attention-output error.

    Args:
        results: From :func:`kvds.evaluation.handoff.evaluate_handoff`.
        fitted: Corpora that the map was fitted to; the others are said to be other text.
    """
    corpora = _corpora(results)
    titles = [f"{name}{'' if name in fitted else ' (other text)'}" for name in corpora]
    head = [
        "the student's cache",
        *(f"{title}: {what}" for title in titles for what in ("exact match %", "nats/token")),
    ]
    lines = [head + ["attention error"], ["---"] + ["---:"] * len(head)]
    for condition, of in results.items():
        line = [_WORDS[condition]]
        for name in corpora:
            line += [_number(100 * of[name]["exact_match"], 1), _number(of[name]["cross_entropy"], 3)]
        lines.append([*line, _number(of["all"]["attention_error"], 3)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def save_picture(results: Results, path: Path) -> None:
    """Exact match and cross entropy per condition, a bar a corpus."""
    from matplotlib.figure import Figure

    corpora = _corpora(results)
    figure = Figure(figsize=(9, 3.6), dpi=130, layout="constrained")
    panels: Any = figure.subplots(1, 2)
    width = 0.8 / len(corpora)
    for axis, key, scale, title in zip(
        panels, ("exact_match", "cross_entropy"), (100, 1), ("exact match, %", "cross entropy, nats per token"),
        strict=True,
    ):  # fmt: skip
        for number, name in enumerate(corpora):
            heights = [scale * of[name][key] for of in results.values()]
            axis.bar([i + number * width for i in range(len(results))], heights, width, label=name)
        axis.set_xticks([i + 0.4 - width / 2 for i in range(len(results))], [_WORDS[c] for c in results], rotation=25)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=8)
    figure.savefig(path)


def _corpora(results: Results) -> list[str]:
    return [name for name in next(iter(results.values())) if name != "all"]


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"
