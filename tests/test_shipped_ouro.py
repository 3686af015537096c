"""The small dense looped model that is shipped: stopping saves a third of its loops and costs next to nothing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from architectures import whole
from paths import ROOT

from rmse_edge.arch.ouro.model import Ouro
from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.loop.dials import Dials
from rmse_edge.losses import token_loss
from rmse_edge.text import Tokenizer

MODEL = ROOT / "models" / "ouro-shakespeare"


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    ids = Tokenizer(MODEL / "tokenizer.json").encode((MODEL / "sample.txt").read_text())
    return np.array(ids[: 4 * 256]).reshape(4, 256)


@pytest.mark.parametrize("policy", ["propagate", "repeat"])
def test_a_third_of_the_loops_for_one_percent_of_the_loss(policy: str, text: np.ndarray) -> None:
    shipped = load_checkpoint(MODEL)
    model = Ouro(dataclasses.replace(shipped.config, kv_policy=policy)).eval()
    model.load_state_dict(shipped.state_dict())
    assert shipped.config.kv_policy == "propagate"
    losses, depths = {}, []
    for name, dials in (("full", Dials(4)), ("own", shipped.config.dials)):
        found = [whole(model, block, dials) for block in text]
        losses[name] = float(
            torch.stack(
                [
                    token_loss(torch.from_numpy(logits[:-1]), torch.from_numpy(block[1:])).mean()
                    for (logits, _), block in zip(found, text)
                ]
            ).mean()
        )
        depths = [depth for _, depth in found]
    assert 1.2 < losses["full"] < 1.9  # it has learned something
    assert losses["own"] <= 1.01 * losses["full"]
    assert np.concatenate(depths).mean() <= 0.7 * 4


def test_it_writes_and_says_how_deep(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--prompt", "ROMEO:", "-n", "40", "--temperature", "0", "--show-depth"]
    assert rmse_run([str(MODEL), *flags]) == 0
    shown = capsys.readouterr()
    assert "of 4 loops on average" in shown.err and "/2]" in shown.out
