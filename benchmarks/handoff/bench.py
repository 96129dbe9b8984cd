"""Time to first token and memory of a handoff, beside the student's own prefill and the teacher alone.

    python -m benchmarks.handoff.bench                    # the Qwen2 pair, random weights, 512 to 32768 tokens; a GPU
    python -m benchmarks.handoff.bench --tiny --tokens 16 # a pair of two layers on the CPU

The teacher has read the prompt: its keys and values are there, and what is timed of a handoff is map, filling of
the cache and the student's forward of the last token. ``floor_ms``: the bytes of the map's sources, weights, results,
each moved once, at the bandwidth at which this device copies. ``work_ms``: its multiplications, at the rate of a large
product here; with four source layers per layer that is more than the bytes take on an H200.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks.memory_peak import MemoryPeak
from benchmarks.records import RESULTS, markdown_table, provenance, write_csv
from kvds.handoff import CacheMap
from kvds.handoff.cache_map import source_layers
from kvds.handoff.reading import cache_argument, fill_cache, read_states
from kvds.kv import KVShape, KVStates

COLUMNS = (
    "tokens", "source_layers", "teacher_prefill_ms", "student_prefill_ms", "map_ms", "first_token_ms", "floor_ms",
    "work_ms", "map_of_prefill", "of_copy_bandwidth", "teacher_prefill_bytes", "student_prefill_bytes", "handoff_bytes",
)  # fmt: skip


def pair_of(tiny: bool) -> tuple[Qwen2Config, Qwen2Config]:
    """Teacher and student: Qwen2-1.5B and 0.5B, or two layers each."""
    sizes = ((1536, 8960, 28, 12, 128), (896, 4864, 24, 14, 64)) if not tiny else ((32, 48, 3, 4, 8), (16, 24, 2, 4, 4))
    return tuple(  # type: ignore[return-value]
        Qwen2Config(
            vocab_size=64 if tiny else 151936, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=2, head_dim=dim, max_position_embeddings=65536,
            tie_word_embeddings=True,
        )
        for width, inner, layers, heads, dim in sizes
    )  # fmt: skip


def milliseconds(work: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Median of ``rounds`` after one that is not counted."""
    found = []
    for _ in range(rounds + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        kept = work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(1000 * (time.perf_counter() - begun))
        del kept
    return median(found[1:])


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """The most that ``work`` adds to what is there."""
    peak = MemoryPeak(device)
    peak.begin()
    kept = work()
    found = peak.end(0)
    del kept
    return found


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes per second, read and written, of a copy."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / (milliseconds(lambda: target.copy_(source), device, 5) / 1000)


def multiplication_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOPs per second of a product of two square matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / (milliseconds(lambda: a @ b, device, 5) / 1000)


@torch.no_grad()
def measure(
    teacher: Any, student: Any, maps: Sequence[CacheMap], tokens: int, rounds: int, rates: tuple[float, float]
) -> list[dict[str, Any]]:
    """A row of the table for each map. ``rates``: bytes and FLOPs per second of the device."""
    weight = next(student.parameters())
    device = weight.device
    ids = torch.randint(2, student.config.vocab_size, (1, tokens), device=device)
    before = torch.ones(1, tokens - 1, dtype=torch.bool, device=device)
    read = read_states(teacher, ids[:, :-1], before)
    states = KVStates(*(tuple(layer.to(weight.dtype) for layer in part) for part in read))

    def prefill(model: Any) -> Any:
        return model(input_ids=ids, use_cache=True, logits_to_keep=1)

    def first_token(cache_map: CacheMap) -> Any:
        cache = {cache_argument(student): fill_cache(student, cache_map(states), before)}
        return student(input_ids=ids[:, -1:], use_cache=True, logits_to_keep=1, **cache)

    def timed(work: Callable[[], Any]) -> float:
        return milliseconds(work, device, rounds)

    alone: dict[str, Any] = {}
    for name, model in (("teacher", teacher), ("student", student)):
        alone[f"{name}_prefill_ms"] = timed(partial(prefill, model))
        alone[f"{name}_prefill_bytes"] = peak_bytes(partial(prefill, model), device)
    rows = []
    for cache_map in maps:
        parameters = sum(p.numel() for p in cache_map.parameters())
        read_layers = {source for layers in cache_map.sources for source in layers}
        widths = cache_map.teacher.num_key_value_heads * cache_map.teacher.head_dim, cache_map.width
        moved = 2 * (tokens - 1) * (len(read_layers) * widths[0] + len(cache_map.sources) * widths[1]) + parameters
        row = {"tokens": tokens, "source_layers": len(cache_map.sources[0]), **alone}
        row |= {
            "map_ms": timed(partial(cache_map, states)), "first_token_ms": timed(partial(first_token, cache_map)),
            "floor_ms": 1000 * moved * weight.element_size() / rates[0],
            "work_ms": 1000 * cache_map.flops_per_token * (tokens - 1) / rates[1],
            "handoff_bytes": peak_bytes(partial(first_token, cache_map), device),
        }  # fmt: skip
        row["map_of_prefill"] = row["map_ms"] / row["student_prefill_ms"]
        row["of_copy_bandwidth"] = row["floor_ms"] / row["map_ms"]
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a pair of two layers")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192, 32768], help="of prompts")
    parser.add_argument(
        "--source_layers", type=int, nargs="+", default=[1, 4], help="teacher layers per student layer (1 and 4)"
    )
    parser.add_argument("--rounds", type=int, default=10, help="timed (10)")
    parser.add_argument("--output", type=Path, default=RESULTS / "handoff.csv", help="CSV; a table goes beside it")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    configs = pair_of(arguments.tiny)
    teacher, student = (AutoModelForCausalLM.from_config(c, dtype=dtype).to(device).eval() for c in configs)
    shapes = [KVShape.from_config(config) for config in configs]
    depths = shapes[1].num_hidden_layers, shapes[0].num_hidden_layers
    counts = sorted({min(count, depths[1]) for count in arguments.source_layers})
    maps = [CacheMap(*shapes, source_layers(*depths, count)).to(device=device, dtype=dtype) for count in counts]
    bandwidth = copy_bandwidth(device, 2**20 if arguments.tiny else 2**30)
    rates = bandwidth, multiplication_rate(device, dtype, 8192 if device.type == "cuda" else 256)
    rows = [
        row
        for tokens in sorted(arguments.tokens)
        for row in measure(teacher, student, maps, tokens, arguments.rounds, rates)
    ]
    facts = provenance(("torch", "transformers"))
    write_csv(arguments.output, [row | facts for row in rows])
    table = markdown_table(rows, COLUMNS)
    arguments.output.with_suffix(".md").write_text(f"Made by `{facts['command']}` on {facts['device']}.\n\n{table}\n")
    print(table)
    return rows


if __name__ == "__main__":
    main()
