"""A text written block by block, on any target: masks become tokens by denoising steps, one call a block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rmse_edge.errors import UserError
from rmse_edge.info import LARGEST_STATE, ModelInfo
from rmse_edge.layers.rope import given_angles
from rmse_edge.loop.dials import Dials
from rmse_edge.numbers import SLOTS

from .base import Arrays, Methods
from .calls import Calls


@dataclass(frozen=True)
class Block:
    """A block that was written."""

    tokens: np.ndarray  # (n,) int64, without those that were known before
    depth: np.ndarray  # (n,) int64, the iteration that filled in each
    iterations: int  # what the call really cost
    logits: np.ndarray  # (n, V) float32, of which each token is the likeliest but for the mask
    drafts: np.ndarray  # (iterations, n) int64, the tokens after every iteration, masks among them


class BlockRuntime:
    """A model that writes block by block, on any target's `Methods`. It remembers what was read and written.

    Args:
        loop: the method that iterates.
    """

    def __init__(self, info: ModelInfo, methods: Methods, calls: type[Calls] = Calls, loop: str = "loop") -> None:
        if info.blocks is None:
            raise UserError(f"{info.name}: does not write by blocks")
        if info.kept_bytes() > LARGEST_STATE:
            raise UserError(
                f"{info.name}: keeps {info.kept_bytes()} bytes between calls; at most {LARGEST_STATE} (4 GiB) are supported, lower "
                "model_length in its config.json"
            )
        self.info, self.blocks = info, info.blocks
        self.calls = calls(info, methods)
        self.calls.loop = loop
        size = self.blocks.size
        # What the loop gives of a block that is known: it does not run.
        self._nothing: Arrays = {
            "h": np.zeros((1, size, info.width), np.float32),
            "depth": np.zeros((1, size), np.int64),
            "iterations": np.array(0, np.int64),
            "drafts": np.zeros((info.max_loops, 1, size), np.int64),
        }
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.calls.reset()
        self._position = 0
        self._begun: list[int] = []

    @property
    def position(self) -> int:
        """Tokens read and written since `reset`."""
        return self._position + len(self._begun)

    @property
    def room(self) -> int:
        """Tokens that may still be written: a text ends with a whole block."""
        longest = self.info.longest
        assert longest is not None  # its state is appended to
        return longest // self.blocks.size * self.blocks.size - self.position

    def state_bytes(self) -> int:
        """Bytes kept between calls."""
        return self.info.kept_bytes(self._position)

    def read(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Continue the text with `tokens`. What does not fill a block is known of the next one that is written.

        Raises:
            UserError: a token is outside the vocabulary, or there is no room for it.
        """
        ids, vocabulary = np.asarray(tokens, np.int64), self.info.vocab_size
        if len(beyond := ids[(ids < 0) | (ids >= vocabulary) | (ids == self.blocks.mask_token_id)]):
            raise UserError(f"token {beyond[0]} is outside the vocabulary (0..{vocabulary - 1}), or the mask")
        if len(ids) > self.room:
            raise UserError(
                f"{self.position + len(ids)} tokens are more than the {self.position + self.room} that {self.info.name} attends to; "
                "shorten the text"
            )
        self._begun += ids.tolist()
        size = self.blocks.size
        while len(self._begun) >= size:
            self._call(np.array(self._begun[:size]), self.info.full_depth, write=False)
            self._begun = self._begun[size:]

    def write(self, dials: Dials) -> Block:
        """Write the next block, or the rest of one that has begun.

        Raises:
            UserError: there is no room for another one.
            ArgumentError: a dial is out of the model's range.
        """
        self.info.check(dials)
        if self.room <= 0:
            raise UserError(f"{self.info.name}: has no room for another block behind {self.position} tokens")
        known, size = len(self._begun), self.blocks.size
        canvas = np.full(size, self.blocks.mask_token_id)
        canvas[:known] = self._begun
        found = self._call(canvas, dials, write=True)
        self._begun = []
        steps = int(found["iterations"])
        rows = slice(known, size)
        tokens, depth, logits = (found[name][0, rows].copy() for name in ("block", "depth", "logits"))
        return Block(tokens, depth, steps, logits, found["drafts"][:steps, 0, rows].copy())

    def _call(self, canvas: np.ndarray, dials: Dials, write: bool) -> Arrays:
        """One call on a block (size,), which moves the position on.

        Args:
            write: the block has masks, and is to be written; otherwise it is only kept.
        """
        size = self.blocks.size
        text = self.blocks.text
        places = self._position + np.arange(size)[None]
        context: Arrays = {"tokens": canvas[None], "position": np.array([self._position], np.int64)}
        context |= given_angles(places, text.rotary_dims, text.rope_theta)
        if self.calls.slots is not None:
            context[SLOTS] = np.arange(self.calls.slots)
        inputs = {"tokens": context["tokens"]}
        nothing = None if write else self._nothing
        call = self.calls.compute(size, inputs, context, dials.arrays(), self._position, size, write, nothing)
        self.calls.keep(call, size)
        self._position += size
        return self.calls.said(call, ("block", "drafts") if write else ())
