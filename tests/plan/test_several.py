"""What several teachers take, against the memory of a real step on real tensors."""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from kvds.align import AlignerGroup, build_aligner
from kvds.config.recipe import parse_run_config
from kvds.data.batches import TokenBatch
from kvds.data.labels import LabelledPositions
from kvds.distillation.module import DistillationModule
from kvds.distillation.step import LossWeights, StepInput, TeacherKV
from kvds.kv import KVShape, Selection, open_capture
from kvds.kv.families import backbone
from kvds.plan.batch_shape import BatchShape
from kvds.plan.live_memory import LiveMemory, drop_gradients
from kvds.plan.several import SeveralTeachersPlanner
from kvds.plan.step import StepPlanner

ROWS, TOKENS, LABELLED = 4, 48, 100


def qwen2(layers: int, hidden: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=512, num_hidden_layers=layers, hidden_size=hidden, intermediate_size=4 * hidden,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip


def teacher_kv(model: torch.nn.Module, ids: torch.Tensor) -> TeacherKV:
    with torch.no_grad(), open_capture(backbone(model), "kv", rope="pre", require_grad=False) as capture:
        backbone(model)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return TeacherKV(capture.states, Selection(None, torch.ones(ROWS, TOKENS, dtype=torch.bool)))


@pytest.mark.parametrize("mode", ["flat", "structured", "relation"])
@pytest.mark.parametrize(
    "hidden", [64, 256]
)  # of the teachers: with the larger, their forward pass is the worst moment
def test_a_step_of_three_teachers_takes_what_is_planned(mode, hidden):
    cfg = parse_run_config(
        ["--teacher_names", "a", "b", "c", "--student_name", "d", "--alignment_mode", mode, "--max_length", "64",
         "--output_dir", "unused", "--batch_size", str(ROWS)]
    )  # fmt: skip
    student, teachers = qwen2(3, 64), [qwen2(layers, hidden) for layers in (3, 5, 4)]
    planners = [StepPlanner(cfg, student, teacher, torch.float32, "cpu") for teacher in teachers]
    batch = BatchShape(ROWS, TOKENS, LABELLED, TOKENS)
    planned = SeveralTeachersPlanner(planners, [0, 0, 0]).peak(batch, checkpointing=False)

    shapes = [KVShape.from_config(config) for config in (student, *teachers)]
    group = AlignerGroup([build_aligner(shapes[0], shape, cfg) for shape in shapes[1:]], [1.0] * 3)
    module = DistillationModule(AutoModelForCausalLM.from_config(student).train(), group)
    models = [AutoModelForCausalLM.from_config(config).eval() for config in teachers]
    ids = torch.randint(0, 512, (ROWS, TOKENS))
    sources = tuple(partial(teacher_kv, model, ids) for model in models)
    index = torch.randint(0, ROWS * TOKENS, (LABELLED,))
    inputs = StepInput(
        TokenBatch(ids, torch.ones_like(ids), ids, ids, ids[:, 0], 1.0, 1.0), LabelledPositions(index, index % 512),
        None, None, None, LossWeights(1.0, 1.0), sources=sources,
    )  # fmt: skip
    memory = LiveMemory()
    for part in (module, *models):
        memory.ignore(iter([*part.parameters(), *part.buffers()]))
    memory.ignore(iter([ids, index]))
    drop_gradients(module.parameters())
    with memory:
        module(step=inputs)[0].backward()
    assert planned == pytest.approx(memory.peak, rel=0.1)
    alone = sum(planner.peak(batch, checkpointing=False) for planner in planners)
    assert planned < alone
