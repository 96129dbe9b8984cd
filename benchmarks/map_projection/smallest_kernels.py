"""Every kernel of the fused operation once, on small inputs with odd sizes: what a sanitizer or a profiler is run on.

compute-sanitizer python -m benchmarks.map_projection.smallest_kernels
ncu python -m benchmarks.map_projection.smallest_kernels --pair qwen2 --tokens 32768
"""

from __future__ import annotations

import argparse
import itertools

import torch

from benchmarks.map_projection.bench import DIRECTIONS, PAIRS, Cell, Inputs
from kvds.ops import map_projection


def main() -> None:
    """Run, and wait for the last kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=PAIRS, default="small")
    parser.add_argument("--tokens", type=int, default=77)
    arguments = parser.parse_args()
    dtype = torch.bfloat16
    count = 0
    forms = itertools.product(("dense", "sparse"), ("shared", "per_head"), DIRECTIONS, ("full", "forward"))
    for layer_map, proj, direction, mode in forms:
        cell = Cell(arguments.pair, layer_map, proj, direction, mode, arguments.tokens, "triton", budget=0.9)
        inputs = Inputs(cell, dtype, "cuda")
        inputs.run("triton")
        projected = map_projection(inputs.source, **inputs.maps, bias=inputs.bias, impl="triton")
        if inputs.trained:
            leaves = [inputs.maps["dim_proj"], inputs.maps["head_mix"]]
            torch.autograd.grad(projected, leaves, torch.ones_like(projected))
        count += 1
    torch.cuda.synchronize()
    print(f"{count} forms ran")


if __name__ == "__main__":
    main()
