"""A looped model of texts with every kind of state that RMS-E has not: what hosts are held against.

Its prelude attends to all earlier tokens (`Append`), every loop has a linear attention whose state is a matrix (`Replace`,
updated by commit, padding left out), and a coda behind the loop averages the last few positions (`Ring`). Its tokens turn
no angles, its first state is noise, and its calls may begin anywhere.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rmse_edge.arch.common.quantization import QuantTable
from rmse_edge.arch.registry import Arch, register
from rmse_edge.info import TextInfo
from rmse_edge.loop.contract import (
    Append,
    InjectedHits,
    LoopSpec,
    Replace,
    Ring,
    StateSpec,
    Tensors,
    TensorSpec,
    WholeText,
)
from rmse_edge.loop.dials import Dials
from rmse_edge.loop.generator import noise
from rmse_edge.loop.whole import in_one_call

VOCAB, DIMS, HEADS, HEAD_DIMS, MAX_LOOPS = 13, 32, 2, 16, 4
ROOM, PAGE, WINDOW, CHUNKS = 48, 10, 5, (1, 8)
NOISE = 0.3  # standard deviation of what a position begins from
NAME = "toy_recurrent"


@dataclass(frozen=True)
class ToyConfig:
    vocab_size: int = VOCAB
    model_type: str = NAME
    eos_token_id: int | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> ToyConfig:
        return cls(**{k: v for k, v in values.items() if k != "model_type"})

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "model_type"}

    def to_json(self) -> str:
        return json.dumps({"model_type": self.model_type} | self.to_dict())


def distances(position: Tensor, chunk: int, slots: Tensor) -> Tensor:
    """How far each position of the call is behind what each slot holds, then behind each of the call's own.

    Args:
        position: (B,) of the call's first row.
        slots: (B, S) positions that the slots hold.
    Returns:
        (B, C, S + C).
    """
    here = position[:, None] + torch.arange(chunk)
    return here[..., None] - torch.cat([slots, here], 1)[:, None]


class ToyRecurrent(nn.Module):
    """The model as a `LoopModel`."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.config = ToyConfig()
        self.embed = nn.Embedding(VOCAB, DIMS)
        self.place = nn.Linear(DIMS, DIMS, bias=False)
        self.key, self.value, self.query = (nn.Linear(DIMS, HEADS * HEAD_DIMS, bias=False) for _ in range(3))
        self.mix = nn.Linear(HEADS * HEAD_DIMS, DIMS)
        self.halt = nn.Linear(DIMS, 1)
        nn.init.normal_(self.halt.weight, std=1.0)
        self.answer = nn.Linear(DIMS, VOCAB)

    def spec(self, chunk: int) -> LoopSpec:
        vector, heads = (1, chunk, DIMS), (1, chunk, HEADS, HEAD_DIMS)
        memory = (MAX_LOOPS, 1, HEADS, HEAD_DIMS, HEAD_DIMS)
        position, n_valid = TensorSpec("position", (1,), torch.int64), TensorSpec("n_valid", (1,), torch.int64)
        return LoopSpec(
            chunk=chunk,
            max_loops=MAX_LOOPS,
            inputs=(TensorSpec("tokens", (1, chunk), torch.int64), TensorSpec("start", vector), position),
            prelude=(TensorSpec("x", vector), TensorSpec("seen", vector), TensorSpec("first", vector)),
            context=(position, n_valid),
            state=(
                StateSpec("past", (1, ROOM, DIMS), batch_axis=0, update=Append("seen"), read_by=("prelude",), per_loop=False),
                StateSpec("memory", memory, update=Replace("new_memory"), read_by=("loop", "commit")),
                StateSpec("tail", (1, WINDOW, DIMS), batch_axis=0, update=Ring("last"), read_by=("coda",), per_loop=False),
            ),
            h=TensorSpec("h", vector),
            active=TensorSpec("active", (1, chunk), torch.bool),
            emits=(TensorSpec("keys", heads), TensorSpec("values", heads)),
            coda=(TensorSpec("y", vector), TensorSpec("last", vector)),
            head=(TensorSpec("logits", (1, chunk, VOCAB)),),
            commit=(TensorSpec("new_memory", memory, batch_axis=1),),
            dials=("max_loops", "min_loops", "exit_threshold"),
            noise={"start": NOISE},
            ids={"tokens": VOCAB},
            examples={"position": [20], "n_valid": [max(1, chunk - 3)]},
        )  # fmt: skip

    def call_sizes(self) -> tuple[int, ...]:
        return CHUNKS

    def prelude(self, tensors: Tensors) -> Tensors:
        x = self.embed(tensors["tokens"])
        seen, chunk = self.place(x), x.shape[1]
        position = tensors["position"]
        slots = torch.arange(tensors["past"].shape[1]).expand(len(position), -1)
        behind = distances(position, chunk, slots)
        empty = torch.cat([slots >= position[:, None], torch.zeros_like(x[..., 0], dtype=torch.bool)], 1)[:, None]
        scores = x @ torch.cat([tensors["past"], seen], 1).transpose(1, 2)
        scores = scores.masked_fill((behind < 0) | empty, -1e4)
        x = x + scores.softmax(-1) @ torch.cat([tensors["past"], seen], 1)
        return {"x": x, "seen": seen, "first": x + tensors["start"]}

    def begin(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        first = tensors["first"]
        return {"h": first, "active": torch.arange(first.shape[1]) < tensors["n_valid"][:, None]}, {}

    def step(self, k: Tensor, carry: Tensors, past: Tensors, fixed: Tensors, dials: Tensors) -> tuple[Tensors, Tensors]:
        h, active = carry["h"], carry["active"]
        u = h + fixed["x"]
        heads = (*u.shape[:2], HEADS, HEAD_DIMS)
        keys, values, query = (f(u).reshape(heads).tanh() for f in (self.key, self.value, self.query))
        # Row t reads the matrix of the texts before and what rows 0 to t of this call, but for those that stopped, add.
        scores = torch.einsum("bthd,bshd->bhts", query, keys) * active[:, None, None, :]
        chunk = u.shape[1]
        scores = scores * torch.ones(chunk, chunk).tril()
        read = torch.einsum("bhts,bshd->bthd", scores, values)
        read = read + torch.einsum("bthd,bhde->bthe", query, past["memory"])
        new = (h + 0.3 * self.mix(read.flatten(2))).tanh()
        new = torch.where(active[..., None], new, h)
        stop = torch.sigmoid(self.halt(new)).squeeze(-1) >= dials["exit_threshold"]
        going = active & ~(stop & (k + 1 >= dials["min_loops"]))
        return {"h": new, "active": going}, {"keys": keys, "values": values}

    def coda(self, tensors: Tensors) -> Tensors:
        h = tensors["h"]
        slots = torch.arange(WINDOW)
        newest = tensors["position"][:, None] - 1
        held = newest - (newest + WINDOW - slots) % WINDOW  # the position that each slot holds; below 0: none
        behind = distances(tensors["position"], h.shape[1], held)
        empty = torch.cat([held < 0, torch.zeros_like(h[..., 0], dtype=torch.bool)], 1)[:, None]
        weights = ((behind >= 0) & (behind < WINDOW) & ~empty).float()
        around = weights @ torch.cat([tensors["tail"], h], 1)
        return {"y": h + around / weights.sum(-1, keepdim=True), "last": h * 1.0}

    def head(self, h: Tensor) -> Tensors:
        return {"logits": self.answer(h)}

    def commit(self, tensors: Tensors) -> Tensors:
        ran = torch.arange(MAX_LOOPS)[:, None, None] < tensors["depth"]  # (K, B, C): of padding, nothing
        keys = torch.where(ran[..., None, None], tensors["keys"], 0.0)
        values = torch.where(ran[..., None, None], tensors["values"], 0.0)
        return {"new_memory": tensors["memory"] + torch.einsum("kbshd,kbshe->kbhde", keys, values)}

    def whole_text(self, tokens: Tensor, dials: Tensors, hits: InjectedHits | None = None) -> WholeText:
        rows = np.stack([noise(0, position, DIMS) for position in range(len(tokens))])
        start = torch.from_numpy(rows * np.float32(NOISE))[None]
        seen: list[Tensor] = []

        def decided(k: int, before: Tensors, after: Tensors) -> Tensor:
            seen.append(torch.sigmoid(self.halt(after["h"]))[0, :, 0])
            away = (seen[-1] - dials["exit_threshold"]).abs()
            return away if k + 1 >= dials["min_loops"] else torch.full_like(away, torch.inf)

        found = in_one_call(self, tokens, {"start": start}, dials, hits, decided)
        return dataclasses.replace(found, scores={"exit_threshold": torch.stack(seen)})


class CountsPadding(ToyRecurrent):
    """Rows that are none of the call's tokens run as well, and leave something in the memory."""

    def begin(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        first, fixed = super().begin(tensors)
        return first | {"active": torch.ones_like(first["active"])}, fixed


def parts(model: ToyRecurrent) -> dict[str, Any]:
    weights = 3 * DIMS * HEADS * HEAD_DIMS + HEADS * HEAD_DIMS * DIMS + DIMS
    return {
        "dials": Dials(MAX_LOOPS, 1, 0.6),
        "text": TextInfo(VOCAB),
        "loop_weights": weights,
        "once_weights": DIMS * DIMS + DIMS * VOCAB,
    }


def table(config: ToyConfig) -> QuantTable:
    return QuantTable(
        stages=(
            ("embed.weight",),
            ("place.weight",),
            ("key.weight", "value.weight", "query.weight"),
            ("mix.weight",),
            ("answer.weight",),
        ),
        float=("*.bias", "halt.*"),
        embedding="embed.weight",
        head="answer.weight",
    )


ARCH = Arch(ToyConfig, lambda config: ToyRecurrent(), parts, quantization=table, gate_bias=lambda config: "halt.bias")
register(NAME, ARCH)
