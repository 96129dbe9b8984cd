"""Depth pruning: a smaller student of some of a model's own layers, chosen by hand or by what each one is worth."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvds.commands.data_flags import add_data_flags, check_data_flags, reading_of, with_template
from kvds.config.settings import DataSettings
from kvds.durable_files import json_text, write_durably
from kvds.errors import InputError, one_line

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

ORDER_FILE = "pruning.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--model_name", required=True, metavar="NAME", help="folder or hub name of the model to prune")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the student; a new one")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument(
        "--layers", type=int, metavar="N",
        help="how many layers stay: one at a time leaves, the one without which calibration rows are predicted best",
    )  # fmt: skip
    how.add_argument("--keep", metavar="0,1,8,…", help="the layers that stay, counted from 0; no data is read")
    parser.add_argument(
        "--order", type=Path, metavar="FILE",
        help=f"{ORDER_FILE} of an earlier student of the same model: sizes that its order reaches cost nothing more",
    )  # fmt: skip
    parser.add_argument("--tokenizer_name", metavar="NAME", help="folder or hub name; unset: the model's")
    numbers = {
        "rows": (48, "calibration rows, of the training split"),
        "batch_size": (16, "rows per forward"),
        "seed": (0, "of which rows are taken"),
    }
    add_data_flags(parser, numbers)


def run(arguments: argparse.Namespace) -> int:
    """Choose the layers, write the student and the order."""
    for name in ("rows", "batch_size", "max_length"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise InputError(f"--{name} {getattr(arguments, name)}: expected at least 1")
    check_data_flags(arguments)
    if arguments.output.exists():
        raise InputError(f"--output {arguments.output}: is there already; expected the name of a new folder")
    keep = None if arguments.keep is None else _numbers(arguments.keep)
    if keep is not None and arguments.order is not None:
        raise InputError("--order: says which layers leave first; expected --layers N with it, not --keep")

    from kvds.models.architecture import load_config, row_length
    from kvds.models.pruning import check_kept_layers
    from kvds.models.weights_identity import weights_identity

    config = load_config(arguments.model_name, flag="model")
    arguments.max_length = row_length(config, arguments.max_length, DataSettings().max_length)
    depth = config.num_hidden_layers
    if keep is not None:
        check_kept_layers(keep, depth)
    elif not 1 <= arguments.layers < depth:
        raise InputError(f"--layers {arguments.layers}: the model has {depth}; expected 1 to {depth - 1}")
    weights = weights_identity(arguments.model_name, init="pretrained", seed=0, flag="--model_name")
    record = {"model": arguments.model_name, "weights": weights, "num_hidden_layers": depth, "removed": []}
    if arguments.order is not None:
        record |= _read_order(arguments.order, depth, weights)
    model, tokenizer = _load(arguments, config)
    if keep is None:
        _extend_order(record, model, tokenizer, arguments)
        gone = {layer for layer, _ in record["removed"][: depth - arguments.layers]}
        keep = [layer for layer in range(depth) if layer not in gone]
    _write(model, tokenizer, keep, record, arguments.output)
    return 0


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--keep {text}: expected numbers of layers with commas between, such as 0,1,8") from None


def _read_order(path: Path, depth: int, weights: str) -> dict[str, Any]:
    """``removed`` and what it was found with, checked against the model's depth and weights."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        removed = [(int(layer), float(loss)) for layer, loss in record["removed"]]
        written_for = int(record["num_hidden_layers"])
    except (OSError, UnicodeDecodeError, ValueError, TypeError, KeyError) as error:
        reason = one_line(error)
        raise InputError(f"--order {path}: cannot be read ({reason}); expected a student's {ORDER_FILE}") from error
    layers = [layer for layer, _ in removed]
    if written_for != depth or len(set(layers)) != len(layers) or not set(layers) <= set(range(depth)):
        raise InputError(
            f"--order {path}: is of a model of {written_for} layers, this one has {depth}; expected the {ORDER_FILE} "
            "of a student of the same model"
        )
    if record.get("weights", weights) != weights:
        raise InputError(
            f"--order {path}: is of a model with other weights ({one_line(record['weights'])}, here {weights}); "
            f"expected the {ORDER_FILE} of a student of the same model"
        )
    return record | {"removed": removed}


def _load(arguments: argparse.Namespace, config: Any) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    import torch

    from kvds.models.loading import load_model
    from kvds.models.tokenizer import check_vocabulary, tokenizer_of

    flag = "--model_name" if arguments.tokenizer_name is None else "--tokenizer_name"
    tokenizer = tokenizer_of(arguments.tokenizer_name or arguments.model_name, flag)
    check_vocabulary(config, tokenizer, flag="model")
    model = load_model(
        arguments.model_name, config, init="pretrained", dtype=config.dtype or torch.float32, seed=0, flag="model",
        attn_implementation="sdpa",
    )  # fmt: skip
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def _extend_order(
    record: dict[str, Any], model: nn.Module, tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace
) -> None:
    """Let layers leave until ``--layers`` are left, and note each with the cross entropy of what is left."""
    missing = record["num_hidden_layers"] - arguments.layers - len(record["removed"])
    if missing <= 0:
        return
    from kvds.data.encoding import compare_rows, encode_examples
    from kvds.data.mixture import load_mixture
    from kvds.data.ready_rows import ready_rows
    from kvds.data.text_fidelity import check_texts
    from kvds.evaluation.layer_order import mean_loss, removal_order

    mixture = load_mixture(
        arguments.datasets, "train", data_dir=arguments.data_dir, subset_size=arguments.rows, seed=arguments.seed,
        reading=reading_of(arguments),
    )  # fmt: skip
    rows = mixture.examples[: arguments.rows]
    turns, tokenizer = arguments.assistant_turns, with_template(tokenizer, arguments)
    examples = ready_rows(rows, tokenizer, arguments.max_length, assistant_turns=turns).examples
    encoded = encode_examples(examples, tokenizer, arguments.max_length)
    samples = encoded.samples
    fidelity = compare_rows(samples, examples, tokenizer)
    check_texts(fidelity, examples, what="calibration", most=arguments.max_lossy_rows, tokenizer=tokenizer)
    if not samples:
        raise InputError(
            f"--max_length {arguments.max_length}: every calibration row is longer; expected at least one that fits"
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    how = {"pad": pad, "batch_size": arguments.batch_size}
    if "cross_entropy" not in record:
        record["cross_entropy"] = mean_loss(model, samples, **how)
        record |= {"datasets": arguments.datasets, "rows": len(samples), "seed": arguments.seed}
    # Hours on a CPU: what is found so far is on disk, and --order goes on from there.
    so_far = arguments.output.with_name(f"{arguments.output.name}.{ORDER_FILE}")
    so_far.parent.mkdir(parents=True, exist_ok=True)
    gone = [layer for layer, _ in record["removed"]]
    for layer, loss in removal_order(model, samples, missing, removed=gone, **how):
        record["removed"].append((layer, loss))
        write_durably(so_far, json_text(record, indent=1) + "\n")


def _write(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, keep: Sequence[int], record: dict[str, Any], output: Path
) -> None:
    """The student's folder, whole or not at all, and what was done in a few lines."""
    from kvds.checkpoint.export import save_student
    from kvds.models.pruning import prune_layers

    student = prune_layers(model, keep)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_student(student, tokenizer, output)
    text = json_text(record | {"kept": list(keep)}, indent=1) + "\n"
    write_durably(output / ORDER_FILE, text)
    output.with_name(f"{output.name}.{ORDER_FILE}").unlink(missing_ok=True)
    depth, parameters = record["num_hidden_layers"], sum(p.numel() for p in student.parameters())
    print(f"layers kept: {','.join(map(str, keep))} ({len(keep)} of {depth}), {parameters / 1e6:.1f} M parameters")
    losses = [record["cross_entropy"], *(loss for _, loss in record["removed"])] if "cross_entropy" in record else []
    if len(losses) > depth - len(keep):
        print(f"cross entropy of the calibration rows: {losses[0]:.3f}, pruned {losses[depth - len(keep)]:.3f}")
    print(f"written: {output} (train it with --student_name {output})")
