"""What the launcher would launch, cross-compiled without a GPU for compute capabilities 8.0 and 9.0.

    python -m tests.ops.compile_gate [--slow] [--record]

prints a JSON object per line: problem, launch, architecture, bytes of shared memory and of spills (stores), and how
many stores are ``narrow``, two bytes each. ``--slow`` takes every problem, not the few of each commit; ``--record``
writes the largest spill of each, and the registers, to compile_gate.json, for each version of Triton apart.

Launches are those of the real launcher on empty tensors: a stand-in for the kernels notes their
arguments, which are then specialised as Triton's JIT does. Must run in a process that does not interpret kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
RECORD = HERE / "compile_gate.json"
SHARED_LIMIT = {80: 166_912, 90: 232_448}
"""Bytes of shared memory that one program may ask for."""

QWEN2, MHA, GQA = ((24, 2, 64), (28, 2, 128)), ((16, 16, 64), (32, 32, 128)), ((32, 8, 64), (80, 8, 128))
SMALL = ("weights_kernel", "sum_kernel", "scale_kernel", "fold_kernel", "count_kernel")
KERNELS = ("map_projection_kernel", "mix_kernel", "unmix_kernel", "fused_kernel", "project_kernel", *SMALL)
TRAIN = {"mask": True, "index": False, "bias": True, "scale": True}

# name: (source, target), what moves, dtype, dim_proj and head_mix dimensions, sparse, features
Problem = tuple[tuple, str, torch.dtype, int, int, bool, dict]


def problems(slow: bool) -> dict[str, Problem]:
    """By name. The aligner's own forms, and shared maps, in training's combination of features; then the rest."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    found: dict[str, Problem] = {
        "qwen2 student→teacher": (QWEN2, "source", bf16, 4, 3, False, TRAIN),
        "qwen2 teacher→student": (QWEN2[::-1], "target", bf16, 4, 3, False, TRAIN),
        "qwen2 student→teacher shared": (QWEN2, "source", bf16, 2, 2, False, TRAIN),
        "qwen2 teacher→student shared": (QWEN2[::-1], "target", bf16, 2, 2, False, TRAIN),
        "qwen2 student→teacher sparse": (QWEN2, "source", bf16, 4, 3, True, TRAIN),
        "qwen2 student→teacher indexed": (QWEN2, "source", bf16, 4, 3, False, TRAIN | {"index": True}),
        "mha student→teacher": (MHA, "source", bf16, 4, 3, False, TRAIN),
        "gqa teacher→student shared": (GQA[::-1], "target", bf16, 2, 2, False, TRAIN),
        "qwen2 student→teacher shared fp16": (QWEN2, "source", fp16, 2, 2, False, TRAIN),
    }
    if not slow:
        return found
    found["dims 80 to 96 fp32"] = (((4, 2, 80), (4, 2, 96)), "source", fp32, 2, 2, False, {"index": True})
    features = {"training": TRAIN, "plain": {}, "indexed": {"index": True, "mask": True}, "bias": {"bias": True}}
    small = {
        "16 to 16": ((2, 2, 16), (3, 2, 16)),
        "96 to 80": ((6, 4, 96), (6, 4, 80)),
        "one row": ((1, 1, 128), (1, 1, 128)),
        "64 heads": ((2, 64, 64), (2, 64, 64)),
    }
    for name, pair in {"qwen2": QWEN2, "mha": MHA, "gqa": GQA, **small}.items():
        for moves, sides in (("source", pair), ("target", pair[::-1]), ("both", pair), ("maps", pair), ("none", pair)):
            for dim_form, head_form in ((2, 2), (3, 3), (4, 3), (2, 3)):
                for sparse in (False, True):
                    label = f"{name} {moves} dims {dim_form} heads {head_form}{' sparse' * sparse}"
                    found[label] = (sides, moves, bf16, dim_form, head_form, sparse, TRAIN)
        for label, chosen in features.items():
            found[f"{name} {label}"] = (pair, "source", bf16, 4, 3, False, chosen)
        for dtype in (fp16, fp32):
            for moves, sides in (("source", pair), ("target", pair[::-1])):
                for dim_form, head_form in ((2, 2), (4, 3)):
                    label = f"{name} {moves} dims {dim_form} {str(dtype)[6:]}"
                    found[label] = (sides, moves, dtype, dim_form, head_form, False, TRAIN)
    return found


class Recorder:
    """Stands in for a kernel: notes the arguments of launches."""

    def __init__(self, kernel: Any, launches: list) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple) -> Any:
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def launches_of(problem: Problem, arch: int) -> list[tuple[Any, tuple, dict]]:
    """(kernel, arguments, keyword arguments) of the loss forward and backward and of the projection, on ``arch``."""
    from kvds.ops import gluon_launch, triton_compute, triton_launch, triton_plan, triton_sums
    from kvds.ops.gradients import LossProblem, loss_with_gradients

    (source, target), moves, dtype, dim_form, head_form, sparse, features = problem
    (lx, hx, dx), (ly, hy, dy) = source, target
    batch, tokens, slots = 2, 512, 128

    def leaf(*shape: int, dtype: torch.dtype = torch.float32, moves: bool = True) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, requires_grad=moves)

    def states(layers: int, heads: int, dim: int, side: str) -> list[torch.Tensor]:
        return [
            leaf(batch, tokens, heads, dim, dtype=dtype, moves=moves in (side, "both")).transpose(1, 2)
            for _ in range(layers)
        ]

    on = moves != "none"
    maps = [
        leaf(ly, moves=on) if sparse else leaf(ly, lx, moves=on),
        leaf(*(ly,)[: head_form - 2], hy, hx, moves=on),
        leaf(*(ly, hy)[: dim_form - 2], dx, dy, moves=on),
        leaf(ly, hy, dy, moves=on) if features.get("bias") else None,
    ]
    indexed = features.get("index")
    index = torch.empty(batch, slots, dtype=torch.int64) if indexed else None
    shape = (batch, slots if indexed else tokens)
    mask = torch.empty(shape, dtype=torch.bool) if features.get("mask") else None
    scale = leaf(ly, moves=False) if features.get("scale") else None
    launches: list = []
    originals = {
        (module, name): getattr(module, name)
        for module in (triton_launch, triton_plan, triton_sums, gluon_launch)
        for name in (*KERNELS, "processors", "capability")
        if hasattr(module, name)
    }
    stand_ins = {"processors": lambda device: 132, "capability": lambda device: (arch // 10, arch % 10)}
    try:
        for (module, name), original in originals.items():
            setattr(module, name, stand_ins.get(name) or Recorder(original, launches))
        x, y = tuple(states(ly if sparse else lx, hx, dx, "source")), tuple(states(ly, hy, dy, "target"))
        asked = LossProblem(x, y, *maps, index, index, mask, scale, features.get("loss", "mse"))  # type: ignore[arg-type]
        loss, _ = loss_with_gradients(triton_compute.compute_triton, asked)
        if loss.requires_grad:
            loss.backward()
        triton_compute.map_projection_triton(x, *maps, index)  # type: ignore[arg-type]
    finally:
        for (module, name), original in originals.items():
            setattr(module, name, original)
    return launches


def specialised(kernel: Any, args: tuple, kwargs: dict, arch: int) -> tuple[Any, dict]:
    """What the JIT makes of a launch's arguments: the source to compile, and options."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", arch, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, _ = bind(*args, **kwargs)
    options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
    _, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialisation, options)
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    return kind(kernel, signature, constants, attributes), options


def compile_all(slow: bool) -> list[dict[str, Any]]:
    """A row for every launch of every problem and architecture; equal launches are compiled once."""
    import triton
    from triton.backends.compiler import GPUTarget

    rows: list[dict[str, Any]] = []
    done: dict[str, dict[str, int]] = {}
    forms: dict[Any, str] = {}
    for (name, problem), arch in itertools.product(problems(slow).items(), SHARED_LIMIT):
        seen = set()
        for kernel, args, kwargs in launches_of(problem, arch):
            source, options = specialised(kernel, args, kwargs, arch)
            form = next((value for value in source.constants.values() if hasattr(value, "mode")), None)
            # The JIT finds a compiled kernel by its form: two that are equal would be launched for one another.
            assert forms.setdefault(form, repr(form)) == repr(form), f"{forms[form]} equals {form}"
            launch = f"{kernel.__name__} {source.signature} {source.constants} {source.attrs} {options}"
            if not slow and kernel.__name__ in SMALL:
                launch = kernel.__name__  # sums and rescaling differ in sizes only: one of each is enough
            if launch in seen:
                continue
            seen.add(launch)
            key = f"{arch} {launch}"
            if key not in done:
                with contextlib.redirect_stdout(io.StringIO()) as log:
                    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
                spills = re.findall(r"(\d+) bytes spill stores", log.getvalue())
                registers = re.findall(r"Used (\d+) registers", log.getvalue())
                assert len(spills) == len(registers) == 1, log.getvalue()
                done[key] = {"shared": made.metadata.shared, "spills": int(spills[0]), "registers": int(registers[0])}
                done[key]["narrow"] = len(re.findall(r"st\.global\.\S*b16", made.asm["ptx"]))
            label = kernel.__name__ if form is None else f"{kernel.__name__} {form.mode}"
            rows.append({"problem": name, "launch": label, "arch": arch} | done[key])
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    return rows


def version() -> str:
    """Triton's, without what does not change code."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def largest(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, int]]]:
    """Per problem and architecture, of all its launches: the largest spill, and the most registers a thread has."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for row in rows:
        at = found.setdefault(row["problem"], {}).setdefault(str(row["arch"]), {"spills": 0, "registers": 0})
        for column in at:
            at[column] = max(at[column], row[column])
    return found


def main() -> None:
    """Compile, print, and record if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow", action="store_true", help="every problem (an hour), not only those of each commit")
    parser.add_argument("--record", action="store_true", help="write what was found to compile_gate.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        # An empty cache: ptxas speaks only when it runs.
        os.environ |= {"TRITON_INTERPRET": "0", "TRITON_DUMP_PTXAS_LOG": "1", "TRITON_CACHE_DIR": cache}
        rows = compile_all(options.slow)
    if options.record:
        record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        record[version()] = record.get(version(), {}) | largest(rows)
        RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
