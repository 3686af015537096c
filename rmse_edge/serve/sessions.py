"""What is kept of conversations between requests: the runtime's state, so that a turn reads only what is new.

A request says all that was said before, as OpenAI's interface wants it; the conversation that it goes on is found by its
text. State is a function of the text, the dials and, where a model begins from noise, the seed, so nothing of one client's
can show in another's answer.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import count

import numpy as np

from rmse_edge.runtimes.host.base import Arrays
from rmse_edge.runtimes.host.tail import Tail
from rmse_edge.runtimes.host.text import LoopRuntime
from rmse_edge.runtimes.text.conversation import Conversation, Read


@dataclass(frozen=True)
class Kept:
    """A runtime's state behind a turn."""

    position: int
    tensors: Arrays
    read: list[Read]
    tail: Tail

    @property
    def nbytes(self) -> int:
        text = sum(len(said.encode()) + 8 * len(pending) for said, pending in self.read)
        return text + sum(array.nbytes for array in self.tensors.values())


class Sessions:
    """The states used last, within a number of bytes."""

    def __init__(self, budget: int) -> None:
        """
        Args:
            budget: bytes that they may take together; 0 keeps none.
        """
        self.budget, self.nbytes, self.evicted = budget, 0, 0
        self._kept: OrderedDict[int, tuple[Hashable, Kept]] = OrderedDict()
        self._numbers = count()
        self._lock = threading.Lock()  # the engine writes, /metrics reads

    def __len__(self) -> int:
        return len(self._kept)

    def resume(self, runtime: LoopRuntime, key: Hashable, conversation: Conversation, text: str) -> None:
        """Put the state that has read most of `text` into the runtime; none: it forgets everything.

        Args:
            key: what else the state depends on.
        """
        with self._lock:
            fitting = [
                (kept.position, number)
                for number, (own, kept) in self._kept.items()
                if own == key and not conversation.anew and any(text.startswith(said) for said, _ in kept.read)
            ]
            if fitting:
                number = max(fitting)[1]
                self._kept.move_to_end(number)
                kept = self._kept[number][1]
        runtime.reset()
        if fitting:
            runtime.restore(kept.position, kept.tensors)
            conversation.go_on(kept.read, kept.tail)

    def keep(self, runtime: LoopRuntime, key: Hashable, conversation: Conversation) -> None:
        """Keep the state behind an answer, in place of those that were not used for longest."""
        read, tail = conversation.standing
        if not read or conversation.anew:
            return
        tensors = {name: np.array(array) for name, array in runtime.tensors().items()}
        kept = Kept(runtime.position, tensors, read, tail)
        if kept.nbytes > self.budget:
            return
        with self._lock:
            for number, (own, other) in self._kept.items():
                if own == key and other.read == read:  # the same turn once more
                    self.nbytes -= other.nbytes
                    del self._kept[number]
                    break
            self._kept[next(self._numbers)] = key, kept
            self.nbytes += kept.nbytes
            while self.nbytes > self.budget:
                self.nbytes -= self._kept.popitem(last=False)[1][1].nbytes
                self.evicted += 1
