"""What the gate allows models whose own numbers hang by a rounding: so much and no more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_tokens
from ouro_models import lively_ouro

from rmse_edge.arch.common.identity import model_info
from rmse_edge.arch.ouro.config import OuroConfig
from rmse_edge.arch.ouro.model import Ouro
from rmse_edge.errors import ParityError
from rmse_edge.export.gate.compare import LOGITS_TOLERANCE, compare
from rmse_edge.export.gate.methods import EXAMPLE_STATE, FEWEST_SLOTS, example_slots, rounded_once_more
from rmse_edge.export.gate.reference import Reference
from rmse_edge.loop.dials import Dials
from rmse_edge.runtimes.engines.torch import TorchRuntime
from rmse_edge.runtimes.host.calls import Calls

FULL = Dials(3)


def loud(times: float) -> tuple[TorchRuntime, Reference, np.ndarray]:
    """A model with so many times larger logits, as a runtime and as a reference, and a text."""
    model = lively_ouro()
    with torch.no_grad():
        model.lm_head.weight *= times
    text = random_tokens(200)
    return TorchRuntime(model, "loud"), Reference(model, model_info(model, "loud", 0), text), text


def test_large_logits_are_allowed_what_their_own_rounding_changes() -> None:
    runtime, reference, text = loud(1000)
    before = {name: tensor.clone() for name, tensor in reference.model.state_dict().items()}
    found = compare(reference, runtime, text, FULL, exact=True)
    assert found["max_logit_difference"] > LOGITS_TOLERANCE
    assert found["allowed"] == pytest.approx(4 * reference.rounding)
    assert all(torch.equal(before[name], tensor) for name, tensor in reference.model.state_dict().items())
    runtime, reference, text = loud(1)
    assert "allowed" not in compare(reference, runtime, text, FULL, exact=True)


def test_a_wrong_host_is_seen_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, reference, text = loud(1000)
    true = Calls.update

    def forgets(self: Calls, found: Any, position: int, n: int) -> None:
        true(self, found, position, max(1, n - 1))

    monkeypatch.setattr(Calls, "update", forgets)
    with pytest.raises(ParityError, match=r"^position \d+: logits differ by"):
        compare(reference, runtime, text, FULL, exact=True)


def test_rounding_inputs_once_more_moves_every_float_by_one_rounding() -> None:
    draw = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    moved = rounded_once_more({"x": draw, "tokens": np.arange(3), "one": np.float32(0.5).reshape(())})
    assert moved["one"].shape == () and moved["one"] != 0.5
    assert (moved["tokens"] == np.arange(3)).all()
    relative = np.abs(moved["x"].astype(np.float64) / draw - 1)
    assert relative.min() > 0 and relative.max() < 2.0**-22 and moved["x"].dtype == np.float32


def test_examples_of_large_models_have_few_slots() -> None:
    """Several copies of the appended state are compared at once: that of Ouro-1.4B takes 1.5 MiB a slot."""
    with torch.device("meta"):
        large = Ouro(OuroConfig(max_position_embeddings=4096)).spec(64)
        tiny = Ouro(OuroConfig(max_position_embeddings=48)).spec(1)
    assert EXAMPLE_STATE // (4 * 24 * 16 * 128 * 4 * 2) == 42
    assert example_slots(large) == FEWEST_SLOTS == 64
    assert example_slots(tiny) == 48
    assert example_slots(lively_ouro().spec(64)) == 300
