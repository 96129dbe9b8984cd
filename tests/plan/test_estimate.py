"""``kvds plan``: each number against arithmetic done by hand or against memory that was really used."""

import gc
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvds.align import build_aligner
from kvds.commands.plan import parse_size
from kvds.config.deepspeed_file import load_deepspeed_config
from kvds.errors import InputError
from kvds.kv import KVShape, KVStates, Selection
from kvds.kv.row_attention import ROW_ATTENTION
from kvds.models.architecture import load_config
from kvds.plan.batch_shape import BatchShape, kv_bytes, lean_workspace
from kvds.plan.estimate import Machine, RunPlan
from kvds.plan.live_memory import LiveMemory, drop_gradients
from kvds.plan.phases import GENERATION, LOSSES, Phases
from kvds.plan.states import ModelSize, aligner_size, model_size, state_memory
from kvds.plan.step import StepPlanner
from kvds.plan.work import aligner_flops, checkpoint_bytes, disk_bytes
from kvds.teacher.stored_batches import read_ahead_bytes
from tests.harness.plan_recipe import QWEN, config

REPOSITORY = Path(__file__).resolve().parents[2]


def test_live_memory_counts_storages_once_until_they_are_freed():
    with LiveMemory() as memory:
        a = torch.zeros(1024)  # 4096 bytes
        view = a.view(32, 32)[:4]
        b = a + 1
        assert memory.live == 8192
        del a
        assert memory.live == 8192  # the view holds the storage
        del view
        assert memory.live == 4096
        (b * 2) * 3  # two temporaries at once beside b
    del b
    gc.collect()
    assert memory.live == 0 and memory.peak == 4096 * 3


def test_gradients_are_dropped_when_they_are_whole():
    layer = torch.nn.Linear(64, 64, bias=False)
    drop_gradients(layer.parameters())
    x = torch.ones(8, 64)
    with LiveMemory() as memory:
        memory.ignore(iter([layer.weight, x]))
        layer(x).sum().backward()
    assert layer.weight.grad is None and 64 * 64 * 4 <= memory.peak < 64 * 64 * 4 + 8 * 64 * 4 * 4


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_model_sizes_are_the_published_ones(models):
    sizes = {name: model_size(load_config(str(models / name), flag=name)) for name in QWEN}
    assert sizes["teacher"].total == 1_543_714_304 and sizes["student"].total == 494_032_768
    assert sizes["student"].head == 151936 * 896
    # Queries and output projection 896², keys and values 896 · 128 each, three matrices of the MLP; 24 layers.
    assert sizes["student"].backbone == 24 * (2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864)


def test_aligner_size_is_that_of_the_module(recipe):
    for mode in ("flat", "structured"):
        cfg = config(recipe, alignment_mode=mode)
        shapes = KVShape(24, 2, 64, 14), KVShape(28, 2, 128, 12)
        real = sum(p.numel() for p in build_aligner(*shapes, cfg).parameters())
        assert aligner_size(*shapes, cfg) == real


def test_state_memory_by_hand(recipe, tmp_path):
    raw = load_deepspeed_config(REPOSITORY / "ds_configs/zero3.json")
    student, teacher = ModelSize(800, 100, 600, 100, 800), ModelSize(4000, 500, 3000, 500, 4000)
    common = {"student": student, "aligner": 200, "teacher": teacher, "element": 2, "device": "cuda"}

    one = state_memory(config(recipe), raw, ranks=1, **common)
    assert (one.weights, one.master, one.optimizer, one.gradients) == (2000, 4000, 8000, 4000)
    assert (one.teacher, one.gathered, one.update, one.host) == (8000, 0, 4000, 0)
    assert one.buckets == 2 * 50_000_000 and one.held == 2000 + 4000 + 8000 + 4000 + 8000 + 100_000_000

    four = state_memory(config(recipe, teacher_placement="zero3"), raw, ranks=4, **common)
    assert (four.weights, four.master, four.optimizer, four.gradients, four.teacher) == (500, 1000, 2000, 1000, 2000)
    assert four.gathered == 2000  # stays whole: its next use is nearer than the reuse distance
    heads = config(recipe, teacher_placement="tensor_parallel", teacher_tp_size=2)
    dealt = state_memory(heads, raw, ranks=4, **common)
    assert (dealt.teacher, dealt.teacher_gathered) == (4000, 0)
    offloaded = state_memory(config(recipe, teacher_placement="zero3_offload"), raw, ranks=4, **common)
    assert (offloaded.teacher, offloaded.host) == (0, 2000)

    sgd = state_memory(config(recipe, optimizer="sgd"), raw, ranks=1, **common)
    assert sgd.optimizer == 0 and sgd.master == 4000
    raw = load_deepspeed_config(REPOSITORY / "ds_configs/zero2.json")
    two = state_memory(config(recipe), raw, ranks=4, **common)
    assert (two.weights, two.master, two.optimizer, two.gradients) == (2000, 1000, 2000, 1000)
    assert not two.gradients_held and two.held == 2000 + 1000 + 2000 + two.buckets + 8000
    raw = load_deepspeed_config(REPOSITORY / "ds_configs/zero3_offload.json")
    host = state_memory(config(recipe), raw, ranks=1, **common)
    assert (host.weights, host.master, host.optimizer, host.update) == (0, 0, 0, 0)
    assert host.host == 2000 + 4000 + 8000 + 4000


# -- a step ------------------------------------------------------------------------------------------------------------


def test_adapters_alone_are_planned_to_train(recipe):
    whole, adapted = (
        RunPlan(config(recipe, **changes), Machine(1, 1, 80 * 2**30)) for changes in ({}, {"lora_r": "8"})
    )
    size = adapted.student_size
    # Of each layer two halves of rank 8 for q, o (896 × 896), k, v (896 × 128) and the MLP (896 × 4864).
    assert size.trained == 24 * 8 * (2 * (896 + 896) + 2 * (896 + 128) + 3 * (896 + 4864))
    assert size.total == whole.student_size.total + size.trained
    held, before = adapted.states(), whole.states()
    assert held.optimizer == 8 * (size.trained + adapted.aligner_parameters)
    assert held.weights > before.weights and held.held < 0.4 * before.held
    assert adapted.checkpoint < 0.2 * whole.checkpoint
    assert adapted.peak < whole.peak


def test_kv_bytes_by_hand():
    # Two of keys and values, 28 layers, 2 heads of 128, 8 rows of 512 tokens, 2 bytes.
    assert kv_bytes(KVShape(28, 2, 128, 12), BatchShape(8, 512, 0, 512), 2) == 2 * 28 * 2 * 128 * 8 * 512 * 2


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("heads", [(2, 2), (4, 4)])
def test_lean_workspace_is_what_the_operation_takes(recipe, share, heads):
    cfg = config(recipe, map_proj_share_dim=str(share).lower())
    student, teacher = KVShape(3, heads[0], 32, 4), KVShape(4, heads[1], 64, 4)
    aligner = build_aligner(student, teacher, cfg)
    batch = BatchShape(2, 96, 0, 96)

    def states(shape: KVShape, grad: bool) -> KVStates:
        size = (2, shape.num_key_value_heads, 96, shape.head_dim)
        keys, values = (tuple(torch.randn(size, requires_grad=grad) for _ in range(shape.num_hidden_layers))
                        for _ in range(2))  # fmt: skip
        return KVStates(keys, values)

    inputs = states(student, True), states(teacher, False)
    with LiveMemory() as memory:
        memory.ignore(iter([*aligner.parameters(), *aligner.buffers(), *(t for kv in inputs for p in kv for t in p)]))
        loss = aligner(*inputs, Selection(None, torch.ones(2, 96, dtype=torch.bool)))
    gradients = kv_bytes(student, batch, 4)
    maps = sum(p.numel() for p in aligner.parameters()) * 4
    assert loss.loss.requires_grad
    planned = gradients + lean_workspace(student, teacher, cfg, batch, "cpu")
    assert planned <= memory.peak <= 1.15 * planned + 6 * maps


def test_a_step_without_data_takes_what_a_step_with_data_takes(recipe, models):
    alone = {"alignment_mode": "none", "student_config_overrides": (
        "num_hidden_layers=5,hidden_size=64,intermediate_size=160,num_attention_heads=4,num_key_value_heads=2,head_dim=16,"
        "vocab_size=512")}  # fmt: skip
    cfg = config(recipe, **alone)
    student = load_config(cfg.student, cfg.student_config_overrides, flag="student")
    planner = StepPlanner(cfg, student, None, torch.float32, "cpu")
    batch = BatchShape(4, 48, 100, 48)
    from transformers import AutoModelForCausalLM

    from kvds.distillation.module import DistillationModule

    class OnHost(DistillationModule):
        def _storage(self, ids):
            """Saved outside of torch, as its memory on a GPU sees it."""
            return torch.autograd.graph.saved_tensors_hooks(
                lambda kept: kept.detach().numpy().copy(), lambda kept: torch.from_numpy(kept).clone()
            )

    offloaded = config(recipe, **alone, gradient_checkpointing=True, checkpoint_offload=True, compile="off")
    on_gpu = StepPlanner(offloaded, student, None, torch.float32, "cuda")
    inputs_of_layers = 5 * 4 * 48 * 64 * 4
    activations = []
    for checkpointing, kind in ((False, DistillationModule), (True, DistillationModule), (True, OnHost)):
        planned = (on_gpu if kind is OnHost else planner).plan(batch, checkpointing=checkpointing)
        model = AutoModelForCausalLM.from_config(student, attn_implementation=ROW_ATTENTION).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs = planner._inputs(batch, aligned=False)
        module = kind(model)
        memory = LiveMemory("cuda" if kind is OnHost else "cpu")
        memory.ignore(iter([*module.parameters(), *module.buffers()]))
        drop_gradients(module.parameters())
        inputs.batch.attention_mask = torch.ones(4, 48, dtype=torch.int64)
        inputs.batch.attention_mask[0, 40:] = 0  # padding, so that a mask is made
        with memory:
            module(step=inputs)[0].backward()
        assert planned.peak == pytest.approx(memory.peak, rel=0.03)
        assert 0 < planned.activations < planned.peak and planned.aligner == planned.teacher_kv == 0
        activations.append(planned.activations)
        assert planned.host > inputs_of_layers if kind is OnHost else planned.host == 0
    assert activations[1] - activations[2] > inputs_of_layers


def test_checkpointing_and_kv_show_in_the_plan(recipe):
    plan = RunPlan(config(recipe), Machine(8, 1, 80 * 2**30))
    step, shape = plan.step, KVShape(28, 2, 128, 12)
    assert plan.other_activations < step.activations / 4
    assert step.teacher_kv == kv_bytes(shape, plan.rows.largest, 2)
    assert (
        plan.rows.largest.rows == 4 and 20 < plan.rows.largest.tokens <= 64 and "read from the data" in plan.rows.note
    )
    assert plan.kv_by_group() == [
        kv_bytes(shape, plan.rows.largest, 2) + kv_bytes(KVShape(24, 2, 64, 14), plan.rows.largest, 2)
    ]


def test_only_what_is_compared_is_told_by_group(recipe):
    both, values, hidden = (
        RunPlan(config(recipe, **changes), Machine(8, 1, 80 * 2**30))
        for changes in ({}, {"kv_parts": "v", "layer_groups": 2}, {"alignment_mode": "hidden"})
    )
    tokens = both.rows.largest.rows * both.rows.largest.tokens
    assert both.kv_by_group() == [2 * 2 * tokens * 2 * (24 * 64 + 28 * 128)]
    assert values.kv_by_group() == [2 * tokens * 2 * (12 * 64 + 14 * 128)] * 2
    assert hidden.kv_by_group() == [2 * tokens * (24 * 896 + 28 * 1536)]


SELECTED = {"kv_method": "uniform", "kv_budget": 8}


@pytest.mark.parametrize(
    ("changes", "states", "tokens"),
    [
        ({"alignment_mode": "flat", **SELECTED}, 2 * 3 * 2 * 16, 8),
        ({"alignment_mode": "flat", **SELECTED, "kv_method": "rkv"}, 2 * 3 * 2 * 16, 48),
        ({"alignment_mode": "flat", **SELECTED, "teacher_kv": "shuffled"}, 2 * 3 * 2 * 16, 48),
        ({"alignment_mode": "relation", **SELECTED}, 2 * 3 * 2 * 16, 8),
        ({"alignment_mode": "structural_kv"}, 2 * 3 * 2 * 16, 48),
        ({"alignment_mode": "hidden", **SELECTED}, 3 * 64, 48),
        ({"alignment_mode": "structured", "align_tokens": "segment"}, 2 * 3 * 2 * 16, 48),
    ],
)
def test_what_is_compared_is_planned(recipe, changes, states, tokens):
    sizes = "num_hidden_layers=3,hidden_size=64,intermediate_size=160,num_attention_heads=4,head_dim=16,vocab_size=512"
    cfg = config(recipe, **changes)
    student, teacher = (
        load_config(name, sizes, flag=side) for side, name in (("student", cfg.student), ("teacher", cfg.first_teacher))
    )
    planner = StepPlanner(cfg, student, teacher, torch.float32, "cpu")
    planned = planner.plan(BatchShape(4, 48, 100, 8 if cfg.kv_budget else 48), checkpointing=False)
    assert planned.teacher_kv == 4 * states * 4 * tokens
    assert planned.aligner > 0 and planned.peak > planned.activations + planned.teacher_kv


def test_a_teacher_that_runs_ahead_is_planned_beside_the_student(recipe):
    sizes = "num_hidden_layers=3,hidden_size=64,intermediate_size=160,num_attention_heads=4,head_dim=16,vocab_size=512"
    batch = BatchShape(4, 48, 180, 8)
    for device in ("cuda", "cpu"):
        plain, ahead = (
            StepPlanner(cfg, *(
        load_config(name, sizes, flag=side) for side, name in (("student", cfg.student), ("teacher", cfg.first_teacher))
    ),
                        torch.float32, device).plan(batch, checkpointing=False)
            for cfg in (config(recipe, **SELECTED, **more) for more in ({}, {"teacher_overlap": "true"}))
        )  # fmt: skip
        assert plain.teacher_ahead == 0 and ahead.teacher_kv == plain.teacher_kv == 2 * 3 * 2 * 16 * 4 * 4 * 8
        beside = ahead.teacher_kv + (ahead.teacher_forward if device == "cuda" else 0)
        assert ahead.teacher_ahead == beside and ahead.teacher_forward > 0
        assert ahead.peak == plain.peak + beside  # on the CPU the backward pass is the worst moment here
    plans = [RunPlan(config(recipe, teacher_overlap=which), Machine(1, 1, 80 * 2**30)) for which in ("false", "true")]
    assert plans[1].peak == plans[0].peak + plans[1].step.teacher_ahead
    judged = [Phases(plan).peaks for plan in plans]
    for phase in (LOSSES, GENERATION):
        assert judged[1][phase] == judged[0][phase] + plans[1].step.teacher_kv
    assert set(plans[1].largest_rows()) == {("replicated", False), ("replicated", True)}
    # A placement that the recipe's other settings rule out is not tried.
    whole = RunPlan(config(recipe, value_metric="output"), Machine(1, 1, 80 * 2**30))
    assert set(whole.largest_rows()) == {("replicated", False), ("replicated", True)}
    # Where it does not fit and would without, that is what is told.
    between = int(((plans[0].peak + plans[1].peak) / 2 + 2**30) / 0.95)
    tight = RunPlan(plans[1].cfg, Machine(1, 1, between))
    assert not tight.fits and tight.advice() == ["teacher_overlap: false"]


def test_what_is_read_ahead_of_a_cache_is_planned(recipe, tmp_path):
    plans = [RunPlan(config(recipe, teacher_cache=tmp_path), Machine(count, 1, 80 * 2**30)) for count in (0, 1)]
    for plan, pinned in zip(plans, (False, True), strict=True):
        assert plan.step.teacher_kv > 0 and plan.teacher_size is None
        assert plan.host == read_ahead_bytes(plan.step.teacher_kv, pinned=pinned)  # values alone: one part
    # A GPU has the next micro-batch's beside the present one's: what it is given, and rows before they are padded.
    assert plans[0].step.teacher_ahead == 0 and plans[1].step.teacher_ahead == 2 * plans[1].step.teacher_kv
    one_row = RunPlan(config(recipe, teacher_cache=tmp_path, tokens_per_batch=512), Machine(1, 1, 80 * 2**30))
    assert one_row.step.teacher_ahead == one_row.step.teacher_kv  # which lies as it is read


def test_packed_rows_are_planned_as_they_lie(recipe):
    plain, packed = (
        RunPlan(
            config(recipe, batch_size=8, kv_method="uniform", kv_budget=0.25, max_length=128, **more),
            Machine(8, 1, 2**36),
        )
        for more in ({}, {"packing": "true"})
    )
    longest = plain.rows.largest.tokens
    assert plain.rows.largest.rows == 8 and plain.rows.largest.slots == -(-longest // 4)
    shape = packed.rows.largest
    assert shape.samples == 8 and longest < shape.tokens <= 128
    assert shape.rows * shape.tokens < 8 * longest  # padding is what packing saves
    assert shape.rows * shape.slots <= shape.rows * 8 * -(-longest // 4) and shape.slots <= shape.tokens
    assert packed._with_rows(16).rows == 2 * shape.rows and packed._with_rows(1).rows == 1
    assert f"8 samples of up to {longest} tokens packed" in packed.rows.note
    assert packed.rows.padded_tokens < plain.rows.padded_tokens and packed.rows.steps == plain.rows.steps


def test_packed_rows_and_a_teacher_ahead_take_what_is_planned():
    """Real runs against their plan, by the script that made benchmarks/results/PLAN.md; beyond 15 % it says 1."""
    bench = [sys.executable, "-m", "benchmarks.bench_plan", "--only", "packed rows", "the teacher runs ahead"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(bench, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.search(r"\| packed rows \| (\d+) × ", done.stdout)
    assert rows is not None and int(rows[1]) <= 8, done.stdout  # of 16 samples
    assert "| the teacher runs ahead | 16 × " in done.stdout


# -- work and disk -----------------------------------------------------------------------------------------------------


def test_aligner_work_is_what_the_design_counts(recipe):
    flops = aligner_flops(config(recipe), KVShape(24, 2, 64, 14), KVShape(28, 2, 128, 12), slots=64)
    # Joint mixing, student to teacher: 3 passes · 2 · 2 parts · 28 layers · (2 · 64 · 128 + 24 · 2 · 2 · 64).
    assert flops == 3 * 2 * 2 * 28 * (2 * 64 * 128 + 24 * 2 * 2 * 64)


def test_disk_by_hand(recipe):
    cfg = config(recipe, save_steps=10)
    assert checkpoint_bytes(cfg, 100, 3, 2) == 1200 and checkpoint_bytes(cfg, 100, 2, 2) == 1400
    assert disk_bytes(cfg, 1000, 50, steps=35) == 4050  # after 10, 20, 30 and 35
    assert disk_bytes(cfg, 1000, 50, steps=30) == 3050
    # Two stay, and the oldest of three goes when the third is whole.
    assert disk_bytes(config(recipe, save_steps=10, keep_checkpoints=2), 1000, 50, steps=95) == 3050


def test_an_epoch_of_known_work(recipe):
    plan = RunPlan(config(recipe, alignment_mode="none", epochs=1), Machine(1, 1, 80 * 2**30))
    work, rows = plan.work, plan.rows
    assert work is not None and rows.steps == 13 and work.teacher == work.aligner == 0
    attention = 4 * 24 * 14 * 64 * rows.largest.tokens
    expected = 3 * rows.padded_tokens * (2 * plan.student_size.backbone + attention)
    assert work.student == expected + 6 * plan.student_size.head * rows.labelled_tokens


# -- the command -------------------------------------------------------------------------------------------------------


def test_sizes_are_read_as_they_are_written():
    assert [parse_size(text, "x") for text in ("80GiB", "24GB", "1.5 MiB", "7")] == [
        80 * 2**30,
        24 * 10**9,
        3 * 2**19,
        7,
    ]
    with pytest.raises(InputError):
        parse_size("0GiB", "x")
