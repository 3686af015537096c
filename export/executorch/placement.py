"""Where experts lie in the file: those that a model uses together, one behind the other.

A package that keeps its experts within a budget (docs/offload.md) reads neighbours in one go. Which experts those are is recorded
while the model that is exported reads a text. Experts keep their numbers, by which a router chooses them and equal scores are
told apart: the operator looks up in a table where an expert lies. So what is computed is the same, to the bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmse_edge.errors import ArgumentError
from rmse_edge.layers.experts import Routing, SparseExperts
from rmse_edge.quantize import QuantizedTensor
from rmse_edge.runtimes.engines.torch import TorchRuntime

ROWS = 64  # of a call
TOKENS = 8192  # of a text at most
PARTNERS = 32  # that an expert may lie beside: those that it is used with most often


@dataclass(frozen=True)
class ExpertProfile:
    """Which experts a model used together, and where they are to lie for it."""

    places: Mapping[str, Tensor]  # (E,) int64 by the name of the layer: expert e lies in place [e]
    digest: str  # SHA-256 of what was recorded: how often each loop used each expert, and which were used together
    tokens: int  # that were read

    def placed(self, name: str, tensor: QuantizedTensor) -> QuantizedTensor:
        """A weight as it is stored: experts (E, N, K) in their places, others as they are."""
        places = self.places.get(name.rpartition(".")[0])
        if places is None or not name.endswith(("gate_up_proj", "down_proj")):
            return tensor
        return tensor.part(places.argsort())


def profile_experts(model: Any, ids: np.ndarray) -> ExpertProfile:
    """Record which experts `model` uses while it reads a text, by its own exit rules.

    Args:
        ids: (n,) tokens; the first TOKENS of them are read.
    Raises:
        ArgumentError: the model has no routed experts, or the text no call's worth of tokens.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SparseExperts)}
    if not layers:
        raise ArgumentError("profile_experts", "the model has no routed experts; leave it out")
    ids = ids[: min(len(ids), TOKENS) // ROWS * ROWS]
    if not len(ids):
        raise ArgumentError("profile_experts", f"the text has less than {ROWS} tokens; give a longer one")
    runtime = TorchRuntime(model, "profile")
    records = {name: Record(layer.n_experts, runtime.info.max_loops) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.observer, layer.listener = records[name].observe, records[name].listen
    try:
        for start in range(0, len(ids), ROWS):
            runtime.feed(ids[start : start + ROWS], runtime.info.dials, logits="last")
    finally:
        for layer in layers.values():
            layer.observer = layer.listener = None
    digest = hashlib.sha256()
    for record in records.values():
        digest.update(record.uses.tobytes() + record.together.tobytes())
    places = {name: torch.from_numpy(places_of(record.together)) for name, record in records.items()}
    return ExpertProfile(places, digest.hexdigest(), len(ids))


class Record:
    """What one layer of experts was asked for."""

    def __init__(self, experts: int, loops: int) -> None:
        self.uses = np.zeros((loops, experts), np.int64)  # rows, by loop and expert
        self.together = np.zeros((experts, experts), np.int64)  # rows that chose both
        self._loop = 0

    def observe(self, k: int, routing: Routing) -> None:
        """Is told before `listen` which loop it is."""
        self._loop = k

    def listen(self, rows: Tensor, routing: Routing) -> None:
        """Is told what the rows that are computed have chosen."""
        chosen = np.zeros((len(rows), self.uses.shape[1]), np.float32)  # whole numbers below 2^24 add up exactly
        np.put_along_axis(chosen, routing.experts.numpy(), 1, 1)
        self.uses[self._loop] += chosen.sum(0).astype(np.int64)
        self.together += (chosen.T @ chosen).astype(np.int64)


def places_of(together: np.ndarray) -> np.ndarray:
    """Where experts lie so that pairs that are used together often are neighbours.

    A chain is made of pairs, the most frequent first, as far as both experts still have a free side and are not at the two ends of
    one chain. What is left in pieces is put together by how often their experts are used.

    Args:
        together: (E, E), how often two experts were used together, and each by itself.
    Returns:
        (E,) int64, the places of experts 0 .. E - 1, each once.
    """
    count = len(together)
    pairs = together.astype(np.float64)
    np.fill_diagonal(pairs, 0)
    partners = np.argsort(-pairs, axis=1, kind="stable")[:, :PARTNERS]
    a = np.repeat(np.arange(count), partners.shape[1])
    b = partners.reshape(-1)
    order = np.lexsort((b, a, -pairs[a, b]))
    chains = {e: [e] for e in range(count)}  # by both of its ends
    inside = np.zeros(count, bool)
    for i in order.tolist():
        left, right = int(a[i]), int(b[i])
        if pairs[left, right] == 0 or inside[left] or inside[right] or chains[left] is chains[right]:
            continue
        first, second = chains[left], chains[right]
        first = first if first[-1] == left else first[::-1]
        second = second if second[0] == right else second[::-1]
        inside[[e for e, chain in ((left, first), (right, second)) if len(chain) > 1]] = True
        joined = first + second
        chains[joined[0]] = chains[joined[-1]] = joined
    alone = {min(chain[0], chain[-1]): chain for e, chain in chains.items() if not inside[e]}
    busiest = sorted(alone.values(), key=lambda chain: (-together.diagonal()[chain].mean(), chain[0]))
    places = np.empty(count, np.int64)
    places[np.concatenate(busiest)] = np.arange(count)
    return places
