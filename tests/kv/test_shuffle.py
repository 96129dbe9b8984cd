"""The control that gives each row another row's keys and values: who gets whose, and which position."""

import torch

from kvds.kv import KVStates, shuffled_states


def labelled(lengths: list[int], width: int, layers: int = 2) -> tuple[KVStates, torch.Tensor]:
    """States whose every number says layer, row and token (100 · layer + 10 · row + token), keys negative."""
    rows, tokens = torch.arange(len(lengths)), torch.arange(width)
    base = (10 * rows[:, None] + tokens)[:, None, :, None].expand(-1, 3, -1, 2)  # [B, H, T, D]
    values = tuple((100 * layer + base).double() for layer in range(layers))
    mask = (tokens < torch.tensor(lengths)[:, None]).long()
    return KVStates(tuple(-v for v in values), values), mask


def test_rows_of_one_length_exchange_whole_rows_in_a_ring():
    states, mask = labelled([4, 4, 4], width=4)
    shuffled = shuffled_states(states, mask, torch.ones(3, dtype=torch.bool))
    for layer in range(2):
        torch.testing.assert_close(shuffled.values[layer], states.values[layer][[1, 2, 0]])
        torch.testing.assert_close(shuffled.keys[layer], -shuffled.values[layer])


def test_partner_is_the_next_longer_row_and_positions_keep_their_relative_place():
    # In order of length: row 1 (2 tokens), row 2 (3), row 0 (4), then around.
    states, mask = labelled([4, 2, 3], width=5)
    values = shuffled_states(states, mask, torch.ones(3, dtype=torch.bool)).values[0][:, 0, :, 0]
    assert values[1, :2].tolist() == [20, 21]  # floor(t · 3 / 2) = 0, 1
    assert values[2, :3].tolist() == [0, 1, 2]  # floor(t · 4 / 3)
    assert values[0, :4].tolist() == [10, 10, 11, 11]  # floor(t · 2 / 4)


def test_no_real_token_faces_padding_or_its_own_row():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (7,), generator=generator).tolist()
    states, mask = labelled(lengths, width=9)
    values = shuffled_states(states, mask, torch.ones(7, dtype=torch.bool)).values[0][:, 0, :, 0]
    for row, length in enumerate(lengths):
        partners = {int(number) // 10 for number in values[row, :length]}
        assert len(partners) == 1 and row not in partners
        assert all(number % 10 < lengths[partners.copy().pop()] for number in values[row, :length].tolist())


def test_rows_of_padding_keep_their_own_and_a_row_alone_gets_nothing():
    states, mask = labelled([3, 1, 3, 1], width=3)
    real = torch.tensor([True, False, True, False])
    values = shuffled_states(states, mask, real).values[0][:, 0, :, 0]
    assert values[0].tolist() == [20, 21, 22] and values[2].tolist() == [0, 1, 2]
    assert values[1, 0] == 10 and values[3, 0] == 30
    alone = shuffled_states(states, mask, torch.tensor([True, False, False, False]))
    assert not alone.values[0].any() and not alone.keys[1].any()
