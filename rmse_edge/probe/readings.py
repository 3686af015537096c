"""What every iteration says of every token of a text, in arrays from which all figures are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from rmse_edge.layers.experts import members

from .subjects import Subject, sparse_layers

LARGEST, TEXTS = 1 << 28, 8  # bytes of logits, and texts, at once
FIGURES = ("loss", "entropy", "kl", "kl_to_before", "lead", "likeliest", "change", "cosine")


@dataclass(frozen=True)
class Readings:
    """Of n texts of T tokens, after each of K iterations. A state is what the head reads, behind the last norm."""

    tokens: np.ndarray  # (n, T) int64
    targets: np.ndarray  # (n, T) the tokens behind them
    loss: np.ndarray  # (K, n, T) nats, of the target
    entropy: np.ndarray  # (K, n, T) nats, of the prediction
    kl: np.ndarray  # (K, n, T) nats, KL(last iteration's prediction || this one's)
    kl_to_before: np.ndarray  # (K, n, T) nats, KL(this prediction || that of the iteration before); NaN for the first
    lead: np.ndarray  # (K, n, T) logit of the likeliest token over the next one's
    likeliest: np.ndarray  # (K, n, T) int64, token
    change: np.ndarray  # (K, n, T) |h_k - h_(k-1)| / |h_k|; NaN for the first, which has none before it
    cosine: np.ndarray  # (K, n, T) to the last iteration's state
    # (K, n, T) the chance that the exit gate has stopped a token by then; None: the model has no gate
    brake: np.ndarray | None
    # (K, K) share of a token's experts in one iteration that it uses in another; None: it has no experts in its loop
    overlap: np.ndarray | None
    # (K, E) of each of these layers: how many of the n T tokens chose each expert; empty: there are none
    used: tuple[np.ndarray, ...] = ()

    @property
    def iterations(self) -> int:
        return len(self.loss)

    @property
    def agrees(self) -> np.ndarray:
        """(K, n, T) bool: the likeliest token is the last iteration's."""
        return self.likeliest == self.likeliest[-1]


def read(
    subject: Subject,
    blocks: np.ndarray,
    progress: Callable[[int], None] = lambda _: None,
    keep: list[np.ndarray] | None = None,
) -> Readings:
    """Read blocks (n, T + 1) of token ids, each from an empty past, all iterations run.

    Args:
        progress: told how many blocks were read.
        keep: is given what the head reads after each iteration, (n, T, d) float32; None: that is not kept.
    """
    length = blocks.shape[1] - 1
    batch = max(1, min(TEXTS, LARGEST // (4 * subject.vocab_size * length)))
    parts: list[dict[str, np.ndarray]] = []
    kept: list[list[np.ndarray]] = []
    used = _Used(subject)
    for first in range(0, len(blocks), batch):
        some = torch.from_numpy(blocks[first : first + batch])
        with used:
            states, gates = subject.course(some[:, :-1])
        vectors = [subject.vectors(state).float() for state in states]
        parts.append(_measured(subject, states, vectors, some[:, 1:]))
        if gates is not None:
            parts[-1]["brake"] = (-torch.expm1(-softplus(gates).cumsum(0))).numpy()
        kept.append([v.numpy() for v in vectors] if keep is not None else [])
        progress(len(some))
    if keep is not None:
        keep += [np.concatenate(of_iteration) for of_iteration in zip(*kept)]
    arrays = {name: np.concatenate([part[name] for part in parts], 1) for name in parts[0]}
    brake = arrays.pop("brake", None)
    return Readings(
        blocks[:, :-1], blocks[:, 1:], **arrays, brake=brake, overlap=used.overlap(), used=tuple(used.counts)
    )


@torch.no_grad()
def _measured(subject: Subject, states: list[Tensor], vectors: list[Tensor], targets: Tensor) -> dict[str, np.ndarray]:
    """All but the experts, of one batch."""
    final = torch.log_softmax(subject.logits(states[-1]).float(), -1)
    certain = final.exp()
    rows: dict[str, list[Tensor]] = {name: [] for name in FIGURES}
    past: Tensor | None = None
    for k, (state, h) in enumerate(zip(states, vectors)):
        log_p = torch.log_softmax(subject.logits(state).float(), -1)
        two = log_p.topk(2, -1).values
        rows["lead"].append(two[..., 0] - two[..., 1])
        changed = torch.full_like(two[..., 0], torch.nan) if past is None else (log_p.exp() * (log_p - past)).sum(-1)
        rows["kl_to_before"].append(changed.clamp_min(0))
        past = log_p
        rows["loss"].append(-log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1))
        rows["entropy"].append(-(log_p.exp() * log_p).sum(-1))
        rows["kl"].append((certain * (final - log_p)).sum(-1).clamp_min(0))
        rows["likeliest"].append(log_p.argmax(-1))
        before = vectors[k - 1] if k else torch.full_like(h, torch.nan)
        rows["change"].append((h - before).norm(dim=-1) / h.norm(dim=-1))
        rows["cosine"].append(torch.cosine_similarity(h, vectors[-1], dim=-1))
    return {name: torch.stack(of_loops).numpy() for name, of_loops in rows.items()}


class _Used:
    """Hears which experts the tokens of a text use in each iteration, while it is open."""

    def __init__(self, subject: Subject) -> None:
        self.layers = sparse_layers(subject.model)
        self.shared: np.ndarray | None = None
        self.count = 0
        self.by_layer: dict[int, np.ndarray] = {}  # of the layers in the loop, see `Readings.used`

    def __enter__(self) -> None:
        # By loop, the parts of the text in order: with a memory it is read segment by segment.
        self.chosen: list[dict[int, list[Tensor]]] = [{} for _ in self.layers]
        for layer, heard in zip(self.layers, self.chosen):
            layer.observer = lambda k, routing, heard=heard: heard.setdefault(k, []).append(routing.experts)

    def __exit__(self, *_: object) -> None:
        for i, (layer, heard) in enumerate(zip(self.layers, self.chosen)):
            layer.observer = None
            if len(heard) < 2:
                continue  # outside of the loop
            picks = torch.stack([torch.cat(heard[k]) for k in sorted(heard)], 1)  # (N, K, top_k)
            member = members(picks, layer.n_experts)
            both = (member @ member.transpose(1, 2)).double().sum(0).numpy() / picks.shape[2]
            self.shared = both if self.shared is None else self.shared + both
            self.count += len(picks)
            chosen = member.sum(0).long().numpy()
            self.by_layer[i] = self.by_layer[i] + chosen if i in self.by_layer else chosen

    @property
    def counts(self) -> list[np.ndarray]:
        return list(self.by_layer.values())

    def overlap(self) -> np.ndarray | None:
        return None if self.shared is None else self.shared / self.count
