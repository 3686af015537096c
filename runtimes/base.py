"""What every runtime can do, and the part of it that is the same for all of them.

Two layers:

- `Methods` runs one exported method on arrays. A target implements this and nothing else.
- `Runtime` is a language model that remembers what it was fed. `LoopRuntime` (runtimes/host.py) builds it on any
  `Methods`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from ..config import token_ids
from ..errors import UserError

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Dials:
    """The quality dial of one call. Loops are 1-based; see rmse_edge/exit.py for the rules."""

    max_loops: int
    min_loops: int = 1
    exit_threshold: float = 1.0  # >= 1 disables the gate
    exit_epsilon: float = 0.0  # 0 disables the delta rule
    exit_entropy: float = 0.0  # 0 disables the entropy rule

    def arrays(self) -> Arrays:
        """As the scalar inputs of `loop` and `step`."""
        integers = {"max_loops", "min_loops"}
        return {k: np.array(v, np.int64 if k in integers else np.float32) for k, v in vars(self).items()}

    def check(self, trained_depth: int) -> Dials:
        """Itself, if a model trained to `trained_depth` loops can run it.

        Raises:
            UserError: naming the dial and its range.
        """
        if not 1 <= self.max_loops <= trained_depth:
            raise UserError(
                f"--max-loops: got {self.max_loops}, expected 1..{trained_depth} (the depth the model was trained to)"
            )
        if not 1 <= self.min_loops <= self.max_loops:
            raise UserError(f"--min-loops: got {self.min_loops}, expected 1..max-loops ({self.max_loops})")
        if not self.exit_threshold > 0:
            raise UserError(f"--exit-threshold: got {self.exit_threshold}, expected a positive number (1 disables it)")
        for name in ("exit_epsilon", "exit_entropy"):
            if not getattr(self, name) >= 0:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag}: got {getattr(self, name)}, expected 0 (off) or more")
        return self


class Methods(Protocol):
    """An exported model's methods on arrays."""

    def run(self, method: str, chunk: int, feeds: Arrays) -> Arrays:
        """Call `prelude`, `loop`, `step`, `head`, `commit` or a method of `LoopSpec.extra` for `chunk` rows.

        Names and shapes are the LoopSpec's.

        The arrays returned may be reused by the next call of the same method and chunk: copy what is to be kept.
        """


@dataclass(frozen=True)
class ModelInfo:
    """What a host needs to know about a model, from a checkpoint or a manifest."""

    name: str
    target: str  # "torch", "onnx", ...
    vocab_size: int
    max_loops: int  # the trained depth
    dials: Dials  # the checkpoint's own settings
    window: int
    rotary_dims: int
    rope_theta: float
    parameters: int
    nbytes: int  # of the artifact on disk
    chunks: tuple[int, ...]  # rows of the calls that exist, ascending; the first is 1
    state: dict[str, tuple[tuple[int, ...], str]]  # name -> (shape, dtype), ring axis -2
    rings: dict[str, str]  # state name -> the commit result that fills it
    memory: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)  # likewise; empty: the model has none
    retrieval: dict[str, float] | None = None  # key_dims, slots, hits and gamma; None: the model has no retrieval head
    quant: str = "fp32"  # how weights are held: fp32, fp16, int8, int4
    fingerprint: str = ""  # of the weights, the same for a checkpoint and every package made of it
    max_seq_len: int | None = None
    eos_token_ids: tuple[int, ...] = ()  # each of them ends a text
    unused_token_ids: tuple[tuple[int, int], ...] = ()  # ranges [first, end) of ids without a token, never to be drawn
    config: dict[str, Any] = field(default_factory=dict)

    def dials_with(self, **overrides: float | int | None) -> Dials:
        """The checkpoint's dials with those given (not None) replaced, checked."""
        chosen = {k: v for k, v in overrides.items() if v is not None}
        if "max_loops" in chosen and "min_loops" not in chosen:
            chosen["min_loops"] = min(self.dials.min_loops, max(1, int(chosen["max_loops"])))
        return Dials(**(vars(self.dials) | chosen)).check(self.max_loops)

    def to_json(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any], nbytes: int) -> ModelInfo:
        values = dict(values) | {"nbytes": nbytes}
        values["dials"] = Dials(**values["dials"])
        values["chunks"] = tuple(values["chunks"])
        for name in ("state", "memory"):  # packages made before there was a memory do not say that they have none
            values[name] = {k: (tuple(shape), dtype) for k, (shape, dtype) in values.get(name, {}).items()}
        # Packages made before a text could end in several ways have config.json's own token.
        eos = values.get("eos_token_ids", values.get("config", {}).get("eos_token_id"))
        values["eos_token_ids"] = token_ids(eos, "eos_token_ids")
        values["unused_token_ids"] = tuple((first, end) for first, end in values.get("unused_token_ids", ()))
        return cls(**values)

    @property
    def full_depth(self) -> Dials:
        """Every position runs every loop."""
        return Dials(self.max_loops)


@dataclass(frozen=True)
class Surprise:
    """How badly the memory predicted a segment, before it learned it."""

    position: int  # tokens fed up to the segment's end
    value: float  # mean loss of the memory: 1 where it knows nothing
    mean: float  # of the segments before
    std: float
    segments: float  # how many those were (a trained start counts as some)

    def above(self, gamma: float) -> bool:
        """Whether it stands out: more than `gamma` deviations above the mean, once there is a deviation to speak of."""
        return self.segments >= 2 and self.value > self.mean + gamma * self.std


@dataclass(frozen=True)
class Fed:
    """What feeding tokens gave."""

    logits: np.ndarray  # (n or 1, V) float32: for every token fed, or for the last one
    depth: np.ndarray  # (n,) int64: iterations each position executed
    iterations: list[int]  # per call, the deepest position's depth: what the call really cost
    chunks: list[int]  # per call, its rows
    surprises: list[Surprise] = field(default_factory=list)  # of the segments that were completed


class Runtime(Protocol):
    """A looped language model that remembers what it was fed."""

    info: ModelInfo

    @property
    def position(self) -> int:
        """Tokens fed since `reset`."""

    def reset(self) -> None:
        """Forget everything."""

    def feed(self, tokens: Sequence[int] | np.ndarray, dials: Dials, logits: str = "all") -> Fed:
        """Continue the text with `tokens`; `logits` is "all" or "last".

        Raises:
            UserError: the text would grow beyond `max_seq_len`, a token is outside the vocabulary, or there is none.
        """

    def state_bytes(self) -> int:
        """Bytes kept between calls, the same however long the text is."""
