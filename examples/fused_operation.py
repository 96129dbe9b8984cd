"""The fused operation alone, loss and gradients against its reference: python examples/fused_operation.py."""

import torch

from kvds.ops import map_projection_loss

batch, tokens, layers, heads, width = 2, 64, (6, 4), (2, 2), (64, 32)  # of the student, then of the teacher
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)


def keys(side, grad):
    shape = (batch, heads[side], tokens, width[side])
    return [torch.randn(shape, device=device, requires_grad=grad) for _ in range(layers[side])]


student, teacher = keys(0, True), keys(1, False)
maps = {  # which layers and heads of the student each of the teacher's draws from, and its dimensions
    "layer_mix": torch.full((layers[1], layers[0]), 1 / layers[0], device=device, requires_grad=True),
    "head_mix": torch.eye(heads[1], heads[0], device=device, requires_grad=True),
    "dim_proj": torch.randn(layers[1], width[0], width[1], device=device).div(width[0] ** 0.5).requires_grad_(),
}
mask = torch.ones(batch, tokens, dtype=torch.bool, device=device)
mask[:, 0] = False  # the first token is an attention sink
leaves = [*student, *maps.values()]
results = {}
for impl in ("reference", "auto"):
    loss, of_layers = map_projection_loss(student, teacher, **maps, mask=mask, impl=impl)
    results[impl] = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    print(impl, float(loss.detach()), "by layer", [round(value, 3) for value in of_layers.tolist()])
for fast, slow in zip(results["auto"], results["reference"], strict=True):
    torch.testing.assert_close(fast, slow, rtol=2e-3, atol=2e-4)
print("same loss, same gradients")
