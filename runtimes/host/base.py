"""What every runtime can do, and the part of it that is the same for all of them.

Two layers:

- `Methods` runs one exported method on arrays. A target implements this and nothing else.
- `Runtime` is a language model that remembers what it was fed. `LoopRuntime` (text.py) builds it on the `Calls` (calls.py)
  of any `Methods`; `ModelInfo` (info.py) is what both know about the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rmse_edge.loop.dials import Dials

if TYPE_CHECKING:
    from rmse_edge.info import ModelInfo

Arrays = dict[str, np.ndarray]


class Methods(Protocol):
    """An exported model's methods on arrays."""

    def run(self, method: str, chunk: int, feeds: dict[str, Any]) -> dict[str, Any]:
        """Call `prelude`, `loop`, `step`, `coda`, `head`, `commit` or a method of `LoopSpec.extra` for `chunk` rows.

        Names and shapes are the LoopSpec's. Arrays are NumPy's, or of the kind that the engine's `Calls` keep.

        The arrays returned may be reused by the next call of the same method and chunk: copy what is to be kept.
        """


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

    def feed(self, tokens: Sequence[int] | np.ndarray, dials: Dials, logits: str = "all", prefix: int = 0) -> Fed:
        """Continue the text with `tokens`; `logits` is "all" or "last".

        Args:
            prefix: how many of a text's first tokens see each other whatever their order; for models with `TextInfo.prefix`.
        Raises:
            UserError: the text would grow beyond `max_seq_len`, a token is outside the vocabulary, or there is none.
            ArgumentError: the prefix is not at the text's beginning, longer than one call, or the model has none.
        """

    def state_bytes(self) -> int:
        """Bytes kept between calls, the same however long the text is."""
