"""Runs compared on curves whose answers are known, and FLOPs against PyTorch's own counter."""

from __future__ import annotations

import json
import math
import runpy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_one_line
from paths import ROOT
from small_models import lively_model, small_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rmse_edge.errors import ConfigError
from rmse_edge.train.comparison import Difference, Run, difference, recovered
from rmse_edge.train.flops import flops_per_token
from rmse_edge.train.objective import Objective
from rmse_edge.train.recipe import Recipe
from rmse_edge.train.sources import next_tokens
from rmse_edge.train.trainer import build_model

FOLDER = ROOT / "docs" / "experiments" / "space_time"
TOKENS = (100, 200, 400, 800)


def run(variant: str, seed: int, flops: float, start: float, fall: float = 0.5) -> Run:
    """Loses `fall` with every doubling of the tokens."""
    loss = tuple(start - fall * i for i in range(4))
    return Run(variant, seed, 1000, flops, TOKENS, loss, loss[-1])


def test_a_curve_is_straight_over_the_logarithm_of_what_was_spent() -> None:
    curve = run("a", 0, 10.0, 3.0)
    assert curve.at("tokens", 400) == pytest.approx(2.0) and curve.at("flops", 4000) == pytest.approx(2.0)
    assert curve.at("tokens", 100 * 2**1.5) == pytest.approx(2.25)
    assert math.isnan(curve.at("tokens", 99)) and math.isnan(curve.at("flops", 8001))
    assert curve.needed("tokens", 2.25) == pytest.approx(100 * 2**1.5)
    assert curve.needed("flops", 1.5) == pytest.approx(8000) and curve.needed("tokens", 3.0) == pytest.approx(100)
    assert curve.needed("tokens", 1.4) is None


def test_at_equal_flops_the_dearer_model_has_read_fewer_tokens() -> None:
    """b costs four times as much and is 0.8 better at as many tokens: two halvings of the tokens cost it 1.0."""
    runs = [run("a", 0, 10.0, 3.0), run("b", 0, 40.0, 2.2), run("a", 1, 10.0, 3.1), run("b", 1, 40.0, 2.2)]
    assert difference(runs, "b", "a", "tokens").values == pytest.approx((-0.8, -0.9))
    assert difference(runs, "b", "a", "flops").values == pytest.approx((0.2, 0.1))
    assert difference(runs, "a", "b", "flops").values == pytest.approx((-0.2, -0.1))
    assert difference(runs, "a", "missing", "flops").values == ()
    dear = [run("a", 0, 10.0, 3.0), run("c", 0, 100.0, 3.0)]  # c's curve begins where a's has ended
    assert difference(dear, "c", "a", "flops").values == ()


def test_only_seeds_of_both_are_compared() -> None:
    runs = [run("a", 0, 10.0, 3.0), run("a", 2, 10.0, 5.0), run("b", 1, 10.0, 9.0), run("b", 2, 10.0, 5.5)]
    assert difference(runs, "a", "b", "tokens").values == pytest.approx((-0.5,))


@pytest.mark.parametrize(
    ("values", "margin", "verdict"),
    [
        ((-0.10, -0.12, -0.14), 0.0, "kept"),
        ((0.10, 0.12, 0.14), 0.0, "refuted"),
        ((-0.1, -0.1, 0.05), 0.0, "unclear"),
        ((0.005, 0.006, 0.007), 0.02, "kept"),  # no worse by more than 0.02
        ((0.005, 0.006, 0.007), 0.0, "refuted"),
        ((-5.0,), 0.0, "one seed"),
        ((), 0.0, "not measured"),
    ],
)
def test_a_verdict_needs_three_seeds_that_agree(values: tuple[float, ...], margin: float, verdict: str) -> None:
    assert Difference(values).verdict(margin) == verdict


def test_the_interval_is_students() -> None:
    found = Difference((1.0, 2.0, 3.0))
    assert found.mean == 2 and found.half == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert str(found) == "+2.000 ± 2.484" and str(Difference((0.5,))) == "+0.500" and str(Difference(())) == ""


def test_the_share_of_the_gain_that_a_loop_has() -> None:
    runs = [run("one", 0, 1, 4.0), run("twelve", 0, 1, 3.0), run("loop", 0, 1, 3.25), run("one", 1, 1, 4.0)]
    assert recovered(runs, "loop", "one", "twelve") == pytest.approx((0.75,))
    assert recovered(runs, "one", "one", "twelve") == (0.0,) and recovered(runs, "twelve", "one", "twelve") == (1.0,)


def grouped(a: tuple[int, ...], b: tuple[int, ...], *_: Any, **__: Any) -> int:
    """FLOPs of a grouped product, which the counter does not know: every row of `a` meets one group."""
    return 2 * a[0] * a[1] * b[-1]


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("gpt.json", ["model.n_layers=1"]),
        ("gpt.json", ["model.n_layers=3", "model.positions=learned", "model.bias=true"]),
        ("loop.json", ["model.max_loops=3", "depths=[3]"]),
        ("loop.json", ["depths=[2,4]", "objective=expected"]),
        ("loop.json", ["depths=[3]", "model.n_experts=8", "model.top_k=3", "model.shared_width=75", "model.n_kv_heads=1"]),
    ],
)  # fmt: skip
def test_flops_are_those_that_pytorch_counts(file: str, changes: list[str]) -> None:
    """All of the block's products, forward and backward; attention computed whole, as the counter sees it."""
    recipe = Recipe.from_file(FOLDER / file).override(changes)
    model = build_model(recipe)
    for name, p in model.named_parameters():
        p.requires_grad_(recipe.objective == "expected" or not name.startswith("gate."))  # as the trainer does
    objective = Objective(model, recipe)
    batch = next_tokens(torch.randint(65, (2, recipe.block + 1)))
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped})
    depths = [0] if recipe.architecture == "gpt" else recipe.depths
    with counter, sdpa_kernel(SDPBackend.MATH):
        for loops in depths:
            objective(batch, "loops", loops)[0].backward()
    counted = counter.get_total_flops() / len(depths) / batch["tokens"].numel()
    assert flops_per_token(recipe, context=recipe.block) == pytest.approx(counted, rel=1e-9)
    assert flops_per_token(recipe) < counted


def test_one_loop_costs_one_layer() -> None:
    """What the protocol stands on: with windows equal, twelve dense loops cost twelve layers."""
    layers, loops = (flops_per_token(Recipe.from_file(FOLDER / name)) for name in ("gpt.json", "loop.json"))
    assert loops == pytest.approx(layers, rel=0.02)


def test_what_is_not_counted_is_refused() -> None:
    recipe = Recipe.from_file(FOLDER / "loop.json").override(["model.memory=titans"])
    with pytest.raises(ConfigError) as caught:
        flops_per_token(recipe)
    assert_one_line(str(caught.value), "rmse without a memory")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """What a script of the folder defines."""
    monkeypatch.syspath_prepend(str(FOLDER))  # as python does, for modules beside a script
    return lambda name: runpy.run_path(str(FOLDER / name))


def test_the_protocols_variants_are_what_they_are_called(script: Callable[[str], dict[str, Any]]) -> None:
    protocol = script("compare.py")
    sizes = {name: build_model(protocol["of_variant"](name, 0, [])) for name in protocol["VARIANTS"]}
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in sizes.items()}
    d, loop = 64, sizes["loop-12"]
    besides = loop.inject.weight.numel() + loop.step_encoding.numel() + loop.gate.weight.numel() + 1
    assert besides == d * d + 12 * d + d + 1
    # SwiGLU is 171 wide where the MLP is 256, and there are norms of queries and keys, gates of heads, a router of one.
    assert counts["loop-12"] - besides == pytest.approx(counts["gpt-1"], rel=0.01)
    assert counts["moe-12"] == pytest.approx(counts["gpt-12"], rel=0.02)
    # A deeper loop has a longer table of codes, and router logits of its one expert, and nothing else.
    assert counts["loop-24"] - counts["loop-12"] == 12 * (d + 1)


def test_the_table_says_what_the_curves_say(script: Callable[[str], dict[str, Any]]) -> None:
    """Twelve loops are 0.4 better than one layer with every seed, 0.1 worse than twelve layers, and cost as much as these."""
    runs = []
    for seed in range(3):
        shift = 0.01 * seed
        runs += [run("gpt-1", seed, 1.0, 3.5 + shift), run("gpt-12", seed, 12.0, 3.0 + shift)]
        runs += [run("loop-12", seed, 12.0, 3.1 + shift + 0.001 * seed), run("loop-1", seed, 1.0, 3.5 - shift)]
    lines = script("compare.py")["tables"](runs).splitlines()
    said = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("|")}
    claim = "twelve loops beat one layer of as many parameters, at equal tokens"
    assert said[claim] == f"| {claim} | -0.399 ± 0.002 | 3 | kept |"
    assert (
        "| +0.101 ± 0.002 | 3 | refuted |" in said["twelve loops are worth twelve layers, at equal FLOPs (within 0.02)"]
    )
    assert said["experts make a loop better, at equal FLOPs"].endswith("|  | 0 | not measured |")
    assert "| 80% ± 0% |" in said["dense loop, 12"] and "| 100% ± 0% |" in said["GPT, 12 layers"]


def test_more_loops_than_were_trained(script: Callable[[str], dict[str, Any]]) -> None:
    """The trained loops say what they said; further ones have the last one's codes, or turn on."""
    depths = script("depths.py")
    tokens = torch.randint(37, (2, 64), generator=torch.Generator().manual_seed(0))
    for encoding in ("learned", "temporal_rope", "none"):
        model = lively_model(small_config(step_encoding=encoding, step_dims=4))
        deep = depths["deepened"](model, 8)
        with torch.no_grad():
            states, further = model.trajectory(tokens)[0], deep.trajectory(tokens)[0]
        assert len(further) == 8 and all(torch.equal(a, b) for a, b in zip(states, further))
        assert not torch.equal(further[6], further[7])
    turned = depths["deepened"](lively_model(small_config(step_encoding="temporal_rope", step_dims=4)), 8)
    # Two pairs of channels: one radian per loop, and 5 ** -0.5, by the five trained loops.
    angles = torch.tensor([[k, k * 5**-0.5] for k in range(8)], dtype=torch.float64)
    torch.testing.assert_close(turned.block.attention.step_cos, angles.cos().float())
    learned = depths["deepened"](lively_model(small_config()), 8)
    assert torch.equal(learned.step_encoding[7], learned.step_encoding[4])
    assert torch.equal(learned.block.experts.step_logits[6], learned.block.experts.step_logits[4])


def test_the_worst_rise_is_over_the_best_before(script: Callable[[str], dict[str, Any]]) -> None:
    rise = script("depths.py")["worst_rise"]
    assert rise([3.0, 2.0, 1.0]) == 0 and rise([3.0, 1.0, 1.5, 1.25, 2.0]) == 1.0


@pytest.mark.parametrize(
    ("name", "results"),
    [pair for pair in (("compare.py", "results.json"), ("depths.py", "depths.json")) if (FOLDER / pair[1]).exists()],
)
def test_the_document_has_the_tables_of_what_was_measured(
    name: str, results: str, script: Callable[[str], dict[str, Any]]
) -> None:
    found = list(json.loads((FOLDER / results).read_text())["runs"].values())
    defined = script(name)
    table = defined["tables"]([Run(**run) for run in found]) if name == "compare.py" else defined["table"](found)
    document = (ROOT / "docs" / "validation.md").read_text()
    assert table in document, f"python docs/experiments/space_time/{name} --text shakespeare.txt --only-table"
