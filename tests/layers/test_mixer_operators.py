"""Parts of mixers as one operator each, as graphs of some targets have them, against the parallel forms that eager code computes."""

from __future__ import annotations

import pytest
import torch
from test_mixers import called, mixer_of, small

from rmse_edge.layers.mixers.base import Call, Mixer

RECURRENT = ("gated_deltanet", "mamba3", "rodimus", "atlas")


def with_operators(mixer: Mixer, monkeypatch: pytest.MonkeyPatch) -> Mixer:
    """The mixer as a trace for such a target sees it."""
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    monkeypatch.setattr(
        torch, "cond", lambda which, yes, no, given: yes(*given) if which else no(*given)
    )  # of eager code
    mixer.operators = True
    return mixer


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize("count", [1, 7, 64])
def test_operators_say_what_the_parallel_forms_say(kind: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a state that is not empty, with padding; what is read, what is left, and what is absorbed."""
    mixer = small(kind, mamba_rank=1, atlas_segment=64).layers[0].mixers[0]
    assert isinstance(mixer, Mixer)
    before = called(mixer, torch.randn(2, 64, 32), torch.tensor([64, 64]))[1]
    x, n_valid = torch.randn(2, count, 32), torch.tensor([count, max(1, count - 3)])
    y, after, rows = called(mixer, x, n_valid, before)
    own, new, _ = called(with_operators(mixer, monkeypatch), x, n_valid, before)
    there = (torch.arange(count) < n_valid[:, None]).unsqueeze(-1)
    torch.testing.assert_close(own * there, y * there, atol=2e-5, rtol=1e-4)
    kept = {k.name: rows.rows[k.name] for k in mixer.kept if k.absorbed}
    past = {k.name: torch.zeros(2, k.heads, k.ring or 1, k.width) for k in mixer.kept}
    absorbed = mixer.absorb(kept, past, before, Call(torch.zeros_like(n_valid), n_valid, {}))
    for name, t in after.items():
        torch.testing.assert_close(new[name], t, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(absorbed[name], t, atol=2e-5, rtol=1e-4)


def test_keys_of_a_rank_stay_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator has one key for each position."""
    mixer = mixer_of("mamba3")
    x, n_valid = torch.randn(1, 7, 32), torch.tensor([7])
    y = called(mixer, x, n_valid)[0]
    torch.testing.assert_close(called(with_operators(mixer, monkeypatch), x, n_valid)[0], y)
