"""Speculative decoding: tokens are drafted cheaply, by the model itself, and one call verifies them at the wished dials.

    drafts d_1 .. d_m   one by one, by few loops or by the model's heads (drafts.py)
    one call            t d_1 .. d_m, where t is the newest token of the text -> what comes behind each of them
    the text            gains the drafts up to the first that is refused, and one token more, which that call says

Greedy tokens are those of plain decoding. Drawn ones have its distribution, by the rule of Leviathan et al. 2023 (`Sampler.verify`),
but are others than without speculation at the same seed. What a draft does to the state is undone, and of a call only the rows
of accepted tokens are kept, so a text leaves behind what it would have left without (`LoopRuntime.aside`, `ahead`, `accept`).

Drafting with fewer loops or layers of the same model is self-speculation: Elhoushi et al. 2024, LayerSkip, arXiv 2404.16710. Heads:
rmse_edge/layers/mtp.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from rmse_edge.errors import ArgumentError
from rmse_edge.loop.dials import Dials
from rmse_edge.numbers import DRAFT_TOKENS
from rmse_edge.runtimes.host.text import Ahead, LoopRuntime

from .drafts import AUTO, HEADS, NOTHING, Rates, Source, drafting, rates_of
from .sampling import Sampler

MOST_TOKENS = 63  # the newest token and these are a call of 64 rows, the largest that models have


@dataclass(frozen=True)
class Speculation:
    """How drafts are made. Checked once here, but for what depends on the model: `check`.

    Raises:
        ArgumentError: naming the setting and its range.
    """

    # Loops of a draft at most, where the dials of the text do not stop it before; "heads": the model's heads; "auto": whichever of
    # these, or no draft, makes the most tokens a millisecond.
    source: int | str
    tokens: int = DRAFT_TOKENS  # of a draft, at most

    def __post_init__(self) -> None:
        if isinstance(self.source, str) and self.source not in (HEADS, AUTO):
            raise ArgumentError("speculate", f"got {self.source!r}, expected a number of loops, {HEADS} or {AUTO}")
        if not 1 <= self.tokens <= MOST_TOKENS:
            raise ArgumentError("draft_tokens", f"got {self.tokens}, expected 1..{MOST_TOKENS}")

    def check(self, runtime: LoopRuntime) -> Speculation:
        """Itself, if the runtime can do it.

        Raises:
            ArgumentError: the loops are not fewer than the model has, it has no heads, or calls of one position alone.
        """
        most = runtime.info.max_loops - 1
        if isinstance(self.source, int) and not 1 <= self.source <= most:
            raise ArgumentError(
                "speculate", f"got {self.source}, expected 1..{most}, fewer loops than {runtime.info.name} has"
            )
        if self.source == HEADS:
            runtime.check_heads()
        runtime.room_ahead(2)
        return self


@dataclass
class Speculator:
    """Drafts and verifies for one text."""

    runtime: LoopRuntime
    sampler: Sampler
    speculation: Speculation
    iterations: list[int] = field(init=False, default_factory=list)  # of every call at the wished dials: of every round
    drafted: int = field(init=False, default=0)
    accepted: int = field(init=False, default=0)
    made: int = field(init=False, default=0)  # tokens, of all rounds
    _ahead: Ahead | None = field(init=False, default=None)  # of the round whose tokens are being taken
    _taken: int = field(init=False, default=0)
    _source: Source = field(init=False, default=NOTHING)  # of that round
    _spent: float = field(init=False, default=0.0)  # on that round, s
    _rates: Rates | None = field(init=False, default=None)  # of "auto"

    def __post_init__(self) -> None:
        self.speculation.check(self.runtime)

    def round(self, newest: int, dials: Dials, most: int, end: Collection[int] = ()) -> Iterator[tuple[int, int]]:
        """The next tokens with their depths, at least one; `settle` before anything else is asked of the runtime.

        Args:
            newest: the last token of the text, which was not fed yet.
            most: tokens that are wanted.
            end: tokens that end the text: nothing comes behind one.
        """
        start = perf_counter()
        runtime, unused = self.runtime, self.runtime.info.language.unused_token_ids
        source = self.speculation.source
        if source == AUTO:
            self._rates = rates_of(runtime, self.speculation.tokens, dials)
            source = self._rates.choose()
        count = runtime.room_ahead(min(self.speculation.tokens + 1, most)) - 1 if source != NOTHING else 0
        drafts: list[tuple[int, Any]] = []
        if count > 0:
            token = newest
            with drafting(runtime, source, dials, count) as feed:
                while len(drafts) < count and token not in end:
                    token, weights = self.sampler.draft(feed(token), unused)
                    drafts.append((token, weights))
        ahead = runtime.ahead([newest, *(token for token, _ in drafts)], dials)
        tokens: list[int] = []
        for row, (draft, weights) in enumerate(drafts):
            tokens.append(self.sampler.verify(ahead.logits[row], draft, weights, unused))
            if tokens[-1] != draft or draft in end:
                break
        else:
            tokens.append(self.sampler.pick(ahead.logits[len(drafts)], unused))
        self._ahead, self._taken, self._source = ahead, 0, source
        self.iterations.append(ahead.iterations)
        self.drafted += len(drafts)
        self._spent = perf_counter() - start
        for row, token in enumerate(tokens):
            self._taken += 1
            self.made += 1
            self.accepted += row < len(drafts) and token == drafts[row][0]
            yield token, int(ahead.depth[row])

    def settle(self) -> None:
        """Keep what the tokens that were taken of the last round have read, and forget its others."""
        if self._ahead is not None:
            start = perf_counter()
            ahead, self._ahead = self._ahead, None
            self.runtime.accept(ahead, self._taken)
            if self._rates is not None:
                self._rates.note(self._source, self._taken, self._spent + perf_counter() - start)

    def statistics(self) -> dict[str, Any]:
        """`tokens_per_round` is the acceptance length: tokens for one call at the wished dials. `tokens_per_ms` is of "auto": of every
        source that was tried.
        """
        rounds, source = len(self.iterations), self.speculation.source
        return {
            "drafts": "loops" if isinstance(source, int) else source,
            "draft_loops": source if isinstance(source, int) else None,
            "draft_tokens": self.speculation.tokens,
            "rounds": rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "tokens_per_round": self.made / rounds if rounds else None,
            **({} if self._rates is None else {"tokens_per_ms": self._rates.statistics()}),
        }
