"""The fit of a finished run's maps on held-out text: start aligner with start student, and both after training."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvds.align import AlignerGroup, KVAligner
from kvds.align.attention_output import AttentionOutputError
from kvds.align.explained_variance import ExplainedVariance
from kvds.checkpoint.aligner_file import ALIGNER_FILE, ALIGNER_START_FILE, load_aligner
from kvds.checkpoint.export import STUDENT_FOLDER
from kvds.config import RunConfig
from kvds.config.recipe import load_recipe
from kvds.data.batches import TokenBatch
from kvds.data.loader import BatchLoader
from kvds.data.run_data import load_run_data
from kvds.errors import InputError
from kvds.kv import KVStates, Selection, open_capture, pool_reasoning_steps, select_tokens
from kvds.kv.families import backbone
from kvds.models.architecture import load_config
from kvds.models.loading import load_model
from kvds.models.tokenizer import load_tokenizer
from kvds.teacher.teacher import Teacher
from kvds.teacher.token_selection import matched_reasoning_steps

log = logging.getLogger("kvds")

Fit = dict[str, dict[str, dict[str, list[float]]]]


def fit_before_and_after(run_dir: Path, rows: int) -> Fit:
    """``"before"`` (where the start was kept) and ``"after"`` → part → measure → a number per target layer; beside the
    parts ``attention_output``, with the measures of :class:`kvds.align.attention_output.AttentionOutputError`, where
    keys or values are mapped.

    Every real token of the rows counts, whatever the run selected (or every step, where it matched steps). Models run
    whole, in fp32, in this process.

    Args:
        run_dir: Output folder of a finished run.
        rows: Held-out rows per corpus.

    Raises:
        InputError: the run or what it was made from is not there any more.
    """
    file = run_dir / "config.yaml"
    if not file.is_file():
        raise InputError(f"--run {run_dir}: has no config.yaml; expected the --output_dir of a run (or no --fit_rows)")
    cfg = dataclasses.replace(RunConfig(**load_recipe(file)), eval_subset_size=rows, batch_size=4)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(cfg)
    loader = load_run_data(cfg, tokenizer, rank=0, world_size=1).eval_loader
    assert loader is not None
    after = _lone_aligner(run_dir / ALIGNER_FILE)
    teacher = Teacher(
        _model(cfg, "teacher"),
        device=device,
        rope=cfg.kv_rope,
        reads=after.teacher_reads,
        value_metric=after.settings.value_metric,
    )
    fit: Fit = {}
    if (run_dir / ALIGNER_START_FILE).is_file():
        start = _lone_aligner(run_dir / ALIGNER_START_FILE)
        fit["before"] = _measure(start, _model(cfg, "student"), teacher, loader, cfg, device)
    trained = dataclasses.replace(
        cfg, student_name=str(run_dir / STUDENT_FOLDER), student_init="pretrained", student_config_overrides=""
    )
    fit["after"] = _measure(after, _model(trained, "student"), teacher, loader, cfg, device)
    return fit


def _lone_aligner(path: Path) -> KVAligner:
    aligner = load_aligner(path)
    if isinstance(aligner, AlignerGroup):
        raise InputError(f"--run {path.parent}: was trained with several teachers; expected a run with one")
    return aligner


def _model(cfg: RunConfig, side: str) -> nn.Module:
    name = cfg.student if side == "student" else cfg.first_teacher or ""
    overrides = getattr(cfg, f"{side}_config_overrides")
    model: Any = load_model(
        name, load_config(name, overrides, flag=side), init=getattr(cfg, f"{side}_init"), dtype=torch.float32,
        attn_implementation=cfg.attn_implementation, flag=side,
        seed=cfg.seed if side == "student" else cfg.teacher_seed(),
    )  # fmt: skip
    return model


@torch.no_grad()
def _measure(
    aligner: KVAligner, student: nn.Module, teacher: Teacher, loader: BatchLoader, cfg: RunConfig, device: torch.device
) -> dict[str, dict[str, list[float]]]:
    explained = ExplainedVariance(aligner.to(device))
    student.to(device).eval()
    target = teacher.whole_model if aligner.settings.direction == "student_to_teacher" else student
    assert target is not None
    outputs = None
    if cfg.align_tokens == "position" and AttentionOutputError.measures(aligner, target):
        outputs = AttentionOutputError(aligner, target, rope=cfg.kv_rope, plain_values=teacher.plain_values)
    for step in range(loader.steps_per_epoch):
        for batch in loader.step(step):
            batch = batch.to(device)
            with contextlib.ExitStack() as stack:
                watched = None if outputs is None else stack.enter_context(outputs.watch())
                with open_capture(backbone(student), aligner.reads, rope=cfg.kv_rope) as capture:
                    backbone(student)(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
                own, theirs = capture.states, teacher(batch).states
            assert theirs is not None
            if batch.reasoning_step_ids is not None:
                own = pool_reasoning_steps(own, batch.reasoning_step_ids, batch.num_reasoning_steps)  # type: ignore[type-var]
            selection = _everything(batch, cfg)
            explained.update(own, theirs, selection)
            if outputs is not None and watched is not None:
                assert isinstance(own, KVStates) and isinstance(theirs, KVStates)
                real = batch.attention_mask.bool() & (batch.segment_ids != 0)
                outputs.update(own, theirs, watched, selection, real)
    found = explained.result()
    if outputs is not None and (measures := outputs.result()):
        found["attention_output"] = measures
    return found


def _everything(batch: TokenBatch, cfg: RunConfig) -> Selection:
    if batch.reasoning_step_ids is None:
        return select_tokens(
            "full", None, batch.segment_ids, batch.attention_mask, mask_first_token=cfg.mask_first_token
        )
    return matched_reasoning_steps(batch)
