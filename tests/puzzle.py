"""A second looped model, as unlike RMS-E as the `LoopModel` protocol allows: it solves a board instead of writing text.

After TRM (Jolicoeur-Martineau 2025, arXiv 2510.04871): a fixed board of cells, two latents (z_l reasons, z_h holds the
answer) refined in turn by one small network that mixes all cells, so nothing is causal. No context, no state, nothing
emitted, no commit; h is z_h, and one flag, read off z_h's first cell, stops the whole board.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rmse_edge.errors import ConfigError
from rmse_edge.loop.contract import LoopSpec, Tensors, TensorSpec

CELLS, SYMBOLS, DIMS, MAX_LOOPS = 16, 5, 32, 8


class Mixer(nn.Module):
    """One layer: across cells, then across channels."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.Linear(CELLS, CELLS)
        self.up = nn.Linear(DIMS, 2 * DIMS)
        self.down = nn.Linear(2 * DIMS, DIMS)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.cells(x.transpose(1, 2)).transpose(1, 2)  # (1, cells, d)
        x = x + self.down(torch.relu(self.up(x)))
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Puzzle(nn.Module):
    """The board solver as a `LoopModel`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, DIMS)
        self.place = nn.Parameter(torch.randn(CELLS, DIMS))
        self.first_h = nn.Parameter(torch.randn(DIMS))
        self.first_l = nn.Parameter(torch.randn(DIMS))
        self.network = nn.Sequential(Mixer(), Mixer())  # shared by both latents and all iterations
        self.halt = nn.Linear(DIMS, 1)
        nn.init.normal_(self.halt.weight, std=10 * DIMS**-0.5)  # decisive, so that random boards stop at many depths
        self.answer = nn.Linear(DIMS, SYMBOLS)

    def spec(self, chunk: int) -> LoopSpec:
        if chunk != CELLS:
            raise ConfigError(f"chunk: got {chunk}, expected the whole board ({CELLS} cells)")
        latent = (1, CELLS, DIMS)
        return LoopSpec(
            chunk=chunk,
            max_loops=MAX_LOOPS,
            inputs=(TensorSpec("board", (1, CELLS), torch.int64),),
            prelude=(TensorSpec("x", latent),),
            h=TensorSpec("h", latent),
            active=TensorSpec("active", (1,), torch.bool),
            carry=(TensorSpec("z_l", latent),),
            head=(TensorSpec("symbols", (1, CELLS, SYMBOLS)),),
            dials=("max_loops", "min_loops", "exit_threshold"),
            ids={"board": SYMBOLS},
        )

    def call_sizes(self) -> tuple[int, ...]:
        return (CELLS,)

    def prelude(self, tensors: Tensors) -> Tensors:
        return {"x": self.embed(tensors["board"]) + self.place}

    def begin(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        x = tensors["x"]
        carry = {
            "h": self.first_h.expand_as(x).clone(),
            "z_l": self.first_l.expand_as(x).clone(),
            "active": torch.ones_like(x[:, 0, 0], dtype=torch.bool),
        }
        return carry, {}

    def step(self, k: Tensor, carry: Tensors, past: Tensors, fixed: Tensors, dials: Tensors) -> tuple[Tensors, Tensors]:
        z_h, z_l, active = carry["h"], carry["z_l"], carry["active"]
        reasoned = self.network(z_l + z_h + fixed["x"])
        answered = self.network(z_h + reasoned)
        stop = torch.sigmoid(self.halt(answered[:, 0])).squeeze(-1) >= dials["exit_threshold"]
        keep = active[:, None, None]
        new = {
            "h": torch.where(keep, answered, z_h),
            "z_l": torch.where(keep, reasoned, z_l),
            "active": active & ~(stop & (k + 1 >= dials["min_loops"])),
        }
        return new, {}

    def head(self, h: Tensor) -> Tensors:
        return {"symbols": self.answer(h)}

    def commit(self, tensors: Tensors) -> Tensors:
        raise NotImplementedError("a board leaves nothing behind")
