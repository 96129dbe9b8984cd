"""Time and memory of ``map_projection_loss``: eager, torch.compile, Triton (on a CPU: lean) side by side in one run.

    python -m benchmarks.map_projection.bench                  # a GPU, at most 8 minutes: CSV, table, roofline picture
    python -m benchmarks.map_projection.bench --quick          # a CPU, about a minute
    python -m benchmarks.map_projection.bench --pairs qwen2 --tokens 32768 --minutes 2

Modes: ``full`` (loss and gradients of the student's states and of every map), ``forward`` (the loss alone) and
``project`` (``map_projection`` alone: its output is written instead of a target read).
Directions: ``student_to_teacher`` (the source is the student) and ``teacher_to_student``. Buffers are rotated so that
no provider finds its input in the L2 cache. ``ms`` is the time on the device with work queued ahead of it, as in a
training step; ``host_ms`` is how long the host is busy with the call. GB/s and the share of the copy bandwidth count
one-pass bytes, whatever a provider really moves: each selected element of teacher and student read once, each of the
student's gradient written once. Extra memory is the peak during one call above what was allocated before it, less the
gradients that it returns.
"""

from __future__ import annotations

import argparse
import csv
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.map_projection.roofline import draw_roofline
from benchmarks.records import RESULTS, markdown_table, provenance, write_csv
from kvds.kv import KVShape
from kvds.ops import map_projection, map_projection_loss

PAIRS = {
    "qwen2": (KVShape(28, 2, 128, 12), KVShape(24, 2, 64, 14)),  # Qwen2-1.5B -> Qwen2-0.5B
    "mha": (KVShape(32, 32, 128, 32), KVShape(16, 16, 64, 16)),
    "gqa": (KVShape(80, 8, 128, 64), KVShape(32, 8, 64, 32)),
    "small": (KVShape(8, 2, 64, 4), KVShape(6, 2, 32, 4)),
    "small_128": (KVShape(8, 2, 128, 4), KVShape(6, 2, 64, 4)),
}
"""Teacher and student."""
TOKENS = (32768, 4096, 262144, 1024, 256, 65536, 16384)
"""The size that the aims are stated at comes first; what the time limit cuts off is the least asked for."""
COMPILED_TOKENS = {
    "qwen2": (256, 4096, 32768, 262144),
    "mha": (32768,),
    "gqa": (32768,),
    "small": (1024, 4096),
    "small_128": (4096,),
}
"""Compilation of one shape takes tens of seconds: the peer is measured at these only."""
DIRECTIONS = ("student_to_teacher", "teacher_to_student")
IMPLEMENTATIONS = {"eager": "reference", "compile": "compile", "triton": "triton", "lean": "lean"}
ROW_LENGTH = 512


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    pair: str
    layer_map: str
    proj: str
    direction: str
    mode: str
    tokens: int
    provider: str
    budget: float = 1.0

    @property
    def shapes(self) -> tuple[KVShape, KVShape]:
        """Source and target."""
        teacher, student = PAIRS[self.pair]
        return (student, teacher) if self.direction == "student_to_teacher" else (teacher, student)

    @property
    def positions(self) -> tuple[int, int, int]:
        """Rows, tokens per row, selected positions per row."""
        length = min(ROW_LENGTH, self.tokens)
        return max(1, self.tokens // length), length, max(1, round(self.budget * length))

    def one_pass_bytes(self, itemsize: int) -> int:
        """Bytes of the selected teacher and student elements, and of the student's gradient in mode full.

        With a sparse map only the source layers that it names are read (each once).
        """
        (source, target), (rows, _, selected) = self.shapes, self.positions
        layers = len(set(depth_map(source, target))) if self.layer_map == "sparse" else source.num_hidden_layers
        source_size = layers * source.num_key_value_heads * source.head_dim
        target_size = target.num_hidden_layers * target.num_key_value_heads * target.head_dim
        student = source_size if self.direction == "student_to_teacher" else target_size
        return rows * selected * itemsize * (source_size + target_size + student * (self.mode == "full"))

    def flops(self) -> int:
        """Of mixing layers, then heads, then projecting; three times that with gradients."""
        (x, y), (rows, _, selected) = self.shapes, self.positions
        heads_x, heads_y, layers_y = x.num_key_value_heads, y.num_key_value_heads, y.num_hidden_layers
        layers = 0 if self.layer_map == "sparse" else x.num_hidden_layers * heads_x
        per_token = 2 * layers_y * x.head_dim * (layers + heads_x * heads_y + heads_y * y.head_dim)
        return rows * selected * per_token * (3 if self.mode == "full" else 1)


def depth_map(source: KVShape, target: KVShape) -> list[int]:
    """The source layer at each target layer's relative depth, ends on ends."""
    last_x, last_y = source.num_hidden_layers - 1, max(1, target.num_hidden_layers - 1)
    return [(2 * i * last_x + last_y) // (2 * last_y) for i in range(target.num_hidden_layers)]


class Inputs:
    """Random states (or, not ``filled``, whatever is there) in the layout in which they are captured, and maps."""

    def __init__(self, cell: Cell, dtype: torch.dtype, device: str, filled: bool = True) -> None:
        source, target = cell.shapes
        rows, length, selected = cell.positions
        generator = torch.Generator(device).manual_seed(0)

        def states(shape: KVShape, trained: bool) -> list[Tensor]:
            size = (rows, length, shape.num_key_value_heads, shape.head_dim)
            layers = [torch.empty(size, dtype=dtype, device=device) for _ in range(shape.num_hidden_layers)]
            made = [layer.normal_(generator=generator) if filled else layer for layer in layers]
            return [layer.transpose(1, 2).requires_grad_(trained) for layer in made]

        def weight(*size: int) -> Tensor:
            values = torch.randn(size, generator=generator, device=device) / size[-2] ** 0.5
            return values.requires_grad_(full)

        self.mode = cell.mode
        full, student_is_source = cell.mode == "full", cell.direction == "student_to_teacher"
        self.source = states(source, full and student_is_source)
        self.target = states(target, full and not student_is_source)
        x, y = (source.num_key_value_heads, source.head_dim), (target.num_key_value_heads, target.head_dim)
        layers_y = target.num_hidden_layers
        if cell.layer_map == "sparse":
            self.source = [self.source[i] for i in depth_map(source, target)]
            layer_mix = torch.ones(layers_y, device=device)
        else:
            layer_mix = weight(layers_y, source.num_hidden_layers)
        dim_proj = weight(x[1], y[1]) if cell.proj == "shared" else weight(layers_y, y[0], x[1], y[1])
        self.maps = {"layer_mix": layer_mix, "head_mix": weight(y[0], x[0]), "dim_proj": dim_proj}
        self.bias = weight(layers_y, y[0], y[1])
        self.scale = torch.rand(layers_y, generator=generator, device=device) + 0.5
        self.mask = torch.ones(rows, selected, dtype=torch.bool, device=device)
        self.mask[:, 0] = False  # the attention sink
        step = torch.arange(selected, device=device) * length // selected
        self.index = None if selected == length else step.expand(rows, -1).contiguous()
        states_and_maps = [*self.source, *self.target, *self.maps.values(), self.bias]
        # A layer that the sparse map names twice stands twice in the list.
        self.trained = list({id(t): t for t in states_and_maps if t.requires_grad}.values())

    def run(self, impl: str) -> Any:
        """One call; in mode full its gradients are returned, as ``backward`` would leave them."""
        if self.mode == "project":
            return map_projection(self.source, **self.maps, bias=self.bias, source_index=self.index, impl=impl)
        loss, _ = map_projection_loss(
            self.source, self.target, self.maps["layer_mix"], self.maps["head_mix"], self.maps["dim_proj"],
            bias=self.bias, source_index=self.index, target_index=self.index, mask=self.mask, scale=self.scale,
            impl=impl,
        )  # fmt: skip
        return torch.autograd.grad(loss, self.trained) if self.trained else loss

    def gradient_bytes(self) -> int:
        """Bytes of the gradients that a call returns."""
        return sum(t.numel() * t.element_size() for t in self.trained)


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call: percentiles, and the median that the host is busy."""

    p20: float
    p50: float
    p80: float
    host: float


def time_call(call: Callable[[Any], Any], buffers: list[Any], seconds: float, device: str) -> Times:
    """Repeat over rotated buffers for about ``seconds``."""
    call(buffers[0])
    clock = _gpu_clock if device == "cuda" else _cpu_clock
    host = clock(call, buffers[-1], 0.0)[1]
    first = max(clock(call, buffers[-1], host))
    repeats = max(5, min(200, int(seconds * 1000 / first)))
    taken = [clock(call, buffers[i % len(buffers)], host) for i in range(repeats)]
    p20, p50, *_, p80 = (statistics.quantiles([ms for ms, _ in taken], n=100)[k - 1] for k in (20, 50, 80))
    return Times(p20, p50, p80, statistics.median(busy for _, busy in taken))


def _gpu_clock(call: Callable[[Any], Any], inputs: Any, host_ms: float) -> tuple[float, float]:
    """Milliseconds on the device and on the host. The device is kept busy while the host prepares its launches."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(int(2e6 * (2 * host_ms + 0.2)))  # cycles, at about 2 GHz
    begin.record()
    begun = time.perf_counter()
    result = call(inputs)
    busy = 1000 * (time.perf_counter() - begun)
    end.record()
    end.synchronize()
    del result
    return begin.elapsed_time(end), busy


def _cpu_clock(call: Callable[[Any], Any], inputs: Any, host_ms: float) -> tuple[float, float]:
    begun = time.perf_counter()
    result = call(inputs)
    elapsed = 1000 * (time.perf_counter() - begun)
    del result
    return elapsed, elapsed


def gpu_extra_bytes(inputs: Inputs, impl: str) -> int:
    """Peak allocation of a call beyond what stood before it and the gradients it returns."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = inputs.run(impl)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del result
    return max(0, peak - before - inputs.gradient_bytes())


def cpu_extra_bytes(cell: Cell, dtype: torch.dtype, threads: int) -> int:
    """The same from the peak resident size of a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure_resident, cell, dtype, threads).result()


def _measure_resident(cell: Cell, dtype: torch.dtype, threads: int) -> int:
    torch.set_num_threads(threads)
    small = Cell(**{**vars(cell), "tokens": 64})
    Inputs(small, dtype, "cpu").run(IMPLEMENTATIONS[cell.provider])  # what a first call loads is not the operation's
    inputs = Inputs(cell, dtype, "cpu")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here; getrusage's would survive the exec
    before = _resident_bytes("VmRSS")
    result = inputs.run(IMPLEMENTATIONS[cell.provider])
    peak = _resident_bytes("VmHWM")
    del result
    return max(0, peak - before - inputs.gradient_bytes())


def _resident_bytes(field: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return 1024 * int(line.split()[1])


def measure(cell: Cell, dtype: torch.dtype, device: str, seconds: float) -> dict[str, object]:
    """A row of results; a cell that does not fit into memory says so."""
    impl = IMPLEMENTATIONS[cell.provider]
    itemsize = torch.empty(0, dtype=dtype).element_size()
    one_pass = cell.one_pass_bytes(itemsize)
    row: dict[str, object] = {**vars(cell), "dtype": str(dtype).removeprefix("torch."), "one_pass_bytes": one_pass}
    if cell.provider == "compile":
        torch.compiler.reset()
    try:
        l2 = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 64 * 2**20
        copies = max(1, min(64, -(-3 * l2 // one_pass)))
        buffers = [Inputs(cell, dtype, device) for _ in range(copies)]
        times = time_call(lambda inputs: inputs.run(impl), buffers, seconds, device)
        extra = gpu_extra_bytes(buffers[0], impl) if device == "cuda" else None
    except torch.OutOfMemoryError:
        return row | {"note": "out of memory"}
    finally:
        buffers = []
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    row |= {"p20_ms": times.p20, "ms": times.p50, "p80_ms": times.p80, "host_ms": times.host}
    row |= {"gb_per_s": one_pass / times.p50 / 1e6, "tflop_per_s": cell.flops() / times.p50 / 1e9}
    if extra is None and cell.mode == "full":
        extra = cpu_extra_bytes(cell, dtype, torch.get_num_threads())
    if extra is not None:
        row["extra_mib"] = extra / 2**20
    return row


def copy_gb_per_s(device: str) -> float:
    """Bandwidth of a large copy, bytes read plus bytes written, the best of ten."""
    size = 2**30 if device == "cuda" else 2**28
    source, target = (torch.empty(size, dtype=torch.uint8, device=device).fill_(1) for _ in range(2))
    best = min(time_call(lambda _: target.copy_(source), [None], 0.2, device).p20 for _ in range(3))
    return 2 * size / best / 1e6


def matmul_tflop_per_s(device: str, dtype: torch.dtype) -> float:
    """Rate of a large square matrix product."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = min(time_call(lambda _: a @ b, [None], 0.2, device).p20 for _ in range(3))
    return 2 * size**3 / best / 1e9


def cells(args: argparse.Namespace, providers: list[str]) -> Iterator[Cell]:
    """The sweep, the most asked-for cells first: all pairs at a size before the next size, slow compilation last."""
    for last, tokens, pair in itertools.product((False, True), args.tokens, args.pairs):
        for layer_map, proj, direction, mode in itertools.product(args.layer_maps, args.proj, DIRECTIONS, args.modes):
            if proj == "per_head" and pair not in ("qwen2", "small"):
                continue
            for provider in providers:
                if (provider == "compile") != last:
                    continue
                if provider == "compile" and (tokens not in COMPILED_TOKENS[pair] or layer_map == "sparse"):
                    continue
                yield Cell(pair, layer_map, proj, direction, mode, tokens, provider, args.budget)


def compare(rows: list[dict[str, Any]]) -> None:
    """Add what a row is worth beside the eager one of the same cell: speed-up, share of its extra memory."""
    keys = ("pair", "layer_map", "proj", "direction", "mode", "tokens", "budget")
    eager = {tuple(row[k] for k in keys): row for row in rows if row["provider"] == "eager" and "ms" in row}
    for row in rows:
        base = eager.get(tuple(row[k] for k in keys))
        if base is None or "ms" not in row or row is base:
            continue
        row["times_eager"] = base["ms"] / row["ms"]
        if base.get("extra_mib") and "extra_mib" in row:
            row["percent_of_eager_memory"] = 100 * row["extra_mib"] / base["extra_mib"]


def earlier_rows(path: Path) -> list[dict[str, Any]]:
    """The Triton rows of a CSV file, as provider ``before``."""
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["provider"] == "triton" and row["ms"]]
    numbers = {"tokens": int, "ms": float, "gb_per_s": float, "tflop_per_s": float, "one_pass_bytes": float}
    return [row | {name: kind(row[name]) for name, kind in numbers.items()} | {"provider": "before"} for row in rows]


def parse_arguments() -> argparse.Namespace:
    """Flags; ``--quick`` changes their defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small sweep that a CPU finishes in about a minute")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS)
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--layer_maps", nargs="+", choices=("dense", "sparse"))
    parser.add_argument("--proj", nargs="+", choices=("shared", "per_head"))
    parser.add_argument("--modes", nargs="+", choices=("full", "forward", "project"), default=["full", "forward"])
    parser.add_argument("--providers", nargs="+", choices=IMPLEMENTATIONS)
    parser.add_argument("--budget", type=float, default=1.0, help="share of the positions that is selected")
    parser.add_argument("--seconds", type=float, default=0.15, help="time spent on repetitions of one cell")
    parser.add_argument("--minutes", type=float, default=8.0, help="no new cell is started after this")
    parser.add_argument("--before", type=Path, help="CSV file of an earlier kernel, drawn beside this one's")
    parser.add_argument("--output", type=Path, help="CSV file (default: benchmarks/results/map_projection_DEVICE.csv)")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    args.pairs = args.pairs or (["small"] if args.quick else ["qwen2", "mha", "gqa"])
    args.tokens = args.tokens or ((4096,) if args.quick else TOKENS)
    args.layer_maps = args.layer_maps or ["dense", "sparse"]
    args.proj = args.proj or (["shared"] if args.quick else ["shared", "per_head"])
    args.providers = args.providers or (["eager", "compile", "triton"] if cuda else ["eager", "lean"])
    name = torch.cuda.get_device_name().split()[1].lower() if cuda else "cpu"
    args.output = args.output or RESULTS / f"map_projection_{name}.csv"
    return args


def main() -> None:
    """Measure, print as it goes, write CSV, table and picture."""
    args = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch._dynamo.config.recompile_limit = 64  # the default falls back to eager without a word
    begun = time.monotonic()
    bandwidth, rate = copy_gb_per_s(device), matmul_tflop_per_s(device, dtype)
    facts = provenance() | {"copy_gb_per_s": round(bandwidth, 1), "matmul_tflop_per_s": round(rate, 1)}
    print({k: v for k, v in facts.items() if k != "command"}, flush=True)
    rows: list[dict[str, Any]] = []
    left_out = 0
    for cell in cells(args, args.providers):
        if time.monotonic() - begun > 60 * args.minutes:
            left_out += 1
            continue
        row = measure(cell, dtype, device, args.seconds)
        if "gb_per_s" in row:
            row["percent_of_copy"] = 100 * row["gb_per_s"] / bandwidth  # type: ignore[operator]
        print(" ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
        rows.append(row)
    compare(rows)
    formula = "selected tokens * itemsize * (teacher L*H*D + student L*H*D * (2 if full else 1))"
    write_csv(args.output, [row | {"bytes_formula": formula} | facts for row in rows])
    columns = ["pair", "layer_map", "proj", "direction", "mode", "tokens", "provider", "ms", "host_ms", "gb_per_s",
               "percent_of_copy", "times_eager", "extra_mib", "percent_of_eager_memory", "note"]  # fmt: skip
    table = markdown_table(rows, columns)
    heading = f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, {facts['git_revision']}; "
    heading += f"copy {bandwidth:.0f} GB/s, matrix product {rate:.1f} TFLOP/s; `{facts['command']}`"
    args.output.with_suffix(".md").write_text(f"# map_projection_loss\n\n{heading}\n\n{table}\n")
    earlier = earlier_rows(args.before) if args.before else []
    draw_roofline(rows + earlier, bandwidth, rate, str(facts["device"]), args.output.with_suffix(".png"))
    print(table)
    print(f"{left_out} cells not started within {args.minutes} minutes; {args.output}")


if __name__ == "__main__":
    main()
