"""Random problems for the operation, and the outputs of an implementation for them."""

import torch

from kvds.ops import map_projection_loss

LEAVES = ("source", "target", "layer_mix", "head_mix", "dim_proj", "bias")


def make(
    layers: tuple[int, int] = (3, 2),
    heads: tuple[int, int] = (2, 3),
    dims: tuple[int, int] = (5, 4),
    batch: int = 2,
    tokens: int = 7,
    slots: int | None = None,
    dim_form: int = 4,
    head_form: int = 2,
    sparse: str = "dense",
    masked: float = 0.3,
    layout: str = "contiguous",
    weighted: bool = False,
    seed: int = 0,
) -> dict:
    """A random problem in fp64.

    ``layout`` is that of the states: ``contiguous``, ``captured`` (strides ``[T·H·D, D, H·D, 1]``, of captured keys)
    or ``inside`` (heads, every second token and dimensions in the middle of a larger tensor full of NaN).
    """
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def states(count: int, n_heads: int, dim: int) -> list[torch.Tensor]:
        made = [rand(batch, n_heads, tokens, dim) for _ in range(count)]
        if layout == "captured":
            return [t.transpose(1, 2).contiguous().transpose(1, 2) for t in made]
        if layout == "inside":
            around = [t.new_full((batch, n_heads + 2, 2 * tokens, dim + 3), float("nan")) for t in made]
            views = [t[:, 1 : 1 + n_heads, ::2, 2 : 2 + dim] for t in around]
            return [view.copy_(t) for view, t in zip(views, made, strict=True)]
        return made

    (lx, ly), (hx, hy), (dx, dy) = layers, heads, dims
    if sparse == "pairs":
        lx = ly
    mix = {"dense": rand(ly, lx), "pairs": rand(ly), "layers": torch.randint(lx, (ly,), generator=g)}[sparse]
    problem = {
        "source": states(lx, hx, dx),
        "target": states(ly, hy, dy),
        "layer_mix": mix,
        "head_mix": rand(*(ly,)[: head_form - 2], hy, hx),
        "dim_proj": rand(*(ly, hy)[: dim_form - 2], dx, dy),
        "bias": rand(ly, hy, dy),
        "scale": rand(ly).abs() + 0.5,
    }
    count = tokens
    if slots is not None:
        count = slots
        for name in ("source_index", "target_index"):
            order = [torch.randperm(tokens, generator=g)[:slots].sort().values for _ in range(batch)]
            problem[name] = torch.stack(order)
    if masked:
        problem["mask"] = torch.rand(batch, count, generator=g) >= masked
    if weighted:
        problem["weight"] = 3 * torch.rand(batch, count, generator=g, dtype=torch.float64)
    return problem


def leaf(value: torch.Tensor, dtype: torch.dtype, gradient: bool = True) -> torch.Tensor:
    """``value`` as a leaf with the same strides."""
    if not value.is_floating_point():
        return value
    value = value.detach()
    if value.dtype != dtype:
        value = torch.empty_strided(value.shape, value.stride(), dtype=dtype).copy_(value)
    return value.requires_grad_(gradient)


def run(
    problem: dict,
    impl: str,
    dtype: torch.dtype,
    loss: str = "mse",
    upstream: float = 1.0,
    moves: tuple[str, ...] = LEAVES,
) -> dict:
    """Losses and the gradients of whatever ``moves``, in fp64."""
    p = dict(problem)
    for name in LEAVES:
        if isinstance(p.get(name), list):
            p[name] = [leaf(v, dtype, name in moves) for v in p[name]]
        elif p.get(name) is not None:
            p[name] = leaf(p[name], dtype, name in moves)
    total, per_layer = map_projection_loss(**p, loss=loss, impl=impl)
    out = {"loss": total.detach(), "per_layer": per_layer}
    assert not per_layer.requires_grad
    leaves = {
        f"{name}.{i}": t
        for name in LEAVES
        for i, t in enumerate(p[name] if isinstance(p.get(name), list) else [p.get(name)])
        if t is not None and t.requires_grad
    }
    assert total.requires_grad == bool(leaves)
    if leaves:
        (total * upstream).backward()
    # A layer that a sparse map does not name has no gradient, or zeros.
    out |= {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items()}
    return {k: v.double() for k, v in out.items()}


def assert_same(got: dict, want: dict, tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, expected in want.items():
        error = (got[name] - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error <= tolerance, f"{name}: {error:.2e}"
