"""A second looped model, as unlike RMS-E as the `LoopModel` protocol allows: it solves a board instead of writing text.

After TRM (Jolicoeur-Martineau 2025, arXiv 2510.04871): a fixed board of cells, two latents (z_l reasons, z_h holds the
answer) refined in turn by one small network that mixes all cells, so nothing is causal. No context, no state, nothing
emitted, no commit; h is z_h, and one flag, read off z_h's first cell, stops the whole board.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rmse_edge.arch.common.quantization import QuantTable
from rmse_edge.arch.registry import Arch
from rmse_edge.errors import ConfigError
from rmse_edge.info import BoardInfo
from rmse_edge.loop.contract import LoopSpec, Tensors, TensorSpec
from rmse_edge.loop.dials import Dials

CELLS, SYMBOLS, DIMS, MAX_LOOPS = 16, 5, 32, 8


@dataclass(frozen=True)
class PuzzleConfig:
    model_type: ClassVar[str] = "puzzle"
    cells: int = CELLS
    symbols: int = SYMBOLS
    d_model: int = DIMS
    max_loops: int = MAX_LOOPS
    exit_threshold: float = 1.0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> PuzzleConfig:
        try:
            return cls(**{name: value for name, value in values.items() if name != "model_type"})
        except TypeError as error:
            raise ConfigError(f"{where}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps({"model_type": self.model_type} | self.to_dict())


class Mixer(nn.Module):
    """One layer: across cells, then across channels."""

    def __init__(self, c: PuzzleConfig) -> None:
        super().__init__()
        self.cells = nn.Linear(c.cells, c.cells)
        self.up = nn.Linear(c.d_model, 2 * c.d_model)
        self.down = nn.Linear(2 * c.d_model, c.d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.cells(x.transpose(1, 2)).transpose(1, 2)  # (1, cells, d)
        x = x + self.down(torch.relu(self.up(x)))
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Puzzle(nn.Module):
    """The board solver as a `LoopModel`."""

    def __init__(self, config: PuzzleConfig | None = None) -> None:
        super().__init__()
        c = self.config = config or PuzzleConfig()
        self.embed = nn.Embedding(c.symbols, c.d_model)
        self.place = nn.Parameter(torch.randn(c.cells, c.d_model))
        self.first_h = nn.Parameter(torch.randn(c.d_model))
        self.first_l = nn.Parameter(torch.randn(c.d_model))
        self.network = nn.Sequential(Mixer(c), Mixer(c))  # shared by both latents and all iterations
        self.halt = nn.Linear(c.d_model, 1)
        nn.init.normal_(self.halt.weight, std=10 * c.d_model**-0.5)  # decisive: random boards stop at many depths
        self.answer = nn.Linear(c.d_model, c.symbols)

    def spec(self, chunk: int) -> LoopSpec:
        c = self.config
        if chunk != c.cells:
            raise ConfigError(f"chunk: got {chunk}, expected the whole board ({c.cells} cells)")
        latent = (1, c.cells, c.d_model)
        return LoopSpec(
            chunk=chunk,
            max_loops=c.max_loops,
            inputs=(TensorSpec("board", (1, c.cells), torch.int64),),
            prelude=(TensorSpec("x", latent),),
            h=TensorSpec("h", latent),
            active=TensorSpec("active", (1,), torch.bool),
            carry=(TensorSpec("z_l", latent),),
            head=(TensorSpec("symbols", (1, c.cells, c.symbols)),),
            dials=("max_loops", "min_loops", "exit_threshold"),
            ids={"board": c.symbols},
        )

    def call_sizes(self) -> tuple[int, ...]:
        return (self.config.cells,)

    def prelude(self, tensors: Tensors) -> Tensors:
        return {"x": self.embed(tensors["board"]) + self.place}

    def begin(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        x = tensors["x"]
        carry = {
            "h": 0 * x + self.first_h,  # not expanded: a converter would store as many copies of it as there are cells
            "z_l": 0 * x + self.first_l,
            "active": torch.ones_like(x[:, 0, 0], dtype=torch.bool),
        }
        return carry, {}

    def step(self, k: Tensor, carry: Tensors, past: Tensors, fixed: Tensors, dials: Tensors) -> tuple[Tensors, Tensors]:
        z_h, z_l, active = carry["h"], carry["z_l"], carry["active"]
        reasoned = self.network(z_l + z_h + fixed["x"])
        answered = self.network(z_h + reasoned)
        threshold = dials["exit_threshold"]  # 1 disables the rule
        stop = (threshold < 1) & (torch.sigmoid(self.halt(answered[:, 0])).squeeze(-1) >= threshold)
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

    @torch.no_grad()
    def scores(self, board: Tensor, dials: Tensors) -> Tensor:
        """What the exit rule compares with its dial after every iteration, (K,), of a board that never stops."""
        x = self.prelude({"board": board})
        carry, _ = self.begin(x)
        found = []
        for k in range(self.config.max_loops):
            carry, _ = self.step(torch.tensor(k), carry, {}, x, dials)
            found.append(torch.sigmoid(self.halt(carry["h"][:, 0])).squeeze())
        return torch.stack(found)


def parts(model: Puzzle) -> dict[str, Any]:
    c = model.config
    loop, once = (sum(p.numel() for p in m.parameters()) for m in (model.network, model.answer))
    return {
        "dials": Dials(c.max_loops, 1, c.exit_threshold),
        "board": BoardInfo(c.cells, c.symbols),
        "loop_weights": loop,
        "once_weights": once,
    }


def stated(config: PuzzleConfig) -> dict[str, Any]:
    return {"max_loops": config.max_loops, "board.cells": config.cells, "board.symbols": config.symbols}


def table(config: PuzzleConfig) -> QuantTable:
    """What mixes cells stays float: a board of 81 has no whole groups of 16."""
    return QuantTable(
        stages=(("embed.weight",), ("network.*.up.weight",), ("network.*.down.weight",), ("answer.weight",)),
        float=("place", "first_?", "network.*.cells.*", "*.bias", "halt.*"),
        embedding="embed.weight",
    )


ARCH = Arch(PuzzleConfig, Puzzle, parts, settings=("exit_",), stated=stated, quantization=table)
