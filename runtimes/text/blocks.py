"""Text from a model that writes by blocks: streamed as `Generation` streams tokens, but a block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from rmse_edge.runtimes.host.blocks import BlockRuntime

from .generate import Generation


@dataclass
class BlockGeneration(Generation):
    """As `Generation`; the depth of a token is the denoising step that filled it in, 0 of a prompt's, which are known.

    Every step takes the likeliest tokens: nothing is drawn, and `sampler` is not asked.
    """

    runtime: BlockRuntime  # type: ignore[assignment]

    steps_of_blocks: list[int] = field(init=False, default_factory=list)  # denoising steps of each block
    written: int = field(init=False, default=0)  # tokens that these filled in, those behind the text's end too

    def steps(self) -> Iterator[tuple[int, int]]:
        start = perf_counter()
        self.runtime.read(self.prompt)
        self.prompt_depth = [0] * len(self.prompt)
        while len(self.made) < self.max_new_tokens:
            if self.runtime.room <= 0:
                self.finish_reason = "max_seq_len"
                return
            block = self.runtime.write(self.dials)
            self.steps_of_blocks.append(block.iterations)
            self.written += len(block.tokens)
            seconds = perf_counter() - start
            if self.first_token_s is None:
                self.first_token_s = seconds
            else:
                self.decode_s += seconds
            for token, depth in zip(block.tokens.tolist(), block.depth.tolist()):
                self.made.append((token, depth))
                yield self.made[-1]
                if token in self.eos:
                    self.finish_reason = "eos"
                    return
                if len(self.made) == self.max_new_tokens:
                    break
            start = perf_counter()
        self.finish_reason = "length"

    def statistics(self) -> dict[str, Any]:
        """As of `Generation`, and how many blocks, denoising steps and forward passes there were. A finished block goes through
        the layers once more than it had steps, for what later blocks attend to.

        `tokens_per_s` is of the blocks after the first. `iterations_saved` compares with one step for each token.
        """
        found = super().statistics()
        steps, blocks = sum(self.steps_of_blocks), len(self.steps_of_blocks)
        later = len(self.made) - self.runtime.blocks.size
        return found | {
            "tokens_per_s": later / self.decode_s if self.decode_s and later > 0 else None,
            "blocks": blocks,
            "denoising_steps": steps,
            "tokens_per_step": self.written / steps if steps else None,
            "tokens_per_forward": self.written / (steps + blocks) if steps else None,
            "iterations_saved": 1 - steps / self.written if steps else None,
        }
