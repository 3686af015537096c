"""A text on any target: positions, angles, hits, and what the memory says; rmse_edge/runtimes/host/calls.py has the calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from rmse_edge.errors import ArgumentError, UserError
from rmse_edge.info import LARGEST_STATE, DraftingInfo, ModelInfo, TextInfo
from rmse_edge.layers.rope import given_angles
from rmse_edge.loop.dials import Dials
from rmse_edge.loop.generator import starts
from rmse_edge.numbers import PREFIX, PROMPT, SLOTS

from .base import Arrays, Fed, Methods, Surprise
from .calls import Calls, Computed, longest_prefix, plan_calls


@dataclass(frozen=True)
class Ahead:
    """Tokens that were computed in one call, and of which nothing is kept yet."""

    call: Computed
    logits: np.ndarray  # (n, V) float32, behind each of them
    depth: np.ndarray  # (n,) int64: iterations each position executed
    iterations: int  # the deepest position's


class LoopRuntime:
    """`Runtime` on top of any target's `Calls`."""

    def __init__(self, info: ModelInfo, methods: Methods, calls: type[Calls] = Calls, loop: str = "loop") -> None:
        if info.blocks is not None:
            raise UserError(
                f"{info.name}: writes by blocks, not token by token; rmse-run MODEL -p TEXT is what runs it"
            )
        if info.text is None:
            raise UserError(
                f"{info.name}: fills in boards and reads no text; give it boards (rmse-run MODEL --board FILE, rmse-eval MODEL "
                "--boards FILE.csv)"
            )
        if info.kept_bytes() > LARGEST_STATE:
            raise UserError(
                f"{info.name}: keeps {info.kept_bytes()} bytes between calls, for {info.window or info.capacity} positions and "
                f"{info.max_loops} loops; at most {LARGEST_STATE} (4 GiB) are supported, lower window in its config.json"
            )
        self.info = info
        self.calls = calls(info, methods)
        self.calls.loop = loop
        self.retrieved = _no_hits(info)
        self.remember = True  # False: nothing more is learned
        self.noise_seed = 0  # of what a model begins from, where that is noise
        self.whole = True  # False after a call that was broken off: what is kept belongs to no moment of the text
        # Called after every segment, before it is forgotten.
        self.on_surprise: Callable[[Surprise], object] | None = None
        self._position = 0
        self._exit: Any = None  # the state (1, 1, d) that the newest position stopped with, of models with heads
        self._prefix = 0  # tokens of the prefix that the calls of this `feed` are told of
        self._prompt = 0  # likewise, of what a plan is made of
        self.reset()

    @property
    def methods(self) -> Methods:
        return self.calls.methods

    @methods.setter
    def methods(self, methods: Methods) -> None:
        self.calls.methods = methods

    @property
    def state(self) -> dict[str, Any]:
        """What is kept between calls by the host, but for the memory, as the methods read it."""
        return self.calls.state

    @property
    def memory(self) -> dict[str, Any]:
        """The neural memory, as the methods read it; empty: there is none."""
        return self.calls.memory

    @property
    def position(self) -> int:
        return self._position

    def reset(self) -> None:
        self.calls.reset()
        self.inject(None)
        self._position = 0
        self._exit = None
        self.whole = True

    def expert_figures(self, tokens: int) -> dict[str, Any] | None:
        """What a budget for experts did since `clear_expert_figures`, per token of so many; None: there is no budget."""
        return None

    def clear_expert_figures(self) -> None:
        """Begin them anew."""

    def tensors(self) -> Arrays:
        """All that is kept between calls, but for the position; views where that is possible. See `Calls.tensors`."""
        return self.calls.tensors(self._position) | self.retrieved

    def forms(self, position: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shapes and types of what `tensors` gives at a position."""
        filled = {name: state.of_slots(position) for name, state in self.info.state.items() if state.kind == "append"}
        return {name: (filled.get(name, array.shape), array.dtype) for name, array in self.tensors().items()}

    def restore(self, position: int, tensors: Arrays) -> None:
        """Go on from what `tensors` gave at `position`.

        Raises:
            ValueError: names, shapes or types are not this model's; nothing was changed.
        """
        got, expected = {k: (v.shape, v.dtype) for k, v in tensors.items()}, self.forms(position)
        if got != expected:
            raise ValueError(f"state: got {got}, expected {expected}")
        self.calls.restore(position, tensors)
        for name, array in self.retrieved.items():
            np.copyto(array, tensors[name])
        self._position = position
        self._exit = None
        self.whole = True

    def state_bytes(self) -> int:
        others = [*self.retrieved.values(), *([] if self.calls.segment is None else [self.calls.segment])]
        return self.info.kept_bytes(self._position) + sum(array.nbytes for array in others)

    def feed(
        self, tokens: Sequence[int] | np.ndarray, dials: Dials, logits: str = "all", prefix: int = 0, prompt: int = 0
    ) -> Fed:
        """As of `Runtime`.

        Args:
            prompt: of a text that begins with these tokens, of how many of them its plan is made; 0: all, as far as one call
                takes them. For models with a plan.
        """
        ids = self._checked(tokens)
        self.info.check(dials)
        self._check_prefix(prefix, len(ids))
        self._prefix, self._prompt = prefix, self._planned_by(prompt, len(ids))
        rows, depths, iterations, chunks, surprises = [], [], [], [], []
        done = 0
        self.whole = False
        for chunk, n in plan_calls(
            self._position, len(ids), self.info.chunks, self.info.segment, max(prefix, self._prompt)
        ):
            last = done + n == len(ids)
            out = self._call(chunk, ids[done : done + n], dials, head=logits == "all" or last)
            depths.append(out["depth"][0, :n].copy())
            iterations.append(int(out["iterations"]))
            chunks.append(chunk)
            if "logits" in out:
                rows.append(out["logits"][0, (0 if logits == "all" else n - 1) : n].copy())
            done += n
            surprises += self._end_segment()
        self.whole = True
        return Fed(np.concatenate(rows), np.concatenate(depths), iterations, chunks, surprises)

    def _checked(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = self._valid_ids(tokens)
        count, limit, room = self._position + len(ids), self.info.language.max_seq_len, self.info.room
        if limit is not None and count > limit:
            raise UserError(
                f"{count} tokens are more than the {limit} this package was exported for "
                "(rmse-export --max-seq-len); shorten the prompt or export again"
            )
        if room is not None and count > room:
            raise UserError(
                f"{count} tokens are more than the {room} that {self.info.name} "
                + ("attends to" if room == self.info.capacity else "can keep in 4 GiB")
                + "; shorten the text"
            )
        return ids

    def _valid_ids(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = np.asarray(tokens, np.int64)
        if ids.ndim != 1 or not len(ids):
            raise UserError("no tokens to run; give a prompt of at least one token")
        if ids.min() < 0 or ids.max() >= self.info.vocab_size:
            raise UserError(f"token {ids[(ids < 0) | (ids >= self.info.vocab_size)][0]} is outside the vocabulary "
                            f"(0..{self.info.vocab_size - 1})")  # fmt: skip
        return ids

    def _check_prefix(self, prefix: int, count: int) -> None:
        """Fail where the first `prefix` of `count` tokens cannot be read as a prefix."""
        if not prefix:
            return
        if not self.info.language.prefix:
            raise ArgumentError("prefix", f"{self.info.name} has none: each of its positions sees those before it")
        if self._position:
            raise ArgumentError("prefix", f"is the beginning of a text, and {self._position} tokens were fed before")
        if not 0 < prefix <= count:
            raise ArgumentError("prefix", f"got {prefix}, expected 0..{count}, of the tokens that are fed")
        most = longest_prefix(self.info.chunks, self.info.segment)
        if prefix > most:
            raise ArgumentError(
                "prefix",
                f"{prefix} tokens are more than the {most} that one call of {self.info.name} has, and a prefix must be in "
                "one; shorten it, leave it out, or raise longest_prefix in config.json",
            )

    def _planned_by(self, prompt: int, count: int) -> int:
        """Of how many of `count` tokens the plan is made of the text that they begin; 0: they begin none, or there is no plan.

        Raises:
            ArgumentError: `prompt` is none that the model can read, or it reads none here.
        """
        plan = self.info.plan
        if prompt and (plan is None or self._position):
            what = "makes no plan of a prompt" if plan is None else f"has its plan since {self._position} tokens ago"
            raise ArgumentError("prompt", f"{self.info.name} {what}; leave it out")
        if plan is None or self._position:
            return 0
        most = min(count, plan.prompt)
        if not 0 <= prompt <= most:
            raise ArgumentError("prompt", f"got {prompt}, expected 0..{most}, of the tokens that are fed")
        return prompt or most

    def context(self, chunk: int, n: int, position: int | None = None) -> Arrays:
        """What a call of `chunk` rows, `n` of them valid, is told about where it stands (here, by default)."""
        position = self._position if position is None else position
        text: TextInfo = self.info.language
        places = position + np.arange(chunk)[None]  # (1, C)
        angles: Arrays = given_angles(places, text.rotary_dims, text.rope_theta, text.further_thetas)
        slots: Arrays = {} if self.calls.slots is None else {SLOTS: self._slots(self.calls.slots)}
        known: Arrays = {PREFIX: np.array([self._prefix], np.int64)} if text.prefix else {}
        known |= {} if self.info.plan is None else {PROMPT: np.array([max(1, self._prompt)], np.int64)}
        known |= {"position": np.array([position], np.int64), "n_valid": np.array([n], np.int64)}
        return angles | slots | known

    @staticmethod
    @lru_cache(maxsize=1)
    def _slots(count: int) -> np.ndarray:
        """The same array until there are more: what is bound to an engine need not be bound again."""
        return np.arange(count)

    def inputs(self, chunk: int, ids: np.ndarray, position: int | None = None, hits: Arrays | None = None) -> Arrays:
        """What a call of `chunk` rows reads that begins at `position` (here, by default): tokens, hits and noise.

        Args:
            ids: at most `chunk`; the rows behind them are padding.
            hits: other ones than those of `inject`.
        """
        tokens = np.zeros((1, chunk), np.int64)
        tokens[0, : len(ids)] = ids
        start = self._position if position is None else position
        return {"tokens": tokens} | (self.retrieved if hits is None else hits) | self._noise(chunk, start)

    def _noise(self, chunk: int, position: int) -> Arrays:
        """Every row belongs to its position, so that it does not matter how a text is cut into calls."""
        found = starts(self.info.noise, self.noise_seed, range(position, position + chunk), self.info.width)
        return {name: rows[None] for name, rows in found.items()}

    def _call(self, chunk: int, ids: np.ndarray, dials: Dials, head: bool) -> Arrays:
        """One call with `ids`, which move the position on."""
        call = self._computed(chunk, ids, dials, head)
        self._keep(call, len(ids))
        return self.calls.said(call)

    def _keep(self, call: Computed, count: int) -> None:
        """Take the first `count` rows of a call into the text."""
        self.calls.keep(call, count)
        self._position += count
        if self.info.drafting is not None:
            self._exit = self.calls.copied(call.found["h"][:, count - 1 : count])

    def _computed(self, chunk: int, ids: np.ndarray, dials: Dials, head: bool = True) -> Computed:
        context, inputs = self.context(chunk, len(ids)), self.inputs(chunk, ids)
        return self.calls.compute(chunk, inputs, context, dials.arrays(), self._position, len(ids), head)

    def _end_segment(self) -> list[Surprise]:
        """What is to be done where a segment ends, and the surprise at it; nothing anywhere else."""
        if self.info.segment is None or self._position % self.info.segment:
            return []
        self.inject(None)  # hits are there until the next boundary
        return [self._memorize()] if self.memory and self.remember else []

    # ------------------------------------------------------------------------------------------ ahead of the text

    def room_ahead(self, count: int) -> int:
        """How many of `count` tokens `ahead` takes from here: as many as there is room for, and none of another segment.

        Raises:
            ArgumentError: the model has calls of one position alone, or a plan, which drafts would have to leave aside.
        """
        if self.info.plan is not None:
            raise ArgumentError(
                "speculate", f"{self.info.name} runs its texts by a plan, which no shallower draft has; leave it out"
            )
        if not self.calls.any_rows and self.info.chunks == (1,):
            raise ArgumentError(
                "speculate",
                f"{self.info.name} takes one position at a time, since each reads what the one before left behind, and nothing "
                "can be verified together; leave it out",
            )
        rooms = [count, count if self.calls.any_rows else self.info.chunks[-1]]
        if self.info.longest is not None:
            rooms.append(self.info.longest - self._position)
        if self.info.segment is not None:
            rooms.append(self.info.segment - self._position % self.info.segment)
        return min(rooms)

    def ahead(self, tokens: Sequence[int] | np.ndarray, dials: Dials) -> Ahead:
        """Compute the tokens that may come next, in one call, and keep nothing of them before `accept`.

        Args:
            tokens: at most as many as `room_ahead` says.
        """
        ids = self._checked(tokens)
        self._prefix = 0
        sizes = (len(ids),) if self.calls.any_rows else self.info.chunks
        call = self._computed(min(size for size in sizes if size >= len(ids)), ids, self.info.check(dials))
        out = self.calls.said(call)
        n = len(ids)
        return Ahead(call, out["logits"][0, :n].copy(), out["depth"][0, :n].copy(), int(out["iterations"]))

    def accept(self, ahead: Ahead, count: int) -> list[Surprise]:
        """Keep the first `count` tokens of `ahead`, as if these alone had been fed. Nothing may have been fed in between."""
        if ahead.call.position != self._position:
            raise ValueError(f"computed at position {ahead.call.position}, and the text is at {self._position}")
        self.whole = False
        self._keep(ahead.call, count)
        surprises = self._end_segment()
        self.whole = True
        return surprises

    @contextmanager
    def aside(self, count: int) -> Iterator[Callable[[int, Dials], np.ndarray]]:
        """Try how the text might go on, up to `count` tokens, no more than `room_ahead`; afterwards it is as if nothing had
        been tried.

        The block is given what feeds a token, at any dials, and returns its logits, (V,).
        """
        position, mark = self._position, self.calls.mark(self._position, count)
        self._prefix = 0
        self.whole = False

        def feed(token: int, dials: Dials) -> np.ndarray:
            call = self._computed(1, np.array([token]), dials)
            self.calls.keep(call, 1, note=False)  # the segment is not told: it holds the text alone
            self._position += 1
            return self.calls.said(call)["logits"][0, 0]

        try:
            yield feed
        finally:
            self.calls.back(mark)
            self._position = position
            self.whole = True

    def check_heads(self) -> DraftingInfo:
        """
        Raises:
            ArgumentError: the model, as it is run here, has no heads that draft.
        """
        if (heads := self.info.drafting) is None:
            raise ArgumentError(
                "speculate",
                f"{self.info.name} has no heads that draft; train some (rmse-train --stage mtp) and run or export that, for onnx "
                "or executorch, or give a number of loops",
            )
        return heads

    def by_heads(self) -> Callable[[int], np.ndarray]:
        """What tries how the text might go on by the model's heads: given the newest token, then one draft after the other, it
        returns what comes behind each, (V,). Nothing of it is kept anywhere. Behind the last head's guess the last one goes on.

        Raises:
            ArgumentError: the model has no heads.
        """
        heads = self.check_heads()
        if self._exit is None:
            raise ValueError("the text has no newest position: nothing was fed since it began or was restored")
        state, known = self._exit, 0

        def feed(token: int) -> np.ndarray:
            nonlocal state, known
            state, logits = self.calls.draft(min(known, heads.heads - 1), state, token)
            known += 1
            return logits

        return feed

    # ------------------------------------------------------------------------------------------ memory, retrieval

    def _memorize(self) -> Surprise:
        """Teach the memory the segment that was just completed."""
        assert self.info.segment is not None
        surprise = self._surprise(self.info.segment, learn=True)
        if self.on_surprise is not None:
            self.on_surprise(surprise)
        return surprise

    def _surprise(self, count: int, learn: bool) -> Surprise:
        found = self.calls.memorize(count, learn)
        mean, variance, segments = (float(x) for x in found["surprise_stats"][0])
        value = float(found["surprise"][0])
        return Surprise(self._position, value, mean, max(variance, 0.0) ** 0.5, segments)

    def _begun(self) -> int:
        """Tokens of the segment that is not complete."""
        return self._position % self.info.segment if self.info.segment else 0

    def peek(self) -> Surprise | None:
        """The surprise of the unfinished segment, with nothing learned; None where it is empty."""
        count = self._begun()
        return self._surprise(count, learn=False) if self.memory and count else None

    def query(self) -> np.ndarray:
        """What the latest segment searches for: the unfinished one, or at a boundary the one before. (key_dims,)."""
        return self.calls.embed_segment(self._begun() or self.info.segment or 0)["query"][0].copy()

    def inject(self, values: np.ndarray | None, scores: np.ndarray | None = None) -> None:
        """Let the following tokens, up to the next boundary, read these hits.

        Args:
            values: (n, slots, d), best first; None: nothing.
            scores: (n,) cosines by which they were found; 1 without.
        Raises:
            ValueError: more hits than the model has room for, or vectors of another shape.
        """
        if values is not None:
            space, width = self.info.retrieval, self.info.width
            if space is None:
                raise ValueError("the model has no retrieval head")
            if values.ndim != 3 or values.shape[1:] != (space["slots"], width) or len(values) > space["hits"]:
                expected = f"(n, {space['slots']}, {width}), n at most {space['hits']}"
                raise ValueError(f"hits: got {values.shape}, expected {expected}")
        for array in self.retrieved.values():
            array.fill(0)
        if values is not None:
            rows = values.reshape(-1, width)
            cosines = np.ones(len(values)) if scores is None else scores
            self.retrieved["retrieved"][0, : len(rows)] = rows
            self.retrieved["retrieved_scores"][0, : len(rows)] = np.repeat(cosines, values.shape[1])
            self.retrieved["retrieved_valid"][0, : len(rows)] = True

    def embed(self, tokens: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A passage of 1 to 64 tokens as a knowledge base holds it: key (key_dims,), value (slots, d).

        It is read from an empty past at the checkpoint's own dials; what was fed stays as it is.

        Raises:
            UserError: the model has no retrieval head, or there are too many tokens or none.
        """
        found = self._read_alone(tokens)
        return found["key"][0].copy(), found["value"][0].copy()

    def embed_query(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """What a text of 1 to 64 tokens, read alone, searches for: (key_dims,). Errors as in `embed`."""
        return self._read_alone(tokens)["query"][0].copy()

    def _read_alone(self, tokens: Sequence[int] | np.ndarray) -> Arrays:
        ids = self._valid_ids(tokens)
        if self.info.retrieval is None:
            raise UserError(f"{self.info.name} has no retrieval head (retrieval_slots in its config.json)")
        segment = self.info.segment
        assert segment is not None  # a retrieval head is asked by a memory
        if len(ids) > segment:
            raise UserError(f"a passage of {len(ids)} tokens; expected at most {segment}")
        context = self.context(segment, len(ids), position=0)
        inputs = self.inputs(segment, ids, position=0, hits=_no_hits(self.info))
        return self.calls.read_alone(inputs, context, self.info.dials.arrays())


def _no_hits(info: ModelInfo) -> Arrays:
    """The inputs of prelude that say that nothing was retrieved; empty for a model without retrieval."""
    if info.retrieval is None:
        return {}
    rows = int(info.retrieval["slots"] * info.retrieval["hits"])
    return {
        "retrieved": np.zeros((1, rows, info.width), np.float32),
        "retrieved_scores": np.zeros((1, rows), np.float32),
        "retrieved_valid": np.zeros((1, rows), np.bool_),
    }
