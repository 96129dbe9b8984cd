"""The kernel of the losses at the head, cross-compiled without a GPU: a JSON object per launch and architecture.

python -m tests.ops.softmax_gate

It must run in a process that does not interpret kernels.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import tempfile

import torch

from tests.ops.compile_gate import SHARED_LIMIT, Recorder, specialised

VOCAB = 151_936


def main() -> None:
    """Compile what the launcher launches for Qwen2's vocabulary."""
    import triton
    from triton.backends.compiler import GPUTarget

    from kvds.ops import softmax_kernel

    real = softmax_kernel.softmax_loss_kernel
    choices = itertools.product(
        SHARED_LIMIT, (torch.bfloat16, torch.float16, torch.float32), (False, True), (False, True)
    )
    for arch, dtype, distilled, gradient in choices:
        launches: list = []
        softmax_kernel.softmax_loss_kernel = Recorder(real, launches)
        logits, target = torch.empty(16, VOCAB, dtype=dtype), torch.zeros(16, dtype=torch.int64)
        teacher = torch.empty(16, VOCAB + 128, dtype=dtype) if distilled else None
        softmax_kernel.softmax_losses_triton(logits, target, teacher, 151_646, 2.0, 0.1, 0.2, gradient)
        [(kernel, args, kwargs)] = launches
        source, options = specialised(kernel, args, kwargs, arch)
        with contextlib.redirect_stdout(io.StringIO()) as log:
            made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        [spills] = re.findall(r"(\d+) bytes spill stores", log.getvalue())
        row = {
            "arch": arch, "dtype": str(dtype), "distilled": distilled, "gradient": gradient, "spills": int(spills),
            "shared": made.metadata.shared, "wide_loads": made.asm["ptx"].count("ld.global.v4"),
        }  # fmt: skip
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        # An empty cache: ptxas speaks only when it runs.
        os.environ |= {"TRITON_INTERPRET": "0", "TRITON_DUMP_PTXAS_LOG": "1", "TRITON_CACHE_DIR": cache}
        main()
