"""Mixers: against published numbers, against themselves cut in other ways, and what padding and stopped positions leave."""

from __future__ import annotations

from math import pi
from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_tokens
from paths import ROOT
from safetensors.torch import load_file
from torch import Tensor

from rmse_edge.arch.common.hybrid_model import MIXERS, HybridModel
from rmse_edge.arch.hybrid.config import KINDS, HybridConfig
from rmse_edge.layers.masks import causal_mask
from rmse_edge.layers.memory.atlas import newton_schulz
from rmse_edge.layers.mixers.atlas import AtlasLayer, features
from rmse_edge.layers.mixers.base import Call, Mixer
from rmse_edge.layers.mixers.chunks import inverse_of_unit_lower
from rmse_edge.layers.mixers.mamba3 import Mamba3, heavy_tail, published_order
from rmse_edge.loop.contract import Tensors
from rmse_edge.loop.dials import Dials
from rmse_edge.runtimes.engines.torch import TorchRuntime

DATA = ROOT / "tests" / "data"


def small(kind: str, **changes: Any) -> HybridModel:
    """A model of one layer of a kind."""
    torch.manual_seed(3)
    sizes: dict[str, Any] = {
        "vocab_size": 65,
        "d_model": 32,
        "layers": (kind,),
        "max_position_embeddings": 512,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 8,
        "rotary_dims": 4,
        "window": 24,
        "shared_key_window": 20,
        "deltanet_key_heads": 2,
        "deltanet_value_heads": 4,
        "deltanet_key_dim": 8,
        "deltanet_value_dim": 8,
        "mamba_heads": 4,
        "mamba_head_dim": 8,
        "mamba_state_dim": 8,
        "mamba_angles": 2,
        "mamba_rank": 2,
        "rodimus_channels": 32,
        "rodimus_state_dim": 8,
        "rodimus_gate_rank": 8,
        "atlas_heads": 2,
        "atlas_head_dim": 8,
        "atlas_hidden": 8,
    }
    if kind == "rodimus_plus":
        sizes["intermediate_size"] = 32  # fmt: skip
    return HybridModel(HybridConfig(**sizes | changes)).eval()


class Recorded:
    """`Rows` of a call with nothing before it."""

    def __init__(self, mixer: Mixer) -> None:
        self.kinds = {kind.name: kind for kind in mixer.kept}
        self.rows: Tensors = {}

    def add(self, name: str, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        self.rows[name] = rows
        kind = self.kinds[name]
        return rows, rows.new_zeros(*rows.shape[:2], kind.ring, rows.shape[3]) if kind.ordered else None


def called(mixer: Mixer, x: Tensor, n_valid: Tensor, state: Tensors | None = None) -> tuple[Tensor, Tensors, Recorded]:
    """One call at position 0: what it reads, the state after it, and its rows."""
    batch, count = x.shape[:2]
    if state is None:
        state = {kind.name: torch.zeros(batch, *kind.shape) for kind in mixer.states}
    window = getattr(getattr(mixer, "kind", None), "window", None)
    ending = f"_{window}" if window else ""
    fixed = {f"causal_mask{ending}": causal_mask(n_valid, count, window)}
    fixed |= {name: torch.ones(1, count, 2) * scale for name, scale in (("cos", 0.8), ("sin", 0.6))}
    rows = Recorded(mixer)
    y, new = mixer(x, rows, state, Call(torch.zeros_like(n_valid), n_valid, fixed))
    return y, new, rows


def mixer_of(kind: str) -> Mixer:
    found = small(kind).layers[0].mixers[0]
    assert isinstance(found, Mixer)
    return found


# --------------------------------------------------------------------------------------------------- cut in other ways


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *(pytest.param(kind, {}, id=kind) for kind in KINDS),
        pytest.param("mamba3", {"mamba_angles": 0}, id="mamba3-real"),
    ],
)
@pytest.mark.parametrize("sizes", [(1,), (1, 7), (1, 64)], ids=str)
def test_calls_of_any_size_give_the_same_numbers_and_states(
    kind: str, changes: dict[str, Any], sizes: tuple[int, ...]
) -> None:
    """150 positions in calls of 1, 7 and 64, the last one padded, against all at once."""
    model, text = small(kind, **changes), random_tokens(150, vocab=65)
    dials = {name: torch.from_numpy(value) for name, value in Dials(1).arrays().items()}
    whole = model.whole_text(torch.from_numpy(text), dials).logits
    left = []
    for cut in ((1, 64), sizes):
        model.call_sizes = lambda cut=cut: cut  # type: ignore[method-assign]
        runtime = TorchRuntime(model, kind)
        fed = runtime.feed(text, Dials(1))
        np.testing.assert_allclose(fed.logits, whole, atol=1e-5)
        left.append(runtime.tensors())
    assert left[0].keys() == left[1].keys() and len(left[0]) > 1
    for name, array in left[0].items():
        assert np.abs(array).max() > 0, name
        np.testing.assert_allclose(left[1][name], array, atol=1e-5 * max(1.0, np.abs(array).max()), err_msg=name)


@pytest.mark.parametrize("kind", MIXERS)
def test_padding_leaves_no_trace_in_what_is_read_or_kept(kind: str) -> None:
    """Rows of a batch with padding of their own are what they are without it, whatever stands in padding."""
    mixer, count = mixer_of(kind), 64
    x = torch.randn(2, count, 32)
    n_valid = torch.tensor([9, 64])
    y, new, _ = called(mixer, x, n_valid)
    short, after, _ = called(mixer, x[:1, :9], n_valid[:1])
    torch.testing.assert_close(y[:1, :9], short, atol=1e-6, rtol=1e-5)
    other, again, _ = called(mixer, torch.cat([x[:, :9], 100 * torch.randn(2, count - 9, 32)], 1), torch.tensor([9, 9]))
    for name, t in new.items():
        torch.testing.assert_close(t[:1], after[name], atol=1e-6, rtol=1e-5)
        assert torch.equal(again[name][:1], t[:1])
    assert torch.equal(other[:1, :9], y[:1, :9])


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("count", [1, 7, 64, 150])
def test_what_is_absorbed_is_what_a_call_leaves(kind: str, count: int) -> None:
    """From a state that is not empty, and with padding."""
    mixer = mixer_of(kind)
    before = called(mixer, torch.randn(2, 64, 32), torch.tensor([64, 64]))[1]
    n_valid = torch.tensor([count, max(1, count - 3)])
    _, new, rows = called(mixer, torch.randn(2, count, 32), n_valid, before)
    absorbed = {kind.name: rows.rows[kind.name] for kind in mixer.kept if kind.absorbed}
    past = {kind.name: None for kind in mixer.kept}
    found = mixer.absorb(absorbed, past, before, Call(torch.zeros_like(n_valid), n_valid, {}))
    assert found.keys() == new.keys()
    for name, t in found.items():
        torch.testing.assert_close(t, new[name], atol=1e-5, rtol=1e-5)
        assert kind == "atlas" or not torch.equal(t, before[name])  # a segment that is not complete teaches nothing


def test_the_inverse_is_as_good_where_keys_repeat() -> None:
    """Equal keys that never decay: what is summed up by powers of N loses every digit there."""
    for n in (1, 2, 7, 64):
        strict = torch.randn(3, n, n, dtype=torch.float64).tril(-1) * n**-0.5
        exact = torch.linalg.inv(torch.eye(n, dtype=torch.float64) - strict)
        found = inverse_of_unit_lower(strict.float())
        assert float((found - exact).abs().max() / exact.abs().max()) < 1e-5
    ones = -torch.ones(64, 64).tril(-1)
    found = inverse_of_unit_lower(ones)
    assert torch.equal(found, torch.eye(64) - torch.diag(torch.ones(63), -1))
    power, product = ones, torch.eye(64)
    for _ in range(6):
        product, power = product + product @ power, power @ power
    assert float((product - found).abs().max()) > 1


# ------------------------------------------------------------------------------------------------------------- Mamba-3


def published_mamba(name: str) -> tuple[Mamba3, Tensor, Tensors, Tensor]:
    """The mixer, its inputs, the numbers, and which published channel stands at each place."""
    weights, inputs, outputs = (
        load_file(DATA / name / f"{part}.safetensors") for part in ("model", "inputs", "outputs")
    )
    rank = 2 if name.endswith("mimo") else 1
    mixer = Mamba3(32, heads=4, head_dim=16, state_dim=16, angles=4, rank=rank)
    order = torch.tensor(published_order(16, 4, rank))
    z, x, b, c, steps = weights.pop("in_proj.weight").split([64, 64, 16 * rank, 16 * rank, 16])
    b, c = (t.unflatten(0, (rank, 16))[:, order].flatten(0, 1) for t in (b, c))
    own = {"z_proj": z, "x_proj": x, "b_proj": b, "c_proj": c, "steps_proj": steps}
    state = {f"{path}.weight": t for path, t in own.items()}
    for path, t in weights.items():
        named = path.replace("B_", "b_").replace("C_", "c_")
        state[named] = t[..., order] if named.startswith(("b_", "c_")) else t
    mixer.load_state_dict(state)
    return mixer, inputs["u"], outputs, order


@pytest.mark.parametrize("name", ["mamba3_siso", "mamba3_mimo"])
@pytest.mark.parametrize("cut", [(12,), (1,) * 12, (7, 5), (8, 1, 1, 1, 1)], ids=str)
@torch.no_grad()
def test_mamba3_gives_the_published_numbers(name: str, cut: tuple[int, ...]) -> None:
    mixer, u, expected, order = published_mamba(name)
    state: Tensors | None = None
    found, done = [], 0
    for count in cut:
        y, state, _ = called(mixer, u[:, done : done + count], torch.tensor([count, count]), state)
        found.append(y)
        done += count
        if (tag := {8: "after_prefill", 12: "final"}.get(done)) and f"{tag}.k_state" in expected:
            turns = (state["theta"].squeeze(2) - expected[f"{tag}.angle_state"]) / (2 * pi)
            assert float((turns - turns.round()).abs().max()) < 1e-6
            for ours, theirs in (("memory", "ssm_state"), ("last_keys", "k_state"), ("last_values", "v_state")):
                value = expected[f"{tag}.{theirs}"]
                value = value if theirs == "v_state" else value[..., order]
                torch.testing.assert_close(state[ours].view(value.shape), value, atol=2e-5, rtol=1e-5)
    assert state is not None
    difference = (torch.cat(found, 1) - expected["out"]).abs().max() / expected["out"].abs().max()
    assert float(difference) < 1e-5
    last = expected["ssm.final_state_f64_check"][..., order]
    assert float((state["memory"] - last).abs().max() / last.abs().max()) < 1e-5


def test_the_two_activations_of_a_decay() -> None:
    x = torch.tensor([-3.0, 0.0, 2.0])
    assert heavy_tail(x).tolist() == [0.25, 1.0, 3.0]
    torch.manual_seed(0)
    both = [Mamba3(8, heads=1, head_dim=4, state_dim=4, angles=1, a_activation=a) for a in ("softplus", "heavy_tail")]
    both[1].load_state_dict(both[0].state_dict())
    a, b = (called(mixer, torch.ones(1, 5, 8), torch.tensor([5]))[0] for mixer in both)
    assert not torch.allclose(a, b)


# --------------------------------------------------------------------------------------------------------------- ATLAS


def learned_by_autograd(mixer: AtlasLayer, rows: Tensors) -> Tensors:
    """What a memory becomes that has learned one segment (B, H, T, n) from its beginning, gradients by autograd."""
    found: dict[str, list[Tensor]] = {}
    for b in range(len(rows["keys"])):
        for h in range(mixer.heads):
            key, value, rates = (rows[name][b, h].detach() for name in ("keys", "values", "rates"))
            gamma, theta, eta, alpha = rates.unbind(-1)
            first = [w[h].detach() for w in (mixer.up, mixer.down)]
            weights, momentum = [w.clone() for w in first], [torch.zeros_like(w) for w in first]
            for step in range(mixer.steps):
                weights = [w.requires_grad_() for w in weights]
                answer = key + torch.nn.functional.gelu(mixer.phi(key).detach() @ weights[0]) @ weights[1]
                (gamma * (answer - value).square().mean(-1)).sum().backward()
                for i, w in enumerate(weights):
                    assert w.grad is not None
                    momentum[i] = theta.mean() * momentum[i] + w.grad
                    rule = newton_schulz(momentum[i][None])[0] if mixer.rule == "muon" else momentum[i]
                    kept = alpha.mean() * w if step == 0 else w
                    weights[i] = (kept - eta.mean() * rule).detach()
            for name, w, start, m in zip(("up", "down"), weights, first, momentum):
                found.setdefault(f"memory_{name}", []).append(w - start)
                found.setdefault(f"momentum_{name}", []).append(m)
    return {name: torch.stack(t).unflatten(0, (-1, mixer.heads)) for name, t in found.items()}


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize(("rule", "steps"), [("muon", 1), ("muon", 3), ("sgd", 2)])
def test_a_segment_teaches_what_autograd_would(degree: int, rule: Any, steps: int) -> None:
    torch.manual_seed(degree)
    mixer = AtlasLayer(16, heads=2, head_dim=4, hidden=6, degree=degree, steps=steps, rule=rule, segment=8)
    mixer.reset_parameters()
    torch.nn.init.normal_(mixer.down, std=0.3)
    _, new, rows = called(mixer, torch.randn(2, 8, 16), torch.tensor([8, 8]))
    for name, expected in learned_by_autograd(mixer, rows.rows).items():
        assert float((new[name] - expected).abs().max() / expected.abs().max()) < 1e-4, name


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_features_are_a_polynomial_kernel(degree: int) -> None:
    """phi(a) . phi(b) is 1 + sum_i (a_i (a . b)^i) with a_i = 1 / i!^2, in as few channels as there are products."""
    mixer = AtlasLayer(8, heads=1, head_dim=5, hidden=4, degree=degree)
    assert features(5, degree) == [5, 20, 55][degree - 1] == mixer.up.shape[1] - 1
    a, b = torch.randn(2, 5)
    dot = a @ b
    expected = 1 + dot + sum((dot**i) / [1, 1, 2, 6][i] ** 2 for i in range(2, degree + 1))
    torch.testing.assert_close((mixer.phi(a) @ mixer.phi(b)).detach(), expected)
