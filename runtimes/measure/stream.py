"""Streaming: what stays flat while a text goes on for as long as it likes: speed, memory, state, and its numbers.

Tokens are fed in calls of 64. The first ones warm up; the others are reported in tenths, the speed of each by the median
of its calls, so that a hiccup of the machine does not decide.

A run takes minutes, and a machine that is busier at its end looks like a model that has become slower. So at the end the
state from after the warm-up is taken out again, and both states read the same tokens in turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from rmse_edge.errors import ArgumentError
from rmse_edge.loop.dials import Dials
from rmse_edge.numbers import SEGMENT
from rmse_edge.runtimes.host.base import Arrays, Fed
from rmse_edge.runtimes.host.text import LoopRuntime

from .machine import resident_bytes

WARM_UP = 2000  # tokens: caches fill, the ring wraps, buffers find their place
EARLY = 1000  # tokens after which the state's size is taken first
TENTHS = 10
PAIRS = 100  # calls of 64 tokens from either state


@dataclass(frozen=True)
class Tenth:
    """A tenth of what was streamed after the warm-up."""

    first: int  # position it begins at
    end: int  # position it ends before
    tok_per_s: float  # 64 over the median of its calls' seconds
    mean_loops: float
    mean_surprise: float | None  # of its segments; None for a model without memory


class Stream:
    """Streams `ids`, repeated as often as needed, through one runtime.

    Raises:
        UserError: too few tokens for a warm-up and ten tenths, or more than the package was exported for.
    """

    def __init__(
        self, runtime: LoopRuntime, ids: np.ndarray, dials: Dials, tokens: int, warm_up: int = WARM_UP
    ) -> None:
        least = warm_up + (TENTHS + 1) * SEGMENT
        if tokens < least:
            raise ArgumentError(
                "tokens", f"got {tokens}, expected at least {least}: {warm_up} to warm up, then ten tenths"
            )
        limit = runtime.info.longest
        if limit is not None and tokens > limit:
            raise ArgumentError(
                "tokens",
                f"got {tokens}, expected at most {limit}: what the model and the export (rmse-export --max-seq-len) allow",
            )
        self.runtime = runtime
        self.ids = ids
        self.dials = dials
        self.tokens = tokens
        calls = tokens // SEGMENT  # whole ones; what is left over is streamed but not timed
        # All room is taken before the first call: what grows later is not ours.
        self.seconds, self.loops, self.surprise = (np.full(calls, np.nan) for _ in range(3))
        self.parts = np.array_split(np.arange(-(-warm_up // SEGMENT), calls), TENTHS)  # calls of each tenth
        self.state_bytes_early = self.state_bytes = 0
        self.resident_first: int | None = None
        self.resident: int | None = None
        self.finite = True
        self.pairs: list[tuple[float, float]] = []  # seconds of a call from the early and from the late state

    def run(self, progress: Callable[[int], object] = lambda _: None) -> None:
        """Feed all of it from an empty past."""
        ends = {int(part[-1]) for part in self.parts}
        self.runtime.reset()
        early, late, limit = self._snapshot(), None, self.runtime.info.longest
        for call in range(len(self.seconds)):
            if call == self.parts[0][0]:
                early = self._snapshot()
            if limit is not None and self.runtime.position + 2 * SEGMENT > limit and late is None:
                late = self._snapshot()  # behind this there is no room for the call that the two are compared by
            start = perf_counter()
            fed = self._feed(call, SEGMENT)
            self.seconds[call] = perf_counter() - start
            self.loops[call] = fed.depth.mean()
            if fed.surprises:
                self.surprise[call] = fed.surprises[-1].value
            if call == min(EARLY // SEGMENT, len(self.seconds) - 1):
                self.state_bytes_early = self.runtime.state_bytes()
            if call == self.parts[0][-1]:
                self.resident_first = resident_bytes()[0]
            if call in ends:
                self.finite &= self._state_is_finite()
            progress(SEGMENT)
        late = self._snapshot() if late is None else late  # at the end of a segment, where calls can be whole again
        rest = self.tokens % SEGMENT
        if rest:
            self._feed(len(self.seconds), rest)
            progress(rest)
        self.finite &= self._state_is_finite()
        self.resident = resident_bytes()[0]
        self.state_bytes = self.runtime.state_bytes()
        self._compare(early, late)

    def _snapshot(self) -> tuple[int, Arrays]:
        return self.runtime.position, {name: array.copy() for name, array in self.runtime.tensors().items()}

    @property
    def paired_loops(self) -> int:
        """Loops of the calls that compare the states: what the stream needed on average, the same for both."""
        return min(self.runtime.info.max_loops, max(1, round(float(self.loops.mean()))))

    def _compare(self, early: tuple[int, Arrays], late: tuple[int, Arrays]) -> None:
        """The same tokens from both states in turns, at a fixed depth, so that both do the same work."""
        dials, end = Dials(self.paired_loops), self._snapshot()
        for pair in range(PAIRS + 1):
            ids = self.ids.take(np.arange(pair * SEGMENT, (pair + 1) * SEGMENT), mode="wrap")
            seconds = []
            for state in (early, late):
                self.runtime.restore(*state)
                start = perf_counter()
                self.runtime.feed(ids, dials, logits="last")
                seconds.append(perf_counter() - start)
            if pair:  # the first one warms up
                self.pairs.append((seconds[0], seconds[1]))
        self.runtime.restore(*end)

    def _feed(self, call: int, count: int) -> Fed:
        places = np.arange(call * SEGMENT, call * SEGMENT + count)
        fed = self.runtime.feed(self.ids.take(places, mode="wrap"), self.dials, logits="last")
        self.finite &= bool(np.isfinite(fed.logits).all())
        return fed

    def _state_is_finite(self) -> bool:
        return all(bool(np.isfinite(array).all()) for array in self.runtime.tensors().values())

    @property
    def tenths(self) -> list[Tenth]:
        remembers = bool(self.runtime.memory)
        return [
            Tenth(
                first=int(part[0]) * SEGMENT,
                end=int(part[-1] + 1) * SEGMENT,
                tok_per_s=SEGMENT / float(np.median(self.seconds[part])),
                mean_loops=float(self.loops[part].mean()),
                mean_surprise=float(self.surprise[part].mean()) if remembers else None,
            )
            for part in self.parts
        ]

    def summary(self) -> dict[str, Any]:
        """Under stable names. Growth is from the first tenth's end on; None where the system does not tell."""
        tenths = self.tenths
        known = self.resident is not None and self.resident_first is not None
        return {
            "stream_tokens": self.tokens,
            "text_tokens": len(self.ids),
            "warm_up_tokens": tenths[0].first,
            "tenths": [vars(tenth) for tenth in tenths],
            "speed_ratio": tenths[-1].tok_per_s / tenths[0].tok_per_s,
            "paired_speed_ratio": float(np.median([a / b for a, b in self.pairs])) if self.pairs else None,
            "paired_calls": len(self.pairs),
            "paired_loops": self.paired_loops,
            "rss_bytes_first_tenth": self.resident_first,
            "rss_bytes": self.resident,
            "rss_growth_bytes": self.resident - self.resident_first if known else None,  # type: ignore[operator]
            "state_bytes_early": self.state_bytes_early,
            "state_bytes": self.state_bytes,
            "finite": self.finite,
        }
