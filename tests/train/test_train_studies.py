"""The comparisons of docs/experiments/hybrid: their variants are what they are called, and what was measured stands in the document."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT

from rmse_edge.cli.protocol import carried_out, parser_of
from rmse_edge.train.trainer import build_model

FOLDER = ROOT / "docs" / "experiments" / "hybrid"
STUDIES = ("mqar", "rodimus", "reach", "etd", "stopped", "sinks")

Load = Callable[[str], dict[str, Any]]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Load:
    """What a script of the folder defines."""
    monkeypatch.syspath_prepend(str(FOLDER))  # as python does, for modules beside a script
    return lambda name: runpy.run_path(str(FOLDER / f"{name}.py"))


@pytest.mark.parametrize("name", STUDIES)
def test_the_document_has_the_tables_of_what_was_measured(name: str, script: Load) -> None:
    """And every variant can be built; claims are about variants there are."""
    study = script(name)["STUDY"]
    for variant in study.variants:
        build_model(study.recipe_of(variant, 0, []))
    assert all({claim.first, claim.second} <= study.variants.keys() for claim in study.claims)
    file = FOLDER / "results" / f"{name}.json"
    if not file.exists():
        assert f"`{name}.py`" in (FOLDER / "README.md").read_text().split("## What has not been run", 1)[1]
        return
    found = json.loads(file.read_text())
    assert found["changes"] == []
    table = study.tables(list(found["runs"].values()))
    text = " --text shakespeare.txt" if study.text else ""
    command = f"python docs/experiments/hybrid/{name}.py{text}"
    assert table in (FOLDER / "README.md").read_text(), f"{command} --only-table"


def trained(study: Any, variant: str, out: Path) -> Any:
    """The model of a variant after two steps."""
    recipe = study.recipe_of(variant, 0, ["steps=2", "batch_size=2", "eval_blocks=1", "eval_every=1"])
    text = out.with_suffix(".txt")
    text.write_text("to be or not to be, that is the question\n" * 40)
    return study.trained(variant, recipe, study.source(recipe, text), out)


def test_parts_of_rodimus_stand_still(script: Load, tmp_path: Path) -> None:
    defined = script("rodimus")
    study, kind, layer = (defined[name] for name in ("STUDY", "Rodimus", "MixerLayer"))
    for variant, gate in (("tau", "selection_proj"), ("values", "value_up_proj"), ("rodimus", None)):
        model = trained(study, variant, tmp_path / variant)
        for mixer in defined["each"](kind, model):
            x = torch.randn(3, mixer.channels)
            tau = torch.sigmoid(mixer.selection_proj(x)[:, mixer.state_dim :])
            values = torch.sigmoid(mixer.value_up_proj(torch.randn(3, mixer.value_up_proj.in_features)))
            assert bool((tau == 1).all()) == (gate == "selection_proj")
            assert bool((values == 1).all()) == (gate == "value_up_proj")
    hops = {
        variant: [part.two_hop for part in defined["each"](layer, trained(study, variant, tmp_path / variant))]
        for variant in ("plus", "one-hop")
    }
    assert hops == {"plus": [True, True], "one-hop": [False, False]}


def test_attention_without_a_gate(script: Load, tmp_path: Path) -> None:
    """Its gate is a half wherever it is asked, after training too; and what is counted of attention is what it gives."""
    defined = script("sinks")
    model = trained(defined["STUDY"], "none", tmp_path / "none")
    attention = model.block.attention
    assert bool((torch.sigmoid(attention.gate_proj(torch.randn(4, 48))) == 0.5).all())
    tokens = torch.randint(65, (2, 32), generator=torch.Generator().manual_seed(0))
    attention.q_proj.weight.data.zero_()  # queries of nothing see all positions alike
    sink, _ = defined["attention_and_states"](model, tokens)
    assert sink == pytest.approx(sum(1 / (t + 1) for t in range(8, 32)) / 24, rel=1e-4)


def test_one_state_of_one_loop_is_a_loop(script: Load) -> None:
    """Position by position, it gives what whole sequences give; with more loops it does not."""
    defined = script("stopped")
    model = build_model(defined["STUDY"].recipe_of("one", 0, [])).eval()
    tokens = torch.randint(65, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for loops in (1, 2):
            own, _, depth = model.trajectory(tokens, loops)
            one, _, found = defined["by_one_state"](model, tokens, loops)
            assert torch.equal(depth, found)
            assert torch.allclose(own[-1], one[-1], atol=1e-5) == (loops == 1)
        stopped, _, depth = defined["by_one_state"](model, tokens, 3, lambda k, *_: torch.full((2, 1), k == 0))
    assert bool((depth == 1).all()) and torch.equal(stopped[0], stopped[2])


def test_a_protocol_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a file of results holds is not measured again, and a file of other changes is refused."""
    output, made = tmp_path / "new" / "r.json", []

    def measured(name: str, seed: int, out: Path, args: Any) -> dict[str, Any]:
        made.append((name, seed))
        if len(made) == 2:
            raise KeyboardInterrupt
        return {"variant": name, "seed": seed}

    def run(*flags: str) -> list[dict[str, Any]]:
        monkeypatch.setattr("sys.argv", ["it", *flags])
        parser = parser_of("d", "runs", output, ("a", "b"), text=False)
        return carried_out(parser, lambda seeds: [(s, n) for s in seeds for n in "ab"], measured)[0]

    with pytest.raises(KeyboardInterrupt):
        run("--seeds", "0,1")
    assert len(run("--seeds", "0,1", "--only", "b")) == 3
    assert made == [("a", 0), ("b", 0), ("b", 0), ("b", 1)]
    assert len(run("--only-table", "--set", "lr=1")) == 3
    with pytest.raises(SystemExit):
        run("--set", "lr=1")
    assert "is of --set []; give another file with -o" in capsys.readouterr().err
