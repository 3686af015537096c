"""The host side of a looped language model, the same for every target: calls, angles, KV ring, memory, hits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rmse_edge.errors import UserError
from rmse_edge.layers.rope import rotary_angles
from rmse_edge.numbers import SEGMENT

from .base import Arrays, Dials, Fed, Methods, ModelInfo, Surprise
from .signatures import LARGEST_STATE, kept_bytes

# Prefill calls have 64 rows, decode calls one. Up to this many rows, single calls beat a padded 64-row call.
SINGLE_CALLS = 6


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
    """`Runtime` on top of any target's `Methods`.

    It keeps the rings of keys and values itself, unless the engine does: then `kept_by_engine` says so, methods find
    them where they are, and `read_engine` and `write_engine` are how sessions get at them.
    """

    loop = "loop"  # the method that iterates

    def __init__(self, info: ModelInfo, methods: Methods) -> None:
        if kept_bytes(info) > LARGEST_STATE:
            raise UserError(
                f"{info.name}: keeps {kept_bytes(info)} bytes between calls, with a window of {info.window} positions and "
                f"{info.max_loops} loops; at most {LARGEST_STATE} (4 GiB) are supported, lower window in its config.json"
            )
        self.info = info
        self.methods = methods
        own = {} if self.kept_by_engine() else info.state
        self.state = {name: np.zeros(shape, dtype) for name, (shape, dtype) in own.items()}
        self.memory = {name: np.zeros(shape, dtype) for name, (shape, dtype) in info.memory.items()}
        # Exit states since the last boundary: what the memory is going to be taught.
        self.segment = np.zeros((1, SEGMENT, info.config["d_model"]), np.float32) if info.memory else None
        self.retrieved = _no_hits(info)
        self.remember = True  # False: nothing more is learned
        self.whole = True  # False after a call that was broken off: what is kept belongs to no moment of the text
        # Called after every segment, before it is forgotten.
        self.on_surprise: Callable[[Surprise], object] | None = None
        self._position = 0
        self._blank: Arrays = (
            {k: np.array(v) for k, v in methods.run("blank", SEGMENT, {}).items()} if info.memory else {}
        )
        self.reset()

    @property
    def position(self) -> int:
        return self._position

    def reset(self) -> None:
        # Slots are masked by position, so what they hold does not matter; zeroed all the same, to be reproducible.
        for array in self.state.values():
            array.fill(0)
        if self.kept_by_engine():
            self.write_engine({name: np.zeros(shape, dtype) for name, (shape, dtype) in self.info.state.items()})
        for name, array in self.memory.items():
            np.copyto(array, self._blank[name])
        if self.segment is not None:
            self.segment.fill(0)
        self.inject(None)
        self._position = 0
        self.whole = True

    def tensors(self) -> Arrays:
        """All that is kept between calls, but for the position; of what is not the engine's, views."""
        rings = self.read_engine() if self.kept_by_engine() else self.state
        return rings | self.memory | self.retrieved | ({} if self.segment is None else {"segment": self.segment})

    def kept_by_engine(self) -> bool:
        """Whether the engine keeps the rings, not this host."""
        return False

    def read_engine(self) -> Arrays:
        """The rings that the engine keeps, by name."""
        return {}

    def write_engine(self, tensors: Arrays) -> None:
        """Replace the rings that the engine keeps."""

    def restore(self, position: int, tensors: Arrays) -> None:
        """Go on from what `tensors` gave at `position`.

        Raises:
            ValueError: names, shapes or types are not this model's; nothing was changed.
        """
        own = self.tensors()
        shapes = [{k: (v.shape, v.dtype) for k, v in t.items()} for t in (own, tensors)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"state: got {shapes[1]}, expected {shapes[0]}")
        for name, array in own.items():
            if name not in self.info.state or not self.kept_by_engine():
                np.copyto(array, tensors[name])
        if self.kept_by_engine():
            self.write_engine({name: tensors[name] for name in self.info.state})
        self._position = position
        self.whole = True

    def state_bytes(self) -> int:
        return sum(array.nbytes for array in self.tensors().values())

    def feed(self, tokens: Sequence[int] | np.ndarray, dials: Dials, logits: str = "all") -> Fed:
        ids = self._checked(tokens)
        dials.check(self.info.max_loops)
        rows, depths, iterations, chunks, surprises = [], [], [], [], []
        done = 0
        self.whole = False
        for chunk, n in plan_calls(self._position, len(ids), self.info.chunks):
            last = done + n == len(ids)
            out = self._call(chunk, ids[done : done + n], dials, head=logits == "all" or last)
            depths.append(out["depth"][0, :n].copy())
            iterations.append(int(out["iterations"]))
            chunks.append(chunk)
            if "logits" in out:
                rows.append(out["logits"][0, (0 if logits == "all" else n - 1) : n].copy())
            done += n
            if self._position % SEGMENT == 0:
                self.inject(None)  # hits are there until the next boundary
                if self.memory and self.remember:
                    surprises.append(self._memorize())
        self.whole = True
        return Fed(np.concatenate(rows), np.concatenate(depths), iterations, chunks, surprises)

    def _checked(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = self._valid_ids(tokens)
        limit = self.info.max_seq_len
        if limit is not None and self._position + len(ids) > limit:
            raise UserError(
                f"{self._position + len(ids)} tokens are more than the {limit} this package was exported for "
                "(--max-seq-len); shorten the prompt or export again"
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

    def context(self, chunk: int, n: int, position: int | None = None) -> Arrays:
        """What a call of `chunk` rows, `n` of them valid, is told about where it stands (here, by default)."""
        position = self._position if position is None else position
        cos, sin = rotary_angles(position + np.arange(chunk), self.info.rotary_dims, self.info.rope_theta)
        return {
            "cos": cos[None],
            "sin": sin[None],
            "position": np.array([position], np.int64),
            "n_valid": np.array([n], np.int64),
        }

    def _call(self, chunk: int, ids: np.ndarray, dials: Dials, head: bool) -> Arrays:
        """One call: prelude, loop, head, commit, ring."""
        n = len(ids)
        tokens = np.zeros((1, chunk), np.int64)
        tokens[0, :n] = ids
        context = self.context(chunk, n)
        prelude = self.methods.run("prelude", chunk, {"tokens": tokens} | self.retrieved)
        looped = self.methods.run(self.loop, chunk, prelude | context | self.state | self.memory | dials.arrays())
        result = dict(looped)
        if head:
            result |= self.methods.run("head", chunk, {"h": looped["h"]})
        kept = self.methods.run("commit", chunk, prelude | context | looped)
        if not self.kept_by_engine():
            self._into_rings(kept, n)
        self._into_segment(looped["h"], n)
        self._position += n
        return result

    def _into_rings(self, kept: Arrays, n: int) -> None:
        """Put what `commit` gave for the call's `n` tokens into their slots."""
        window = self.info.window
        first = max(0, n - window)
        slots = (self._position + np.arange(first, n)) % window
        for ring, source in self.info.rings.items():
            self.state[ring][..., slots, :] = kept[source][..., first:n, :]

    def _into_segment(self, h: np.ndarray, n: int) -> None:
        """Put the exit states of the call's `n` tokens into their rows of the segment."""
        if self.segment is not None:
            row = self._position % SEGMENT
            self.segment[:, row : row + n] = h[:, :n]

    # ------------------------------------------------------------------------------------------ memory, retrieval

    def _memorize(self) -> Surprise:
        """Teach the memory the segment that was just completed."""
        learned, surprise = self._surprise(SEGMENT)
        for name, array in self.memory.items():
            np.copyto(array, learned[f"next_{name}"])
        if self.on_surprise is not None:
            self.on_surprise(surprise)
        return surprise

    def _surprise(self, count: int) -> tuple[Arrays, Surprise]:
        learned = self.methods.run("memorize", SEGMENT, self._latest(count) | self.memory)
        mean, variance, segments = (float(x) for x in self.memory["surprise_stats"][0])
        value = float(learned["surprise"][0])
        return learned, Surprise(self._position, value, mean, max(variance, 0.0) ** 0.5, segments)

    def peek(self) -> Surprise | None:
        """The surprise of the unfinished segment, with nothing learned; None where it is empty."""
        count = self._position % SEGMENT
        return self._surprise(count)[1] if self.memory and count else None

    def query(self) -> np.ndarray:
        """What the latest segment searches for: the unfinished one, or at a boundary the one before. (key_dims,)."""
        count = self._position % SEGMENT or SEGMENT
        return self.methods.run("embed_segment", SEGMENT, self._latest(count))["query"][0].copy()

    def _latest(self, count: int) -> Arrays:
        """The first `count` rows of the segment, as `memorize` and `embed_segment` take them."""
        assert self.segment is not None
        return {"segment": self.segment, "n_valid": np.array([count], np.int64)}

    def inject(self, values: np.ndarray | None, scores: np.ndarray | None = None) -> None:
        """Let the following tokens, up to the next boundary, read these hits.

        Args:
            values: (n, slots, d), best first; None: nothing.
            scores: (n,) cosines by which they were found; 1 without.
        Raises:
            ValueError: more hits than the model has room for, or vectors of another shape.
        """
        if values is not None:
            space, width = self.info.retrieval, self.info.config["d_model"]
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
        if len(ids) > SEGMENT:
            raise UserError(f"a passage of {len(ids)} tokens; expected at most {SEGMENT}")
        padded = np.zeros((1, SEGMENT), np.int64)
        padded[0, : len(ids)] = ids
        context = self.context(SEGMENT, len(ids), position=0)
        # What an engine keeps is not seen from position 0; what the host gives may be anything, too, but it is asked for.
        nothing = {name: np.zeros_like(array) for name, array in self.state.items()}
        prelude = self.methods.run("prelude", SEGMENT, {"tokens": padded} | _no_hits(self.info))
        feeds = prelude | context | nothing | self._blank | self.info.dials.arrays()
        h = self.methods.run(self.loop, SEGMENT, feeds)["h"]
        return self.methods.run("embed_segment", SEGMENT, {"segment": h, "n_valid": context["n_valid"]})


def _no_hits(info: ModelInfo) -> Arrays:
    """The inputs of prelude that say that nothing was retrieved; empty for a model without retrieval."""
    if info.retrieval is None:
        return {}
    rows = int(info.retrieval["slots"] * info.retrieval["hits"])
    vectors = np.zeros((1, rows, info.config["d_model"]), np.float32)
    return {
        "retrieved": vectors,
        "retrieved_scores": np.zeros((1, rows), np.float32),
        "retrieved_valid": np.zeros((1, rows), np.bool_),
    }
