"""R² and spectra equal numpy's on planted maps."""

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from kvds.align import build_aligner
from kvds.align.explained_variance import ExplainedVariance
from kvds.align.figures import save_spectra
from kvds.align.fitting import fit_aligner
from kvds.align.spectrum import map_spectra
from kvds.kv import HiddenStates, KVShape, KVStates, Selection
from tests.harness.kv_settings import both_parts

STUDENT, TEACHER = KVShape(2, 2, 3, 2, 5), KVShape(2, 2, 4, 2, 6)


def random_states(shape: KVShape, seed: int, kind=KVStates):
    generator = torch.Generator().manual_seed(seed)
    heads, dim = (shape.num_key_value_heads, shape.head_dim) if kind is KVStates else (1, shape.hidden_size)

    def layers():
        size = 3, 40, heads, dim
        made = [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(shape.num_hidden_layers)]
        return tuple((2 + (i + 1) * layer).transpose(1, 2) for i, layer in enumerate(made))

    return kind(*(layers() for _ in kind._fields))


MASK = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) > 0.3


@pytest.mark.parametrize("kv_loss", ["mse", "l1"])
@pytest.mark.parametrize("mode", ["flat", "structured", "hidden"])
def test_r2_equals_numpys_over_batches(mode, kv_loss):
    kind = HiddenStates if mode == "hidden" else KVStates
    settings = both_parts(alignment_mode=mode, layer_map="endpoint", map_start="ridge", kv_loss=kv_loss)
    aligner = build_aligner(STUDENT, TEACHER, settings).double()
    student, noise = random_states(STUDENT, 1, kind), random_states(TEACHER, 2, kind)
    # A teacher that is the student mapped, and noise of another size per layer.
    generator = torch.Generator().manual_seed(3)

    def mapped(x, n, size):
        width = x.shape[1] * x.shape[3], n.shape[1] * n.shape[3]
        matrix = torch.randn(width, generator=generator, dtype=torch.float64)
        rows = x.transpose(1, 2).flatten(2) @ matrix
        return (rows.unflatten(2, n.shape[1::2]).transpose(1, 2) + size * n).detach()

    teacher = kind(
        *(tuple(mapped(x, n, (i + 1) ** 2) for i, (x, n) in enumerate(zip(a, b, strict=True)))
          for a, b in zip(student, noise, strict=True))
    )  # fmt: skip
    fit_aligner(aligner, [(student, teacher, Selection(None, MASK))])
    explained = ExplainedVariance(aligner)
    for b in range(3):
        one = [kind(*(tuple(layer[b : b + 1] for layer in part) for part in side)) for side in (student, teacher)]
        explained.update(*one, Selection(None, MASK[b : b + 1]))
    explained.update(*one, Selection(None, torch.zeros(1, 40, dtype=torch.bool)))
    found = explained.result()
    assert list(found) == list(aligner.parts) and aligner.parts[next(iter(found))].loss_name == kv_loss
    whole = aligner(student, teacher, Selection(None, MASK))
    for name, part in aligner.parts.items():
        for i, (x, y) in enumerate(zip(getattr(student, f"{name}s"), getattr(teacher, f"{name}s"), strict=True)):
            rows = (side.transpose(1, 2)[MASK][None].expand(2, -1, -1, -1) for side in (x, y))
            source, target = (part.source_rows(r) if s == 0 else part.target_rows(r) for s, r in enumerate(rows))
            source, target = source[i], target[i]  # [maps, N, width]
            matrix = part.projection[i] if part.projection[i].dim() == 3 else part.projection[i][None]
            bias, mean = (b.reshape(len(matrix), 1, -1) for b in (part.bias[i], part.target_mean[i]))
            projected = part.target_scale[i] * (source / part.source_scale[i] @ matrix + bias) + mean
            residual = (projected - target).detach().numpy()
            varied = target.numpy() - target.numpy().mean(1, keepdims=True)
            np.testing.assert_allclose(found[name]["r2"][i], 1 - (residual**2).sum() / (varied**2).sum(), rtol=1e-9)
        if name != "hidden_state":
            layers = whole.key_layers if name == "key" else whole.value_layers
            np.testing.assert_allclose(found[name]["loss"], layers.numpy(), rtol=1e-9)
    assert 0 < found[name]["r2"][1] < found[name]["r2"][0] < 1


def test_a_perfect_map_explains_all_and_a_constant_nothing():
    shape = KVShape(2, 1, 4, 1)
    student = random_states(shape, 1)
    aligner = build_aligner(shape, shape, both_parts(alignment_mode="flat", map_start="ridge")).double()
    teacher = KVStates(tuple(3 * k + 1 for k in student.keys), student.values)
    fit_aligner(aligner, [(student, teacher, Selection(None, MASK))])
    explained = ExplainedVariance(aligner)
    explained.update(student, teacher, Selection(None, MASK))
    assert min(explained.result()["key"]["r2"]) > 0.999
    with torch.no_grad():
        aligner.parts["key"].weight.zero_()
        aligner.parts["key"].bias.zero_()
    explained = ExplainedVariance(aligner)
    explained.update(student, teacher, Selection(None, MASK))
    assert explained.result()["key"]["r2"] == pytest.approx([0, 0], abs=1e-9)
    assert ExplainedVariance(aligner).result() == {}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("maps", [2, 9])
def test_spectra_of_maps_of_nothing_are_drawn(maps, tmp_path):
    nothing = {"value": {"singular_values": [[0.0] * 3] * maps, "directions": [0.0] * maps}}
    assert imread(save_spectra(nothing, tmp_path / "spectra.png")).std() > 0.02


@pytest.mark.parametrize("share", [False, True])
def test_spectra_are_the_singular_values_of_every_map(share):
    aligner = build_aligner(STUDENT, TEACHER, both_parts(map_proj_share_dim=share, kv_parts="k"))
    projection = aligner.parts["key"].dim_proj
    with torch.no_grad():
        projection.mul_(torch.tensor([3.0, 1.0, 0.0])[:, None])
    found = map_spectra(aligner)["key"]
    assert np.array(found["singular_values"]).shape == ((1, 3) if share else (2 * 2, 3))
    # The start has orthonormal rows: what multiplies them are the singular values.
    np.testing.assert_allclose(found["singular_values"], [[3, 1, 0]] * len(found["directions"]), atol=1e-6)
    entropy = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    np.testing.assert_allclose(found["directions"], [np.exp(entropy)] * len(found["directions"]), rtol=1e-5)
    assert map_spectra(build_aligner(STUDENT, TEACHER, both_parts(alignment_mode="relation"))) == {}
