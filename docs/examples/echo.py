"""The smallest looped model of texts, down to tokens out of an ONNX package. CONTRIBUTING.md goes through it.

    h = x0 = embed(token)
    h <- norm(h + x0 + attention(h + x0))      again and again, until h hardly changes
    logits = out(h)

Running it leaves a checkpoint, echo/, and a package, echo.rmse, in the current folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rmse_edge.arch.registry import Arch, register
from rmse_edge.checkpoint import save_checkpoint
from rmse_edge.errors import ConfigError
from rmse_edge.export import ExportRequest, export_package
from rmse_edge.info import TextInfo
from rmse_edge.layers.masks import ring_mask
from rmse_edge.layers.norm import RMSNorm
from rmse_edge.loop.contract import InjectedHits, LoopSpec, Ring, StateSpec, Tensors, TensorSpec, WholeText
from rmse_edge.loop.dials import Dials
from rmse_edge.loop.stop import delta_stops
from rmse_edge.loop.whole import in_one_call
from rmse_edge.runtimes import open_runtime
from rmse_edge.schema import check_fields, first_of


@dataclass(frozen=True)
class EchoConfig:
    model_type: ClassVar[str] = "echo"
    vocab_size: int = 65
    d_model: int = 32
    window: int = 24  # positions that attention sees, the token's own included
    max_loops: int = 6
    exit_epsilon: float = 0.05  # a token stops when its state changes by less, relatively

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> EchoConfig:
        values = {name: value for name, value in values.items() if name != "model_type"}
        if unknown := first_of(values, [f.name for f in fields(cls)]):
            raise ConfigError(f"{where}: unknown key {unknown!r}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps({"model_type": self.model_type} | self.to_dict(), indent=2) + "\n"


class Echo(nn.Module):
    def __init__(self, config: EchoConfig) -> None:
        super().__init__()
        self.config, d = config, config.d_model
        self.embed = nn.Embedding(config.vocab_size, d)
        self.query = nn.Linear(d, d, bias=False)
        self.key_value = nn.Linear(d, 2 * d, bias=False)
        self.norm = RMSNorm(d, 1e-6)
        self.out = nn.Linear(d, config.vocab_size, bias=False)

    def call_sizes(self) -> tuple[int, ...]:
        return (1, 16)

    def spec(self, chunk: int) -> LoopSpec:
        c, integer = self.config, torch.int64
        call, ring = (1, 1, chunk, c.d_model), (c.max_loops, 1, 1, c.window, c.d_model)  # keys: (batch, heads, rows, d)
        return LoopSpec(
            chunk=chunk,
            max_loops=c.max_loops,
            inputs=(TensorSpec("tokens", (1, chunk), integer),),
            context=(TensorSpec("position", (1,), integer), TensorSpec("n_valid", (1,), integer)),
            prelude=(TensorSpec("x0", (1, chunk, c.d_model)),),
            h=TensorSpec("h", (1, chunk, c.d_model)),
            active=TensorSpec("active", (1, chunk), torch.bool),
            invariants=(TensorSpec("mask", (1, 1, chunk, c.window + chunk)),),
            emits=(TensorSpec("new_keys", call), TensorSpec("new_values", call)),
            commit=tuple(TensorSpec(name, (c.max_loops, *call), batch_axis=1) for name in ("keys", "values")),
            state=tuple(StateSpec(f"past_{name}", ring, update=Ring(name)) for name in ("keys", "values")),
            head=(TensorSpec("logits", (1, chunk, c.vocab_size)),),
            dials=("max_loops", "min_loops", "exit_epsilon"),
            ids={"tokens": c.vocab_size},
            examples={"position": [40], "n_valid": [max(1, chunk - 3)]},
        )

    def keys_values(self, u: Tensor) -> tuple[Tensor, ...]:
        return self.key_value(u).unsqueeze(1).chunk(2, -1)  # (B, 1, C, d) each

    def prelude(self, tensors: Tensors) -> Tensors:
        return {"x0": self.embed(tensors["tokens"])}

    def begin(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        x0, n_valid = tensors["x0"], tensors["n_valid"]
        active = torch.arange(x0.shape[1], device=x0.device) < n_valid[:, None]  # rows beyond are padding
        mask = ring_mask(tensors["position"], n_valid, x0.shape[1], self.config.window)
        return {"h": x0, "active": active}, {"mask": mask}

    def step(self, k: Tensor, carry: Tensors, past: Tensors, fixed: Tensors, dials: Tensors) -> tuple[Tensors, Tensors]:
        before, active = carry["h"], carry["active"]
        u = before + fixed["x0"]
        new_keys, new_values = self.keys_values(u)
        keys = torch.cat([past["past_keys"], new_keys], 2)  # (B, 1, W + C, d)
        values = torch.cat([past["past_values"], new_values], 2)
        scores = self.query(u).unsqueeze(1) @ keys.transpose(-1, -2) * self.config.d_model**-0.5
        attended = (torch.softmax(scores + fixed["mask"], -1) @ values).squeeze(1)
        after = self.norm(u + attended)
        stop = delta_stops(before, after, dials["exit_epsilon"]) & (k + 1 >= dials["min_loops"])
        new = {"h": torch.where(active.unsqueeze(-1), after, before), "active": active & ~stop}
        return new, {"new_keys": new_keys, "new_values": new_values}

    def head(self, h: Tensor) -> Tensors:
        return {"logits": self.out(h)}

    def commit(self, tensors: Tensors) -> Tensors:
        """Loops that no token of the call reached get the keys and values of the states that the tokens stopped with."""
        keys, values = self.keys_values(tensors["h"] + tensors["x0"])
        ran = torch.arange(self.config.max_loops, device=keys.device).view(-1, 1, 1, 1, 1) < tensors["iterations"]
        keys, values = torch.where(ran, tensors["new_keys"], keys), torch.where(ran, tensors["new_values"], values)
        return {"keys": keys, "values": values}

    def whole_text(self, tokens: Tensor, dials: Tensors, hits: InjectedHits | None = None) -> WholeText:
        return in_one_call(self, tokens, {}, dials, hits)


def parts(model: Echo) -> dict[str, Any]:
    c = model.config
    return {"dials": Dials(c.max_loops, exit_epsilon=c.exit_epsilon), "text": TextInfo(c.vocab_size)}


ARCH = Arch(EchoConfig, Echo, parts, settings=("exit_",))

if __name__ == "__main__":
    register(EchoConfig.model_type, ARCH)
    torch.manual_seed(0)
    model = Echo(EchoConfig()).eval()  # random weights: only the shape of a model matters here
    save_checkpoint(model, "echo", dtype=torch.float32)
    export_package(model, "echo.rmse", ExportRequest("onnx", overwrite=True))  # fails unless it agrees with `model`
    runtime = open_runtime("echo.rmse")
    fed = runtime.feed(list(range(20)), runtime.info.dials)
    print("loops:", *fed.depth, "next token:", fed.logits[-1].argmax())
