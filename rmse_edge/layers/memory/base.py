"""Neural memory: an MLP whose weights are state, written once per 64-token segment and read in every iteration.

The far past of a sequence lives in the weights of a small network M, one set per sequence. A write teaches it, by a
gradient step in closed form, to answer the segment's keys with its values; a read asks it with a query:

    k, v = unit(conv(Wk n)), rms(Wv n)    n: normed exit state of a position, (B, 64, d)
    loss = mean |M(k) - v|^2              the surprise: 1 where the memory knows nothing, 0 where it knows all
    y    = M(unit(Wq x)),  read = Wo(y / sqrt(1 + mean y^2)) * sigmoid(gate x)

conv mixes the keys of a position and the three before it, channel by channel (as in Titans, section 4.4): with it the
memory learns what *follows* a state, which is what a query wants to know.

`Memory` is what the two kinds share: `Titans` (titans.py) and `Atlas` (atlas.py) say how M is built and written. All of it is float32 and free of autograd, so that the same lines are trained, exported and run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmse_edge.layers.norm import rms, unit
from rmse_edge.loop.contract import Tensors, TensorSpec

HORIZON = 64  # segments over which the running mean and deviation of the surprise look back
TAPS = 4  # positions that a key is made of
CLIP = 8.0  # Frobenius norm that one segment's gradient step may have: repetitive text cannot blow the memory up


def gelu_slope(x: Tensor) -> Tensor:
    """d gelu(x) / dx = Phi(x) + x phi(x)."""
    return 0.5 * (1 + torch.erf(x / sqrt(2))) + x * torch.exp(-0.5 * x.square()) / sqrt(2 * torch.pi)


def clipped(gradient: tuple[Tensor, Tensor]) -> Tensor:
    """Factor (B, 1, 1) that keeps the norm of both matrices together at `CLIP` or below."""
    up, down = (g.square().sum((1, 2), keepdim=True) for g in gradient)
    return CLIP * torch.rsqrt((up + down).clamp_min(CLIP**2))


class Memory(nn.Module, ABC):
    """A two-layer MLP as state: up (B, features, hidden), down (B, hidden, m).

    Its state is named in `specs`.
    """

    surprise_prior: Tensor  # (3,) mean, variance and weight (in segments) of the surprise that a sequence starts with

    def __init__(
        self, d_model: int, *, dims: int, hidden: int, key_dims: int, features: int, rates: int, max_loops: int
    ) -> None:
        """
        Args:
            dims: m, channels of values.
            hidden: channels between the two layers.
            key_dims: channels of keys and queries.
            features: channels of what `features` makes of them, the MLP's inputs.
            rates: data-dependent scalars per position that the write rule uses.
            max_loops: how often the memory is read for a position, at most; its first weights go by that.
        """
        super().__init__()
        self.max_loops = max_loops
        d, m = d_model, dims
        self.query_proj = nn.Linear(d, key_dims, bias=False)
        self.key_proj = nn.Linear(d, key_dims, bias=False)
        self.key_conv = nn.Parameter(torch.zeros(TAPS, key_dims))  # tap j: the position j before
        self.value_proj = nn.Linear(d, m, bias=False)
        self.rates_proj = nn.Linear(d, rates)
        self.out_proj = nn.Linear(m, d, bias=False)
        self.gate_proj = nn.Linear(d, 1)
        # The memory before anything was written: random features and nothing known about them.
        self.up = nn.Parameter(torch.empty(features, hidden))
        self.down = nn.Parameter(torch.zeros(hidden, m))
        self.register_buffer("surprise_prior", torch.zeros(3))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Every projection but those that start closed is drawn by the model; see `RMSE.reset_parameters`."""
        self.up.normal_(std=0.3)  # nearly linear at first, so that different keys hardly meet
        self.down.zero_()
        self.query_proj.weight.copy_(self.key_proj.weight)  # so that from the start like finds like
        self.key_conv.copy_(torch.tensor([1.0, 1.0, 0.0, 0.0])[:, None].expand_as(self.key_conv))
        # What is read comes out as what was written, at the size of the block's other branches.
        d, m = self.out_proj.weight.shape
        scale = min(self.max_loops**-0.5, 0.3) * (d / m) ** 0.5
        self.out_proj.weight.copy_(self.value_proj.weight.T * scale)
        self.gate_proj.weight.zero_()
        self.gate_proj.bias.zero_()
        self.rates_proj.weight.mul_(0.1)

    # ---------------------------------------------------------------------------------------------- state

    def specs(self) -> tuple[TensorSpec, ...]:
        """The state of one sequence, float32."""
        up, down = (1, *self.up.shape), (1, *self.down.shape)
        return (
            TensorSpec("memory_up", up),
            TensorSpec("memory_down", down),
            TensorSpec("momentum_up", up),
            TensorSpec("momentum_down", down),
            TensorSpec("key_tail", (1, TAPS - 1, self.key_proj.out_features)),  # the last positions, for conv
            *self.window_specs(),
            TensorSpec("surprise_stats", (1, 3)),  # running mean, variance, number of segments
        )

    def window_specs(self) -> tuple[TensorSpec, ...]:
        """Further state of a rule that looks at more than one segment."""
        return ()

    def initial(self, batch: int) -> Tensors:
        """The state before the first segment, `batch` sequences."""
        start = {"memory_up": self.up, "memory_down": self.down, "surprise_stats": self.surprise_prior}
        zero = self.up.new_zeros(())
        return {t.name: start.get(t.name, zero).expand(batch, *t.shape[1:]) for t in self.specs()}

    # ---------------------------------------------------------------------------------------------- read and write

    def features(self, x: Tensor) -> Tensor:
        """Unit keys or queries (B, C, key_dims) -> what the MLP reads, (B, C, features)."""
        return x

    def read(self, x: Tensor, state: Tensors) -> Tensor:
        """What the memory recalls for normed states x (B, C, d): (B, C, d).

        What comes out of M is bounded but not normed: little known stays little.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            query = self.features(unit(self.query_proj(x)))
            y = F.gelu(query @ state["memory_up"]) @ state["memory_down"]  # (B, C, m)
            y = y * torch.rsqrt(1 + y.square().mean(-1, keepdim=True))
            return self.out_proj(y) * torch.sigmoid(self.gate_proj(x))

    def write(self, n: Tensor, count: Tensor, state: Tensors) -> tuple[Tensors, Tensor]:
        """Learn one segment.

        Args:
            n: (B, 64, d) normed exit states.
            count: (B,) rows that are there. A segment with fewer than 64 only has a surprise: its state means nothing.
        Returns:
            (new state; surprise (B,), the memory's mean loss on the segment before the write).
        """
        with torch.autocast(n.device.type, enabled=False):
            n = n.float()
            rows = torch.cat([state["key_tail"], self.key_proj(n)], 1)  # (B, 3 + 64, key_dims)
            shifted = [rows[:, TAPS - 1 - j : rows.shape[1] - j] for j in range(TAPS)]
            mixed = (torch.stack(shifted, -1) * self.key_conv.T).sum(-1)
            key = self.features(unit(mixed))  # (B, 64, features)
            value = rms(self.value_proj(n))
            hidden = key @ state["memory_up"]
            answer = F.gelu(hidden) @ state["memory_down"]
            error = answer - value  # (B, 64, m)
            there = (torch.arange(n.shape[1], device=n.device) < count[:, None]).float()
            # Training may ask for less surprise: that must make the memory better, not the values duller.
            surprise = ((answer - value.detach()).square().mean(-1) * there).sum(1) / there.sum(1)
            new = self.learn(key, value, hidden, error, self.rates_proj(n), state)
            new["key_tail"] = rows[:, -(TAPS - 1) :]
            return new | {"surprise_stats": self.running(state["surprise_stats"], surprise)}, surprise

    @abstractmethod
    def learn(
        self, key: Tensor, value: Tensor, hidden: Tensor, error: Tensor, rates: Tensor, state: Tensors
    ) -> Tensors:
        """The write rule: all state but `key_tail` and `surprise_stats` after a segment.

        Args:
            key: (B, 64, features); value, error: (B, 64, m), error = M(key) - value.
            hidden: (B, 64, hidden) before the activation.
            rates: (B, 64, rates) logits.
        """

    @staticmethod
    def running(stats: Tensor, surprise: Tensor) -> Tensor:
        """Mean, variance and count (B, 3) after one more segment; old segments fade once there are `HORIZON`."""
        mean, variance, count = stats.unbind(-1)
        share = 1 / (count + 1).clamp_max(HORIZON)
        delta = surprise - mean
        return torch.stack([mean + share * delta, (1 - share) * (variance + share * delta.square()), count + 1], -1)


def gradient(key: Tensor, hidden: Tensor, error: Tensor, down: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """sum_t weight_t * d loss_t / d(up, down) with loss_t = mean (M(k_t) - v_t)^2, in closed form.

    Args:
        key: (B, T, features); hidden: (B, T, hidden) before the activation; error: (B, T, m).
        weight: (B, T).
    Returns:
        (d up (B, features, hidden), d down (B, hidden, m)).
    """
    of_output = error * (2 / error.shape[-1]) * weight.unsqueeze(-1)
    of_hidden = (of_output @ down.transpose(1, 2)) * gelu_slope(hidden)
    return key.transpose(1, 2) @ of_hidden, F.gelu(hidden).transpose(1, 2) @ of_output
