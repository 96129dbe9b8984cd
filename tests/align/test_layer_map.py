"""Depth maps keep the ends, round half up, and learned mixes start near the diagonal."""

import itertools
import math

import pytest
import torch

from kvds.align.layer_map import endpoint_map, last_aligned_map, near_diagonal_logits


def test_endpoint_map_of_known_pairs():
    assert endpoint_map(3, 4) == [0, 2, 3]
    assert endpoint_map(4, 4) == [0, 1, 2, 3]
    assert endpoint_map(4, 2) == [0, 0, 1, 1]
    assert endpoint_map(2, 7) == [0, 6]
    # 24 layers of 28, Qwen2-0.5B and 1.5B: i * 27 / 23, half up.
    assert endpoint_map(24, 28)[:8] == [0, 1, 2, 4, 5, 6, 7, 8]
    assert endpoint_map(1, 5) == [4]


def test_endpoint_map_rounds_half_up():
    # i * 5 / 2 and i * 3 / 6: the halves go up, where round() would take 2.5 to 2 and 0.5 to 0.
    assert endpoint_map(3, 6) == [0, 3, 5]
    assert endpoint_map(7, 4) == [0, 1, 1, 2, 2, 3, 3]


def test_endpoint_map_keeps_ends_and_order():
    for students, teachers in itertools.product(range(2, 34), range(1, 34)):
        layers = endpoint_map(students, teachers)
        assert layers[0] == 0 and layers[-1] == teachers - 1 and layers == sorted(layers)
        for i, layer in enumerate(layers):
            assert layer == math.floor(i * (teachers - 1) / (students - 1) + 0.5 + 1e-9)


def test_last_aligned_map_counts_from_the_top():
    assert last_aligned_map(3, 5) == [2, 3, 4]
    assert last_aligned_map(3, 3) == [0, 1, 2]
    assert last_aligned_map(4, 2) == [0, 0, 0, 1]


def test_near_diagonal_mix_weighs_the_layer_of_the_same_depth_most():
    mix = near_diagonal_logits(5, 5).softmax(1)
    assert mix.argmax(1).tolist() == [0, 1, 2, 3, 4]
    # One layer off loses a factor e², so the middle row is 1 / (1 + 2 e⁻² + 2 e⁻⁴).
    assert mix[2, 2].item() == pytest.approx(1 / (1 + 2 * math.exp(-2) + 2 * math.exp(-4)))
    assert near_diagonal_logits(28, 24).argmax(1)[[0, -1]].tolist() == [0, 23]
    assert near_diagonal_logits(1, 3).argmax(1).tolist() == [2]
    halfway = near_diagonal_logits(3, 2).softmax(1)[1]
    torch.testing.assert_close(halfway, torch.tensor([0.5, 0.5]))
