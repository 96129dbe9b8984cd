"""The implementation of the KV loss that a run here would use, against the oracle in fp64."""

from __future__ import annotations

import importlib.util
import json
import os
import sys

from kvds.doctor.finding import Finding, last_line, run_bounded

# Worst difference, relative to the largest value: rounding, not a formula.
_BOUND = 1e-4
_SCRIPT = """
import sys
from kvds.durable_files import json_text
from kvds.doctor.kernel import worst_difference
print(json_text(worst_difference(sys.argv[1], sys.argv[2])))
"""


def worst_difference(impl: str, device: str) -> float:
    """Largest relative error of ``impl``'s loss and gradients, fp32 against the oracle in fp64, at a small shape."""
    import torch

    from kvds.ops import map_projection_loss

    def inputs(dtype: torch.dtype, where: str) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(where, dtype)

        source = [draw(2, 2, 24, 64).requires_grad_() for _ in range(3)]
        target = [draw(2, 2, 24, 128) for _ in range(4)]
        maps = [draw(4, 3), draw(2, 2), draw(64, 128), draw(4, 2, 128)]
        return source, target, [m.requires_grad_() for m in maps]

    def run(dtype: torch.dtype, where: str, chosen: str) -> list[torch.Tensor]:
        source, target, (layer_mix, head_mix, dim_proj, bias) = inputs(dtype, where)
        loss, _ = map_projection_loss(source, target, layer_mix, head_mix, dim_proj, bias=bias, impl=chosen)
        gradients = torch.autograd.grad(loss, [*source, layer_mix, head_mix, dim_proj, bias])
        return [loss.detach(), *gradients]

    oracle = run(torch.float64, "cpu", "reference")
    found = run(torch.float32, device, impl)
    pairs = zip(found, oracle, strict=True)
    return max(float((a.cpu().double() - b).abs().max() / b.abs().max()) for a, b in pairs)


def check_kernel(*, seconds: float = 300.0) -> list[Finding]:
    """Run the comparison in a process of its own: a kernel can take its process down."""
    import torch

    cuda = torch.cuda.is_available()
    triton = importlib.util.find_spec("triton") is not None
    environment = dict(os.environ)
    if triton:
        impl, device, how = "triton", "cuda" if cuda else "cpu", "on the GPU" if cuda else "interpreted on the CPU"
        if not cuda:
            environment["TRITON_INTERPRET"] = "1"
    else:
        impl, device, how = "lean", "cuda" if cuda else "cpu", "on the GPU" if cuda else "on the CPU"
    status, said = run_bounded([sys.executable, "-c", _SCRIPT, impl, device], seconds=seconds, environment=environment)
    subject = "kernel"
    if status != 0:
        text = f"{impl} {how} failed: {last_line(said, 'no reason given')}"
        if not cuda and triton:  # the interpreter is for tests; no run uses it
            return [Finding("warning", subject, text, "none needed for training on the CPU, which does not use triton")]
        return [Finding("fault", subject, text, "a triton and a driver that fit torch; until then --impl reference")]
    error = json.loads(last_line(said, "null"))
    text = f"{impl} {how}: within {error:.1e} of the oracle"
    if not error < _BOUND:
        return [Finding("fault", subject, text, "--impl reference, and report this with the versions above")]
    if cuda and not triton:
        return [Finding("warning", subject, f"{text}; triton is not installed", "pip install triton: one fast pass")]
    return [Finding("ok", subject, text + ("" if triton else "; triton kernel skipped: no GPU and no triton here"))]
