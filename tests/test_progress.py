"""Long work tells one share of the whole, which only grows, and a terminal shows it with the time that is left."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from helpers import mixed_model

from rmse_edge.cli.common import total_bar
from rmse_edge.progress import Stages, Work
from rmse_edge.quantize import QuantizeRequest, quantize


def test_parts_by_their_costs() -> None:
    told: list[tuple[str, float]] = []
    work = Work({"first": 1.0, "second": 3.0, "third": 1.0}, lambda what, done: told.append((what, round(done, 6))))
    note = work.start("first", 10)
    note(5)
    note(50)  # more than was promised: no part takes more than its share
    work.start("second", 2)(1)
    work.start("third", 1)  # what was never told of the second is done, too
    assert told == [
        ("first", 0.0), ("first", 0.1), ("first", 0.2), ("second", 0.2), ("second", 0.5), ("third", 0.8)
    ]  # fmt: skip


def test_stages_are_done_when_the_next_one_begins() -> None:
    told: list[float] = []
    stages = Stages([("tracing", 1.0), ("tracing", 1.0), ("lowering", 2.0)], lambda what, done: told.append(done))
    for stage in ("tracing a", "tracing b", "something else", "lowering a", "lowering b"):
        stages(stage)
    assert told == [0.0, 0.25, 0.25, 0.5, 0.5]


@pytest.mark.slow
def test_quantising_tells_all_of_it() -> None:
    told: list[float] = []
    request = QuantizeRequest(calibration_tokens=512, evaluation_tokens=512, kv="int8")
    ids = np.random.default_rng(0).integers(0, 65, 16_384)
    quantize(mixed_model(block_size=64), request, ids, progress=lambda what, done: told.append(done))
    assert told == sorted(told) and told[0] == 0 and told[-1] == pytest.approx(1.0)
    assert len(set(told)) > 10  # every stage, and steps within


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [Terminal(), io.StringIO()])
def test_one_bar_for_the_whole_command(terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parts share one bar, which says how much is done and what is left; where nobody looks, nothing is written."""
    monkeypatch.setattr(sys, "stderr", terminal)
    with total_bar() as part:
        quantising, exporting = part(0.6), part(0.4)
        quantising("gate_up_proj", 0.5)
        exporting("lowering loop", 0.5)
    said = terminal.getvalue()
    if not terminal.isatty():
        assert said == ""
        return
    assert "gate_up_proj:  30% |" in said and "lowering loop:  80% |" in said and said.rstrip().count("\n") == 0
    assert "left" in said
