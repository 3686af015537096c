"""The write rules against slow recurrences and autograd, and the memory inside the model: segments, chunks, gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from small_models import RingHost, dials, lively_model, small_config, whole_sequence
from torch import Tensor

from rmse_edge.arch.rmse.config import RMSEConfig
from rmse_edge.arch.rmse.parts import make_memory
from rmse_edge.errors import ConfigError
from rmse_edge.layers.memory.atlas import Atlas, newton_schulz
from rmse_edge.layers.memory.base import CLIP, HORIZON, Memory, gelu_slope
from rmse_edge.loop.contract import Tensors
from rmse_edge.numbers import SEGMENT

KINDS = ("titans", "atlas")
SMALL = dict(memory_dim=16, memory_hidden=24, memory_key_dim=6)


def memory_config(kind: str, **changes: object) -> RMSEConfig:
    return small_config(memory=kind, **(SMALL | changes))


def made(kind: str, **changes: object) -> Memory:
    """A memory whose rates and starting weights are all different from their gentle beginnings."""
    torch.manual_seed(3)
    memory = make_memory(memory_config(kind, **changes))
    assert memory is not None
    memory.reset_parameters()
    with torch.no_grad():
        memory.down.normal_(std=0.2)
        memory.key_conv.normal_()
        memory.rates_proj.weight.normal_(std=0.5)
        memory.rates_proj.bias.fill_(-1.0)
    return memory


def segment_states(count: int, batch: int = 2, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, SEGMENT, 32, generator=draw) for _ in range(count)]


FULL = torch.tensor([SEGMENT, SEGMENT])


# ------------------------------------------------------------------------------------------- independent, slow


def plain_unit(x: Tensor) -> Tensor:
    return x / (x.pow(2).sum() + 1e-6).sqrt()


def answer(up: Tensor, down: Tensor, key: Tensor) -> Tensor:
    """M(key) for one vector."""
    return F.gelu(key @ up) @ down


def slow_loss(up: Tensor, down: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return ((answer(up, down, key) - value) ** 2).mean()


def key_and_value(memory: Memory, past: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Of the last position of a sequence of normed states."""
    n = past[-1]
    key = plain_unit(sum(memory.key_conv[j] * memory.key_proj(past[-1 - j]) for j in range(min(4, len(past)))))
    if isinstance(memory, Atlas):
        products = [
            key[i] * key[j] * (1.0 if i == j else 2.0**0.5)
            for i, j in itertools.combinations_with_replacement(range(len(key)), 2)
        ]
        key = torch.cat([key, torch.stack(products)]) / 2.0**0.5
    value = memory.value_proj(n)
    return key, value / (value.pow(2).mean() + 1e-6).sqrt()


def autograd_of(up: Tensor, down: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of one position's loss, by torch.autograd."""
    up, down = up.detach().requires_grad_(), down.detach().requires_grad_()
    loss = slow_loss(up, down, key.detach(), value.detach())
    return torch.autograd.grad(loss, (up, down))


class SlowTitans:
    """One sequence, position by position; double precision."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.weights = [memory.up.detach().clone(), memory.down.detach().clone()]
        self.momentum = [torch.zeros_like(w) for w in self.weights]
        self.past: list[Tensor] = []

    def segment(self, n: Tensor) -> Tensor:
        began = [w.clone() for w in self.weights]
        learned = []
        for position in n:
            self.past.append(position)
            key, value = key_and_value(self.memory, self.past)
            theta, eta, alpha = torch.sigmoid(self.memory.rates_proj(position))
            slopes = autograd_of(*began, key, value)
            for i, slope in enumerate(slopes):
                self.momentum[i] = eta * self.momentum[i] - theta * slope
                self.weights[i] = (1 - alpha) * self.weights[i] + self.momentum[i]
            learned.append(slow_loss(*began, key, value))
        return torch.stack(learned).mean()


class SlowAtlas:
    """One sequence, segment by segment, with the omega rule's window as a plain list; double precision."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.weights = [memory.up.detach().clone(), memory.down.detach().clone()]
        self.momentum = [torch.zeros_like(w) for w in self.weights]
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self.past: list[Tensor] = []

    def segment(self, n: Tensor) -> Tensor:
        rates = torch.sigmoid(self.memory.rates_proj(n))
        for position, rate in zip(n, rates):
            self.past.append(position)
            self.seen.append((*key_and_value(self.memory, self.past), rate[0]))
        surprise = torch.stack([slow_loss(*self.weights, k, v) for k, v, _ in self.seen[-SEGMENT:]]).mean()
        window = self.seen[-self.memory.window :]
        up, down = (w.detach().requires_grad_() for w in self.weights)
        loss = sum(gamma.detach() * slow_loss(up, down, k.detach(), v.detach()) for k, v, gamma in window)
        theta, eta, alpha = rates[:, 1:].mean(0)
        for i, slope in enumerate(torch.autograd.grad(loss, (up, down))):
            self.momentum[i] = theta * self.momentum[i] + slope
            self.weights[i] = alpha * self.weights[i] - eta * slow_newton_schulz(self.momentum[i])
        return surprise


def slow_newton_schulz(s: Tensor) -> Tensor:
    """The odd polynomial 3.4445 x - 4.775 x^3 + 2.0315 x^5 applied five times to the singular values."""
    u, x, v = torch.linalg.svd(s / (s.norm() + 1e-7), full_matrices=False)
    for _ in range(5):
        x = 3.4445 * x - 4.775 * x**3 + 2.0315 * x**5
    return u @ torch.diag(x) @ v


@pytest.mark.parametrize(("kind", "changes"), [("titans", {}), ("atlas", {}), ("atlas", {"memory_window": 64}),
                                               ("atlas", {"memory_window": 192})])  # fmt: skip
def test_the_write_is_the_slow_recurrence(kind: str, changes: dict[str, int]) -> None:
    memory = made(kind, **changes).double()
    slow = [{"titans": SlowTitans, "atlas": SlowAtlas}[kind](memory) for _ in range(2)]
    state = memory.initial(2)
    for n in segment_states(5):
        n = n.double()
        with torch.no_grad():
            state, surprise = write_in_double(memory, n, state)
        for b, one in enumerate(slow):
            assert surprise[b] == pytest.approx(float(one.segment(n[b])), rel=1e-5)
            for name, expected in zip(("up", "down"), one.weights):
                torch.testing.assert_close(state[f"memory_{name}"][b], expected, rtol=1e-5, atol=1e-5)
            for name, expected in zip(("up", "down"), one.momentum):
                torch.testing.assert_close(state[f"momentum_{name}"][b], expected, rtol=1e-5, atol=1e-5)


def write_in_double(memory: Memory, n: Tensor, state: Tensors) -> tuple[Tensors, Tensor]:
    """`Memory.write` without its casts to float32, so that only the rule is compared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", lambda self: self.double())
        return memory.write(n, FULL, state)


def test_the_slope_of_gelu() -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(F.gelu(x).sum(), x)
    torch.testing.assert_close(gelu_slope(x.detach()), expected)


def test_newton_schulz_pushes_singular_values_together() -> None:
    draw = torch.Generator().manual_seed(0)
    for shape in ((3, 20, 8), (3, 8, 20)):
        values = torch.linalg.svdvals(newton_schulz(torch.randn(shape, generator=draw)))
        assert values.min() > 0.6 and values.max() < 1.2
    assert not newton_schulz(torch.zeros(1, 5, 4)).any()  # nothing learned, nothing moved


@pytest.mark.parametrize("kind", KINDS)
def test_a_write_makes_the_segment_less_surprising(kind: str) -> None:
    memory = made(kind)
    memory.reset_parameters()
    state = memory.initial(2)
    n = segment_states(1)[0]
    with torch.no_grad():
        surprises = []
        for _ in range(6):
            state, surprise = memory.write(n, FULL, state)
            surprises.append(surprise.max().item())
    assert surprises[0] == pytest.approx(1.0, abs=1e-3)  # values have mean square 1 and nothing is known
    assert surprises[-1] < 0.9 * surprises[0]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_blows_the_memory_up(kind: str) -> None:
    """One position over and over, at rates far above what it can take: 64 times the same gradient, 200 times over."""
    memory = made(kind)
    with torch.no_grad():
        memory.rates_proj.weight.zero_()
        memory.rates_proj.bias.fill_(3.0)
        n = torch.randn(1, 1, 32).expand(2, SEGMENT, 32)
        state = memory.initial(2)
        for _ in range(200):
            state, surprise = memory.write(n, FULL, state)
        read = memory.read(n, state)
    assert all(t.isfinite().all() for t in state.values()) and surprise.isfinite().all() and read.isfinite().all()
    assert state["memory_down"].norm(dim=(1, 2)).max() < 100 * CLIP


def test_running_statistics_are_those_of_the_segments_so_far() -> None:
    draws = torch.rand(40, 2, generator=torch.Generator().manual_seed(0))
    stats = torch.zeros(2, 3)
    for surprise in draws:
        stats = Memory.running(stats, surprise)
    torch.testing.assert_close(stats[:, 0], draws.mean(0))
    torch.testing.assert_close(stats[:, 1], draws.var(0, correction=0))
    assert stats[:, 2].tolist() == [40, 40]
    for _ in range(10 * HORIZON):  # then old ones fade
        stats = Memory.running(stats, torch.tensor([5.0, 5.0]))
    torch.testing.assert_close(stats[:, 0], torch.tensor([5.0, 5.0]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_a_segment_has_the_surprise_of_its_rows(kind: str) -> None:
    memory, n = made(kind), segment_states(1)[0]
    garbage = n.clone()
    garbage[:, 10:] = 1e3
    with torch.no_grad():
        state = memory.initial(2)
        a, b = (memory.write(x, torch.tensor([10, 10]), state)[1] for x in (n, garbage))
    torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------------ in the model


def remembering_model(kind: str, **changes: object) -> torch.nn.Module:
    model = lively_model(memory_config(kind, **changes))
    with torch.no_grad():
        model.memory.down.normal_(std=0.3)
        model.memory.out_proj.weight.normal_(std=0.5)
        model.memory.rates_proj.bias.copy_(torch.tensor([0.0, 0.0, -3.0] if kind == "titans" else [0.0, 0.0, 0.0, 2.0]))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", [{}, {"exit_threshold": 0.7}, {"exit_epsilon": 0.4}])
def test_chunks_of_any_size_agree_across_segments(kind: str, setting: dict[str, float]) -> None:
    """A full forward, calls of 64, calls of 1 and a mixture: one text, one set of numbers."""
    model = remembering_model(kind)
    tokens = torch.randint(37, (1, 64 * 3 + 20), generator=torch.Generator().manual_seed(5))
    dial = dials(model, **setting)
    logits, depth = whole_sequence(model, tokens, dial)
    for sizes, pad in (([64], 0), ([1], 0), ([1, 30, 64, 5], 64)):
        got, got_depth = RingHost(model).feed(tokens, dial, sizes, pad)
        assert torch.equal(got_depth, depth)
        torch.testing.assert_close(got, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_beyond_the_window_matters_only_through_the_memory(kind: str) -> None:
    model = remembering_model(kind, max_loops=1)
    tokens = torch.randint(37, (1, 64 * 4), generator=torch.Generator().manual_seed(5))
    other = tokens.clone()
    other[:, :32] = (other[:, :32] + 1) % 37
    with torch.no_grad():
        a, b = (model.trajectory(t)[0][-1][:, 3 * 64 :] for t in (tokens, other))
        assert (a - b).abs().max() > 1e-3
        model.memory.out_proj.weight.zero_()
        a, b = (model.trajectory(t)[0][-1][:, 3 * 64 :] for t in (tokens, other))
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_what_decides_the_write(kind: str) -> None:
    """The loss after a write teaches the keys, values and rates it was made with."""
    model = remembering_model(kind)
    tokens = torch.randint(37, (2, 64 * 3), generator=torch.Generator().manual_seed(5))
    states, _, _ = model.trajectory(tokens)
    model.head_proj(states[-1])[:, 128:].square().mean().backward()
    for name, p in model.memory.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_configuration_of_memories() -> None:
    with pytest.raises(ConfigError, match="memory: got 'neural', expected one of none, titans, atlas"):
        memory_config("neural")
    with pytest.raises(ConfigError, match="memory_window: got 100, expected a multiple of 64"):
        memory_config("atlas", memory_window=100)
