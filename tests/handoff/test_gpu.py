"""Handoff on a GPU: a step with compiled layers, and the command on a real pair.

python -m pytest tests/handoff/test_gpu.py -m gpu
"""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvds.cli import main
from kvds.data.batches import collate
from kvds.data.labels import LabelledPositions
from kvds.distillation.module import DistillationModule
from kvds.distillation.step import LossWeights, StepInput
from kvds.handoff.continuation import Continuation
from kvds.handoff.following_map import following_map
from kvds.handoff.reading import read_states
from kvds.kv import KVShape
from kvds.kv.row_attention import ROW_ATTENTION
from kvds.models.compiled_layers import compile_layers
from kvds.teacher.teacher import TeacherOutput
from tests.handoff.pairs import model_of, rows_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TEACHER = Path(__file__).resolve().parents[2] / "launch/quickstart_teacher"


def test_a_step_with_compiled_layers_is_that_with_plain_ones() -> None:
    """As ``--handoff_weight`` runs below ZeRO-3, where layers are compiled unless told not to be."""
    teacher = model_of("qwen2", seed=1, layers=3).float().cuda()
    student = model_of("qwen2", seed=2, layers=2, heads=2, groups=1, attn_implementation=ROW_ATTENTION).float().cuda()
    follower = following_map(KVShape.from_config(teacher.config), KVShape.from_config(student.config), 2).cuda()
    torch.manual_seed(0)
    for parameter in follower.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    batch = collate([*rows_of([(6, 3, 2), (2, 2, 2), (3, 0, 2)]), None], [0, 1, 2, -1], 0, 4.0, 1.0)
    labelled, row = LabelledPositions.from_labels(batch.labels), Continuation.from_batch(batch)
    device = torch.device("cuda")
    batch = batch.to(device)
    states = TeacherOutput(read_states(teacher, batch.input_ids, batch.attention_mask.bool()), None)
    step = StepInput(
        batch, labelled.to(device), None, states, None, LossWeights(handoff=0.7), continuation=row.to(device)
    )
    found = []
    for compiled in (False, True):
        own = copy.deepcopy(student).train()
        if compiled:
            assert compile_layers(own) == 2
        module = DistillationModule(own, following_map=copy.deepcopy(follower))
        loss, metrics = module(replace(step))
        loss.backward()
        gradients = [p.grad for _, p in sorted(module.named_parameters()) if p.grad is not None]
        found.append((loss.detach(), metrics["loss/handoff"], *gradients))
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-3, atol=2e-4)


def test_the_command_fits_trains_and_judges_a_map(tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(TEACHER, student)
    pair = ["--teacher", str(TEACHER), "--student", str(student)]
    fit = ["--rows", "48", "--attention_steps", "2", "--answer_steps", "2", "--lr", "1e-6"]
    assert main(["handoff", "fit", *pair, *fit]) == 0
    judged = ["--subset_size", "12", "--max_new_tokens", "32", "--output", str(tmp_path / "out")]
    assert main(["handoff", "eval", *pair, *judged]) == 0
    results = json.loads((tmp_path / "out/handoff_eval.json").read_text())["results"]
    assert results["own"]["all"]["exact_match"] == 1 and results["mapped"]["all"]["exact_match"] > 0.9
    assert max(results[wrong]["all"]["exact_match"] for wrong in ("another", "shuffled", "zeros", "none")) < 0.3
