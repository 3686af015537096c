"""Loss and depth of a text on any `Runtime`, with an error bar that allows for neighbouring tokens being alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from rmse_edge.errors import UserError
from rmse_edge.loop.dials import Dials
from rmse_edge.numbers import SEGMENT
from rmse_edge.runtimes.host.base import Runtime

# Targets of one batch of the standard error: beyond this distance losses are taken to be independent.
BATCH = 256
MIN_BATCHES = 8  # with fewer, the error of the error is too large; shorter texts use shorter batches

Progress = Callable[[int], object]  # called with the number of tokens done since the last call


@dataclass(frozen=True)
class Evaluation:
    """Per-target losses and per-position depths of one pass over a text."""

    dials: Dials
    full_depth: int  # the trained depth
    losses: np.ndarray  # (n,) float64, nats: of target i + 1 given the tokens up to i
    depth: np.ndarray  # (n,) int64: iterations of position i, whose logits were scored
    iterations: np.ndarray  # (calls,) int64: the deepest position of each call
    block: int  # tokens after which the state was reset; 0: never
    seconds: float  # the whole pass, scoring included

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    @property
    def mean_loops(self) -> float:
        return float(self.depth.mean())

    def loss_se(self) -> float | None:
        """Standard error of the loss from the means of consecutive batches; None for fewer than 16 targets.

        Losses of neighbouring tokens are correlated, so the error over single tokens would be too small.
        """
        count = len(self.losses)
        batches = max(count // max(self.block, BATCH), min(MIN_BATCHES, count // 2))
        if batches < MIN_BATCHES:
            return None
        means = np.array([part.mean() for part in np.array_split(self.losses, batches)])
        return float(means.std(ddof=1) / math.sqrt(batches))

    def summary(self) -> dict[str, Any]:
        """The figures under their stable names; `histogram[k - 1]` counts the positions of depth k."""
        se = self.loss_se()
        perplexity = math.exp(min(self.loss, 700.0))
        return {
            "tokens": len(self.losses),
            "loss": self.loss,
            "loss_se": se,
            "perplexity": perplexity,
            "perplexity_se": None if se is None else perplexity * se,  # delta method: d exp(x) = exp(x) dx
            "mean_loops": self.mean_loops,
            "depth_sd": float(self.depth.std()),
            "iterations_saved": 1 - self.mean_loops / self.full_depth,
            "mean_iterations": float(self.iterations.mean()),  # per call: the deepest position decides
            "histogram": np.bincount(self.depth, minlength=self.full_depth + 1)[1:].tolist(),
            "seconds": self.seconds,
            "tokens_per_s": len(self.losses) / self.seconds,
        }


def evaluate(
    runtime: Runtime, ids: np.ndarray, dials: Dials, block: int = 0, progress: Progress = lambda _: None
) -> Evaluation:
    """Score every token of `ids` (n + 1,) but the first.

    Args:
        block: reset the state every so many tokens and score all targets inside, as training does (the rest that fills
            no block is left out); 0 reads one stream through the model's window.
    Raises:
        UserError: the text is too short, or too long for the package.
    """
    check_length(runtime, len(ids), block)
    losses, depths, iterations = [], [], []
    start = perf_counter()
    for first, last, fresh in pieces(len(ids) - 1, block):
        if fresh:
            runtime.reset()
        fed = runtime.feed(ids[first:last], dials)
        losses.append(cross_entropy(fed.logits, ids[first + 1 : last + 1]))
        depths.append(fed.depth)
        iterations += fed.iterations
        progress(last - first)
    return Evaluation(
        dials,
        runtime.info.max_loops,
        np.concatenate(losses),
        np.concatenate(depths),
        np.array(iterations),
        block,
        perf_counter() - start,
    )


def check_length(runtime: Runtime, count: int, block: int) -> None:
    """Raise a `UserError` where `count` tokens cannot be scored that way."""
    if count < max(block, 1) + 1:
        expected = f"at least {block + 1} for block={block}" if block else "at least 2"
        raise UserError(f"the text has {count} tokens, expected {expected}")
    limit = runtime.info.longest
    if limit is not None and (block or count - 1) > limit:
        raise UserError(
            f"{block or count - 1} tokens in a row are more than the {limit} that the model and its export "
            f"(rmse-export --max-seq-len) allow; pass block={min(limit, 256)} or max_tokens={limit}"
        )


def pieces(targets: int, block: int) -> Iterator[tuple[int, int, bool]]:
    """Ranges of inputs (first, last exclusive, whether the state is reset before), each one call where possible.

    >>> list(pieces(130, 0))
    [(0, 64, True), (64, 128, False), (128, 130, False)]
    >>> list(pieces(250, 100))
    [(0, 64, True), (64, 100, False), (100, 164, True), (164, 200, False)]
    """
    length = block or targets
    for start in range(0, targets - length + 1, length):
        for offset in range(0, length, SEGMENT):
            yield start + offset, start + min(offset + SEGMENT, length), offset == 0


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[target] in float64, nats: (n, V), (n,) -> (n,).

    Raises:
        UserError: the logits hold NaN or infinity; the model that made them is damaged.
    """
    if not np.isfinite(logits).all():
        raise UserError("the model gave logits that are not numbers; its weights are damaged")
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.log(np.exp(shifted).sum(-1)) - np.take_along_axis(shifted, targets[:, None], -1)[:, 0]
