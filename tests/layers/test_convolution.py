"""Short convolutions in calls: rings of any state, rows of a batch at different positions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rmse_edge.layers.convolution import DynamicShortConvolution, ShortConvolution, ring_order
from rmse_edge.layers.masks import ring_positions

SIZE, GROUPS, WIDE, COUNT = 4, 2, 3, 11


def convolution(dynamic: bool) -> nn.Module:
    torch.manual_seed(0)
    made = DynamicShortConvolution(GROUPS * WIDE, SIZE, 5, GROUPS) if dynamic else ShortConvolution(GROUPS * WIDE, SIZE)
    for p in made.parameters():
        nn.init.normal_(p)
    return made


@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_a_text_may_be_cut_anywhere(dynamic: bool) -> None:
    """What lies in the ring before the text begins does not matter, and rows of a batch may stand apart."""
    made = convolution(dynamic)
    x, read = torch.randn(1, GROUPS, COUNT, WIDE), torch.randn(1, COUNT, 5)
    none = torch.zeros(1, GROUPS, SIZE - 1, WIDE)
    whole = made(x, none, read)
    for cut in range(1, COUNT):
        ring = torch.full((2, GROUPS, SIZE - 1, WIDE), 7.0)  # of two rows: one begins here, the other goes on
        for p in range(cut):
            ring[1, :, p % (SIZE - 1)] = x[0, :, p]
        past = ring_order(torch.tensor([0, cut]), SIZE - 1).unsqueeze(1) @ ring
        rest = COUNT - cut
        both = torch.cat([x[:, :, :rest], x[:, :, cut:]]), torch.cat([read[:, :rest], read[:, cut:]])
        found = made(both[0], past, both[1])
        torch.testing.assert_close(found[0], whole[0, :, :rest])
        torch.testing.assert_close(found[1], whole[0, :, cut:])


@torch.no_grad()
def test_weights_of_a_channel_are_those_of_conv1d() -> None:
    made = convolution(False)
    x = torch.randn(1, GROUPS, COUNT, WIDE)
    flat = x.transpose(1, 2).flatten(2).transpose(1, 2)  # (1, channels, C)
    padded = nn.functional.pad(flat, (SIZE - 1, 0))
    expected = (made.conv1d(padded) + flat) * (SIZE + 1) ** -0.5
    found = made(x, torch.zeros(1, GROUPS, SIZE - 1, WIDE), x)
    torch.testing.assert_close(found.transpose(1, 2).flatten(2).transpose(1, 2), expected)


def test_which_position_a_slot_holds() -> None:
    assert ring_positions(torch.tensor([0, 2, 7]), 3).tolist() == [[-3, -2, -1], [0, 1, -1], [6, 4, 5]]
