"""What is compared: looped models, and for each the dense model of twelve layers that one would deploy instead.

HRM-Text is run by llama.cpp itself, so that has no dense model beside it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import gcd
from pathlib import Path
from typing import Any

from rmse_edge.arch.ouro.config import OuroConfig

from .child import ROOT

LAYERS, LOOPS = 12, 12  # of the twin, of the looped models: about equal FLOPs
HEAD = 64  # channels of one head
VOCABULARY = 4096  # of the twin
WIDTHS = (256, 512, 768, 1024)
CONFIGS = ROOT / "docs" / "benchmarks"
OURO = "ouro-1.4b"
SHIPPED = ROOT / "models" / "rmse-shakespeare"


@dataclass(frozen=True)
class Twin:
    """A dense model of the llama architecture."""

    width: int  # channels of h
    ffn: int  # channels within an FFN
    heads: int
    vocab: int = VOCABULARY
    layers: int = LAYERS
    context: int = 2048  # positions of a text, at most

    @property
    def name(self) -> str:
        return f"twin-d{self.width}"

    @property
    def about(self) -> str:
        return f"Dense twin: {self.layers} layers, d {self.width}, FFN {self.ffn}, {self.heads} heads, vocabulary {self.vocab}."

    @property
    def parameters(self) -> int:
        """Of its matrices."""
        layer = 4 * self.width**2 + 3 * self.width * self.ffn
        return self.layers * layer + 2 * self.vocab * self.width

    def shape(self) -> dict[str, int]:
        return asdict(self)

    def unrolled(self) -> dict[str, Any]:
        """A config.json for this project: Ouro's block of as many layers, applied once, is the twin's unrolled graph.

        Its layers are those of llama with two more norms each.
        """
        return {
            "model_type": "ouro",
            "vocab_size": self.vocab,
            "hidden_size": self.width,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "total_ut_steps": 1,
            "max_position_embeddings": self.context,
            "rope_theta": 10000.0,
        }


@dataclass(frozen=True)
class HrmText:
    """HRM-Text in llama.cpp, all cycles: the same twelve calls of layers that the looped model makes."""

    width: int  # channels of a state
    ffn: int  # channels within an FFN
    heads: int
    vocab: int = VOCABULARY
    layers: int = 2  # of each of the two stacks
    cycles: int = 2
    fast: int = 2  # calls of the fast stack in a cycle
    context: int = 2048  # positions of a text, at most

    @property
    def name(self) -> str:
        return f"hrm-text-d{self.width}"

    @property
    def about(self) -> str:
        return (
            f"llama.cpp runs the model itself, all {self.cycles} cycles: two stacks of {self.layers} layers, d {self.width}, FFN "
            f"{self.ffn}, {self.heads} heads, vocabulary {self.vocab}."
        )

    def shape(self) -> dict[str, int]:
        return asdict(self)

    @property
    def calls(self) -> int:
        """Of layers, for a token."""
        return self.layers * self.cycles * (self.fast + 1)

    @property
    def reads(self) -> int:
        """Bytes of Q4_0 weights that a token is multiplied with."""
        layer = self.width * (5 * self.width + 3 * self.ffn)
        return (self.calls * layer + self.vocab * self.width) * 18 // 32

    def config(self) -> dict[str, Any]:
        """A config.json for this project."""
        return {
            "model_type": "hrm_text",
            "vocab_size": self.vocab,
            "hidden_size": self.width,
            "intermediate_size": self.ffn,
            "num_layers_per_stack": self.layers,
            "num_attention_heads": self.heads,
            "head_dim": self.width // self.heads,
            "H_cycles": self.cycles,
            "L_cycles": self.fast,
            "max_position_embeddings": self.context,
            "exit_rules": ["delta"],
        }


@dataclass(frozen=True)
class Looped:
    """A looped model: random weights by a configuration, or a checkpoint."""

    name: str
    config: dict[str, Any]
    twin: Twin | HrmText  # what llama.cpp runs
    checkpoint: Path | None = None  # a trained one, which stops by itself on its own text
    # Of a published model, by its name in docs/experiments/random_checkpoint.py: weights are drawn and rounded one by one.
    shape: str | None = None

    @property
    def loops(self) -> int:
        names = ("H_cycles", "max_loops", "total_ut_steps")
        return next(self.config[name] for name in names if name in self.config)

    def depths(self) -> tuple[int | None, ...]:
        """Loops of the rows of its table: all, a third, and None where it stops by itself."""
        fixed = (self.loops, max(1, self.loops // 3))
        return (*dict.fromkeys(fixed), *((None,) if self.checkpoint else ()))


def to_block(channels: float) -> int:
    """The nearest multiple of 32, the weights of one group of int4."""
    return max(32, round(channels / 32) * 32)


def twin_of(width: int) -> Twin:
    """At d 768: FFN 2048, 12 heads."""
    return Twin(width, to_block(width * 8 / 3), width // HEAD)


def moe(width: int) -> Looped:
    """The block of docs/benchmarks/d768.json, at another width with all its sizes in proportion."""
    config = json.loads((CONFIGS / "d768.json").read_text())
    heads = width // HEAD
    if width != config["d_model"]:
        scale = width / config["d_model"]
        config |= {
            "d_model": width,
            "n_heads": heads,
            "n_kv_heads": gcd(heads, max(1, heads // 3)),
            "expert_width": to_block(config["expert_width"] * scale),
            "shared_width": to_block(config["shared_width"] * scale),
        }
    return Looped(f"moe-d{width}", config, twin_of(width))


def dense(width: int) -> Looped:
    """One layer of the twin's own shape, looped: docs/benchmarks/d768-dense.json."""
    config, twin = json.loads((CONFIGS / "d768-dense.json").read_text()), twin_of(width)
    heads = {"n_heads": twin.heads, "n_kv_heads": twin.heads}
    config |= {"d_model": width, "expert_width": twin.ffn, **heads}
    return Looped(f"dense-d{width}", config, twin)


def hrm_text(width: int) -> Looped:
    """At d 768: FFN 2048, 12 heads, as the twin."""
    own = HrmText(width, to_block(width * 8 / 3), width // HEAD)
    return Looped(own.name, own.config(), own)


def ouro() -> Looped:
    """Ouro-1.4B. Its twin has its 24 layers once for each of the 4 loops: what llama.cpp builds of a looped model."""
    c = OuroConfig()
    layers = c.num_hidden_layers * c.total_ut_steps
    twin = Twin(c.hidden_size, c.intermediate_size, c.num_attention_heads, c.vocab_size, layers)
    return Looped(OURO, {"model_type": c.model_type, **c.to_dict()}, twin, shape=OURO)


def shipped(folder: Path) -> Looped:
    """A trained RMS-E model of this project, beside a twin of its own width and vocabulary."""
    config = json.loads((folder / "config.json").read_text())
    width = config["d_model"]
    twin = Twin(width, to_block(width * 8 / 3), config["n_heads"], config["vocab_size"])
    return Looped(folder.name, config, twin, folder)
