"""The oracle against its equation written as loops, and what the public functions refuse."""

import re

import pytest
import torch

from kvds.errors import InputError
from kvds.ops import compiled, map_projection, map_projection_loss, reference

PENALTIES = {
    "mse": lambda r: r * r,
    "l1": abs,
    "smooth_l1": lambda r: 0.5 * r * r if abs(r) < 1 else abs(r) - 0.5,
}


def small_problem(seed: int = 0, per_layer_heads: bool = False, dim_form: int = 2) -> dict:
    """L_x=3 H_x=2 D_x=4 to L_y=2 H_y=3 D_y=5, B=2, T=4, M=3."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "source": [rand(2, 2, 4, 4) for _ in range(3)],
        "target": [rand(2, 3, 4, 5) for _ in range(2)],
        "layer_mix": rand(2, 3),
        "head_mix": rand(*((2,) if per_layer_heads else ()), 3, 2),
        "dim_proj": rand(*(2, 3)[: dim_form - 2], 4, 5),
        "bias": rand(2, 3, 5),
        "source_index": torch.tensor([[0, 2, 3], [1, 2, 3]]),
        "target_index": torch.tensor([[0, 1, 3], [0, 1, 2]]),
        "mask": torch.tensor([[True, True, False], [False, True, True]]),
        "scale": torch.tensor([0.5, 2.0], dtype=torch.float64),
    }


def projected_by_loops(p: dict) -> torch.Tensor:
    head = p["head_mix"] if p["head_mix"].dim() == 3 else p["head_mix"].expand(2, 3, 2)
    dim = p["dim_proj"]
    dim = {2: dim, 3: dim[:, None] if dim.dim() == 3 else dim, 4: dim}[dim.dim()].expand(2, 3, 4, 5)
    out = torch.zeros(2, 2, 3, 3, 5, dtype=torch.float64)
    for i in range(2):
        for b in range(2):
            for j in range(3):
                for m in range(3):
                    row = p["bias"][i, j].clone()
                    for layer in range(3):
                        for h in range(2):
                            x = p["source"][layer][b, h, p["source_index"][b, m]]
                            row += p["layer_mix"][i, layer] * head[i, j, h] * (x @ dim[i, j])
                    out[i, b, j, m] = row
    return out


@pytest.mark.parametrize("dim_form", [2, 3, 4])
@pytest.mark.parametrize("per_layer_heads", [False, True])
def test_projection_is_its_equation(per_layer_heads: bool, dim_form: int) -> None:
    p = small_problem(per_layer_heads=per_layer_heads, dim_form=dim_form)
    got = map_projection(
        p["source"], p["layer_mix"], p["head_mix"], p["dim_proj"], bias=p["bias"], source_index=p["source_index"]
    )
    assert torch.allclose(got, projected_by_loops(p), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss", ["mse", "l1", "smooth_l1"])
@pytest.mark.parametrize("impl", ["reference", "lean"])
def test_loss_is_the_mean_over_what_counts(impl: str, loss: str, weighted: bool) -> None:
    p = small_problem(1)
    weight = torch.tensor([[0.25, 3.0, 7.0], [9.0, 0.0, 1.5]], dtype=torch.float64)
    p |= {"weight": weight} if weighted else {}
    projected = projected_by_loops(p)
    expected = []
    for i in range(2):
        terms = []
        for b in range(2):
            for m in range(3):
                if p["mask"][b, m]:
                    wanted = p["target"][i][b, :, p["target_index"][b, m]]
                    residual = (projected[i, b, :, m] - wanted) / p["scale"][i]
                    factor = float(weight[b, m]) if weighted else 1.0
                    terms += [factor * PENALTIES[loss](r) for r in residual.flatten().tolist()]
        assert len(terms) == 4 * 3 * 5
        expected.append(sum(terms) / len(terms))
    total, per_layer = map_projection_loss(**p, loss=loss, impl=impl)
    assert per_layer.tolist() == pytest.approx(expected, rel=1e-12)
    assert total.item() == pytest.approx(sum(expected) / 2, rel=1e-12)


def test_sparse_forms_are_the_dense_map_they_stand_for() -> None:
    p = small_problem(2)
    chosen = torch.tensor([2, 2])
    dense = torch.zeros(2, 3, dtype=torch.float64)
    dense[torch.arange(2), chosen] = 1
    for impl in ("reference", "lean"):
        expected, _ = map_projection_loss(**(p | {"layer_mix": dense}), impl=impl)
        by_layers, _ = map_projection_loss(**(p | {"layer_mix": chosen}), impl=impl)
        weights = torch.tensor([0.5, -3.0], dtype=torch.float64)
        pairs = {"source": [p["source"][2], p["source"][2]], "layer_mix": weights}
        by_weights, _ = map_projection_loss(**(p | pairs), impl=impl)
        weighted, _ = map_projection_loss(**(p | {"layer_mix": dense * weights[:, None]}), impl=impl)
        assert by_layers.item() == pytest.approx(expected.item(), rel=1e-12)
        assert by_weights.item() == pytest.approx(weighted.item(), rel=1e-12)
    projection = map_projection(p["source"], chosen, p["head_mix"], p["dim_proj"])
    assert torch.allclose(projection, map_projection(p["source"], dense, p["head_mix"], p["dim_proj"]), rtol=1e-12)


def test_oracle_passes_gradcheck() -> None:
    p = small_problem(3, per_layer_heads=True, dim_form=4)
    leaves = [*p["source"], *p["target"], p["layer_mix"], p["head_mix"], p["dim_proj"], p["bias"]]

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        names = dict(zip(("layer_mix", "head_mix", "dim_proj", "bias"), tensors[5:], strict=True))
        return map_projection_loss(**(p | {"source": tensors[:3], "target": tensors[3:5]} | names), impl="reference")[0]

    assert torch.autograd.gradcheck(run, [leaf.requires_grad_() for leaf in leaves], fast_mode=True)


def test_compile_traces_the_oracle_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without code generation, which takes minutes on a small machine; the GPU tests generate code.
    traced = torch.compile(reference.map_projection_loss_reference, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(compiled, "map_projection_loss_compiled", traced)
    p = small_problem(4)
    p["layer_mix"].requires_grad_()
    expected = torch.autograd.grad(map_projection_loss(**p, impl="reference")[0], p["layer_mix"])[0]
    got = torch.autograd.grad(map_projection_loss(**p, impl="compile")[0], p["layer_mix"])[0]
    assert torch.allclose(got, expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"source": []}, "source: expected at least one layer"),
        ({"source": [torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 5, 4)]}, "source: expected layers of one shape"),
        ({"layer_mix": torch.zeros(2, 4)}, "layer_mix"),
        ({"layer_mix": torch.tensor([0, 3])}, "layer_mix"),
        ({"head_mix": torch.zeros(3, 5)}, "head_mix"),
        ({"dim_proj": torch.zeros(5, 5)}, "dim_proj"),
        ({"bias": torch.zeros(2, 3, 4)}, "bias"),
        ({"target": [torch.zeros(2, 3, 4, 5)]}, "target"),
        ({"source_index": torch.zeros(3, 3, dtype=torch.int64)}, "source_index"),
        ({"target_index": torch.zeros(2, 3)}, "target_index: expected int64"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, "mask"),
        ({"mask": torch.ones(2, 3)}, "mask: expected bool"),
        ({"scale": torch.ones(3)}, "scale"),
        ({"weight": torch.ones(2, 4)}, "weight: expected floating (2, 3)"),
        ({"weight": torch.ones(2, 3, dtype=torch.bool)}, "weight: expected floating"),
        ({"weight": torch.ones(2, 3), "impl": "triton"}, "impl=triton: its kernel takes no weights of positions"),
        ({"loss": "cosine"}, "loss=cosine: expected one of mse, l1, smooth_l1"),
        ({"impl": "fast"}, "impl=fast: expected one of auto, reference"),
    ],
)
def test_what_does_not_fit_is_named(change: dict, says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        map_projection_loss(**(small_problem() | change))
