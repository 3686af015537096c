"""A third looped model, of texts like RMS-E and like nothing else of it: what the tools do for an architecture of one's own.

Every loop reads the mean of what the positions so far had to say in it, which is kept as a sum per loop (`Replace`), in
calls of 1 and of 16 positions that know no segments. A position that has stopped says to deeper loops what its last state
says. `register` it in a test; `published` are names and forms of checkpoints as somebody else may have written them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rmse_edge.arch.common.quantization import QuantTable
from rmse_edge.arch.registry import Arch, Stored
from rmse_edge.errors import ConfigError
from rmse_edge.info import TextInfo
from rmse_edge.loop.contract import InjectedHits, LoopSpec, Replace, StateSpec, Tensors, TensorSpec, WholeText
from rmse_edge.loop.dials import Dials
from rmse_edge.loop.stop import add_log_survival, margins, scores, stops

ROWS = 16


@dataclass(frozen=True)
class ToyConfig:
    model_type: ClassVar[str] = "toy"
    vocab_size: int = 65
    width: int = 32
    hidden: int = 64
    max_loops: int = 4
    exit_threshold: float = 0.5
    tied: bool = False
    block_size: int = 40
    eos_token_id: int | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> ToyConfig:
        given = {key: value for key, value in values.items() if key != "model_type"}
        if unknown := given.keys() - {f.name for f in dataclasses.fields(cls)}:
            raise ConfigError(f"{where}: unknown key {min(unknown)!r}")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps({"model_type": self.model_type, **self.to_dict()})


class Toy(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.say = nn.Linear(config.width, config.width, bias=False)
        self.up = nn.Linear(config.width, config.hidden)
        self.down = nn.Linear(config.hidden, config.width, bias=False)
        self.norm = nn.RMSNorm(config.width)
        self.halt = nn.Linear(config.width, 1)
        self.head_proj = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tied:
            self.head_proj.weight = self.embed.weight

    def spec(self, chunk: int) -> LoopSpec:
        c = self.config
        vector = (1, chunk, c.width)
        return LoopSpec(
            chunk=chunk,
            max_loops=c.max_loops,
            inputs=(TensorSpec("tokens", (1, chunk), torch.int64),),
            prelude=(TensorSpec("x0", vector),),
            context=(TensorSpec("position", (1,), torch.int64), TensorSpec("n_valid", (1,), torch.int64)),
            state=(
                StateSpec("sums", (c.max_loops, 1, c.width), update=Replace("new_sums"), read_by=("loop", "commit")),
            ),
            h=TensorSpec("h", vector),
            active=TensorSpec("active", (1, chunk), torch.bool),
            carry=(TensorSpec("log_survival", (1, chunk)),),
            invariants=(TensorSpec("valid", (1, chunk), torch.bool),),
            emits=(TensorSpec("added", (1, c.width)),),
            head=(TensorSpec("logits", (1, chunk, c.vocab_size)),),
            commit=(TensorSpec("new_sums", (c.max_loops, 1, c.width), batch_axis=1),),
            ids={"tokens": c.vocab_size},
            examples={"position": [7], "n_valid": [max(1, chunk - 3)]},
        )

    def call_sizes(self) -> tuple[int, ...]:
        return (1, ROWS)

    def prelude(self, tensors: Tensors) -> Tensors:
        return {"x0": self.embed(tensors["tokens"])}

    def begin(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        x0 = tensors["x0"]
        valid = torch.arange(x0.shape[1]) < tensors["n_valid"][:, None]
        return {"h": x0, "active": valid, "log_survival": torch.zeros_like(x0[..., 0])}, {"valid": valid}

    def step(self, k: Tensor, carry: Tensors, past: Tensors, fixed: Tensors, dials: Tensors) -> tuple[Tensors, Tensors]:
        before, active = carry["h"], carry["active"]
        said = self.say(self.norm(before)) * fixed["valid"].unsqueeze(-1)
        seen = past["sums"].unsqueeze(1) + said.cumsum(1)
        count = fixed["position"][:, None] + 1 + torch.arange(said.shape[1])
        after = self.refined(before, seen / count.unsqueeze(-1), fixed["x0"])
        survival = add_log_survival(carry["log_survival"], self.halt(self.norm(after)).squeeze(-1), active)
        new = {
            "h": torch.where(active.unsqueeze(-1), after, before),
            "active": active & ~stops(k, before, after, survival, dials),
            "log_survival": survival,
        }
        return new, {"added": said.sum(1)}

    def refined(self, h: Tensor, mean: Tensor, x0: Tensor) -> Tensor:
        return h + self.down(torch.relu(self.up(self.norm(h + mean + x0))))

    def head(self, h: Tensor) -> Tensors:
        return {"logits": self.head_proj(self.norm(h))}

    def commit(self, tensors: Tensors) -> Tensors:
        rows = torch.arange(tensors["h"].shape[1]) < tensors["n_valid"][:, None]
        last = (self.say(self.norm(tensors["h"])) * rows.unsqueeze(-1)).sum(1)
        ran = (torch.arange(self.config.max_loops) < tensors["iterations"]).view(-1, 1, 1)
        return {"new_sums": tensors["sums"] + torch.where(ran, tensors["added"], last)}

    @torch.no_grad()
    def whole_text(self, tokens: Tensor, dials: Tensors, hits: InjectedHits | None = None) -> WholeText:
        x0 = self.embed(tokens)[None]
        h, active, survival = x0, torch.ones_like(tokens[None], dtype=torch.bool), torch.zeros_like(x0[..., 0])
        depth, found = torch.zeros_like(tokens), []
        for k in range(int(dials["max_loops"])):
            mean = self.say(self.norm(h)).cumsum(1) / torch.arange(1, len(tokens) + 1).view(1, -1, 1)
            after = self.refined(h, mean, x0)
            survival = add_log_survival(survival, self.halt(self.norm(after)).squeeze(-1), active)
            every = scores(h, after, survival)
            found.append({name: score for name, score in every.items() if name in self.spec(1).dials})
            depth, before = depth + active[0], h
            h = torch.where(active.unsqueeze(-1), after, h)
            active = active & ~stops(k, before, after, survival, dials)
        of_loops = {name: torch.stack([f[name][0] for f in found]) for name in found[0]}
        margin = margins(of_loops, dials).amin(0)
        return WholeText(self.head(h)["logits"][0], depth, h[0], torch.zeros(0), of_loops, margin)


def parts(model: Toy) -> dict[str, Any]:
    c = model.config
    return {"dials": Dials(c.max_loops, exit_threshold=c.exit_threshold), "text": TextInfo(c.vocab_size)}


def tied(config: ToyConfig) -> Mapping[str, str]:
    return {"head_proj.weight": "embed.weight"} if config.tied else {}


def stored(config: ToyConfig) -> Mapping[str, Stored]:
    half = config.hidden // 2
    return {
        "embed.weight": Stored(("wte",)),
        "down.weight": Stored(("w2",), lambda w: w.T),
        "halt.weight": Stored(("halt",), lambda w: w[:1]),
        "halt.bias": Stored(("halt",), lambda w: w[1:].flatten()[:1]),
        "up.weight": Stored(("w1.a", "w1.b"), lambda *both: torch.cat(both)),
        "up.bias": Stored(("b1",), lambda b: b.unflatten(0, (half, 2)).T.flatten()),  # interleaved
    }


def published(model: Toy) -> Tensors:
    """A checkpoint of the model by the names of `stored`."""
    own = dict(model.state_dict())
    if model.config.tied:
        del own["head_proj.weight"]
    bias = torch.zeros_like(own["halt.weight"])
    bias[0, 0] = own.pop("halt.bias")[0]
    up, half = own.pop("up.weight"), model.config.hidden // 2
    return {
        "wte": own.pop("embed.weight"),
        "w2": own.pop("down.weight").T.contiguous(),
        "halt": torch.cat([own.pop("halt.weight"), bias]),
        "w1.a": up[:half].contiguous(),
        "w1.b": up[half:].contiguous(),
        "b1": own.pop("up.bias").unflatten(0, (2, half)).T.flatten().contiguous(),
        "rotary.inv_freq": torch.ones(4),
        **own,
    }


def table(config: ToyConfig) -> QuantTable:
    return QuantTable(
        stages=(("embed.weight",), ("say.*",), ("up.weight",), ("d*n.weight",), ("head_proj.weight",)),
        float=("*.bias", "norm.weight", "halt.*"),
        embedding="embed.weight",
        head="head_proj.weight",
    )


ARCH = Arch(
    ToyConfig,
    Toy,
    parts,
    settings=("exit_",),
    tied=tied,
    stored=stored,
    unread=("*.inv_freq",),
    quantization=table,
    gate_bias=lambda config: "halt.bias",
)


def toy(seed: int = 0, **changes: Any) -> Toy:
    """Random weights whose positions stop at every depth."""
    torch.manual_seed(seed)
    model = Toy(ToyConfig(**changes)).eval()
    with torch.no_grad():
        model.norm.weight.mul_(1 + 0.3 * torch.randn_like(model.norm.weight))
        model.halt.weight.normal_(std=0.3)
        model.halt.bias.fill_(-0.7)
        model.head_proj.weight.normal_(std=0.3)
    return model
