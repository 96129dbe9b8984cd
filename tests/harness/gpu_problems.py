"""Problems of the fused operation on a GPU: inputs, a run of any implementation, errors against the oracle in fp64.

An *error* is ``‖got − oracle‖ / ‖oracle‖`` (Frobenius) of one output.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator

import pytest
import torch

from kvds.ops import map_projection_loss


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    """Roles of a kernel that wait for one another for ever keep the interpreter in a call from which no signal and no
    other thread of Python gets it: faulthandler's own thread ends the process."""
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


MAPS = ("layer_mix", "head_mix", "dim_proj", "bias")
FROBENIUS = 5e-3
"""The largest error of any output in bf16 and fp16."""

# (layers, KV heads, head_dim) of the student, then of the teacher.
PAIRS = {
    "qwen2": ((24, 2, 64), (28, 2, 128)),
    "mha": ((16, 16, 64), (32, 32, 128)),
    "gqa": ((32, 8, 64), (80, 8, 128)),
}


def make(
    source: tuple[int, int, int],
    target: tuple[int, int, int],
    dtype: torch.dtype = torch.bfloat16,
    *,
    batch: int = 2,
    tokens: int = 150,
    slots: int | None = 131,
    masked: float = 0.3,
    sparse: bool = False,
    head_form: int = 3,
    dim_form: int = 4,
    token_major: bool = True,
    bias: bool = True,
    scale: bool = True,
    seed: int = 0,
) -> dict:
    """A random problem on the GPU; by default as the structured aligner asks it, with the strides of captured keys."""
    g = torch.Generator("cuda").manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device="cuda")

    def states(layers: int, heads: int, dim: int) -> list[torch.Tensor]:
        if token_major:
            return [rand(batch, tokens, heads, dim).to(dtype).transpose(1, 2) for _ in range(layers)]
        return [rand(batch, heads, tokens, dim).to(dtype) for _ in range(layers)]

    (lx, hx, dx), (ly, hy, dy) = source, target
    problem = {"source": states(lx, hx, dx), "target": states(ly, hy, dy)}
    if sparse:  # an endpoint map: one source layer for each target layer
        problem["source"] = [problem["source"][(i * (lx - 1) * 2 + ly - 1) // (2 * max(ly - 1, 1))] for i in range(ly)]
        problem["layer_mix"] = 1 + 0.1 * rand(ly)
    else:
        problem["layer_mix"] = torch.softmax(rand(ly, lx), 1)
    problem["head_mix"] = rand(*(ly,)[: head_form - 2], hy, hx) / hx**0.5
    problem["dim_proj"] = rand(*(ly, hy)[: dim_form - 2], dx, dy) / dx**0.5
    if bias:
        problem["bias"] = rand(ly, hy, dy)
    if scale:
        problem["scale"] = rand(ly).abs() + 0.5
    if slots is not None:
        order = torch.rand(batch, tokens, generator=g, device="cuda").argsort(1)
        problem["source_index"] = problem["target_index"] = order[:, :slots].sort(1).values
    if masked:
        problem["mask"] = torch.rand(batch, slots or tokens, generator=g, device="cuda") >= masked
    return problem


def run(
    problem: dict, impl: str, *, wide: bool = False, moves: str = "source", loss: str = "mse", upstream: float = 1.0
) -> dict[str, torch.Tensor]:
    """Losses, and the gradients of the side that ``moves`` and of all maps. ``wide`` casts everything to fp64."""

    def leaf(value: torch.Tensor) -> torch.Tensor:
        return (value.detach().double() if wide else value.detach()).requires_grad_()

    p = dict(problem)
    if wide:
        p |= {side: [t.double() for t in problem[side]] for side in ("source", "target")}
        p |= {"scale": problem["scale"].double()} if "scale" in problem else {}
    sides = [side for side in ("source", "target") if moves in (side, "both")]
    p |= {side: [leaf(t) for t in problem[side]] for side in sides}
    moving = [t for side in sides for t in p[side]]
    maps = {name: leaf(problem[name]) for name in MAPS if name in problem}
    total, per_layer = map_projection_loss(**(p | maps), loss=loss, impl=impl)
    gradients = torch.autograd.grad(total * upstream, [*moving, *maps.values()])
    # One output: a scalar's error can be zero by luck, in one implementation and not in the other.
    out = {"losses": torch.cat([total.detach()[None], per_layer])}
    states = iter(gradients)
    out |= {side: torch.stack([next(states) for _ in p[side]]) for side in sides}
    return out | dict(zip(maps, gradients[len(moving) :], strict=True))


def errors(got: dict[str, torch.Tensor], oracle: dict[str, torch.Tensor]) -> dict[str, float]:
    assert got.keys() == oracle.keys()
    return {
        name: float((got[name].double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
        for name, want in oracle.items()
    }


def assert_rounds_like_eager(problem: dict, frobenius: float | None = FROBENIUS, **how: object) -> None:
    """Every output: at most twice eager's error in the same dtype, plus 1e-5; and within ``frobenius``."""
    oracle = run(problem, "reference", wide=True, **how)  # type: ignore[arg-type]
    eager = errors(run(problem, "reference", **how), oracle)  # type: ignore[arg-type]
    found = errors(run(problem, "triton", **how), oracle)  # type: ignore[arg-type]
    table = "\n".join(f"{name}: triton {found[name]:.2e}, eager {eager[name]:.2e}" for name in found)
    print(table)
    assert all(found[name] <= 2 * eager[name] + 1e-5 for name in found), table
    assert frobenius is None or all(error <= frobenius for error in found.values()), table


# fp16 keeps 6e-8 at least: gradients of a mean over millions of elements need the loss scale that training has.
SCALED = {torch.bfloat16: 1.0, torch.float16: 2.0**20, torch.float32: 1.0}
