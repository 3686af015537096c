"""A looped text model as unlike RMS-E as the contract allows, and small: every kind of state, layers around the loop.

    x0 = first layer(embed(tokens))                     prelude, attention in a window, its own ring
    K times: two attention layers, one recurrence       step; keys of both layers per loop, appended; a state that is replaced
    y = last layer(h)                                   coda, attention to the whole text, appended keys

A position that stopped repeats the keys and values it had last, in all deeper loops (RMS-E makes new ones: a block of two
layers would have to run for that). The recurrence of a loop is S = decay S + k v^T over the positions, as in linear
attention; a position that stopped feeds it from the state it stopped with, also in loops that no call ran.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rmse_edge.arch.common.quantization import QuantTable
from rmse_edge.arch.registry import Arch
from rmse_edge.errors import ConfigError
from rmse_edge.info import TextInfo
from rmse_edge.layers.masks import append_mask, causal_mask, ring_mask, slots_mask
from rmse_edge.layers.norm import RMSNorm
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
from rmse_edge.loop.stop import add_log_survival, stops
from rmse_edge.loop.whole import in_one_call
from rmse_edge.numbers import SLOTS
from rmse_edge.schema import check_fields, read_json

LAYERS = 2  # of attention in the loop


@dataclass(frozen=True)
class TowerConfig:
    model_type: ClassVar[str] = "tower"
    vocab_size: int = 65
    d_model: int = 32
    n_heads: int = 2
    window: int = 24  # of the first layer
    capacity: int = 512  # of all others
    max_loops: int = 4
    exit_threshold: float = 1.0
    exit_epsilon: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> TowerConfig:
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known - {"model_type"}):
            raise ConfigError(f"{where}: unknown key {unknown[0]!r}; known keys are {', '.join(sorted(known))}")
        try:
            return cls(**{name: value for name, value in values.items() if name in known})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    @classmethod
    def from_file(cls, path: str | Path) -> TowerConfig:
        return cls.from_dict(read_json(Path(path), ConfigError), str(path))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps({"model_type": self.model_type} | self.to_dict(), indent=2) + "\n"


class Attention(nn.Module):
    """x + attention(norm(x)), without positions but for the mask."""

    def __init__(self, c: TowerConfig) -> None:
        super().__init__()
        self.heads, self.dims = c.n_heads, c.d_model // c.n_heads
        self.norm = RMSNorm(c.d_model, 1e-6)
        self.q_proj = nn.Linear(c.d_model, c.d_model, bias=False)
        self.kv_proj = nn.Linear(c.d_model, 2 * c.d_model, bias=False)
        self.o_proj = nn.Linear(c.d_model, c.d_model, bias=False)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, d) -> two of (B, H, C, hd)."""
        both = self.kv_proj(self.norm(x)).view(*x.shape[:2], 2, self.heads, self.dims).permute(2, 0, 3, 1, 4)
        return both[0], both[1]

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, past: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        q = self.q_proj(self.norm(x)).view(*x.shape[:2], self.heads, self.dims).transpose(1, 2)
        keys, values = torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)
        weights = torch.softmax(q @ keys.transpose(-1, -2) * self.dims**-0.5 + mask, -1)
        return x + self.o_proj((weights @ values).transpose(1, 2).flatten(2))


class Recurrence(nn.Module):
    """x + o(q S), S = decay S + k v^T: (B, H, hd, hd), one position after the other, in products over the whole call."""

    def __init__(self, c: TowerConfig) -> None:
        super().__init__()
        self.heads, self.dims = c.n_heads, c.d_model // c.n_heads
        self.norm = RMSNorm(c.d_model, 1e-6)
        self.q_proj = nn.Linear(c.d_model, c.d_model, bias=False)
        self.kv_proj = nn.Linear(c.d_model, 2 * c.d_model, bias=False)
        self.o_proj = nn.Linear(c.d_model, c.d_model, bias=False)
        self.register_buffer("log_decay", torch.log(torch.linspace(0.9, 0.8, c.n_heads)))  # (H,)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        both = self.kv_proj(self.norm(x)).view(*x.shape[:2], 2, self.heads, self.dims).permute(2, 0, 3, 1, 4)
        return both[0] * self.dims**-0.5, both[1]

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, before: Tensor) -> Tensor:
        q = self.q_proj(self.norm(x)).view(*x.shape[:2], self.heads, self.dims).transpose(1, 2)
        row = torch.arange(x.shape[1], dtype=torch.float32)
        distance = row[:, None] - row
        decay = torch.exp(self.log_decay.view(-1, 1, 1) * distance.clamp_min(0)) * (distance >= 0)  # (H, C, C)
        first = torch.exp(self.log_decay.view(-1, 1, 1) * (row[:, None] + 1))  # (H, C, 1)
        read = (q @ keys.transpose(-1, -2) * decay) @ values + (q @ before) * first
        return x + self.o_proj(read.transpose(1, 2).flatten(2))

    def after(self, before: Tensor, keys: Tensor, values: Tensor, n_valid: Tensor) -> Tensor:
        """S behind the call's valid rows: (..., H, hd, hd) from (..., H, C, hd)."""
        row = torch.arange(keys.shape[-2], dtype=torch.float32)
        count = n_valid.to(torch.float32).view(-1, 1, 1, 1)  # (B, 1, 1, 1)
        left = count - 1 - row.view(-1, 1)  # positions behind each row, (B, 1, C, 1)
        weight = torch.exp(self.log_decay.view(-1, 1, 1) * left.clamp_min(0)) * (left >= 0)  # (B, H, C, 1)
        whole = torch.exp(self.log_decay.view(-1, 1, 1) * count)
        return before * whole + (keys * weight).transpose(-1, -2) @ values


class Tower(nn.Module):
    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(c.vocab_size, c.d_model)
        self.first, self.last = Attention(c), Attention(c)
        self.layers = nn.ModuleList(Attention(c) for _ in range(LAYERS))
        self.recurrence = Recurrence(c)
        self.inject = nn.Linear(c.d_model, c.d_model, bias=False)
        self.norm = RMSNorm(c.d_model, 1e-6)
        self.gate = nn.Linear(c.d_model, 1)
        self.head_proj = nn.Linear(c.d_model, c.vocab_size, bias=False)

    def call_sizes(self) -> tuple[int, ...]:
        return (1, 16)

    def spec(self, chunk: int) -> LoopSpec:
        c, hd = self.config, self.config.d_model // self.config.n_heads
        vector, kv, integer = (1, chunk, c.d_model), (1, c.n_heads, chunk, hd), torch.int64
        ring, loops = (1, c.n_heads, c.window, hd), c.max_loops
        where = (TensorSpec("position", (1,), integer), TensorSpec("n_valid", (1,), integer))
        of_first = {"update": Ring("first_keys"), "read_by": ("prelude",), "per_loop": False, "batch_axis": 0}
        of_last = {"update": Append("last_keys"), "read_by": ("coda",), "per_loop": False, "batch_axis": 0}
        layers = (
            1,
            LAYERS * c.n_heads,
            chunk,
            hd,
        )  # side by side, as more heads: engines' tensors have five axes at most
        return LoopSpec(
            chunk=chunk,
            max_loops=loops,
            inputs=(TensorSpec("tokens", (1, chunk), integer), *where),
            prelude=(TensorSpec("x0", vector), TensorSpec("first_keys", kv), TensorSpec("first_values", kv)),
            context=(*where, TensorSpec(SLOTS, (c.capacity,), integer, None, slots_axis=0)),
            state=(
                StateSpec("past_first_keys", ring, **of_first),
                StateSpec("past_first_values", ring, **of_first | {"update": Ring("first_values")}),
                StateSpec("past_keys", (loops, 1, LAYERS * c.n_heads, c.capacity, hd), update=Append("keys")),
                StateSpec("past_values", (loops, 1, LAYERS * c.n_heads, c.capacity, hd), update=Append("values")),
                StateSpec(
                    "memory", (loops, 1, c.n_heads, hd, hd), update=Replace("next_memory"), read_by=("loop", "commit")
                ),
                StateSpec("past_last_keys", (1, c.n_heads, c.capacity, hd), **of_last),
                StateSpec(
                    "past_last_values", (1, c.n_heads, c.capacity, hd), **of_last | {"update": Append("last_values")}
                ),
            ),
            h=TensorSpec("h", vector),
            active=TensorSpec("active", (1, chunk), torch.bool),
            carry=(
                TensorSpec("log_survival", (1, chunk)),
                TensorSpec("held_keys", layers),
                TensorSpec("held_values", layers),
            ),
            invariants=(
                TensorSpec("slots_mask", (1, 1, chunk, c.capacity), slots_axis=3),
                TensorSpec("causal_mask", (1, 1, chunk, chunk)),
            ),
            emits=(
                TensorSpec("new_keys", layers),
                TensorSpec("new_values", layers),
                TensorSpec("memory_keys", kv),
                TensorSpec("memory_values", kv),
            ),
            coda=(TensorSpec("y", vector), TensorSpec("last_keys", kv), TensorSpec("last_values", kv)),
            head=(TensorSpec("logits", (1, chunk, c.vocab_size)),),
            commit=(
                TensorSpec("keys", (loops, *layers), batch_axis=1),
                TensorSpec("values", (loops, *layers), batch_axis=1),
                TensorSpec("next_memory", (loops, 1, c.n_heads, hd, hd), batch_axis=1),
            ),
            ids={"tokens": c.vocab_size},
            examples={"position": [3 * c.window - (chunk + 1) // 2], "n_valid": [max(1, chunk - 3)]},
        )

    def prelude(self, tensors: Tensors) -> Tensors:
        x = self.embed(tensors["tokens"])
        mask = ring_mask(tensors["position"], tensors["n_valid"], x.shape[1], self.config.window)
        keys, values = self.first.keys_values(x)
        past = tensors["past_first_keys"], tensors["past_first_values"]
        return {"x0": self.first(x, keys, values, past, mask), "first_keys": keys, "first_values": values}

    def begin(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        x0, n_valid = tensors["x0"], tensors["n_valid"]
        past, call = slots_mask(tensors["position"], x0.shape[1], tensors[SLOTS]), causal_mask(n_valid, x0.shape[1])
        active = torch.arange(x0.shape[1]) < n_valid[:, None]
        heads = self.config.n_heads
        held = x0.new_zeros((x0.shape[0], LAYERS * heads, x0.shape[1], self.config.d_model // heads))
        survival = torch.zeros_like(x0[..., 0])
        return {"h": x0, "active": active, "log_survival": survival, "held_keys": held, "held_values": held}, {
            "slots_mask": past,
            "causal_mask": call,
        }

    def step(self, k: Tensor, carry: Tensors, past: Tensors, fixed: Tensors, dials: Tensors) -> tuple[Tensors, Tensors]:
        before, active = carry["h"], carry["active"]
        u = before + self.inject(fixed["x0"])
        runs = active[:, None, :, None]
        held = [carry[name].chunk(LAYERS, 1) for name in ("held_keys", "held_values")]
        pasts = [past[name].chunk(LAYERS, 1) for name in ("past_keys", "past_values")]
        every: list[tuple[Tensor, Tensor]] = []
        x, mask = u, torch.cat([fixed["slots_mask"], fixed["causal_mask"]], -1)
        for i, layer in enumerate(self.layers):
            own = layer.keys_values(x)
            kept = tuple(torch.where(runs, new, old[i]) for new, old in zip(own, held))
            x = layer(x, *kept, (pasts[0][i], pasts[1][i]), mask)
            every.append(kept)
        memory = self.recurrence.keys_values(u)
        after = self.recurrence(x, *memory, past["memory"])
        log_survival = add_log_survival(carry["log_survival"], self.gate(self.norm(after)).squeeze(-1), active)
        keys, values = (torch.cat(t, 1) for t in zip(*every))
        new = {
            "h": torch.where(active.unsqueeze(-1), after, before),
            "active": active & ~stops(k, before, after, log_survival, dials),
            "log_survival": log_survival,
            "held_keys": keys,
            "held_values": values,
        }
        emitted = {"new_keys": keys, "new_values": values, "memory_keys": memory[0], "memory_values": memory[1]}
        return new, emitted

    def coda(self, tensors: Tensors) -> Tensors:
        h = tensors["h"]
        mask = append_mask(tensors["position"], tensors["n_valid"], h.shape[1], tensors[SLOTS])
        keys, values = self.last.keys_values(h)
        past = tensors["past_last_keys"], tensors["past_last_values"]
        return {"y": self.last(h, keys, values, past, mask), "last_keys": keys, "last_values": values}

    def head(self, h: Tensor) -> Tensors:
        return {"logits": self.head_proj(self.norm(h))}

    def commit(self, tensors: Tensors) -> Tensors:
        loops = torch.arange(self.config.max_loops)
        last = torch.minimum(loops, tensors["iterations"] - 1)
        keys, values = (tensors[name].index_select(0, last) for name in ("new_keys", "new_values"))
        # Every loop's memory takes in every position: in loops that did not run, from the state it stopped with.
        own = self.recurrence.keys_values(tensors["h"] + self.inject(tensors["x0"]))
        ran = (loops < tensors["iterations"]).view(-1, 1, 1, 1, 1)
        new = [
            torch.where(ran, tensors[name], t.unsqueeze(0)) for name, t in zip(("memory_keys", "memory_values"), own)
        ]
        return {
            "keys": keys,
            "values": values,
            "next_memory": self.recurrence.after(tensors["memory"], *new, tensors["n_valid"]),
        }

    def whole_text(self, tokens: Tensor, dials: Tensors, hits: InjectedHits | None = None) -> WholeText:
        return in_one_call(self, tokens, {}, dials, hits)


# Towers with a wrong rule, which the parity gate must catch.


class CountsPadding(Tower):
    """The recurrence takes in the rows of a call that are none of its tokens."""

    def commit(self, tensors: Tensors) -> Tensors:
        rows = torch.full_like(tensors["n_valid"], tensors["h"].shape[1])
        return super().commit(tensors | {"n_valid": rows})


class ForgetsDeepLoops(Tower):
    """Loops that did not run keep the memory they had."""

    def commit(self, tensors: Tensors) -> Tensors:
        found = super().commit(tensors)
        ran = torch.arange(self.config.max_loops).view(-1, 1, 1, 1, 1) < tensors["iterations"]
        return found | {"next_memory": torch.where(ran, found["next_memory"], tensors["memory"])}


class LastKeysForAll(Tower):
    """A position that goes on makes its keys from the state before, as one that stopped."""

    def commit(self, tensors: Tensors) -> Tensors:
        found = super().commit(tensors)
        return found | {"keys": found["keys"][-1:].expand_as(found["keys"])}


def parts(model: Tower) -> dict[str, Any]:
    c = model.config
    once = sum(p.numel() for m in (model.first, model.last, model.inject, model.head_proj) for p in m.parameters())
    loop = sum(p.numel() for m in (model.layers, model.recurrence) for p in m.parameters())
    dials = Dials(c.max_loops, 1, c.exit_threshold, c.exit_epsilon)
    return {"dials": dials, "text": TextInfo(c.vocab_size), "loop_weights": loop, "once_weights": once}


def stated(config: TowerConfig) -> dict[str, Any]:
    return {"max_loops": config.max_loops, "width": config.d_model, "text.vocab_size": config.vocab_size}


def table(config: TowerConfig) -> QuantTable:
    reads = ("q_proj.weight", "kv_proj.weight")
    loop = [tuple(f"layers.{i}.{name}" for name in reads) for i in range(LAYERS)]
    outs = [(f"layers.{i}.o_proj.weight",) for i in range(LAYERS)]
    return QuantTable(
        stages=(
            ("embed.weight",),
            tuple(f"first.{name}" for name in reads),
            ("first.o_proj.weight",),
            ("inject.weight",),
            (*loop[0], *(f"recurrence.{name}" for name in reads)),
            ("recurrence.o_proj.weight",),
            *(stage for pair in zip(outs, loop[1:]) for stage in pair),
            outs[-1],
            tuple(f"last.{name}" for name in reads),
            ("last.o_proj.weight",),
            ("head_proj.weight",),
        ),
        float=("*norm.weight", "gate.*", "recurrence.log_decay"),
        once=("first.*", "last.*"),
        embedding="embed.weight",
        head="head_proj.weight",
    )


ARCH = Arch(
    TowerConfig,
    Tower,
    parts,
    settings=("exit_",),
    stated=stated,
    quantization=table,
    gate_bias=lambda config: "gate.bias",
)


def lively_tower(seed: int = 0, kind: type[Tower] = Tower, **changes: Any) -> Tower:
    """Random weights under which positions stop at every depth."""
    torch.manual_seed(seed)
    model = kind(TowerConfig(**changes)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and "embed" not in name:
                p.normal_(std=0.7 * p.shape[1] ** -0.5)
        model.gate.weight.normal_(std=0.5)
        model.gate.bias.fill_(-1.0)
    return model
