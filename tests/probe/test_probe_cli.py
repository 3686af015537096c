"""rmse-probe from the command line, on small models."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from helpers import assert_one_line
from ouro_models import lively_ouro
from paths import ROOT

from rmse_edge.checkpoint import save_checkpoint
from rmse_edge.cli.data import main as rmse_data
from rmse_edge.cli.probe import main as rmse_probe
from rmse_edge.probe import KINDS
from rmse_edge.probe.problems import PROBLEMS
from rmse_edge.text import train_character_tokenizer
from rmse_edge.train.gpt import GPT, GPTConfig, save_gpt

pytestmark = pytest.mark.slow
PLAY = "\n\n".join(
    f"{'ANNA BEN CARL'.split()[i % 3]}:\nSpeech {i} has (some) {'words ' * (1 + i % 4)}</script>" for i in range(300)
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "play.txt").write_text(PLAY)
    assert rmse_data(["problems", "--text", str(tmp_path / "play.txt"), "-o", str(tmp_path / "mixed.txt")]) == 0
    return tmp_path / "mixed.txt"


@pytest.fixture
def ouro(tmp_path: Path, text: Path) -> Path:
    (tmp_path / "ouro").mkdir()
    train_character_tokenizer(text.read_text(), tmp_path / "ouro" / "tokenizer.json")
    save_checkpoint(lively_ouro(vocab_size=90), tmp_path / "ouro")
    return tmp_path / "ouro"


def test_names_of_tasks_are_those_of_problems() -> None:
    assert tuple(PROBLEMS) == KINDS


def test_everything_is_measured_and_drawn(
    tmp_path: Path, text: Path, ouro: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(ouro), "--text", str(text), "--blocks", "4", "--task", "hops", "--task", "brackets", "--problems", "32"]
    documents = []
    for name in ("a", "b"):
        assert rmse_probe([*argv, "-o", str(tmp_path / name)]) == 0
        documents.append((tmp_path / name / "probe.json").read_bytes())
    assert documents[0] == documents[1]  # a function of the seed
    said = capsys.readouterr().out
    assert said.count("| loop |") == 2 and "entropy falls with every iteration" in said
    found = json.loads(documents[0])
    assert [row["iteration"] for row in found["by_iteration"]] == [1, 2, 3]
    assert list(found["tasks"]) == ["hops", "brackets"] and set(found["probes"]) >= {"place in word", "bracket depth"}
    assert found["tasks"]["hops"]["problems"] == [4] * 8 and found["difficulty"]["judge"] == "n-grams"
    assert {v["verdict"] for v in found["verdicts"]} <= {"kept", "refuted", "unclear"}
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"probe.json", "probe.png", "probe.html"}
    page = (tmp_path / "a" / "probe.html").read_text()
    assert "{{" not in page and page.count("</script>") == 2
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # it needs no other file
    trace = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.DOTALL)[1])["trace"]  # type: ignore[index]
    assert len(trace) == 160 and len(trace[0]["iterations"]) == 3 and len(trace[0]["iterations"][0]["guesses"]) == 5
    assert all(row["next"] == after["token"] for row, after in itertools.pairwise(trace))


def test_a_gpt_is_probed_and_judges(tmp_path: Path, text: Path, ouro: Path) -> None:
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=90, d_model=16, n_heads=2, n_layers=2, block_size=256)
    save_gpt(GPT(config), tmp_path / "gpt")
    (tmp_path / "gpt" / "tokenizer.json").write_bytes((ouro / "tokenizer.json").read_bytes())
    short = ["--text", str(text), "--blocks", "2", "--no-probes"]
    assert rmse_probe([str(tmp_path / "gpt"), *short, "-o", str(tmp_path / "a")]) == 0
    found = json.loads((tmp_path / "a" / "probe.json").read_text())
    assert found["unit"] == "layer" and len(found["by_iteration"]) == 2 and found["probes"] == {}
    assert rmse_probe([str(ouro), *short, "--judge", str(tmp_path / "gpt"), "-o", str(tmp_path / "b")]) == 0
    assert json.loads((tmp_path / "b" / "probe.json").read_text())["difficulty"]["judge"] == str(tmp_path / "gpt")


def test_what_cannot_be_probed_is_one_line(
    tmp_path: Path, text: Path, ouro: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("Speech")
    (tmp_path / "strange.txt").write_text("\u65e5" * 400)
    trm = str(ROOT / "models" / "trm-sudoku")
    cases = [
        ([str(tmp_path / "none"), "--text", str(text)], "none"),
        ([str(ouro), "--text", str(tmp_path / "none.txt")], "none.txt"),
        ([str(ouro), "--text", str(tmp_path / "short.txt")], "too few"),
        ([str(ouro), "--text", str(tmp_path / "strange.txt")], "no token for"),
        ([trm, "--text", str(text)], "reads no texts"),
        ([str(tmp_path), "--text", str(text)], "config.json"),
        ([str(ouro), "--text", str(text), "--task", "chess"], "hops"),
        ([str(ouro), "--text", str(text), "--epsilon", "0"], "--epsilon"),
    ]
    for argv, needle in cases:
        assert rmse_probe([*argv, "-o", str(tmp_path / "out")]) == 2
        assert_one_line(capsys.readouterr().err, "rmse-probe: error:", needle)
        assert not (tmp_path / "out").exists()


def test_a_judge_reads_the_same_tokens(
    tmp_path: Path, text: Path, ouro: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = str(ROOT / "models" / "ouro-shakespeare")
    argv = [str(ouro), "--text", str(text), "--blocks", "1", "--no-probes", "--judge", judge, "-o", str(tmp_path / "o")]
    assert rmse_probe(argv) == 2
    assert_one_line(capsys.readouterr().err, "ouro-shakespeare", "has another tokenizer")


def test_problems_need_a_text(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        (["problems"], "--text FILE"),
        (["problems", "--text", str(text), "--share", "1"], "--share"),
        (["problems", "--text", str(text), "--size", "4"], "--size"),
        (["problems", "--text", str(text), "--kinds", "chess"], "--kinds"),
        (["sudoku", "--share", "0.5"], "--share"),
        (["problems", "--text", str(text), "-o", str(text)], "is there already"),
    ]
    for argv, needle in cases:
        assert rmse_data(argv) == 2
        assert_one_line(capsys.readouterr().err, "rmse-data: error:", needle)
