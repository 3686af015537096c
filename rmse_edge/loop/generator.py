"""Random numbers that are the same in every language: ten lines each, from integers alone.

SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; the constants are those
of Vigna's public-domain splitmix64.c). Its state is a counter that the seed starts and every number moves on by `STEP`,
modulo 2^64; a number is the counter, mixed:

    state += STEP
    z = state
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9
    z = (z ^ z >> 27) * 0x94D049BB133111EB
    return z ^ z >> 31

So number n of a seed is known without those before it. runtimes/native/core/generator.cpp is the same in C++, and
tests/data/sampler.json has numbers that both are held against.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

import numpy as np

Words = TypeVar("Words", int, np.ndarray)  # one of 64 bits, or an array of them

MASK = 2**64 - 1
STEP = 0x9E3779B97F4A7C15
PIECES = 12  # of 16 bits, which are added up to a nearly normal number


class SplitMix64:
    """A stream of random numbers.

    >>> f"{SplitMix64(0).next():x}"
    'e220a8397b1dcdaf'
    """

    def __init__(self, seed: int) -> None:
        self._state = seed & MASK

    def next(self) -> int:
        """64 random bits."""
        self._state = (self._state + STEP) & MASK
        return mixed(self._state)

    def uniform(self) -> float:
        """A number from [0, 1): the upper 53 bits, as many as a float64 has."""
        return (self.next() >> 11) * 2.0**-53


def mixed(z: Words) -> Words:
    """The bits of `z`, or of each of an array (uint64), so that every one of them decides over all."""
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def number(seed: int, n: int) -> int:
    """What `SplitMix64(seed)` gives as number `n`, counted from 0."""
    return mixed((seed + (n + 1) * STEP) & MASK)


def noise(seed: int, position: int, count: int) -> np.ndarray:
    """`count` random numbers that are nearly normal, (count,) float32, bit for bit the same on every machine.

    They depend on `seed` and `position`, both from 0 to 2^64 - 1, and on nothing that was drawn before: positions can be
    computed in any order. Number i is what numbers 3 i to 3 i + 2 of a stream of the position's own hold, as twelve
    uniform numbers of 16 bits, (k + 1/2) / 2^16 each: their sum minus 6. This has mean 0 and variance 1, and never leaves
    -6..6 (Irwin and Hall's distribution: its fourth moment is 2.9 where the normal one's is 3). All of it is exact in
    integers, and the result in float32.
    """
    own = number(number(seed, 0), position)
    counters = np.arange(1, 3 * count + 1, dtype=np.uint64) * np.uint64(STEP) + np.uint64(own)
    pieces = mixed(counters).view(np.uint16).reshape(count, PIECES)  # in whatever order: they are added up
    sums = pieces.sum(axis=1, dtype=np.int64)
    return ((sums - PIECES // 2 * (2**16 - 1)) / 2**16).astype(np.float32)


def starts(deviations: Mapping[str, float], seed: int, positions: Iterable[int], width: int) -> dict[str, np.ndarray]:
    """What a model begins from where that is noise, (positions, width) float32 each.

    Args:
        deviations: of each input that is filled with noise. The first by name gets the noise of `seed`, number i after it that
            of number i of the seed's stream: no two are alike.
    """
    found, places = {}, list(positions)
    for i, name in enumerate(sorted(deviations)):
        own = number(seed, i) if i else seed
        rows = [noise(own, position, width) for position in places]
        found[name] = np.stack(rows) * np.float32(deviations[name])
    return found
