"""Time and memory of the losses at the language-model head, forward and backward: ``python -m benchmarks.bench_head``.

Qwen2-0.5B's head (151,936 × 896), alone and beside that of Qwen2-1.5B, on labelled tokens of 32 and of 128 rows of
GSM8K. Arms: ``recomputed`` calls the heads of each chunk again in the backward pass, ``small chunks`` makes gradients
in the forward pass by torch, both in as many chunks as rows of 512 tokens would need at 2^26 logits each; ``large
chunks`` does so in chunks of 512 MiB; ``fused`` is large chunks with the kernel. Each round times every arm once; the
table shows medians, the most memory that a pass added to what it was given, gradients included, and how far gradients
are from those of the first arm.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.memory_peak import MemoryPeak
from benchmarks.records import RESULTS, device_name, markdown_table, provenance, write_csv
from kvds.data.labels import LabelledPositions
from kvds.distillation.losses import head_losses
from kvds.ops import softmax_loss

HIDDEN, TEACHER_HIDDEN, ROW = 896, 1536, 512
COLUMNS = ("labelled", "distilled", "arm", "ms", "peak_mib", "loss", "gradient_off")


class Head:
    """The heads, and one micro-batch of hidden states all of whose tokens count."""

    def __init__(self, tokens: int, rows: int, vocab: int, distilled: bool, device: torch.device, dtype: torch.dtype):
        torch.manual_seed(0)
        self.small_chunks = max(1, -(-rows * ROW * vocab // 2**26))
        self.head = nn.Linear(HIDDEN, vocab, bias=False, device=device, dtype=dtype)
        self.hidden = torch.randn(1, tokens, HIDDEN, device=device, dtype=dtype).requires_grad_()
        self.labelled = LabelledPositions(
            torch.arange(tokens, device=device), torch.randint(0, vocab, (tokens,), device=device)
        )
        self.teacher: dict[str, Any] = {}
        if distilled:
            other = nn.Linear(TEACHER_HIDDEN, vocab, bias=False, device=device, dtype=dtype).requires_grad_(False)
            hidden = torch.randn(1, tokens, TEACHER_HIDDEN, device=device, dtype=dtype)
            self.teacher = {"teacher_head": other, "teacher_hidden": hidden, "temperature": 2.0, "kd_weight": 0.5}

    def arms(self) -> dict[str, Callable[[], Tensor]]:
        """Name → forward and backward pass; gives the loss and leaves gradients."""

        def run(head: Callable[[Tensor], Tensor], chunks: int | None, triton: bool) -> Tensor:
            with mock.patch.object(softmax_loss, "_has_triton", lambda: triton):
                scale = 1 / len(self.labelled.index)
                loss = head_losses(
                    head, self.hidden, self.labelled, num_chunks=chunks, scale=scale, **self.teacher
                ).loss
            loss.backward()
            return loss.detach()

        found = {
            "recomputed": lambda: run(lambda rows: self.head(rows), self.small_chunks, False),
            "small chunks": lambda: run(self.head, self.small_chunks, False),
            "large chunks": lambda: run(self.head, None, False),
        }
        if self.hidden.is_cuda:
            found["fused"] = lambda: run(self.head, None, True)
        return found

    def clear(self) -> None:
        """Drop the gradients."""
        self.hidden.grad = self.head.weight.grad = None

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of hidden states and weight."""
        assert self.hidden.grad is not None and self.head.weight.grad is not None
        return self.hidden.grad, self.head.weight.grad


def timed(run: Callable[[], Tensor], device: torch.device) -> float:
    """Milliseconds."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)
    begun = time.process_time()
    run()
    return 1000 * (time.process_time() - begun)


def measure(made: Head, rounds: int, device: torch.device) -> list[dict[str, object]]:
    """A row for each arm."""
    arms = made.arms()
    times: dict[str, list[float]] = {name: [] for name in arms}
    rows: dict[str, dict[str, object]] = {}
    expected: tuple[Tensor, ...] = ()
    for name, run in arms.items():  # the first pass warms up; memory has a pass of its own
        run()
        made.clear()
        memory = MemoryPeak(device)
        memory.begin()
        loss = run()
        peak = memory.end(0) / 2**20
        found = tuple(gradient.clone() for gradient in made.gradients())
        made.clear()
        expected = expected or found
        off = max(
            float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(found, expected, strict=True)
        )
        rows[name] = {"arm": name, "peak_mib": peak, "loss": float(loss), "gradient_off": off}
        del found
    for _ in range(rounds):
        for name, run in arms.items():
            times[name].append(timed(run, device))
            made.clear()
    return [row | {"ms": statistics.median(times[name])} for name, row in rows.items()]


def main(arguments: list[str] | None = None) -> list[dict[str, object]]:
    """Measure, print a table and write the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2807, 12000], help="labelled tokens (2807 12000)")
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 128], help="rows that they are of (32 128)")
    parser.add_argument("--vocab_size", type=int, default=151_936, help="entries of the vocabulary (151936)")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds (20)")
    parser.add_argument("--output", type=Path, help="CSV file; unset: head_DEVICE.csv among the results, none on a CPU")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found: list[dict[str, object]] = []
    for tokens, rows in zip(options.tokens, options.rows, strict=True):
        for distilled in (False, True):
            made = Head(tokens, rows, options.vocab_size, distilled, device, dtype)
            shared = {"labelled": tokens, "distilled": distilled, "vocab_size": options.vocab_size, "dtype": str(dtype)}
            found += [shared | row | provenance() for row in measure(made, options.rounds, device)]
            del made
    print(markdown_table(found, COLUMNS))
    output = options.output
    if output is None and device.type == "cuda":
        output = RESULTS / f"head_{device_name().split()[1].lower()}.csv"
    if output is not None:
        write_csv(output, found)
    return found


if __name__ == "__main__":
    main()
