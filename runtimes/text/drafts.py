"""Where drafts come from: few loops of the model, its heads for multi-token prediction, or whichever makes more tokens a millisecond."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import mean, median
from weakref import WeakKeyDictionary

import numpy as np

from rmse_edge.loop.dials import Dials
from rmse_edge.runtimes.host.text import LoopRuntime

HEADS, AUTO, NOTHING = "heads", "auto", "nothing"
AUTO_LOOPS = (1, 2)  # that `Rates` tries: more cost more than they gain (docs/experiments/speculation)
TRIED = 5  # rounds of each source before the best is taken
AGAIN, LATEST = 24, 64  # rounds

Source = int | str  # loops of a draft, HEADS, or NOTHING
Feed = Callable[[int], np.ndarray]  # a token -> logits (V,) of what comes behind it


def shallow(wished: Dials, loops: int) -> Dials:
    """The dials of a draft of so many loops at most, for a text at `wished`."""
    loops = min(loops, wished.max_loops)
    return replace(wished, max_loops=loops, min_loops=min(wished.min_loops, loops))


@contextmanager
def drafting(runtime: LoopRuntime, source: Source, wished: Dials, count: int) -> Iterator[Feed]:
    """What guesses up to `count` tokens from where the text is; nothing of it stays."""
    if isinstance(source, int):
        dials = shallow(wished, source)
        with runtime.aside(count) as feed:
            yield lambda token: feed(token, dials)
    else:
        yield runtime.by_heads()


def label(source: Source) -> str:
    """As statistics have it: heads, nothing, 1 loop, 2 loops."""
    return source if isinstance(source, str) else f"{source} loop{'s' if source > 1 else ''}"


@dataclass
class Rate:
    """What rounds of one source gave. Of time the median counts: other work on the machine makes some rounds far too long."""

    rounds: int = 0
    tokens: deque[int] = field(default_factory=lambda: deque(maxlen=LATEST))
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=LATEST))

    def note(self, tokens: int, seconds: float) -> None:
        self.rounds += 1
        self.tokens.append(tokens)
        self.seconds.append(seconds)

    @property
    def per_ms(self) -> float:
        return mean(self.tokens) / (1000 * max(median(self.seconds), 1e-9)) if self.rounds else 0.0


@dataclass
class Rates:
    """Which source makes the most tokens a millisecond, on this machine and in this text: each is tried in turns, once untimed, since
    an engine's first call of a size prepares it, and `TRIED` times by the clock. From then on the best of their latest rounds makes the
    next one; every `AGAIN`th belongs to whichever was timed least, so that no bad luck lasts.

    The clock takes part in the choice, not in what is said: greedy texts are the same whatever is chosen, drawn ones have the same distribution,
    but at one seed two runs may draw differently.
    """

    found: dict[Source, Rate] = field(default_factory=dict)
    warm: set[Source] = field(default_factory=set)

    @classmethod
    def of(cls, runtime: LoopRuntime) -> Rates:
        """With every source that a runtime has."""
        loops: list[Source] = [n for n in AUTO_LOOPS if n < runtime.info.max_loops]
        heads: list[Source] = [] if runtime.info.drafting is None else [HEADS]
        return cls({source: Rate() for source in (*heads, *loops, NOTHING)})

    def choose(self) -> Source:
        least = min(self.found, key=lambda source: self.found[source].rounds)
        total = sum(rate.rounds for rate in self.found.values())
        if self.found[least].rounds < TRIED or total % AGAIN == AGAIN - 1:
            return least
        return max(self.found, key=lambda source: self.found[source].per_ms)

    def note(self, source: Source, tokens: int, seconds: float) -> None:
        """One round of a source: the tokens that the text gained, and what it took with all that had to be done for them."""
        if source not in self.warm:
            self.warm.add(source)
            return
        self.found[source].note(tokens, seconds)

    def statistics(self) -> dict[str, float]:
        return {label(source): rate.per_ms for source, rate in self.found.items()}


# What was found of a runtime, by tokens of a draft and dials: the next text goes on with it.
_KNOWN: WeakKeyDictionary[LoopRuntime, dict[tuple[int, Dials], Rates]] = WeakKeyDictionary()


def rates_of(runtime: LoopRuntime, tokens: int, dials: Dials) -> Rates:
    """What is known of drafts of so many tokens for texts at these dials."""
    known = _KNOWN.setdefault(runtime, {})
    if (tokens, dials) not in known:
        known[tokens, dials] = Rates.of(runtime)
    return known[tokens, dials]
