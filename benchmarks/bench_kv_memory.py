"""Peak memory of teacher keys and values: what is selected, and one layer group beside it.

    python -m benchmarks.bench_kv_memory       # a minute on the CPU; writes benchmarks/results/KV_MEMORY.md and .csv

Of a teacher with Qwen2-1.5B's keys and values (28 layers, 2 heads of 128), narrow otherwise, and a student of 28 layers
with 2 heads of 64. "Teacher forward" is by how much the allocator's peak in a teacher forward that keeps the selected
keys and values exceeds the peak of the same forward that keeps none. "Alignment" is what the aligner's forward and
backward pass allocates at its peak beside the states that it is given and their gradients, which its forward makes.
Both are running sums of the profiler's allocation events, so that everything that torch allocates counts.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.records import RESULTS, markdown_table, provenance, write_csv
from benchmarks.train_step.workbench import build_model, load_samples, make_loader
from kvds.align import build_aligner
from kvds.config.settings import AlignmentSettings
from kvds.data.batches import TokenBatch
from kvds.kv import KVShape, KVStates, Selection, select_tokens
from kvds.teacher.teacher import Teacher

REPOSITORY = Path(__file__).resolve().parent.parent
LAYERS = 28
GROUPS = (1, 4, 28)
BUDGETS: tuple[tuple[str, float | None], ...] = (("full", None), ("right_crop", 0.25))


def teacher_config() -> Any:
    """Wide in keys and values, narrow in everything else, so that those are what memory goes to."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=2, head_dim=128, max_position_embeddings=4096, use_sliding_window=False,
    )  # fmt: skip


def peak_of(work: Callable[[], Any]) -> int:
    """Most bytes that ``work`` had allocated at once, its result included."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    del kept
    events = profiler.profiler.kineto_results.events()
    live = peak = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        live += change
        peak = max(peak, live)
    return peak


def state_bytes(states: KVStates) -> int:
    """Of keys and values of all layers."""
    return sum(layer.nbytes for layer in (*states.keys, *states.values))


def student_states(shape: KVShape, batch: TokenBatch) -> KVStates:
    """Random keys and values of a student for ``batch``, leaves of a graph."""
    size = (*batch.input_ids.shape, shape.num_key_value_heads, shape.head_dim)
    made = [torch.randn(size).transpose(1, 2).requires_grad_() for _ in range(2 * shape.num_hidden_layers)]
    return KVStates(tuple(made[:LAYERS]), tuple(made[LAYERS:]))


def alignment_peak(teacher: Teacher, batch: TokenBatch, selection: Selection, groups: int) -> int:
    """Of the aligner's forward and backward, beside the states and their gradients."""
    shape = KVShape(LAYERS, num_key_value_heads=2, head_dim=64, num_attention_heads=2)
    settings = AlignmentSettings(alignment_mode="structured", kv_parts="kv", layer_groups=groups)
    aligner = build_aligner(shape, teacher.shape, settings)
    given = student_states(shape, batch)
    states = teacher(batch, selection).states

    def work() -> None:
        aligner(student=given, teacher=states, selection=selection).loss.backward()

    work()  # the leaves' own gradients are there from now on
    return peak_of(work) - state_bytes(given)


def main() -> int:
    """Measure, write, print; 1 where a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=8, help="rows (8)")
    parser.add_argument("--max_length", type=int, default=512, help="tokens per row (512)")
    parser.add_argument("--data_dir", type=Path, default=REPOSITORY.parent / "shared" / "data")
    arguments = parser.parse_args()
    device = torch.device("cpu")
    samples, data = load_samples(arguments.data_dir, 512, arguments.max_length, arguments.batch_size)
    [batch] = make_loader(samples, arguments.batch_size).step(0)
    model = build_model(teacher_config(), torch.float32, device, 1)
    keeps_none = Teacher(model, device=device, wants_states=False)
    teacher = Teacher(model, device=device)
    rows = []
    for method, budget in BUDGETS:
        selection = select_tokens(method, budget, batch.segment_ids, batch.attention_mask)
        states = teacher(batch, selection).states
        assert isinstance(states, KVStates)
        selected = state_bytes(states)
        everything = state_bytes(teacher(batch).states)  # type: ignore[arg-type]
        del states
        none = peak_of(lambda: keeps_none(batch))
        taken = peak_of(lambda chosen=selection: teacher(batch, chosen)) - none  # type: ignore[misc]
        for groups in GROUPS:
            group = everything * -(-LAYERS // groups) // LAYERS
            alignment = alignment_peak(teacher, batch, selection, groups)
            rows.append({
                "positions": f"{method} {budget or ''}".strip(), "layer_groups": groups,
                "selected (MiB)": selected / 2**20, "one group (MiB)": group / 2**20,
                "bound (MiB)": (selected + group) / 2**20, "teacher forward (MiB)": taken / 2**20,
                "alignment (MiB)": alignment / 2**20, "holds": taken <= selected + group,
            })  # fmt: skip
            print(rows[-1], flush=True)
    facts = provenance(("torch", "transformers"))
    table = markdown_table(rows, list(rows[0]))
    tokens = " × ".join(map(str, batch.input_ids.shape))
    text = [
        "# Peak memory of teacher keys and values", "",
        f"Made by `{facts['command']}` at revision {facts['git_revision']}: torch {facts['torch']}, {facts['device']}; "
        f"a batch of {tokens} tokens ({data}), fp32.", "",
        *(__doc__ or "").split("\n\n", 2)[2].strip().splitlines(), "", table, "",
        "The teacher forward gathers layer by layer and lets the rest go, whatever `layer_groups` is: beside what is "
        "selected, one layer at most is alive, so that the bound for 28 groups holds for all.",
    ]  # fmt: skip
    write_csv(RESULTS / "kv_memory.csv", [row | facts for row in rows])
    (RESULTS / "KV_MEMORY.md").write_text("\n".join(text) + "\n")
    print(table)
    return int(not all(row["holds"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
