"""Work that is done again and again on tensors that keep their place: on a GPU a CUDA graph, on a CPU the work itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rmse_edge.layers.fixed import fixed_work
from rmse_edge.loop.contract import Tensors

Places = dict[str, tuple[int, tuple[int, ...], torch.dtype]]


def places(tensors: Mapping[str, Tensor]) -> Places:
    """Where tensors are and what they look like: a graph that was recorded on some reads and writes just these."""
    return {name: (t.data_ptr(), tuple(t.shape), t.dtype) for name, t in tensors.items()}


class Recorded:
    """`work` as it is: run the first time, which loads what its kernels need; recorded the second; replayed from then on.

    `work` reads and writes tensors that stay where they are, and looks at none of them (`fixed_work`).
    """

    def __init__(self, work: Callable[[], object], capture: bool, pool: Any = None, conditions: bool = False) -> None:
        """
        Args:
            capture: record a CUDA graph; False: run the work each time.
            pool: memory that graphs share which are never replayed side by side (`torch.cuda.graph_pool_handle`).
            conditions: `cond` within the work becomes a conditional node of the graph.
        """
        self.work, self.capture, self.pool, self.conditions = work, capture, pool, conditions
        self.graph: torch.cuda.CUDAGraph | None = None
        self.ran = False

    @torch.inference_mode()
    def __call__(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        with fixed_work():
            if self.capture and self.ran:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.pool), self._mode():
                    self.work()
                self.graph = graph
                graph.replay()
            else:
                self.work()
        self.ran = True

    def _mode(self) -> AbstractContextManager[object]:
        if not self.conditions:
            return nullcontext()
        from torch._higher_order_ops.cudagraph_conditional_nodes import CUDAGraphCaptureControlFlowOpDispatchMode

        return CUDAGraphCaptureControlFlowOpDispatchMode()


class RecordedMethod:
    """A model's method on tensors by name, recorded. What it gives stays where it is, and the next call writes over it."""

    def __init__(self, method: Callable[[Tensors], Tensors], tensors: Tensors, capture: bool, pool: Any = None) -> None:
        """
        Args:
            tensors: what it is given, at their places; another call may write others into them.
        """
        self.method, self.tensors, self.places = method, tensors, places(tensors)
        self.found: Tensors = {}
        self.run = Recorded(self._work, capture, pool)

    def fits(self, tensors: Tensors) -> bool:
        """Whether these are the tensors that were recorded."""
        return self.places == places(tensors)

    def __call__(self) -> Tensors:
        self.run()
        return self.found

    def _work(self) -> None:
        found = self.method(self.tensors)
        if not self.found:
            # Places of its own, the same whether the work is run or replayed.
            self.found = {name: t.clone() for name, t in found.items()}
            return
        for name, t in found.items():
            self.found[name].copy_(t)
