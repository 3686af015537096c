"""The loop as a GPU is given it: iterations are launched before it is known whether anything is still active.

Whether anything is active is known on the device. A host that asks after every iteration leaves the device idle while the
answer travels; one that never asks computes all K. Here the flag of every iteration is copied to the host as the device gets
there, and the host launches iteration k when it has read the flag from before iteration k - (m - 1): m iterations are on
their way, and at most m - 1 are launched that nobody needed. Those change nothing: positions that have stopped keep their
state, and `iterations` is counted on the device. m = 1 asks every time. That is `AheadLoop`; in `ConditionalLoop` the device
decides alone. Which is faster was not measured: benchmarks/gpu.py does.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rmse_edge.loop.contract import LoopModel, LoopSpec, Tensors
from rmse_edge.loop.drive import depth_after, empty_stacks

from .recorded import Recorded, places


class Flags:
    """Whether anything was active before each iteration, on the device and, as it gets there, on the host."""

    def __init__(self, iterations: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.device = torch.zeros(iterations + 1, dtype=torch.bool, device=device)
        there = "meta" if device.type == "meta" else "cpu"
        self.host = torch.zeros(iterations + 1, dtype=torch.bool, device=there, pin_memory=cuda)
        self.events = [torch.cuda.Event() for _ in range(iterations + 1)] if cuda else []

    def note(self, k: int, active: Tensor) -> None:
        """A part of what is recorded."""
        self.device[k].copy_(active.any())
        self.host[k].copy_(self.device[k], non_blocking=True)

    def launched(self, k: int) -> None:
        """`note` of k is on its way."""
        if self.events:
            self.events[k].record()

    def read(self, k: int) -> bool:
        """Waits for it."""
        if self.events:
            self.events[k].synchronize()
        return bool(self.host[k])


class AheadLoop:
    """The loop of one size of call, on tensors that keep their place: `begin` and each iteration a recording of its own."""

    def __init__(
        self,
        model: LoopModel,
        spec: LoopSpec,
        tensors: Tensors,
        ahead: int = 2,
        capture: bool = False,
        pool: Any = None,
    ) -> None:
        """
        Args:
            tensors: prelude's results, context, the state that the loop reads, and the dials, at their places. Names that no
                method knows are let be.
            ahead: m, iterations that are on their way at once, at least 1.
        """
        self.model, self.spec, self.ahead = model, spec, ahead
        self.tensors, self.places = tensors, places(tensors)
        self.dials = {name: tensors[name] for name in spec.dials}
        first, invariants = model.begin(tensors)
        device = first["h"].device
        self.carry = {name: t.clone() for name, t in first.items()}
        self.carry["depth"] = torch.zeros_like(first["active"], dtype=torch.int64)
        self.invariants = {name: t.clone() for name, t in invariants.items()}
        self.fixed = tensors | self.invariants
        self.emits = empty_stacks(spec, first["h"])
        self.iterations = torch.zeros((), dtype=torch.int64, device=device)
        self.loops = torch.arange(spec.max_loops, device=device)
        self.flags = Flags(spec.max_loops, device)
        self.launched = 0  # iterations of the last call, those that nobody needed among them
        self.recordings = self._recordings(capture, pool)

    def _recordings(self, capture: bool, pool: Any) -> list[Recorded]:
        """What is recorded: what begins, and every iteration."""
        steps = [Recorded(partial(self._step, k), capture, pool) for k in range(self.spec.max_loops)]
        return [Recorded(self._first, capture, pool), *steps]

    def fits(self, tensors: Tensors) -> bool:
        """Whether these are the tensors that were recorded."""
        return self.places == places(tensors)

    def __call__(self, max_loops: int) -> Tensors:
        """What `run_loop` gives: h, depth, iterations and the stacked emits. The next call writes over it."""
        begin, *steps = self.recordings
        begin()
        self.flags.launched(0)
        self.launched = 0
        for k in range(max_loops):
            if k + 1 >= self.ahead and not self.flags.read(k + 1 - self.ahead):
                break
            steps[k]()
            self.flags.launched(k + 1)
            self.launched += 1
        return self.found()

    def found(self) -> Tensors:
        """What `run_loop` gives, of the last call."""
        found = {"h": self.carry["h"], "depth": self.carry["depth"], "iterations": self.iterations}
        return found | self.emits

    def _first(self) -> None:
        first, invariants = self.model.begin(self.tensors)
        put(first, self.carry)
        put(invariants, self.invariants)
        self.carry["depth"].zero_()
        self.iterations.zero_()
        self.flags.note(0, self.carry["active"])

    def _step(self, k: int) -> None:
        past = {t.name: self.tensors[t.name][k] for t in self.spec.rows}
        new, emitted = self.model.step(self.loops[k], self.carry, past, self.fixed, self.dials)
        new["depth"] = depth_after(self.carry, new)
        self.iterations += self.flags.device[k]
        put(new, self.carry)
        for name, stack in self.emits.items():
            stack[k].copy_(emitted[name])
        self.flags.note(k + 1, self.carry["active"])


class ConditionalLoop(AheadLoop):
    """The same as one recording: iteration k + 1 lies within a conditional node of iteration k, which the device decides.

    The host asks nothing while the loop runs, and nothing is launched that nobody needs. PyTorch records `cond` as such nodes,
    one inside the other, on CUDA 12.4 and later; it does not record `while_loop`.
    """

    def _recordings(self, capture: bool, pool: Any) -> list[Recorded]:
        return [Recorded(self._whole, capture, pool, conditions=True)]

    def __call__(self, max_loops: int) -> Tensors:
        self.recordings[0]()
        self.launched = -1  # the device alone knows
        return self.found()

    def _whole(self) -> None:
        self._first()
        self._level(0)

    def _level(self, k: int) -> None:
        if k == self.spec.max_loops:
            return

        def iterate(flag: Tensor) -> tuple[Tensor, ...]:
            self._step(k)
            self._level(k + 1)
            return (flag.clone(),)

        # Both sides write nothing but buffers that keep their place. What they return is there because they must.
        goes_on = self.flags.device[k] & (self.loops[k] < self.dials["max_loops"])
        torch.ops.higher_order.cond(goes_on, iterate, lambda flag: (flag.clone(),), (goes_on,))


LOOPS = {"flags": AheadLoop, "cond": ConditionalLoop}


def put(new: Tensors, into: Tensors) -> None:
    """Write tensors over others of the same names, some of which they may be: a model may carry what another one was."""
    taken = {id_of(t): name for name, t in into.items()}
    apart = {name: t.clone() if taken.get(id_of(t), name) != name else t for name, t in new.items() if name in into}
    for name, t in apart.items():
        into[name].copy_(t)


def id_of(t: Tensor) -> int:
    """What tell apart tensors that share no memory."""
    return t.untyped_storage()._cdata
