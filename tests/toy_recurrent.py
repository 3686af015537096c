"""A looped model of texts with every kind of state that RMS-E has not: what hosts are held against.

Its prelude attends to all earlier tokens (`Append`), every loop has a linear attention whose state is a matrix (`Replace`,
updated by commit, padding left out), and a coda behind the loop averages the last few positions (`Ring`). Its tokens turn
no angles, its first state is noise, and its calls may begin anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rmse_edge.arch.identity import model_info
from rmse_edge.arch.registry import Arch, register
from rmse_edge.info import TextInfo
from rmse_edge.loop.contract import Append, LoopSpec, Replace, Ring, StateSpec, Tensors, TensorSpec
from rmse_edge.loop.dials import Dials

VOCAB, DIMS, HEADS, HEAD_DIMS, MAX_LOOPS = 13, 16, 2, 8, 4
ROOM, PAGE, WINDOW, CHUNKS = 48, 10, 5, (1, 8)
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


def distances(tensors: Tensors, chunk: int, slots: Tensor) -> Tensor:
    """How far each position of the call is behind what each slot holds, then behind each of the call's own, (C, S + C)."""
    here = tensors["position"] + torch.arange(chunk)
    return here[:, None] - torch.cat([slots, here])[None]


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
            commit=(TensorSpec("new_memory", memory),),
            dials=("max_loops", "min_loops", "exit_threshold"),
            noise={"start": 0.3},
            ids={"tokens": VOCAB},
        )  # fmt: skip

    def call_sizes(self) -> tuple[int, ...]:
        return CHUNKS

    def prelude(self, tensors: Tensors) -> Tensors:
        x = self.embed(tensors["tokens"])
        seen, chunk = self.place(x), x.shape[1]
        slots = torch.arange(tensors["past"].shape[1])
        behind = distances(tensors, chunk, slots)
        empty = torch.cat([slots >= tensors["position"], torch.zeros(chunk, dtype=torch.bool)])
        scores = x @ torch.cat([tensors["past"], seen], 1).transpose(1, 2)
        scores = scores.masked_fill((behind < 0) | empty, -1e4)
        x = x + scores.softmax(-1) @ torch.cat([tensors["past"], seen], 1)
        return {"x": x, "seen": seen, "first": x + tensors["start"]}

    def begin(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        first = tensors["first"]
        valid = torch.arange(first.shape[1]) < tensors["n_valid"]
        return {"h": first, "active": valid[None]}, {}

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
        newest = tensors["position"] - 1
        held = newest - (newest + WINDOW - slots) % WINDOW  # the position that each slot holds; below 0: none
        behind = distances(tensors, h.shape[1], held)
        empty = torch.cat([held < 0, torch.zeros(h.shape[1], dtype=torch.bool)])
        weights = ((behind >= 0) & (behind < WINDOW) & ~empty).float()
        around = weights @ torch.cat([tensors["tail"], h], 1)
        return {"y": h + around / weights.sum(-1, keepdim=True), "last": h * 1.0}

    def head(self, h: Tensor) -> Tensors:
        return {"logits": self.answer(h)}

    def commit(self, tensors: Tensors) -> Tensors:
        ran = torch.arange(MAX_LOOPS)[:, None, None] < tensors["depth"][None]  # (K, 1, C): of padding, nothing
        keys = torch.where(ran[..., None, None], tensors["keys"], 0.0)
        values = torch.where(ran[..., None, None], tensors["values"], 0.0)
        return {"new_memory": tensors["memory"] + torch.einsum("kbshd,kbshe->kbhde", keys, values)}


def parts(model: ToyRecurrent) -> dict[str, Any]:
    weights = 3 * DIMS * HEADS * HEAD_DIMS + HEADS * HEAD_DIMS * DIMS + DIMS
    return {
        "dials": Dials(MAX_LOOPS, 1, 0.6),
        "text": TextInfo(VOCAB),
        "loop_weights": weights,
        "once_weights": DIMS * DIMS + DIMS * VOCAB,
    }


register(NAME, Arch(ToyConfig, lambda config: ToyRecurrent(), parts))


def write_package(model: ToyRecurrent, folder: Path) -> Path:
    """`model` lowered for ExecuTorch into a package, as an export does it but for the gate."""
    from rmse_edge.export import trace
    from rmse_edge.export.pipeline import signatures
    from rmse_edge.export.program import tensors_json
    from rmse_edge.export.targets import LowerOptions, get_target
    from rmse_edge.package import seal

    target, info = get_target("executorch"), replace(model_info(model, "toy", 0, "executorch"), page=PAGE)
    program = trace(model, model.call_sizes(), host_loop=True, grows=True)
    folder.mkdir()
    lowering = target.lower(program, folder, LowerOptions(info=info))
    methods = {
        name: {"inputs": tensors_json(takes, grows=True), "outputs": tensors_json(gives, grows=True)}
        for name, (takes, gives) in signatures(program.specs, target, "fp32").items()
    }
    manifest = {"target": "executorch", "model": info.to_json(), "methods": methods}
    seal(folder, manifest | {"quantization": {"weights": "fp32"}, "lowering": lowering})
    return folder
