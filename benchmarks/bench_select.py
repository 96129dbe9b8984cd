"""Time of each token selection beside the teacher's forward that it follows: ``python -m benchmarks.bench_select``.

In each round the forward that captures keys, values and query rows and the selection from them are timed one after the
other, for every method; the table shows medians over rounds and the median of the rounds' ratios. On the CPU processor
time is counted, which other programs on the machine change little; on a GPU the time between events.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks.records import RESULTS
from kvds.config.selection_methods import SELECTION_METHODS
from kvds.data.batches import TokenBatch
from kvds.data.encoding import Segment
from kvds.kv import observing_rows, row_draws, select_tokens
from kvds.teacher.teacher import Teacher
from kvds.tracking.provenance import collect_versions, git_revision, typed_command

# Qwen2-1.5B, and two layers of half its width (a quarter of the weights) with as many keys and values of the same size:
# there a selection, whose work is that on keys, costs about four times the share.
MODELS = {
    "qwen2-1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_hidden_layers": 28},
    "half": {"hidden_size": 768, "intermediate_size": 4480, "num_attention_heads": 6, "num_hidden_layers": 2},
}


def make_teacher(name: str, layers: int | None, dtype: torch.dtype, device: torch.device, method: str) -> Teacher:
    """A random model of the size asked for; its vocabulary, which the backbone hardly reads, is small."""
    torch.manual_seed(0)
    sizes = MODELS[name] | ({} if layers is None else {"num_hidden_layers": layers})
    config = Qwen2Config(**sizes, num_key_value_heads=2, head_dim=128, vocab_size=1000, max_position_embeddings=4096)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return Teacher(
        model, device=device, observe=lambda batch: observing_rows(method, batch.segment_ids, batch.attention_mask)
    )


def make_batch(rows: int, tokens: int, device: torch.device) -> TokenBatch:
    """Rows of decreasing length: a third prompt, ten answer tokens, the rest rationale."""
    segments = torch.zeros(rows, tokens, dtype=torch.int64)
    for row in range(rows):
        length = tokens - row * tokens // 16
        segments[row, :length] = Segment.RATIONALE
        segments[row, : length // 3] = Segment.PROMPT
        segments[row, length - 10 : length] = Segment.ANSWER
    ids = torch.randint(0, 1000, (rows, tokens), generator=torch.Generator().manual_seed(1))
    batch = TokenBatch(ids, (segments != 0).long(), ids, segments, torch.arange(rows), 1.0, 1.0)
    return batch.to(device)


def seconds(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """How long ``run`` took, and what it gave."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        result = run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000, result
    begun = time.process_time()
    result = run()
    return time.process_time() - begun, result


def measure(method: str, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Medians of one method."""
    teacher, batch = make_teacher(args.model, args.layers, dtype, device, method), make_batch(4, args.tokens, device)
    budget = None if method == "full" else args.budget

    def select(observed: Any) -> Tensor:
        draws = row_draws(0, 0, batch.sample_ids)
        found = select_tokens(method, budget, batch.segment_ids, batch.attention_mask, observed=observed, draws=draws)
        return found.mask

    forwards, selections = [], []
    for round_number in range(args.rounds + 1):
        forward, output = seconds(lambda: teacher(batch), device)
        selection, _ = seconds(lambda observed=output.observed: select(observed), device)
        if round_number:  # the first warms up
            forwards.append(forward)
            selections.append(selection)
    ratios = [s / f for s, f in zip(selections, forwards, strict=True)]
    return {
        "method": method, "forward_seconds": statistics.median(forwards),
        "select_seconds": statistics.median(selections), "share": statistics.median(ratios), "share_max": max(ratios),
    }  # fmt: skip


def main() -> None:
    """Measure every method, print a table and append CSV rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="half")
    parser.add_argument("--layers", type=int, help="layers; unset: the model's")
    parser.add_argument("--tokens", type=int, default=512, help="tokens per row of a batch of 4")
    parser.add_argument("--budget", type=float, default=0.25, help="share of the tokens that is kept")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds after one to warm up")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--output", type=Path, default=RESULTS / "select.csv", help="CSV file to append to")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU, 1 thread"
    if device.type == "cpu":
        torch.set_num_threads(1)
    facts = {
        "model": args.model, "layers": args.layers or MODELS[args.model]["num_hidden_layers"], "tokens": args.tokens,
        "batch": 4, "budget": args.budget, "dtype": args.dtype, "rounds": args.rounds, "machine": machine,
        **collect_versions(), "git_revision": git_revision(), "command": typed_command(),
    }  # fmt: skip
    rows = []
    print(f"{'method':<12}{'forward s':>12}{'select s':>12}{'share':>9}{'worst':>9}")
    for method in SELECTION_METHODS:
        row = measure(method, args, device, dtype)
        print(
            f"{method:<12}{row['forward_seconds']:>12.4f}{row['select_seconds']:>12.4f}{row['share']:>9.2%}"
            f"{row['share_max']:>9.2%}",
            flush=True,
        )
        rows.append({**row, **facts})
    args.output.parent.mkdir(parents=True, exist_ok=True)
    new = not args.output.exists()
    with args.output.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
