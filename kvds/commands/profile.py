"""Profile of an aligner, of what it has learned, too: parameters, mixing heat maps, spectra, fit on held-out text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kvds.config.alignment_modes import ALIGNMENT_MODES, modes_where
from kvds.config.settings import AlignmentSettings
from kvds.durable_files import json_text
from kvds.errors import InputError

_MEASURES = {"r2": "R² of the map", "loss": "loss", "relative_error": "relative error", "cosine": "mean cosine"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--run", type=Path, metavar="DIR", help="output folder of a run: the aligner that it trained")
    rows = "with --run: held-out rows per corpus for the fit before and after training; 0: none"
    parser.add_argument("--fit_rows", type=int, default=0, metavar="N", help=rows + " (0)")
    pair = parser.add_argument_group("instead of a run: the aligner of a pair of models, as it starts")
    for side in ("teacher", "student"):
        name, changes = f"--{side}_name", f"--{side}_config_overrides"
        pair.add_argument(name, metavar="NAME", help=f"folder or hub name of the {side}; only its config.json is read")
        pair.add_argument(changes, metavar="KEY=VALUE,…", default="", help=f"changes of the {side}'s config.json")
    modes = [name for name, mode in ALIGNMENT_MODES.items() if mode.aligned]
    pair.add_argument("--alignment_mode", choices=modes, default="structured", help="(structured)")
    values = modes_where(lambda mode: mode.parts == "v")
    parts = f"keys and values, or one of them; auto: values alone for {values}, else both (auto)"
    pair.add_argument("--kv_parts", choices=("auto", "kv", "k", "v"), default="auto", help=parts)
    pair.add_argument("--map_proj_share_dim", action="store_true", help="one dimension map for all layers and heads")
    pair.add_argument("--map_proj_init_uniform", action="store_true", help="mixing weights start uniform")
    parser.add_argument("--output", type=Path, metavar="DIR", help="for PNGs and JSON; unset: the run's, else none")


def run(arguments: argparse.Namespace) -> int:
    """Print the description and draw the heat maps."""
    names = [f"--{side}_name" for side in ("teacher", "student") if getattr(arguments, f"{side}_name") is not None]
    if (arguments.run is None) == (not names):
        raise InputError("expected --run DIR, or --teacher_name and --student_name" + (", not both" if names else ""))
    if arguments.output is not None and arguments.output.exists() and not arguments.output.is_dir():
        raise InputError(f"--output {arguments.output}: is a file; expected a folder")
    if arguments.fit_rows < 0 or (arguments.fit_rows and arguments.run is None):
        raise InputError(f"--fit_rows {arguments.fit_rows}: expected at least 0, and with --run DIR")
    aligner = _of_pair(arguments) if arguments.run is None else _of_run(arguments.run)

    from kvds.align.diagnostics import describe_aligner, parameter_counts, save_heatmaps
    from kvds.align.figures import save_fit, save_spectra
    from kvds.align.spectrum import map_spectra

    description = describe_aligner(aligner)
    counts = parameter_counts(aligner.student_shape, aligner.teacher_shape, aligner.settings)
    print(format_profile(description, counts))
    spectra, fit = map_spectra(aligner), {}
    if arguments.fit_rows:
        from kvds.evaluation.map_fit import fit_before_and_after

        fit = fit_before_and_after(arguments.run, arguments.fit_rows)
        print(format_fit(fit))
    output = arguments.output or arguments.run
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        written = [save_heatmaps(aligner, output / "aligner.png")]
        if spectra:
            written.append(save_spectra(spectra, output / "aligner_spectrum.png"))
        if fit:
            written.append(save_fit(fit, output / "aligner_fit.png"))
        written.append(output / "profile.json")
        content = {**description, "learned_parameters_by_mode": counts, "spectra": spectra, "fit": fit}
        written[-1].write_text(json_text(content, indent=1) + "\n", encoding="utf-8")
        print("written:", *written)
    return 0


def _of_run(folder: Path) -> Any:
    if not folder.is_dir():
        raise InputError(f"--run {folder}: no such folder; expected the --output_dir of a run")
    from kvds.checkpoint.aligner_file import ALIGNER_FILE, load_aligner

    aligner = load_aligner(folder / ALIGNER_FILE)
    from kvds.align import AlignerGroup

    if isinstance(aligner, AlignerGroup):
        raise InputError(f"--run {folder}: was trained with several teachers; expected a run with one")
    return aligner


def _of_pair(arguments: argparse.Namespace) -> Any:
    from kvds.align import build_aligner
    from kvds.kv import KVShape
    from kvds.models.architecture import load_config

    shapes = {}
    for side in ("student", "teacher"):
        name = getattr(arguments, f"{side}_name")
        if name is None:
            raise InputError(f"--{side}_name is missing; expected a folder or a hub name")
        shapes[side] = KVShape.from_config(load_config(name, getattr(arguments, f"{side}_config_overrides"), flag=side))
    names = ("alignment_mode", "kv_parts", "map_proj_share_dim", "map_proj_init_uniform")
    chosen = {key: getattr(arguments, key) for key in names}
    return build_aligner(shapes["student"], shapes["teacher"], AlignmentSettings(**chosen))


def format_profile(description: dict[str, Any], counts: dict[str, int]) -> str:
    """The description of :func:`kvds.align.diagnostics.describe_aligner` and the counts per mode as text."""
    head = f"alignment {description['alignment_mode']}, {description['direction']}"
    lines = [f"{head}, {description['parameters']:,} parameters"]
    for side in ("student", "teacher"):
        shape = description[side]
        heads = f"{shape['num_key_value_heads']} KV heads of {shape['head_dim']}"
        lines.append(f"{side}: {shape['num_hidden_layers']} layers, {heads}")
    width = max(map(len, counts))
    lines += ["", "learned parameters for this pair, by alignment:"]
    lines += [f"  {mode:<{width}}  {count:>14,}" for mode, count in counts.items()]
    for name, part in description["parts"].items():
        lines += ["", f"{name}:"]
        lines += [f"  {parameter} {list(shape)}" for parameter, shape in part["parameters"].items()]
        if part["layer_pairs"] is not None:
            lines.append("  layers paired (student, teacher): " + " ".join(f"{s}-{t}" for s, t in part["layer_pairs"]))
            continue
        mixes = zip(part["layer_mix_argmax"], part["layer_mix_entropy"], strict=True)
        lines.append("  row of the layer mix: strongest source, entropy (nats)")
        lines += [f"  {row:>4}: {source:>4}  {entropy:.3f}" for row, (source, entropy) in enumerate(mixes)]
    return "\n".join(lines)


def format_fit(fit: dict[str, dict[str, dict[str, list[float]]]]) -> str:
    """What :func:`kvds.evaluation.map_fit.fit_before_and_after` measured, as a table of target layers."""
    whens = list(fit)
    lines = []
    for part, measures in fit[whens[-1]].items():
        for measure in measures:
            name = f"{part.replace('_', ' ')}: {_MEASURES[measure]}"
            heads = "  ".join(f"{when:>8}" for when in whens)
            lines += ["", f"{name} on held-out text, by target layer", f"  layer  {heads}"]
            columns = [fit[when][part][measure] for when in whens]
            lines += [
                f"  {layer:>5}  " + "  ".join(f"{value:>8.4f}" for value in row)
                for layer, row in enumerate(zip(*columns, strict=True))
            ]
            lines.append("   mean  " + "  ".join(f"{sum(column) / len(column):>8.4f}" for column in columns))
    return "\n".join(lines) if lines else "\nno position of the held-out text counts: there is no fit to tell"
