"""Every recording of a model built from shapes alone, on the device "meta": without a GPU, and without memory for weights.

Nothing there has values. A layer that looked at what a tensor holds would fail, and so would a kernel whose operator does
not say what it gives: what passes can be recorded. Not whether it is right, nor whether CUDA takes every operator of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rmse_edge.arch.registry import arch_of_model
from rmse_edge.layers.fixed import fixed_work
from rmse_edge.layers.held import with_stored
from rmse_edge.loop.contract import LoopSpec, Tensors
from rmse_edge.loop.dials import DIALS

from .drive import LOOPS
from .reads import Reads


@dataclass(frozen=True)
class Graph:
    """One recording."""

    chunk: int  # rows of the call
    name: str  # "prelude", "begin", "step 3", ...
    gives: dict[str, tuple[int, ...]]  # shapes by name


def on_meta(model: Any, held: Mapping[str, Any]) -> Any:
    """A copy of the model without values.

    Args:
        held: weights as integers or in 16 bits, see `with_stored`.
    """
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin: nn.Module = copy.deepcopy(model, shared)
    if held:
        twin = with_stored(twin, held, arch_of_model(model).tied(model.config))
    return twin.to("meta").eval()


def feeds(spec: LoopSpec) -> Tensors:
    """All that hosts give, without values."""
    given = (*spec.inputs, *spec.context, *spec.state)
    found = {t.name: torch.empty(t.shape, dtype=t.dtype, device="meta") for t in given}
    dials = {name: getattr(torch, DIALS[name].dtype) for name in spec.dials}
    return found | {name: torch.empty((), dtype=dtype, device="meta") for name, dtype in dials.items()}


@torch.inference_mode()
def dry_run(
    model: Any, held: Mapping[str, Any] | None = None, note: Callable[[Graph, Reads], object] | None = None
) -> list[Graph]:
    """Build every recording of every size of call.

    Args:
        held: weights as integers or in 16 bits, by name; None: as the model has them.
        note: is told of every recording and what it read of weights and state.
    Raises:
        RuntimeError: PyTorch's, where a layer looks at a tensor.
    """
    twin, found = on_meta(model, held or {}), []
    with fixed_work():
        for chunk in twin.call_sizes():
            spec = twin.spec(chunk)
            tensors = feeds(spec)
            state = [tensors[s.name] for s in spec.state]
            with Reads((*twin.parameters(), *twin.buffers(), *state)) as reads:

                def built(name: str, gives: Mapping[str, Tensor], chunk: int = chunk, reads: Reads = reads) -> None:
                    found.append(Graph(chunk, name, {n: tuple(t.shape) for n, t in gives.items()}))
                    if note is not None:
                        note(found[-1], reads)
                    reads.taken()

                tensors |= (given := twin.prelude(tensors))
                built("prelude", given)
                loop = LOOPS["flags"](twin, spec, tensors)
                reads.taken()
                names = ["begin", *(f"step {k}" for k in range(spec.max_loops))]
                for name, recording in zip(names, loop.recordings, strict=True):
                    recording.work()
                    built(name, loop.carry)
                tensors |= loop.found()
                for name in ("coda", "head", "commit"):
                    if name in spec.methods:
                        given = twin.head(tensors[spec.final.name]) if name == "head" else getattr(twin, name)(tensors)
                        tensors |= given
                        built(name, given)
    return found
