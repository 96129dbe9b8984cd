"""Judge a model on held-out rows: cross entropy and perplexity of rationale and answer, exact match of the answer.

With --tasks, on tasks of lm-evaluation-harness instead.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from kvds.commands.data_flags import add_data_flags, check_data_flags, reading_of, with_template
from kvds.commands.output_folder import check_output, owned_output
from kvds.config.extras import need
from kvds.config.settings import DataSettings
from kvds.durable_files import json_text
from kvds.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags; those that training has, too, have its defaults."""
    data = DataSettings()
    parser.add_argument("--model", type=Path, metavar="DIR", required=True, help="the model (RUN_DIR/student)")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder of the tokenizer; unset: the model's")
    numbers = {
        "subset_size": (data.eval_subset_size, "the first N held-out rows of each corpus, 0: all"),
        "batch_size": (32, "rows at once"),
        "max_new_tokens": (data.max_new_tokens, "tokens generated per row"),
        "synthetic_problems": (data.synthetic_problems, "size of the built-in training corpus"),
    }
    add_data_flags(parser, numbers)
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for eval.json and predictions.jsonl")
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="tasks of lm-evaluation-harness in place of --datasets, such as gsm8k",
    )
    parser.add_argument("--include_path", type=Path, metavar="DIR", help="--tasks: folder with task files of your own")
    parser.add_argument("--num_fewshot", type=int, metavar="N", help="--tasks: examples in a prompt; unset: the task's")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print a table, and write the files if asked to."""
    for name in ("batch_size", "max_new_tokens", "max_length", "synthetic_problems"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: expected at least 1")
    if arguments.subset_size < 0:
        raise InputError(f"--subset_size {arguments.subset_size}: expected at least 1, or 0 for every row")
    check_data_flags(arguments)
    for flag in ("model", "tokenizer"):
        folder = getattr(arguments, flag)
        if folder is not None and not folder.is_dir():
            raise InputError(
                f"--{flag} {folder}: no such folder; expected what save_pretrained writes (RUN_DIR/student)"
            )
    if arguments.output is not None:
        check_output(arguments.output)
    if arguments.tasks is not None:
        return _run_tasks(arguments)
    for flag in ("include_path", "num_fewshot"):
        if getattr(arguments, flag) is not None:
            raise InputError(f"--{flag} {getattr(arguments, flag)}: expected it with --tasks alone")

    import torch

    from kvds.data.mixture import first_per_corpus, load_mixture
    from kvds.data.ready_rows import ready_rows
    from kvds.data.text_fidelity import check_texts
    from kvds.data.token_files import TokenFiles, encode_once
    from kvds.evaluation.model import evaluate_model
    from kvds.models.architecture import row_length

    mixture = load_mixture(
        arguments.datasets, "eval", data_dir=arguments.data_dir, synthetic_problems=arguments.synthetic_problems,
        reading=reading_of(arguments),
    )  # fmt: skip
    examples = first_per_corpus(mixture.examples, arguments.subset_size)
    model, tokenizer = _load(arguments.model, arguments.tokenizer or arguments.model)
    max_length = row_length(model.config, arguments.max_length, DataSettings().max_length)
    tokenizer = with_template(tokenizer, arguments)
    examples = ready_rows(examples, tokenizer, max_length, assistant_turns=arguments.assistant_turns).examples
    rows = encode_once(examples, tokenizer, max_length, files=TokenFiles())
    if not rows.samples:
        raise InputError(
            f"--max_length {max_length}: none of the {len(examples)} held-out rows fits; expected more tokens"
        )
    check_texts(rows.fidelity, examples, what="held-out", most=arguments.max_lossy_rows, tokenizer=tokenizer)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    output = arguments.output
    with contextlib.nullcontext() if output is None else owned_output(output):
        results = evaluate_model(
            model, tokenizer, examples, batch_size=arguments.batch_size, max_new_tokens=arguments.max_new_tokens,
            max_length=max_length, predictions_path=None if output is None else output / "predictions.jsonl",
        )  # fmt: skip
        print(_table(results))
        if output is not None:
            (output / "eval.json").write_text(json_text(results, indent=1) + "\n", encoding="utf-8")
            print("written:", output / "eval.json", output / "predictions.jsonl")
    asking = any(example.form != "text" for example in examples)
    return 0 if results["all"]["judged"] or not asking else 1


def _run_tasks(arguments: argparse.Namespace) -> int:
    """Print what the harness finds, and write ``tasks.json`` if asked to."""
    need("kvds eval --tasks", "lm_eval")
    if arguments.include_path is not None and not arguments.include_path.is_dir():
        raise InputError(f"--include_path {arguments.include_path}: no such folder; expected task files (*.yaml) in it")
    if arguments.num_fewshot is not None and arguments.num_fewshot < 0:
        raise InputError(f"--num_fewshot {arguments.num_fewshot}: expected at least 0")

    import torch

    from kvds.evaluation.harness_tasks import evaluate_tasks

    model, tokenizer = _load(arguments.model, arguments.tokenizer or arguments.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    output = arguments.output
    with contextlib.nullcontext() if output is None else owned_output(output):
        results = evaluate_tasks(
            model, tokenizer, arguments.tasks, include_path=arguments.include_path, num_fewshot=arguments.num_fewshot,
            limit=arguments.subset_size or None, batch_size=arguments.batch_size,
        )  # fmt: skip
        width = max(4, *map(len, results))
        print(f"{'task':<{width}}  {'metric':<24}  {'value':>10}")
        for task, values in results.items():
            for metric, value in values.items():
                print(f"{task:<{width}}  {metric:<24}  {value:>10.4f}")
        if output is not None:
            (output / "tasks.json").write_text(json_text(results, indent=1) + "\n", encoding="utf-8")
            print("written:", output / "tasks.json")
    return 0


def _load(model_folder: Path, tokenizer_folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer, with the checks that a run makes."""
    from transformers.utils import logging as transformers_logging

    from kvds.models.architecture import load_config
    from kvds.models.loading import load_model
    from kvds.models.tokenizer import check_vocabulary, tokenizer_of

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    tokenizer = tokenizer_of(str(tokenizer_folder), "--model" if tokenizer_folder == model_folder else "--tokenizer")
    config = load_config(str(model_folder), flag="model", option="--model")
    model = load_model(
        str(model_folder), config, init="pretrained", dtype="auto", attn_implementation=None, seed=0, flag="model",
        option="--model",
    )  # fmt: skip
    check_vocabulary(config, tokenizer, flag="model", option="--model")
    return model, tokenizer


def _table(results: dict[str, dict[str, float]]) -> str:
    """A line per corpus; ``cut``: completions that had not ended when their tokens were used up."""
    width = max(6, *map(len, results))
    titles = f"{'cross entropy':>13}  {'perplexity':>10}  {'exact match %':>13}  {'cut':>6}  {'rows':>6}"
    lines = [f"{'corpus':<{width}}  {titles}"]
    for corpus, values in results.items():
        lines.append(
            f"{corpus:<{width}}  {values['cross_entropy']:>13.4f}  {values['perplexity']:>10.3f}  "
            f"{100 * values['exact_match']:>13.1f}  {values['cut_completions']:>6.0f}  {values['samples']:>6.0f}"
        )
    return "\n".join(lines)
