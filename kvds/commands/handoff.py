"""Handoff: a student writes on from its teacher's keys and values. Fit the map, judge it, write it for an engine."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvds.commands.data_flags import add_data_flags, check_data_flags, reading_of, with_template
from kvds.commands.output_folder import check_output, owned_output
from kvds.config.settings import DataSettings
from kvds.durable_files import json_text
from kvds.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kvds.data.encoding import EncodedSample
    from kvds.data.example import Example

_DTYPES = ("fp32", "bf16", "fp16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the three."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="fit|eval|export")
    texts = {
        "fit": "fit a map on prompts of the training split and write it beside the student",
        "eval": "the mapped cache against the student's own and against wrong ones, on held-out rows",
        "export": "student, tokenizer and map in one folder, in an engine's number format",
    }
    fit, judge, export = (
        actions.add_parser(name, help=text, description=text, allow_abbrev=False) for name, text in texts.items()
    )
    for one in (fit, judge):
        one.add_argument("--teacher", required=True, metavar="NAME", help="folder or hub name of the teacher")
    for one in (fit, judge, export):
        one.add_argument("--student", required=True, metavar="NAME", help="folder or hub name of the student")
    fit.add_argument("--output", type=Path, metavar="DIR", help="folder for the map; unset: the student's own")
    for one in (judge, export):
        one.add_argument("--map", type=Path, metavar="DIR", help="folder with the map; unset: the student's own")
        one.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    data = DataSettings()
    both = {
        "batch_size": (16, "rows per forward"),
        "synthetic_problems": (data.synthetic_problems, "size of the built-in training corpus"),
    }
    prompts = {"rows": (512, "training prompts to fit to"), "seed": (0, "of which rows are taken")}
    judged = {
        "subset_size": (data.eval_subset_size, "the first N held-out rows of each corpus, 0: all"),
        "max_new_tokens": (data.max_new_tokens, "tokens generated per row"),
    }
    for one, numbers in ((fit, prompts | both), (judge, judged | both)):
        add_data_flags(one, numbers, of="models'")
    fit.add_argument(
        "--source_layers", type=int, metavar="N",
        help="teacher layers that each student layer reads, those nearest in depth; unset: all",
    )  # fmt: skip
    fit.add_argument(
        "--ridge", type=float, nargs="+", metavar="λ", help="strengths to choose from by held-out answers; unset: nine"
    )
    fit.add_argument(
        "--attention_steps", type=int, default=0, metavar="N",
        help="then train the map for N steps to lessen the attention-output error (default: 0)",
    )  # fmt: skip
    fit.add_argument(
        "--answer_steps", type=int, default=0, metavar="N",
        help="and for N steps to lessen the cross entropy of the student's answers (default: 0)",
    )  # fmt: skip
    fit.add_argument("--lr", type=float, default=1e-4, metavar="X", help="of these steps (default: %(default)s)")
    export.add_argument("--dtype", choices=_DTYPES, default="bf16", help="of the map (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Check what needs no model, then do it."""
    least = {
        "rows": 2,
        "batch_size": 1,
        "max_length": 2,
        "max_new_tokens": 1,
        "synthetic_problems": 1,
        "subset_size": 0,
    }
    least |= {"seed": 0, "source_layers": 1, "attention_steps": 0, "answer_steps": 0}
    for name, smallest in least.items():
        value = getattr(arguments, name, None)
        if value is not None and value < smallest:
            raise InputError(f"--{name} {value}: expected at least {smallest}")
    if arguments.action != "export":
        check_data_flags(arguments)
    if not 0 < getattr(arguments, "lr", 1) < float("inf"):
        raise InputError(f"--lr {arguments.lr}: expected above 0, such as 1e-4")
    if any(not 0 < strength < float("inf") for strength in getattr(arguments, "ridge", None) or ()):
        raise InputError(f"--ridge {' '.join(map(str, arguments.ridge))}: expected strengths above 0, such as 1e-4")
    if arguments.output is not None:
        check_output(arguments.output)
    return {"fit": _fit, "eval": _eval, "export": _export}[arguments.action](arguments)


def _quiet() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _fit(arguments: argparse.Namespace) -> int:
    _quiet()
    import torch

    from kvds.handoff.calibration import fit_pair
    from kvds.handoff.continuation import first_prompt_length
    from kvds.handoff.files import load_pair, one_tokenizer, pair_identity, save_map
    from kvds.handoff.fitting import STRENGTHS
    from kvds.handoff.training import MapTraining

    output = _map_folder(arguments.student, arguments.output, "--output")
    tokenizer = one_tokenizer(arguments.teacher, arguments.student)
    teacher, student = load_pair(arguments.teacher, arguments.student, tokenizer)
    samples, examples = _rows(arguments, "train", tokenizer, student, teacher)
    prompts = [row.input_ids[: first_prompt_length(row)] for row in samples]
    pad = _pad(tokenizer)
    with owned_output(output):
        how = {"batch_size": arguments.batch_size, "pad": pad}
        strengths = STRENGTHS if arguments.ridge is None else tuple(arguments.ridge)
        cache_map, fit = fit_pair(
            teacher, student, prompts, layers=arguments.source_layers, strengths=strengths, rows=samples, **how
        )
        corpora = sorted({example.corpus for example in examples})
        facts: dict[str, Any] = {"corpora": corpora, "prompts": len(prompts), **fit.to_dict()}
        training = MapTraining(teacher, student, cache_map, samples, seed=arguments.seed, **how)
        with torch.enable_grad():
            for name, train in (("attention", training.attention), ("answer", training.answers)):
                steps = getattr(arguments, f"{name}_steps")
                if steps:
                    losses = train(steps, arguments.lr)
                    facts[f"{name}_steps"] = {
                        "steps": steps,
                        "lr": arguments.lr,
                        "first": losses[0],
                        "last": losses[-1],
                    }
        identity = pair_identity(arguments.teacher, arguments.student, tokenizer)
        save_map(cache_map, output, {"identity": identity, "fit": facts})
    r2 = ", ".join(f"{part} {value:.3f}" for part, value in fit.mean_r2.items())
    print(f"fitted to {len(prompts)} prompts, {fit.rows} tokens; R² of held-out prompts: {r2}")
    if fit.used:
        best, *_, worst = fit.by_use
        told = f"{fit.used[best]:.4f} nats per token of held-out answers (with {worst} {fit.used[worst]:.4f})"
        print(f"strength of the ridge: {best}, {told}")
    for name in ("attention", "answer"):
        if done := facts.get(f"{name}_steps"):
            print(f"{name} steps: {done['first']:.4f} → {done['last']:.4f}")
    print(f"written: {output} (judge it with kvds handoff eval)")
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    _quiet()
    from kvds.evaluation.handoff import evaluate_handoff, wrong_caches_that_hurt
    from kvds.evaluation.handoff_report import markdown_table, save_picture
    from kvds.handoff.files import load_handoff, load_map, one_tokenizer

    folder = _map_folder(arguments.student, arguments.map, "--map")
    tokenizer = one_tokenizer(arguments.teacher, arguments.student)
    handoff = load_handoff(arguments.teacher, arguments.student, folder)
    samples, examples = _rows(arguments, "eval", tokenizer, handoff.student, handoff.teacher)
    with owned_output(arguments.output):
        results = evaluate_handoff(
            handoff, tokenizer, examples, samples, batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_new_tokens,
        )  # fmt: skip
        fit = load_map(folder)[1].get("fit") or {}
        table = markdown_table(results, fit.get("corpora", []))
        checks = wrong_caches_that_hurt(results)
        content = {"results": results, "wrong_caches_hurt": checks, "fit": fit}
        (arguments.output / "handoff_eval.json").write_text(json_text(content, indent=1) + "\n", encoding="utf-8")
        (arguments.output / "handoff_eval.md").write_text(table, encoding="utf-8")
        save_picture(results, arguments.output / "handoff_eval.png")
    print(table)
    if idle := [name for name, hurts in checks.items() if not hurts]:
        print(f"no evidence of a handoff: with a cache that is wrong ({', '.join(idle)}) answers are as good")
    print("written:", *(str(arguments.output / f"handoff_eval.{end}") for end in ("json", "md", "png")))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    _quiet()
    from kvds.checkpoint.export import save_student
    from kvds.handoff.files import check_pair, load_map, save_map
    from kvds.identity.contents import tokenizer_identity
    from kvds.models.architecture import load_config
    from kvds.models.loading import TORCH_DTYPES, load_model
    from kvds.models.tokenizer import tokenizer_of
    from kvds.models.weights_identity import weights_identity

    folder = _map_folder(arguments.student, arguments.map, "--map")
    cache_map, content = load_map(folder)
    tokenizer, config = tokenizer_of(arguments.student, "--student"), load_config(arguments.student, flag="student")
    weights = weights_identity(arguments.student, init="pretrained", seed=0, flag="--student")
    check_pair(content, {"tokenizer": tokenizer_identity(tokenizer), "student weights": weights}, folder)
    student = load_model(
        arguments.student, config, init="pretrained", dtype="auto", attn_implementation=None, seed=0, flag="model",
        option="--student",
    )  # fmt: skip
    with owned_output(arguments.output):
        target = arguments.output / "student"
        save_student(student, tokenizer, target)
        saved = weights_identity(str(target), init="pretrained", seed=0, flag="--output")
        facts = {"identity": content["identity"] | {"student weights": saved}, "fit": content.get("fit")}
        import torch

        dtype = {**TORCH_DTYPES, "fp16": torch.float16}[arguments.dtype]
        save_map(cache_map, target, facts, dtype)
    print("written:", *sorted(str(path) for path in target.iterdir()))
    return 0


def _map_folder(student: str, folder: Path | None, flag: str) -> Path:
    """The folder that was named, else the student's own, which then must be one."""
    if folder is not None:
        return folder
    if not Path(student).is_dir():
        raise InputError(f"--student {student}: no such folder; expected one, or a folder for its map ({flag} DIR)")
    return Path(student)


def _pad(tokenizer: Any) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def _rows(
    arguments: argparse.Namespace, split: str, tokenizer: PreTrainedTokenizerBase, *models: Any
) -> tuple[list[EncodedSample], list[Example]]:
    """Rows of a split as tokens, those that fit, and all as text."""
    from kvds.data.encoding import compare_rows, encode_examples
    from kvds.data.mixture import first_per_corpus, load_mixture
    from kvds.data.ready_rows import ready_rows
    from kvds.data.text_fidelity import check_texts
    from kvds.models.architecture import row_length

    lengths = [row_length(model.config, arguments.max_length, DataSettings().max_length) for model in models]
    how = {
        "data_dir": arguments.data_dir, "synthetic_problems": arguments.synthetic_problems,
        "reading": reading_of(arguments),
    }  # fmt: skip
    held_out = load_mixture(arguments.datasets, "eval", **how).examples
    if split == "eval":
        examples = first_per_corpus(held_out, arguments.subset_size)
    else:
        mixture = load_mixture(
            arguments.datasets, "train", subset_size=arguments.rows, seed=arguments.seed, held_out=held_out, **how
        )
        examples = mixture.examples[: arguments.rows]
    tokenizer = with_template(copy.copy(tokenizer), arguments)  # what the map is of has its own
    turns = arguments.assistant_turns
    examples = ready_rows(examples, tokenizer, min(lengths), assistant_turns=turns).examples
    samples = list(encode_examples(examples, tokenizer, min(lengths)).samples)
    what = "held-out" if split == "eval" else "training"
    check_texts(
        compare_rows(samples, examples, tokenizer), examples, what=what, most=arguments.max_lossy_rows,
        tokenizer=tokenizer,
    )  # fmt: skip
    if len(samples) < 2:
        raise InputError(
            f"--max_length {min(lengths)}: {len(samples)} of {len(examples)} {what} rows fit; expected at least two"
        )
    return samples, examples
