"""Dr.LLM says what the published code says without a cache, and says it with one, too: a plan is made once and kept."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_tokens
from safetensors.torch import load_file, save_file

from rmse_edge.arch.dr_llm.config import DrLlmConfig
from rmse_edge.arch.dr_llm.model import DrLlm
from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.errors import ArgumentError, ConfigError
from rmse_edge.layers.routers import chances, windows
from rmse_edge.loop.dials import Dials
from rmse_edge.loop.plan import drive_plan, plan_of, times
from rmse_edge.runtimes.engines.torch import TorchRuntime
from rmse_edge.runtimes.host.session import restore_session, save_session
from rmse_edge.runtimes.text.speculation import Speculation

DATA = Path(__file__).parents[1] / "data" / "dr_llm"
EXACT = 1e-5
CONFIG = {
    "model_type": "dr_llm", "vocab_size": 90, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "num_windows": 8, "router_hidden": 128,
    "router_outputs": ["skip", "execute", "repeat"],
}  # fmt: skip
ROUTES = ("-1.0", "-0.75", "-0.5", "-0.25", "0.0", "0.5", "0.75", "1.0")


@functools.cache
def golden() -> dict[str, torch.Tensor]:
    return load_file(DATA / "inputs.safetensors") | load_file(DATA / "outputs.safetensors")


def published_folder(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    save_file(load_file(DATA / "model.safetensors"), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DrLlm:
    return load_checkpoint(published_folder(tmp_path_factory.mktemp("dr_llm"))).eval()


def dials(route: float) -> Dials:
    return Dials(12, route=route)


def whole(model: DrLlm, tokens: np.ndarray | torch.Tensor, chosen: Dials, prompt: int = 0) -> Any:
    scalars = {name: torch.from_numpy(a) for name, a in chosen.arrays().items()}
    return model.whole_text(torch.as_tensor(tokens), scalars, prompt=prompt)


def far(got: Any, expected: Any) -> float:
    return float((torch.as_tensor(got) - torch.as_tensor(expected)).abs().max())


def runs_of(decisions: torch.Tensor) -> list[int]:
    """The layers of a plan, in order."""
    return [layer for layer, n in enumerate(decisions.tolist()) for _ in range(n)]


# ------------------------------------------------------------------------------------------------- the published numbers


@pytest.mark.parametrize("tag", ["long", "short"])
@pytest.mark.parametrize("route", ROUTES)
def test_plans_and_logits_are_the_published_ones(model: DrLlm, tag: str, route: str) -> None:
    tokens, expected = golden()[f"input_ids_{tag}"][0], golden()[f"{tag}.p{route}.logits"][0]
    decisions = golden()[f"{tag}.p{route}.decisions"]
    found = whole(model, tokens, dials(float(route)))
    assert far(found.logits, expected) < EXACT
    assert set(found.depth.tolist()) == {int(decisions.sum())}
    if float(route) > -1:  # at -1, which the dial does not have, all is skipped as at -0.75
        runtime = TorchRuntime(model, "published")
        fed = runtime.feed(tokens.numpy(), dials(float(route)))
        assert far(fed.logits, expected) < EXACT
        assert plan_of(runtime.state["past_plan"]) == runs_of(decisions)


def test_every_layer_once_is_the_model_without_routers(model: DrLlm) -> None:
    tokens, expected = golden()["input_ids_long"], golden()["static.logits"]
    assert far(whole(model, tokens[0], dials(0.5)).logits, expected[0]) < EXACT
    states, _, depth = model.trajectory(tokens)
    assert far(model.read_out(states[-1]).detach(), expected) < EXACT and set(depth.flatten().tolist()) == {6}


def test_routers_read_means_of_windows(model: DrLlm) -> None:
    """Of the prompt alone, as many windows as it has tokens and no more than eight, the rest of it left out."""
    for tag in ("long", "short"):
        x = model.prelude({"tokens": golden()[f"input_ids_{tag}"]})["x0"].detach()
        fixed = model.fixed_of(x.shape[1], x.device)
        for index, n in enumerate(golden()[f"{tag}.p-0.5.decisions"].tolist()):
            expected = golden()[f"{tag}.p-0.5.router_logits"][index]
            with torch.no_grad():
                assert far(model.router_logits(index, x)[0], expected) < EXACT
                padded = torch.cat([x, torch.full((1, 7, 32), 9.0)], 1)  # rows of a call that are no tokens
                means, share = windows(padded, torch.tensor([x.shape[1]]), 8)
                assert far((model.model.routers[index](means) * share.unsqueeze(-1)).sum(1)[0], expected) < EXACT
                for _ in range(n):
                    x = model.run_layer(index, x, fixed)


# ------------------------------------------------------------------------------------------------------ plans, and the host


@pytest.mark.parametrize("route", [-0.5, -0.25, 1.0])
@pytest.mark.parametrize("cut", [(11, 1, 1, 1, 30, 7), (11, 64), (11, *[1] * 12)])
def test_a_text_goes_on_by_the_plan_of_its_prompt(model: DrLlm, route: float, cut: tuple[int, ...]) -> None:
    """However what follows is cut into calls, at whatever dial: each execution has slots of its own."""
    tokens = random_tokens(sum(cut), vocab=90)
    runtime, fed, done = TorchRuntime(model, "cut"), [], 0
    for i, n in enumerate(cut):
        fed.append(runtime.feed(tokens[done : done + n], dials(route if i == 0 else 0.5)))
        done += n
    expected = whole(model, tokens, dials(route), prompt=11)
    assert far(np.concatenate([f.logits for f in fed]), expected.logits) < 2e-5
    assert np.array_equal(np.concatenate([f.depth for f in fed]), expected.depth)
    assert {n for f in fed for n in f.iterations} == {int(expected.depth[0])}


def test_a_short_prompt_decides_as_a_whole(model: DrLlm) -> None:
    """Up to six tokens are otherwise fed one by one, and the first of them alone would decide."""
    tokens = golden()["input_ids_short"][0].numpy()
    whole_plan = golden()["short.p-0.5.decisions"]
    runtime = TorchRuntime(model, "short")
    runtime.feed(tokens, dials(-0.5))
    assert plan_of(runtime.state["past_plan"]) == runs_of(whole_plan)
    runtime.reset()
    runtime.feed(tokens, dials(-0.5), prompt=1)
    assert plan_of(runtime.state["past_plan"]) != runs_of(whole_plan)


def test_executions_are_no_more_than_asked_for(model: DrLlm) -> None:
    tokens = golden()["input_ids_long"][0].numpy()
    runtime = TorchRuntime(model, "few")
    fed = runtime.feed(tokens, Dials(4, route=-0.5))
    assert plan_of(runtime.state["past_plan"]) == runs_of(golden()["long.p-0.5.decisions"])[:4]
    assert far(fed.logits, whole(model, tokens, Dials(4, route=-0.5)).logits) < EXACT


def test_what_is_not_executed_is_not_computed(model: DrLlm, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    layer = DrLlm.layer

    def counted(self: DrLlm, index: int, *rest: Any) -> Any:
        ran.append(index)
        return layer(self, index, *rest)

    monkeypatch.setattr(DrLlm, "layer", counted)
    runtime = TorchRuntime(model, "counted")
    runtime.feed(golden()["input_ids_long"][0].numpy(), dials(-0.5))
    runtime.feed([7], dials(-0.5))
    assert ran == [0, 1, 1, 4, 4, 5, 5] * 2


def test_a_session_keeps_its_plan(model: DrLlm, tmp_path: Path) -> None:
    tokens = random_tokens(40, vocab=90)
    first, second = TorchRuntime(model, "first"), TorchRuntime(model, "second")
    first.feed(tokens[:20], dials(-0.5))
    save_session(first, tmp_path / "text.session")
    second.feed(tokens[5:9], dials(1.0))  # of another text, with another plan
    restore_session(second, tmp_path / "text.session")
    a, b = (r.feed(tokens[20:], dials(1.0)) for r in (first, second))
    assert np.array_equal(a.logits, b.logits) and a.iterations == b.iterations
    assert plan_of(first.state["past_plan"]) == plan_of(second.state["past_plan"])


def test_what_makes_no_sense_of_a_plan_is_refused(model: DrLlm) -> None:
    runtime = TorchRuntime(model, "planned")
    with pytest.raises(ArgumentError, match=r"prompt: got 4, expected 0\.\.3, of the tokens that are fed"):
        runtime.feed([1, 2, 3], dials(-0.5), prompt=4)
    runtime.feed([1, 2, 3], dials(-0.5))
    with pytest.raises(ArgumentError, match="prompt: planned has its plan since 3 tokens ago"):
        runtime.feed([1, 2, 3], dials(-0.5), prompt=1)
    with pytest.raises(ArgumentError, match="speculate: planned runs its texts by a plan"):
        Speculation(2).check(runtime)
    with pytest.raises(ArgumentError, match=re.escape("route: got -1, expected a number above -1")):
        runtime.feed([1], dials(-1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 33}, "num_hidden_layers: got 33, expected at most 32"),
        ({"route": -1}, "route: got -1, expected a number above -1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: got 3, expected a divisor"),
        ({"router_outputs": ["execute", "skip"]}, "router_outputs: got"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling: got"),
    ],
)
def test_configurations_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        DrLlmConfig.from_dict(CONFIG | changes)


def test_a_plan_is_driven_in_order() -> None:
    """On arrays of any kind: rows by execution, not by layer, and never more than the most."""
    rows, stacks = {"past": np.arange(5) * 10.0}, {"seen": np.zeros(5)}

    def layer(index: int, given: dict[str, Any], k: int) -> dict[str, Any]:
        return {"next_h": given["h"] + 100**index, "seen": given["past"] + k}

    asked: list[tuple[int, float]] = []

    def decide(index: int, h: Any) -> int:
        asked.append((index, float(h)))
        return (2, 0, 2, 2)[index]

    carry, k = drive_plan(layer, decide, {"h": np.float64(0)}, rows, stacks, 4, 5, None)
    assert (carry["h"], k) == (2 + 2 * 100**2 + 100**3, 5)
    assert asked == [(0, 0), (1, 2), (2, 2), (3, 2 + 2 * 100**2)]
    assert stacks["seen"].tolist() == [0, 11, 22, 33, 44]
    again, n = drive_plan(layer, decide, {"h": np.float64(0)}, rows, stacks, 4, 5, [3, 0])
    assert (again["h"], n) == (1 + 100**3, 2) and len(asked) == 4


def test_the_dial_goes_from_skipping_to_repeating() -> None:
    logits = torch.tensor([[1.0, 0.0, 0.5]])
    found = [times(chances(logits, torch.tensor(p))[0]) for p in (-0.99, -0.5, -0.25, 0.0, 0.5, 0.7, 0.8, 1.0, 3.0)]
    assert found == [0, 0, 1, 1, 1, 1, 2, 2, 2]
