"""What a fixed order of sums costs: the same training steps with and without ``--deterministic``, in turns.

    python -m benchmarks.bench_deterministic --pair qwen2 --data_dir DATA     # Qwen2-1.5B and 0.5B, a GPU
    python -m benchmarks.bench_deterministic                                  # small models, CPU or GPU

The table has the median time of a step, its ratio, and whether the student's gradients of one batch come out in the
same bits twice.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read with the first product on a GPU

import torch

from benchmarks.records import device_name, revision, write_csv
from benchmarks.train_step.arms import ARMS, Workbench
from benchmarks.train_step.workbench import Clock, load_samples, make_loader, make_pair
from kvds.data.batches import TokenBatch
from kvds.tracking.provenance import typed_command
from kvds.training.fixed_order import fixed_order

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS = ("task_only", "kvds_structured", "kvds_structured_packed")


def same_bits(bench: Workbench, step: object, batch: TokenBatch) -> bool:
    """Whether one batch gives the same gradients of the student twice, its weights held still."""
    kept: list[list[torch.Tensor]] = []
    handles = [p.register_hook(lambda g, k=kept: k[-1].append(g.detach().clone())) for p in bench.student.parameters()]
    with patch.object(torch.optim.AdamW, "step", lambda self: None):  # neither the student nor its map moves
        for _ in range(2):
            kept.append([])
            step(batch)  # type: ignore[operator]
    for handle in handles:
        handle.remove()
    bench.clock.read()
    return all(torch.equal(one, other) for one, other in zip(*kept, strict=True))


def main(argv: list[str] | None = None) -> list[dict[str, object]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="small", choices=("tiny", "small", "small_152k", "qwen2"))
    parser.add_argument("--data_dir", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="unset: bf16 for qwen2 on a GPU, else fp32")
    parser.add_argument("--batch_size", type=int, default=8, help="rows per batch (8)")
    parser.add_argument("--max_length", type=int, default=512, help="tokens per row (512)")
    parser.add_argument("--rounds", type=int, default=20, help="batches that each arm is timed on (20)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(STEPS))
    parser.add_argument("--output", type=Path, help="CSV file")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    pair, clock = make_pair(arguments.pair, arguments.data_dir, arguments.dtype), Clock(device)
    count = arguments.batch_size * (arguments.rounds + 1)
    samples, _ = load_samples(arguments.data_dir, pair.student.vocab_size, arguments.max_length, count)
    loaders = {
        False: make_loader(samples, arguments.batch_size),
        True: make_loader(samples, arguments.batch_size, pack_to=arguments.max_length),
    }
    bench = Workbench(pair, device, clock, samples=samples)
    rows: list[dict[str, object]] = []
    for name in arguments.arms:
        arm = ARMS[name](bench)
        loader = loaders[arm.packed]
        batches = [loader.step(i)[0] for i in range(min(arguments.rounds, loader.steps_per_epoch))]
        times: dict[bool, list[float]] = {False: [], True: []}
        bits = {}
        for number, batch in enumerate([batches[0], *batches]):  # the first one warms up
            for ordered in (False, True) if number % 2 else (True, False):
                with fixed_order(ordered):
                    arm.prepare(batch)
                    with clock.phase("step"):
                        arm.step(batch)
                    spent = clock.read()["step"]
                    if number:
                        times[ordered].append(spent)
                    else:
                        bits[ordered] = same_bits(bench, arm.step, batch)
        medians = {ordered: statistics.median(found) for ordered, found in times.items()}
        for ordered in (False, True):
            rows.append({
                "arm": name, "order": "fixed" if ordered else "any", "ms": f"{1000 * medians[ordered]:.2f}",
                "ratio": f"{medians[ordered] / medians[False]:.3f}", "same_bits": bits[ordered],
                "device": device_name(), "torch": torch.__version__, "revision": revision(), "command": typed_command(),
            })  # fmt: skip
    print(f"{'arm':<24} {'order':<6} {'ms':>10} {'ratio':>7}  same bits twice")
    for row in rows:
        print(f"{row['arm']:<24} {row['order']:<6} {row['ms']:>10} {row['ratio']:>7}  {row['same_bits']}")
    if arguments.output is not None:
        write_csv(arguments.output, rows)
    return rows


if __name__ == "__main__":
    main()
