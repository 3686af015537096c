"""Independent pieces of work side by side, each on one core.

PyTorch shares every operation among all cores. For the small ones of a looped model (a few rows for each of hundreds of
experts) that costs more than it gains, and where a core is busy otherwise, every operation waits for it. Pieces of the
text that are computed side by side wait for nothing.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import Any, TypeVar

import torch
from torch import nn

SMALL = 200_000_000  # parameters
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when the one that made it ends

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
def one_thread(model: nn.Module) -> Iterator[bool]:
    """PyTorch computes with one thread meanwhile, if `model` is small: its operations on few rows are over before other
    cores have heard of them, and on a busy machine each would wait for a core that does something else.

    Yields:
        Whether that leaves a core idle that PyTorch was to use.
    """
    count = torch.get_num_threads()
    small = sum(t.numel() for t in (*model.parameters(), *model.buffers())) <= SMALL
    try:
        torch.set_num_threads(1 if small else count)
        yield small and count > 1
    finally:
        torch.set_num_threads(count)


@contextmanager
def aside(work: Callable[[], R], idle: bool) -> Iterator[Callable[[], R | None]]:
    """Call `work` on an idle core while the block runs: in a copy of this process, since Python runs one thread at a time.

    Args:
        work: computes with PyTorch on the CPU, in one thread; its result must be picklable, and is best made of arrays.
        idle: whether there is such a core, as `one_thread` says.
    Yields:
        A function that waits for the result. It gives None where there is no such core, where processes cannot be copied
        safely (outside of Linux, or while other threads of Python may hold locks), or where `work` failed: so a caller
        must be able to do without. The copy ends with the block, and with this process, however that ends.
    """
    if not (idle and sys.platform == "linux" and threading.active_count() == 1):
        yield lambda: None
        return
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(there, work, os.getpid()), daemon=True)
    if not _started(process):
        there.close()
        here.close()
        yield lambda: None
        return
    there.close()  # the copy has its own; once that is closed, nobody waits any longer
    try:
        yield lambda: _received(here)
    finally:
        process.kill()
        process.join()
        here.close()


def _started(process: ForkProcess) -> bool:
    """Start a copy of this process that Ctrl-C leaves alone: it is for the original to say so, and to end the copy."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with warnings.catch_warnings():
            # From Python 3.12 on it warns of other threads. Those there are now are the engines' own, and wait for work.
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        return True
    except OSError:  # no more processes, or no memory for one
        return False
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _send(there: Connection, work: Callable[[], object], parent: int) -> None:
    """What the copy does; it leaves without the clean-up that is the original's."""
    try:
        # Killed, the original could not end the copy, which would keep its locks on files.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            return
        gc.disable()  # it would touch, and so copy, all that the two processes share
        arrays: list[pickle.PickleBuffer] = []
        with torch.no_grad():
            # By plain pickle: tensors in shared memory, which PyTorch sends otherwise, do not outlive this process.
            rest = pickle.dumps(work(), protocol=5, buffer_callback=arrays.append)
        there.send((rest, [array.raw().nbytes for array in arrays]))
        for array in arrays:  # one by one, so that no second copy of them all is made
            there.send_bytes(array.raw())
    finally:
        os._exit(0)


def _received(here: Connection) -> Any:
    """What `_send` sent, None if it did not get that far."""
    try:
        rest, sizes = here.recv()
        arrays = [bytearray(size) for size in sizes]
        for array in arrays:
            here.recv_bytes_into(array)
    except (EOFError, OSError):
        return None
    return pickle.loads(rest, buffers=arrays)


def shared_copy(model: Any) -> Any:
    """A copy of all modules, whose parameters and buffers are those of `model`: to be replaced, not to be written to."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def split_evenly(count: int, parts: int, least: int, most: int) -> int:
    """Into pieces of which size `count` things are to be split for so many workers: `least` to `most`."""
    return max(least, min(most, -(-count // parts)))
