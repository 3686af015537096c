"""Many texts at once: what each says alone, though those that have stopped leave the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from architectures import TEXTS, Case, settings_of, text_of

from rmse_edge.arch.common.identity import model_info
from rmse_edge.errors import UserError
from rmse_edge.runtimes.cuda.batch import TextBatch
from rmse_edge.runtimes.engines.torch import TorchRuntime

texts = pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.nightly] if c.slow else [], id=c.name) for c in TEXTS]
)


@texts
def test_each_text_is_what_it_is_alone(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of different lengths, then single tokens of some of them: other positions, other depths."""
    model, text, dials = case.model(), text_of(case), settings_of(case)["adaptive"]
    sizes: list[int] = []
    true = model.step

    def step(k: Any, carry: Any, *rest: Any) -> Any:
        sizes.append(len(carry["h"]))
        return true(k, carry, *rest)

    info = model_info(model, case.name, 0)
    rounds = [[text[7 * i : 7 * i + n] for i, n in enumerate((3, 20, 1, 9, 5))]]
    rounds += [[text[40 + 5 * i + r : 40 + 5 * i + r + (i + r) % 2] for i in range(5)] for r in range(4)]
    alone = [TorchRuntime(model, case.name) for _ in range(5)]
    batch = TextBatch(model, info, 5, "cpu")
    for given in rounds:
        with monkeypatch.context() as patch:
            patch.setattr(model, "step", step)
            found = batch.feed(given, dials)
        for runtime, ids, fed in zip(alone, given, found):
            if not len(ids):
                assert not len(fed.depth) and not len(fed.logits)
                continue
            expected = runtime.feed(ids, dials, "last")
            assert np.array_equal(fed.depth, expected.depth)
            np.testing.assert_allclose(fed.logits, expected.logits, atol=3e-5)
    assert [runtime.position for runtime in alone] == batch.kept.position.tolist()
    assert min(sizes) < 3 < max(sizes) == 5  # rows have left


def test_what_it_is_given_has_to_fit(tiny: Any) -> None:
    info = model_info(tiny, "tiny", 0)
    batch = TextBatch(tiny, info, 2, "cpu")
    with pytest.raises(UserError, match="got 1, expected 2"):
        batch.feed([[1]], info.dials)
    with pytest.raises(UserError, match="outside the vocabulary"):
        batch.feed([[1], [65]], info.dials)
    assert batch.kept.position.tolist() == [0, 0]
    assert torch.equal(batch.kept.state["past_keys"], torch.zeros_like(batch.kept.state["past_keys"]))
