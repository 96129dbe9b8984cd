"""The picture of ``bench_map_projection.py``: time against tokens, and the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {
    "eager": "#D55E00",
    "compile": "#E69F00",
    "before": "#56B4E9",
    "triton": "#0072B2",
    "lean": "#009E73",
}
MARKERS = {"student_to_teacher": "o", "teacher_to_student": "s"}


def draw_roofline(
    rows: Sequence[dict[str, Any]], copy_gb_per_s: float, matmul_tflop_per_s: float, device: str, path: Path
) -> None:
    """Left: milliseconds of mode full over tokens for the first pair, with the time that one pass of copying takes.
    Right: rate over arithmetic intensity of each pair at 32768 tokens (or its largest size), under the two measured
    ceilings; points are labelled with pair and form of ``dim_proj``. Rows of provider ``before`` are of an earlier
    kernel.
    """
    full = [row for row in rows if row["mode"] == "full" and "ms" in row]
    if not full:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    pair, proj = full[0]["pair"], full[0]["proj"]
    chosen = [r for r in full if (r["pair"], r["proj"], r["layer_map"]) == (pair, proj, "dense")]
    for provider in dict.fromkeys(row["provider"] for row in chosen):
        for direction in dict.fromkeys(row["direction"] for row in chosen):
            points = sorted(
                (r["tokens"], r["ms"]) for r in chosen if (r["provider"], r["direction"]) == (provider, direction)
            )
            style = "-" if direction == "student_to_teacher" else "--"
            left.plot(*zip(*points, strict=True), style, color=COLOURS[provider], marker=MARKERS[direction], ms=4,
                      label=f"{provider}, {direction.replace('_', ' ')}")  # fmt: skip
    floor = sorted({(r["tokens"], r["one_pass_bytes"] / copy_gb_per_s / 1e6) for r in chosen})
    left.plot(*zip(*floor, strict=True), ":", color="black", label="one pass at copy bandwidth")
    left.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds, loss and gradients",
             title=f"{pair}, dense layer map, {proj} dim_proj")  # fmt: skip
    left.legend(fontsize=7)

    sizes = {key: {r["tokens"] for r in full if r["pair"] == key} for key in {r["pair"] for r in full}}
    shown = {key: 32768 if 32768 in found else max(found) for key, found in sizes.items()}
    intensities = []
    for row in full:
        if row["tokens"] != shown[row["pair"]]:
            continue
        intensity = row["tflop_per_s"] / row["gb_per_s"] * 1000
        intensities.append(intensity)
        hollow = "none" if row["layer_map"] == "sparse" else COLOURS[row["provider"]]
        right.plot(intensity, row["tflop_per_s"], MARKERS[row["direction"]], color=COLOURS[row["provider"]],
                   markerfacecolor=hollow, ms=6)  # fmt: skip
        label = f"{row['pair']} {row['proj'].replace('_', ' ')}"
        right.annotate(label, (intensity, row["tflop_per_s"]), xytext=(5, -2), textcoords="offset points", fontsize=5)
    low, high = min(intensities) / 2, max(*intensities, 2 * matmul_tflop_per_s / copy_gb_per_s * 1000)
    knee = matmul_tflop_per_s / copy_gb_per_s * 1000
    right.plot(
        [low, knee, high], [low * copy_gb_per_s / 1000, matmul_tflop_per_s, matmul_tflop_per_s], color="black", lw=1
    )
    for provider in dict.fromkeys(row["provider"] for row in full):
        right.plot([], [], "o", color=COLOURS[provider], label=provider)
    right.plot([], [], "o", color="grey", markerfacecolor="none", label="sparse layer map")
    right.set(xscale="log", yscale="log", xlabel="FLOP per one-pass byte", ylabel="TFLOP/s",
              title="Roofline (circles: student to teacher)")  # fmt: skip
    right.legend(fontsize=7)
    figure.suptitle(f"map_projection_loss on {device}", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)
