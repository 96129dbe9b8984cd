"""How many tokens a step computes, its samples dealt out as they are drawn or by length: counted, not timed.

    python -m benchmarks.bench_dealing --data_dir DATA

An epoch of GSM8K under Qwen2's tokenizer, for several sizes of micro-batch, accumulations and ranks, padded and packed.
Writes ``dealing.csv`` and ``DEALING.md`` below ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.records import RESULTS, markdown_table, provenance, write_csv
from kvds.config.recipe import parse_run_config
from kvds.data.batches import RowWidth
from kvds.data.grouping import deal_by_length
from kvds.data.packing import pack_lengths, place_samples
from kvds.data.run_data import load_run_data
from kvds.models.tokenizer import load_tokenizer

CASES = ((8, 8, 1), (16, 8, 1), (8, 2, 1), (8, 2, 2), (8, 4, 8), (16, 1, 8), (32, 1, 1), (32, 1, 2), (32, 1, 4))
MAX_LENGTH = 512
HEADING = """# Samples of a step, dealt out by length

Tokens computed per real one, counted over an epoch of GSM8K (7473 rows) under Qwen2's tokenizer: the samples of a step
dealt out to its micro-batches as they are drawn, and by length as a run does; over all ranks, and on the slowest rank
of each round of micro-batches, for which the others wait. The same samples make a step either way, so losses and
gradients differ by rounding alone. Padded rows on several ranks without accumulation gain nothing: one rank has the
longest row anyway. Made by `{command}` at revision {git_revision}.
"""


def computed(lengths: list[int], packed: bool) -> int:
    """Tokens of a micro-batch of samples of these lengths, padding included."""
    if not lengths:
        return 0
    if not packed:
        return len(lengths) * max(lengths)
    packing, _ = place_samples(pack_lengths(lengths, MAX_LENGTH), lengths, RowWidth(1, MAX_LENGTH))
    return int(packing.document_ids.numel())


def main() -> None:
    """Count, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=RESULTS.parent.parent.parent / "shared" / "data")
    data = parser.parse_args().data_dir
    rows: list[dict[str, Any]] = []
    for size, accumulation, ranks in CASES:
        with tempfile.TemporaryDirectory() as folder:
            cfg = parse_run_config([
                "--student_name", str(data / "models/qwen2-0.5b"), "--tokenizer_name", str(data / "tokenizers/qwen2"),
                "--alignment_mode", "none", "--datasets", "gsm8k", "--data_dir", str(data), "--batch_size", str(size),
                "--gradient_accumulation_steps", str(accumulation), "--max_length", str(MAX_LENGTH),
                "--output_dir", f"{folder}/run", "--data_cache", f"{folder}/tokens",
                "--deepspeed_config", str(RESULTS.parent.parent / "ds_configs/zero3_cpu.json"),
            ])  # fmt: skip
            loader = load_run_data(cfg, load_tokenizer(cfg), rank=0, world_size=ranks).loader
            lengths = [len(sample.input_ids) for sample in loader.samples]
            steps = [loader.sample_ids(step) for step in range(loader.steps_per_epoch)]
        for packed in (False, True):
            row: dict[str, Any] = {"rows": size, "accumulation": accumulation, "ranks": ranks, "packed": packed}
            for name in ("drawn", "dealt"):
                all_ranks = slowest = 0
                for ids in steps:
                    if name == "dealt" and accumulation * ranks > 1:
                        ids = deal_by_length(ids, lengths, size, packed=packed)
                    counts = [
                        computed([lengths[i] for i in ids[begin : begin + size] if i >= 0], packed)
                        for begin in range(0, len(ids), size)
                    ]
                    all_ranks += sum(counts)
                    slowest += sum(max(counts[at : at + ranks]) for at in range(0, len(counts), ranks))
                row[f"{name}_all"] = all_ranks / sum(lengths)
                row[f"{name}_slowest"] = slowest * ranks / sum(lengths)
            row["times_fewer"] = row["drawn_slowest"] / row["dealt_slowest"]
            rows.append(row)
            print(row, flush=True)
    facts = provenance(("torch", "transformers"))
    facts["command"] = "python -m benchmarks.bench_dealing --data_dir DATA"
    write_csv(RESULTS / "dealing.csv", [row | facts for row in rows])
    table = markdown_table(rows, list(rows[0]))
    (RESULTS / "DEALING.md").write_text(f"{HEADING.format(**facts)}\n{table}\n")


if __name__ == "__main__":
    main()
