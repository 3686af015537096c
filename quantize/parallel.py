"""Independent pieces of work side by side, each on one core.

PyTorch shares every operation among all cores. For the small ones of a looped model (a few rows for each of hundreds of
experts) that costs more than it gains, and where a core is busy otherwise, every operation waits for it. Pieces of the
text that are computed side by side wait for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import nn

SMALL = 200_000_000  # parameters

T = TypeVar("T")
R = TypeVar("R")


class Cores:
    """As many workers as PyTorch has threads (`torch.set_num_threads`); results do not depend on who is faster."""

    def __init__(self, count: int, pool: ThreadPoolExecutor) -> None:
        self.count = count
        self._pool = pool

    def start(self, work: Callable[[], R]) -> Future[R]:
        """Let a worker call `work()`; gradients are off."""
        return self._pool.submit(torch.no_grad()(work))

    def each(self, work: Callable[[T], R], pieces: Iterable[T]) -> Iterator[R]:
        """work(piece) of every piece, in order; a piece that fails raises here."""
        futures = [self.start(partial(work, piece)) for piece in pieces]
        for future in futures:
            yield future.result()


@contextmanager
def cores() -> Iterator[Cores]:
    """Workers for the length of a block. No parallel work of PyTorch's own should be going on meanwhile."""
    count = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield Cores(count, pool)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(count)


@contextmanager
def one_thread(model: nn.Module) -> Iterator[None]:
    """PyTorch computes with one thread meanwhile, if `model` is small: its operations on few rows are over before other
    cores have heard of them, and on a busy machine each would wait for a core that does something else.
    """
    count = torch.get_num_threads()
    small = sum(p.numel() for p in model.parameters()) <= SMALL
    try:
        torch.set_num_threads(1 if small else count)
        yield
    finally:
        torch.set_num_threads(count)


def split_evenly(count: int, parts: int, least: int, most: int) -> int:
    """Into pieces of which size `count` things are to be split for so many workers: `least` to `most`."""
    return max(least, min(most, -(-count // parts)))
