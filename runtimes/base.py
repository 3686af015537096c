"""What every runtime can do, and the part of it that is the same for all of them.

Two layers:

- `Methods` runs one exported method on arrays. A target implements this and nothing else.
- `Runtime` is a language model with a memory of what it was fed. `LoopRuntime` builds it on any `Methods`: it splits
  input into calls, makes the angles, keeps the KV ring and reports depths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from ..config import SEGMENT
from ..errors import UserError
from ..rope import rotary_angles

Arrays = dict[str, np.ndarray]

# Prefill calls have 64 rows, decode calls one. Up to this many rows, single calls beat a padded 64-row call.
SINGLE_CALLS = 6


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
        """Call `prelude`, `loop`, `step`, `head` or `commit` for `chunk` rows; names and shapes are the LoopSpec's.

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
    max_seq_len: int | None = None
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
        values["state"] = {k: (tuple(shape), dtype) for k, (shape, dtype) in values["state"].items()}
        return cls(**values)

    @property
    def full_depth(self) -> Dials:
        """Every position runs every loop."""
        return Dials(self.max_loops)


@dataclass(frozen=True)
class Fed:
    """What feeding tokens gave."""

    logits: np.ndarray  # (n or 1, V) float32: for every token fed, or for the last one
    depth: np.ndarray  # (n,) int64: iterations each position executed
    iterations: list[int]  # per call, the deepest position's depth: what the call really cost
    chunks: list[int]  # per call, its rows


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
        """Bytes kept between calls."""


def plan_calls(position: int, count: int, chunks: tuple[int, ...]) -> list[tuple[int, int]]:
    """Split `count` tokens from `position` on into calls (rows of the call, tokens in it).

    No call crosses a multiple of 64 positions, so that a segment always ends with a call.

    >>> plan_calls(60, 70, (1, 64))
    [(1, 1), (1, 1), (1, 1), (1, 1), (64, 64), (1, 1), (1, 1)]
    """
    calls = []
    largest = chunks[-1]
    while count > 0:
        n = min(count, largest, SEGMENT - position % SEGMENT)
        if n <= SINGLE_CALLS:
            calls += [(chunks[0], 1)] * n
        else:
            calls.append((min(c for c in chunks if c >= n), n))
        position, count = position + n, count - n
    return calls


class LoopRuntime:
    """`Runtime` on top of any target's `Methods`."""

    def __init__(self, info: ModelInfo, methods: Methods) -> None:
        self.info = info
        self.methods = methods
        self.state = {name: np.zeros(shape, dtype) for name, (shape, dtype) in info.state.items()}
        self._position = 0

    @property
    def position(self) -> int:
        return self._position

    def reset(self) -> None:
        # Slots are masked by position, so what they hold does not matter; zeroed all the same, to be reproducible.
        for array in self.state.values():
            array.fill(0)
        self._position = 0

    def state_bytes(self) -> int:
        return sum(a.nbytes for a in self.state.values())

    def feed(self, tokens: Sequence[int] | np.ndarray, dials: Dials, logits: str = "all") -> Fed:
        ids = self._checked(tokens)
        dials.check(self.info.max_loops)
        rows, depths, iterations, chunks = [], [], [], []
        done = 0
        for chunk, n in plan_calls(self._position, len(ids), self.info.chunks):
            last = done + n == len(ids)
            out = self._call(chunk, ids[done : done + n], dials, head=logits == "all" or last)
            depths.append(out["depth"][0, :n].copy())
            iterations.append(int(out["iterations"]))
            chunks.append(chunk)
            if "logits" in out:
                rows.append(out["logits"][0, (0 if logits == "all" else n - 1) : n].copy())
            done += n
        return Fed(np.concatenate(rows), np.concatenate(depths), iterations, chunks)

    def _checked(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = np.asarray(tokens, np.int64)
        if ids.ndim != 1 or not len(ids):
            raise UserError("no tokens to run; give a prompt of at least one token")
        if ids.min() < 0 or ids.max() >= self.info.vocab_size:
            raise UserError(f"token {ids[(ids < 0) | (ids >= self.info.vocab_size)][0]} is outside the vocabulary "
                            f"(0..{self.info.vocab_size - 1})")  # fmt: skip
        limit = self.info.max_seq_len
        if limit is not None and self._position + len(ids) > limit:
            raise UserError(
                f"{self._position + len(ids)} tokens are more than the {limit} this package was exported for "
                "(--max-seq-len); shorten the prompt or export again"
            )
        return ids

    def context(self, chunk: int, n: int) -> Arrays:
        """What a call of `chunk` rows, `n` of them valid, is told about where it stands."""
        cos, sin = rotary_angles(self._position + np.arange(chunk), self.info.rotary_dims, self.info.rope_theta)
        return {
            "cos": cos[None],
            "sin": sin[None],
            "position": np.array([self._position], np.int64),
            "n_valid": np.array([n], np.int64),
        }

    def _call(self, chunk: int, ids: np.ndarray, dials: Dials, head: bool) -> Arrays:
        """One call: prelude, loop, head, commit, ring."""
        n = len(ids)
        tokens = np.zeros((1, chunk), np.int64)
        tokens[0, :n] = ids
        context = self.context(chunk, n)
        prelude = self.methods.run("prelude", chunk, {"tokens": tokens})
        looped = self.methods.run("loop", chunk, prelude | context | self.state | dials.arrays())
        result = dict(looped)
        if head:
            result |= self.methods.run("head", chunk, {"h": looped["h"]})
        kept = self.methods.run("commit", chunk, prelude | context | looped)
        window = self.info.window
        first = max(0, n - window)
        slots = (self._position + np.arange(first, n)) % window
        for ring, source in self.info.rings.items():
            self.state[ring][..., slots, :] = kept[source][..., first:n, :]
        self._position += n
        return result
