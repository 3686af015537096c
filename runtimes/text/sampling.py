"""The sampler of every runtime, on the host: the same seed and the same logits give the same token.

It works in float64 on NumPy arrays and owns its random numbers (host/generator.py), so that neither the engine nor the device
takes part. Sums run from the first token to the last, as every language adds up, and not in NumPy's `sum`, whose order is
its own. tests/data/sampler.json has tokens that runtimes/native/core/sampler.cpp is held against, too.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from rmse_edge.errors import ArgumentError, UserError
from rmse_edge.loop.generator import MASK, SplitMix64


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits. Checked once here.

    Raises:
        ArgumentError: naming the setting and its range.
    """

    temperature: float = 0.8  # 0: the largest logit, always
    top_k: int = 0  # keep the k largest; 0 keeps all
    top_p: float = 1.0  # keep the smallest set of tokens with at least this probability; 1 keeps all
    seed: int = 0

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or a positive number"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or a positive whole number"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0, at most 1 (all tokens)"),
            ("seed", 0 <= self.seed <= MASK, f"a whole number from 0 to {MASK}"),
        ):
            if not ok:  # NaN fails every comparison
                raise ArgumentError(name, f"got {getattr(self, name)}, expected {expected}")


class Sampler:
    """Draws tokens. One random number per token, whatever the options, so that they do not shift the stream."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = SplitMix64(sampling.seed)

    def pick(self, logits: np.ndarray, unused: Collection[tuple[int, int]] = ()) -> int:
        """The next token for `logits`, (V,) of any float type.

        Args:
            unused: ranges [first, end) of ids that are never drawn, as if the head had no rows for them.
        Raises:
            UserError: the logits hold NaN or no finite maximum; the model that made them is damaged.
        """
        draw = self._random.uniform()
        logits = _drawable(logits, unused)
        if self.sampling.temperature == 0:
            return int(logits.argmax())  # the lowest index on ties
        return drawn(probabilities(logits, self.sampling), draw)

    def draft(self, logits: np.ndarray, unused: Collection[tuple[int, int]] = ()) -> tuple[int, np.ndarray | None]:
        """A token of a draft, and what it was drawn from, for `verify`; None: it is the likeliest."""
        draw = self._random.uniform()
        logits = _drawable(logits, unused)
        if self.sampling.temperature == 0:
            return int(logits.argmax()), None
        weights = probabilities(logits, self.sampling)
        return drawn(weights, draw), weights

    def verify(
        self, logits: np.ndarray, drafted: int, weights: np.ndarray | None, unused: Collection[tuple[int, int]] = ()
    ) -> int:
        """The next token for `logits` where a draft says `drafted`: that one, or another one in its place.

        Whatever the draft is, tokens have the distribution that `pick` gives them: with p what the logits say and q what the
        draft was drawn from, it is kept with probability min(1, p / q), and else replaced by a draw from max(0, p - q), scaled to 1
        (Leviathan et al. 2023, Fast Inference from Transformers via Speculative Decoding, arXiv 2211.17192, section 2.3). Two random
        numbers, whatever happens.

        Args:
            weights: q, from `draft`.
        """
        keep, draw = self._random.uniform(), self._random.uniform()
        logits = _drawable(logits, unused)
        if weights is None:
            return int(logits.argmax())
        wanted = probabilities(logits, self.sampling)
        if keep * weights[drafted] < wanted[drafted]:
            return drafted
        rest = np.maximum(wanted - weights, 0)
        return drawn(rest if rest.any() else wanted, draw)


def _drawable(logits: np.ndarray, unused: Collection[tuple[int, int]]) -> np.ndarray:
    """The logits, -inf at ids that are never drawn.

    Raises:
        UserError: they hold NaN or no finite maximum.
    """
    if unused:
        logits = logits.copy()
        for first, end in unused:
            logits[first:end] = -np.inf
    if not np.isfinite(logits.max()):  # a NaN anywhere makes the maximum NaN
        raise UserError("the model gave logits that are not numbers; its weights are damaged")
    return logits


def drawn(weights: np.ndarray, draw: float) -> int:
    """The token at `draw`, from [0, 1), of weights (V,) of any sum.

    Tokens stay in the order of their ids: a difference of 1e-6 between two runtimes then moves a boundary by as little, where
    an order by probability would swap whole tokens.
    """
    cumulative = np.cumsum(weights)
    index = np.searchsorted(cumulative, draw * cumulative[-1], side="right")
    # The product can round up to the total; the total is first reached at the last token that was kept.
    return int(min(index, np.searchsorted(cumulative, cumulative[-1])))


def probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """What is drawn from, (V,) float64 with sum 1: temperature, then top-k, then top-p; zero for what is left out.

    Ties at a boundary are decided for the lower index. The temperature must not be 0.
    """
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the largest to -inf, which is right
        scaled = (logits.astype(np.float64) - np.float64(logits.max())) / sampling.temperature
    order = np.argsort(-scaled, kind="stable") if sampling.top_k or sampling.top_p < 1 else None
    if order is not None and sampling.top_k:
        scaled[order[sampling.top_k :]] = -np.inf
    weights = np.exp(scaled)
    weights /= np.cumsum(weights)[-1]
    if order is not None and sampling.top_p < 1:
        through = np.cumsum(weights[order])
        # The first token stays; another where all that is likelier does not reach the mass.
        weights[order[1:][through[:-1] >= sampling.top_p]] = 0
        weights /= np.cumsum(weights)[-1]
    return weights
