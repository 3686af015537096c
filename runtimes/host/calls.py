"""The calls of a model: how a text is cut into them, what one is, and what is kept between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rmse_edge.info import ModelInfo

from .base import Arrays, Methods

# Of models that are called with few rows and with many: up to this many, single calls beat a padded large one.
SINGLE_CALLS = 6


def plan_calls(
    position: int, count: int, chunks: tuple[int, ...], segment: int | None = 64, prefix: int = 0
) -> list[tuple[int, int]]:
    """Split `count` tokens from `position` on into calls (rows of the call, tokens in it).

    No call crosses a multiple of `segment` positions, so that a segment always ends with a call. The first `prefix` tokens
    are in one call, which `longest_prefix` says that there is.

    >>> plan_calls(60, 70, (1, 64))
    [(1, 1), (1, 1), (1, 1), (1, 1), (64, 64), (1, 1), (1, 1)]
    """
    calls: list[tuple[int, int]] = []
    largest = chunks[-1]
    while count > 0:
        n = min(count, largest) if segment is None else min(count, largest, segment - position % segment)
        if n <= SINGLE_CALLS and chunks[0] == 1 and (calls or prefix < 2):
            calls += [(1, 1)] * n
        else:
            calls.append((min(c for c in chunks if c >= n), n))
        position, count = position + n, count - n
    return calls


def longest_prefix(chunks: tuple[int, ...], segment: int | None) -> int:
    """Tokens that the prefix of a text may have, since all of it must be in one call."""
    return chunks[-1] if segment is None else min(chunks[-1], segment)


@dataclass
class Computed:
    """A call that was computed, and of which nothing is kept yet."""

    chunk: int  # rows of the call
    position: int  # of its first row
    n: int  # rows of it that are valid
    found: dict[str, Any]  # what its methods gave, as the engine has it
    givers: dict[str, str]  # which method gave each of them
    inputs: dict[str, Any]
    context: dict[str, Any]
    dials: dict[str, Any]


class Mark(NamedTuple):
    """What calls from a position on replace of what is kept."""

    position: int
    rows: int  # positions of these calls
    state: dict[str, Any]
    engine: Arrays


class Calls:
    """One call after the other on any target's `Methods`, and the tensors that are kept between them.

    The arrays are NumPy's, unless a subclass keeps its own kind where its engine reads them: `put` and `get` are then how
    they come there and back. What the engine itself keeps is in no array here; `kept_by_engine` says its names.
    """

    loop = "loop"  # the method that iterates

    def __init__(self, info: ModelInfo, methods: Methods) -> None:
        self.info, self.methods = info, methods
        own = {name: s for name, s in info.state.items() if name not in self.kept_by_engine()}
        self.slots = info.slots(0)  # of the appended state, as far as it has grown
        made = {name: self.put(np.zeros(s.of_slots(self.slots), s.dtype)) for name, s in own.items()}
        self.state = {name: array for name, array in made.items() if own[name].kind != "written"}
        self.memory = {name: array for name, array in made.items() if own[name].kind == "written"}
        # What the memory holds before a text begins.
        self.blank: dict[str, Any] = {}
        # Exit states since the last boundary: what the memory is going to be taught.
        self.segment: Any = None
        if self.memory:
            assert info.segment is not None
            blank = methods.run("blank", info.segment, {})
            self.blank = {name: self.put(np.array(array)) for name, array in blank.items()}
            self.segment = self.put(np.zeros((1, info.segment, info.width), np.float32))

    # ------------------------------------------------------------------------------------------ where arrays are

    def put(self, array: np.ndarray) -> Any:
        """An array of the host's as the engine reads it."""
        return array

    def give(self, name: str, array: np.ndarray) -> Any:
        """What a call is told by this name, for this call alone, as the engine reads it."""
        return self.put(array)

    def get(self, array: Any) -> np.ndarray:
        """An array of the engine's as the host reads it; a view where that is possible."""
        return array

    def copied(self, array: Any) -> Any:
        """A copy of an array of the engine's."""
        return np.array(array)

    def kept_by_engine(self) -> frozenset[str]:
        """The names of state that the engine keeps where nobody else sees it."""
        return frozenset()

    def read_engine(self) -> Arrays:
        """What the engine keeps, by name."""
        return {}

    def write_engine(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Replace what the engine keeps."""

    # ------------------------------------------------------------------------------------------ what is kept

    def grow(self, positions: int) -> None:
        """Give the appended state the slots that a text of so many positions has: more, or fewer after a reset."""
        if self.slots is None or (slots := self.info.slots(positions)) == self.slots:
            return
        for name, state in self.info.state.items():
            if state.kind == "append" and name in self.state:
                old, new = self.state[name], self.put(np.zeros(state.of_slots(slots), state.dtype))
                both = min(old.shape[-2], new.shape[-2])
                new[..., :both, :] = old[..., :both, :]
                self.state[name] = new
        self.slots = slots

    def reset(self) -> None:
        self.grow(0)
        # Slots are masked by position, so what they hold does not matter; zeroed all the same, to be reproducible.
        for array in self.state.values():
            array[...] = 0
        kept = {name: self.info.state[name] for name in self.kept_by_engine()}
        if kept:
            self.write_engine({name: np.zeros(s.shape, s.dtype) for name, s in kept.items()})
        for name, array in self.memory.items():
            array[...] = self.blank[name]
        if self.segment is not None:
            self.segment[...] = 0

    def tensors(self, position: int) -> Arrays:
        """All that is kept at `position`; of what is not the engine's, views where that is possible.

        Of what is appended only the slots that are filled: how many there are besides is every host's own.
        """
        own = self.state | self.memory | ({} if self.segment is None else {"segment": self.segment})
        found = self.read_engine() | {name: self.get(array) for name, array in own.items()}
        return {name: array[..., :position, :] if self._appended(name) else array for name, array in found.items()}

    def restore(self, position: int, tensors: Mapping[str, np.ndarray]) -> None:
        """Put back what `tensors` gave at `position`."""
        self.grow(position)
        for name, array in (self.state | self.memory).items():
            filled = array[..., :position, :] if self._appended(name) else array
            filled[...] = self.put(tensors[name])
        if self.segment is not None:
            self.segment[...] = self.put(tensors["segment"])
        if self.kept_by_engine():
            own = {
                name: np.zeros(self.info.state[name].shape, self.info.state[name].dtype)
                for name in self.kept_by_engine()
            }
            for name, array in own.items():
                (array[..., :position, :] if self._appended(name) else array)[...] = tensors[name]
            self.write_engine(own)

    def _appended(self, name: str) -> bool:
        return name in self.info.state and self.info.state[name].kind == "append"

    # ------------------------------------------------------------------------------------------ calls

    any_rows = False  # whether a call may have any number of rows, and not only `ModelInfo.chunks`

    def compute(
        self,
        chunk: int,
        inputs: Arrays,
        context: Arrays,
        dials: Arrays,
        position: int,
        n: int,
        head: bool,
        instead: Arrays | None = None,
    ) -> Computed:
        """One call up to its head. Nothing is kept of it yet; another of as many rows may replace what it gave.

        Args:
            inputs: tokens, hits, noise.
            context: where the call stands.
            n: rows of it that are valid.
            instead: of a call in which nothing iterates: what the loop gives then. Engines' loops run at least once.
        """
        sides = (inputs, context, dials)
        given = [{name: self.give(name, array) for name, array in side.items()} for side in sides]
        call = Computed(chunk, position, n, {}, {}, *given)
        for method in ("prelude", self.loop, "coda", "head"):
            if method == self.loop and instead is not None:
                call.found |= {name: self.put(array) for name, array in instead.items()}
                call.givers |= dict.fromkeys(instead, method)
            elif (method != "coda" or method in self.info.methods) and (method != "head" or head):
                self._ask(call, method)
        return call

    def _ask(self, call: Computed, method: str) -> None:
        """Have a method say its part of a call."""
        around = call.context | self.state | self.memory
        if method == "prelude":
            feeds = call.inputs | around
        elif method == "head":
            feeds = call.found
        else:
            feeds = call.found | around | (call.dials if method == self.loop else {})
        said = self.methods.run(method, call.chunk, feeds)
        call.found |= said
        call.givers |= dict.fromkeys(said, method)

    def said(self, call: Computed, also: tuple[str, ...] = ()) -> Arrays:
        """depth, iterations, what `also` names and, of a call with a head, what head gave."""
        named = ("depth", "iterations", *also)
        wanted = [name for name, giver in call.givers.items() if giver == "head" or name in named]
        return {name: self.get(call.found[name]) for name in wanted}

    def draft(self, index: int, state: Any, token: int) -> tuple[Any, np.ndarray]:
        """One head that drafts: the state (1, 1, d) before a token, and the token -> (the next state, logits (V,))."""
        assert self.info.drafting is not None
        tokens = self.give("tokens", np.array([[token]], np.int64))
        drafted = self.methods.run(f"draft{index}", 1, {"h": state, "tokens": tokens})["drafted"]
        said = self.methods.run("head", 1, {self.info.drafting.reads: drafted})
        return self.copied(drafted), self.get(said["logits"])[0, 0].copy()

    def keep(self, call: Computed, n: int, note: bool = True) -> None:
        """Take the first `n` rows of a call into what is kept, as if it had had no more.

        Args:
            note: False leaves the segment as it is, which the memory is going to be taught.
        """
        if n < call.n:
            call.n, call.context = n, call.context | {"n_valid": self.give("n_valid", np.array([n], np.int64))}
            # What is replaced has taken in every row, so what gave it is asked again. Commit reads what the loop emits, which
            # may be sums over the rows: the loop, too. Rows before the n-th stay what they are.
            replaced = {s.source for s in self.info.state.values() if s.kind == "replace"}
            again = {call.givers.get(name, self.loop) for name in replaced}
            for method in ("prelude", self.loop, "coda"):
                if method in again:
                    self._ask(call, method)
        if "commit" in self.info.methods:
            self._ask(call, "commit")
        self.update(call.found, call.position, n)
        if note:
            self.note(call.found["h"], call.position, n)

    def mark(self, position: int, count: int) -> Mark:
        """What calls of `count` positions from `position` on are going to replace; `back` undoes them.

        Slots that positions are appended to are not in it: what lies behind a text is seen by nobody.
        """
        kept = {}
        for name, array in self.state.items():
            kind = self.info.state[name].kind
            if kind == "replace":
                kept[name] = self.copied(array)
            elif kind == "ring":
                kept[name] = self.copied(array[..., self._slots(array, position, count), :])
        engine = {name: np.array(array) for name, array in self.read_engine().items()}
        return Mark(position, count, kept, engine)

    def back(self, mark: Mark) -> None:
        """Have everything as it was when `mark` was made; of calls since then nothing may have been noted."""
        for name, kept in mark.state.items():
            array = self.state[name]
            if self.info.state[name].kind == "replace":
                array[...] = kept
            else:
                array[..., self._slots(array, mark.position, mark.rows), :] = kept
        if mark.engine:
            self.write_engine(mark.engine)

    @staticmethod
    def _slots(ring: Any, position: int, count: int) -> list[int]:
        """The slots of a ring that these positions are written into."""
        size = ring.shape[-2]
        return [(position + i) % size for i in range(min(count, size))]

    def update(self, found: Mapping[str, Any], position: int, n: int) -> None:
        """Take what a call gave for its `n` tokens into the state, as each tensor's kind says."""
        self.grow(position + n)
        for name, array in self.state.items():
            state = self.info.state[name]
            given = found[state.source]
            if state.kind == "replace":
                array[...] = given
                continue
            size = array.shape[-2]
            first = max(0, n - size)
            start = (position + first) % size  # an appended position is below the size: `LoopRuntime` checks it
            until = min(size, start + n - first)  # the rest of the call begins at slot 0 again
            middle = first + until - start
            array[..., start:until, :] = given[..., first:middle, :]
            array[..., : n - middle, :] = given[..., middle:n, :]

    def note(self, h: Any, position: int, n: int) -> None:
        """Put the exit states of a call's `n` tokens into their rows of the segment."""
        if self.segment is not None:
            assert self.info.segment is not None
            row = position % self.info.segment
            self.segment[:, row : row + n] = h[:, :n]

    def memorize(self, count: int, learn: bool) -> Arrays:
        """The surprise at the first `count` exit states of the segment, and the statistics before; with `learn` the
        memory takes them in.
        """
        assert self.info.segment is not None
        stats = np.array(self.get(self.memory["surprise_stats"]))
        found = self.methods.run("memorize", self.info.segment, self.latest(count) | self.memory)
        if learn:
            for name, array in self.memory.items():
                array[...] = found[f"next_{name}"]
        return {"surprise_stats": stats, "surprise": self.get(found["surprise"])}

    def embed_segment(self, count: int) -> Arrays:
        """Key, query and value of the first `count` exit states of the segment."""
        assert self.info.segment is not None
        found = self.methods.run("embed_segment", self.info.segment, self.latest(count))
        return {name: self.get(array) for name, array in found.items()}

    def latest(self, count: int) -> dict[str, Any]:
        """The segment as `memorize` and `embed_segment` take it."""
        return {"segment": self.segment, "n_valid": self.put(np.array([count], np.int64))}

    def read_alone(self, inputs: Arrays, context: Arrays, dials: Arrays) -> Arrays:
        """Key, query and value of a passage, read from an empty past by one call of a segment's size; nothing is kept."""
        assert self.info.segment is not None
        rows = self.info.segment
        given = {name: self.put(array) for name, array in (inputs | context | dials).items()}
        # From position 0 no ring is seen, whatever it holds: what an engine keeps stays there, what a host gives is asked for.
        kept = {name: self.info.state[name] for name in self.state}
        nothing = {name: self.put(np.zeros(s.of_slots(self.slots), s.dtype)) for name, s in kept.items()}
        found = self.methods.run("prelude", rows, given | nothing | self.blank)
        h = self.methods.run(self.loop, rows, given | found | nothing | self.blank)["h"]
        said = self.methods.run("embed_segment", rows, {"segment": h, "n_valid": given["n_valid"]})
        return {name: self.get(array) for name, array in said.items()}


class Opened(NamedTuple):
    """A package as its engine opened it: what a host is made of."""

    info: ModelInfo
    methods: Methods
    calls: type[Calls] = Calls
    loop: str = "loop"  # the method that iterates
