"""python -m benchmarks: what is compared, how it is reported, and that what fails stays in the table. No test asserts a time."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from helpers import TINY, assert_one_line
from paths import ROOT

from benchmarks import llama, options
from benchmarks.__main__ import main
from benchmarks.artifacts import Artifacts, Missing
from benchmarks.bandwidth import read_bandwidth
from benchmarks.cells import Cell
from benchmarks.child import Failed
from benchmarks.field import BASELINE, CONTESTANTS, Timed, start_of
from benchmarks.first_token import LEFT, FirstToken, cached_part, drop_cached
from benchmarks.plot import draw
from benchmarks.report import Results, loops_of
from benchmarks.rounds import run_section
from benchmarks.shapes import SHIPPED, WIDTHS, HrmText, Looped, Twin, dense, hrm_text, moe, shipped, twin_of
from rmse_edge.arch.hrm_text.config import HrmTextConfig
from rmse_edge.arch.hrm_text.entry import calls as hrm_calls
from rmse_edge.arch.hrm_text.entry import loop_weights as hrm_loop_weights
from rmse_edge.arch.hrm_text.entry import once_weights as hrm_once_weights
from rmse_edge.arch.ouro.config import OuroConfig
from rmse_edge.arch.rmse.config import RMSEConfig
from rmse_edge.arch.rmse.costs import parameters

TWIN = Twin(64, 96, 4, 65, layers=2)
MODEL = Looped("tiny", {"model_type": "rmse", **TINY}, TWIN)


def artifacts(folder: Path, lines: list[str] | None = None) -> Artifacts:
    """Without llama.cpp and without a runner."""
    said: list[str] = [] if lines is None else lines
    return Artifacts(folder / "cache", folder / "no-python", folder / "no-runner", said.append)


# ------------------------------------------------------------------------------------------------------ what is compared


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_is_a_valid_model_of_the_same_depth(width: int):
    for model in (moe(width), dense(width)):
        config = RMSEConfig.from_dict(model.config)
        assert config.d_model == width == config.n_heads * config.head_dim
        assert model.depths() == (12, 4)
    twin = twin_of(width)
    assert twin.ffn % 32 == 0 and OuroConfig.from_dict(twin.unrolled()).num_hidden_layers == 12


def test_width_768_is_the_documented_files():
    folder = ROOT / "docs" / "benchmarks"
    assert moe(768).config == json.loads((folder / "d768.json").read_text())
    assert dense(768).config == json.loads((folder / "d768-dense.json").read_text())
    assert twin_of(768).shape() == {
        "width": 768, "ffn": 2048, "heads": 12, "vocab": 4096, "layers": 12, "context": 2048
    }  # fmt: skip


def test_a_dense_loop_has_a_twelfth_of_the_twins_weights():
    twin = twin_of(768)
    layer = 4 * twin.width**2 + 3 * twin.width * twin.ffn
    config = RMSEConfig.from_dict(dense(768).config)
    assert parameters(config) - 2 * twin.vocab * twin.width == pytest.approx(layer, rel=0.1), (
        "and what is injected in each loop"
    )


def test_hrm_text_makes_as_many_calls_of_layers_as_the_twin_has():
    """llama.cpp reads the same weights as the looped model, each stack's as often as it is called."""
    model = hrm_text(768)
    config = HrmTextConfig.from_dict(model.config)
    assert model.depths() == (2, 1) and hrm_calls(config) * config.H_cycles == twin_of(768).layers
    assert isinstance(model.twin, HrmText)
    weights = config.H_cycles * hrm_loop_weights(config) + hrm_once_weights(config)
    assert model.twin.reads == weights * 18 / 32
    text = Results(1, [Cell(model.name, 1, BASELINE, "tg1", None)], models={model.name: model}).markdown()
    assert "llama.cpp runs the model itself, all 2 cycles" in text and " all |" in text


def test_hrm_text_has_no_twin_to_unroll(tmp_path: Path):
    with pytest.raises(Missing, match="there is no dense twin"):
        start_of("unrolled", hrm_text(256), 1, Timed(), artifacts(tmp_path))


def test_the_shipped_model_stops_by_itself_beside_a_twin_of_its_width():
    model = shipped(SHIPPED)
    assert model.depths() == (12, 4, None)
    assert (model.twin.width, model.twin.vocab) == (192, 65)


# ------------------------------------------------------------------------------------------------ ratios and the table


def results() -> Results:
    """Three rounds on a machine that slows down; the contestant is twice as fast as llama.cpp in each of them."""
    base = Cell("tiny", 1, BASELINE, "tg128", None, {1: 100.0, 2: 50.0, 3: 25.0}, file_bytes=5_000_000)
    fast = Cell("tiny", 1, "onnx", "tg128", 4, {1: 200.0, 2: 100.0}, 4.0, [3.0, 5.0], 2**20, 700_000)
    lost = Cell("tiny", 1, "compiled", "tg128", 4, failed="RuntimeError: no compiler")
    alone = Cell("tiny", 1, "onnx", "tg128", None, {1: 150.0}, 3.25)
    other = Cell("tiny", 2, "onnx", "tg128", 4, {1: 9.0})
    first = [
        FirstToken("tiny", 1, BASELINE, True, [0.2, 0.4]),
        FirstToken("tiny", 1, "rmse-runner", True, failed="not built: make runner"),
    ]
    return Results(
        3, [base, fast, lost, alone, other], {}, first, {1: {0.25: 90.0, 64.0: 11.0}}, {"tiny": MODEL}, ["a note"]
    )


def test_ratios_are_taken_within_a_round():
    found = results()
    base, fast, lost, alone, other = found.cells
    assert fast.ratio(found.cells) == 2.0, "of the medians of all rounds it would be 3"
    assert base.ratio(found.cells) == 1.0
    assert alone.ratio(found.cells) == 1.5
    assert lost.ratio(found.cells) is None and lost.median is None
    assert other.ratio(found.cells) is None, "llama.cpp ran with another number of threads"


def test_a_failed_cell_stays_with_its_reason():
    text = results().markdown()
    row = next(line for line in text.splitlines() if "torch.compile" in line)
    assert row.count(" - |") >= 5 and "failed: RuntimeError: no compiler" in row
    assert "| by itself, 3.25 |" in text and " no loop |" in text
    assert "## tiny, threads: 2" in text and "- a note" in text
    assert "failed: not built: make runner" in text
    assert "| 64   |" in text.partition("## Reading memory")[2]


def test_the_table_has_the_twin_first_and_goes_by_depth():
    cells = [Cell("tiny", 1, name, "tg1", loops) for loops in (None, 4, 12) for name in ("eager", "onnx")]
    cells.append(Cell("tiny", 1, BASELINE, "tg1", None))
    text = Results(1, cells, models={"tiny": MODEL}).markdown()
    rows = [[part.strip() for part in line.split("|")][1:4:2] for line in text.splitlines() if " tg1 |" in line]
    names = [CONTESTANTS["onnx"], CONTESTANTS["eager"]]
    expected = [[name, loops] for loops in ("12", "4", "by itself") for name in names]
    assert rows == [[CONTESTANTS[BASELINE], "no loop"], *expected]


def test_the_document_is_json_and_has_every_round():
    document = json.loads(json.dumps(results().document()))
    fast = document["cells"][1]
    assert fast["speeds"] == [200.0, 100.0] and fast["spread"] == [100.0, 200.0]
    assert (fast["ratio"], fast["gb_per_s"]) == (2.0, 4.0)
    assert document["cells"][2]["failed"] and document["bandwidth_gb_per_s"] == {"1": {"0.25": 90.0, "64": 11.0}}
    assert document["models"]["tiny"]["config"]["max_loops"] == 4


def test_a_picture_is_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib")
    draw(results(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# ----------------------------------------------------------------------------------------------------- what is not there


def test_what_is_not_built_is_said_once_and_stays_missing(tmp_path: Path):
    files = artifacts(tmp_path)
    for name, why in ((BASELINE, "not built: --llama-python"), ("rmse-runner", "not built: make runner")):
        for _ in range(2):
            with pytest.raises(Missing, match=why):
                start_of(name, MODEL, 1, Timed(), files)


def test_llama_cpps_environment_is_made_once_pinned_and_without_amx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The commands, without running them: a venv and one install, and the next time nothing."""
    ran: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], env: dict[str, str], **rest: object) -> subprocess.CompletedProcess[str]:
        ran.append((command, env))
        if "venv" in command:
            python = Path(command[-1]) / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
            python.parent.mkdir(parents=True)
            python.touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(llama.subprocess, "run", run)
    monkeypatch.setattr(llama, "version_of", lambda python: llama.VERSION)
    said: list[str] = []
    found = [llama.llama_python(None, tmp_path, said.append) for _ in range(2)]
    assert found[0] == found[1] and found[0].is_relative_to(tmp_path) and len(said) == 1 and "AMX is off" in said[0]
    (made, _), (installed, environment) = ran
    assert made[1:4] == ["-m", "venv", "--clear"]
    assert installed[0] == str(found[0]) and "llama-cpp-python==0.3.36" in installed
    assert all("==" in pin for pin in llama.PINS)
    # CMake's switches do nothing beside GGML_NATIVE: the sources ask for the macros that -march=native defines.
    assert "-DGGML_AMX_INT8=OFF" in environment["CMAKE_ARGS"].split()
    assert {"-U__AMX_TILE__", "-U__AMX_INT8__", "-U__AMX_BF16__"} == set(environment["CFLAGS"].split())
    assert environment["CXXFLAGS"] == environment["CFLAGS"]


@pytest.mark.slow
def test_a_section_runs_without_llama_cpp(tmp_path: Path):
    """PyTorch, real and tiny, in a process of its own; the others in their cells with what is missing."""
    said: list[str] = []
    tests = Timed(70, 3)
    cells, facts = run_section(
        MODEL, 1, [BASELINE, "rmse-runner", "eager"], tests, 2, artifacts(tmp_path), 120, said.append
    )
    found = {(c.contestant, c.test, c.loops): c for c in cells}
    for test in ("pp70", "tg3"):
        for loops in (4, 1):
            cell = found["eager", test, loops]
            assert cell.failed is None and sorted(cell.speeds) == [1, 2] and cell.mean_loops == loops
            assert min(cell.speeds.values()) > 0
        assert found[BASELINE, test, None].failed and found["rmse-runner", test, 4].failed
    assert facts["eager"]["weights"]["loop"] > 0  # type: ignore[index]
    assert len(found["eager", "tg3", 4].gb_per_s) == 2 and not found["eager", "pp70", 4].gb_per_s
    assert any("warm-up" in line for line in said)


def test_the_twin_of_ouro_multiplies_as_often(tmp_path: Path):
    """By its layers once for each loop; too many for a graph that is made of floats."""
    (model,), _ = options.chosen_models(options.parse(["--models", "ouro-1.4b"]))
    c = OuroConfig()
    assert model.loops == 4 and model.depths() == (4, 1)
    layer = 4 * c.hidden_size**2 + 3 * c.hidden_size * c.intermediate_size
    once = 2 * c.vocab_size * c.hidden_size  # embedding and head
    assert model.twin.parameters == model.loops * c.num_hidden_layers * layer + once
    with pytest.raises(Missing, match="made of floats, 21 GB of them"):
        start_of("unrolled", model, 1, Timed(), artifacts(tmp_path))
    assert "ouro-1.4b" not in [m.name for m in options.chosen_models(options.parse([]))[0]]


def test_without_the_trained_model_it_is_left_out_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(options, "SHIPPED", ROOT / "models" / "gone")
    models, notes = options.chosen_models(options.parse(["--widths", "256"]))
    assert [model.name for model in models] == ["moe-d256", "dense-d256", "hrm-text-d256"]
    assert notes == ["left out: the trained model, models/gone is not here"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--models", "huge"], "--models: got 'huge', expected some of moe, dense, shipped, hrm-text, ouro-1.4b"),
        (["--widths", "100"], "--widths: got '100', expected some of 256, 512, 768, 1024"),
        (["--contestants", "vllm"], "--contestants: got 'vllm', expected some of llama.cpp, unrolled"),
        (["--threads", "0"], "--threads: got '0', expected a whole number of at least 1"),
        (["-p", "0", "-n", "0"], "both are 0"),
        (["--runner", "nowhere"], "--runner: nowhere: no such file or folder"),
        (["--llama-python", __file__], "does not import llama-cpp-python and gguf"),
        (["--json", "no/where.json"], "the folder no does not exist"),
        (["--plot", "plot.docx"], "expected a file ending in one of"),
        (["--model", "moe"], "unknown argument --model; did you mean --models?"),
    ],
)
def test_a_bad_flag_is_one_line(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert main(flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("benchmarks: error: ") and said in err
    assert_one_line(err)


# ----------------------------------------------------------------------------------------------------------- the machine


def test_bandwidth_has_a_figure_for_every_working_set():
    found = read_bandwidth(2, (0.01, 0.1), rounds=2)
    assert list(found) == [0.01, 0.1] and min(found.values()) > 0


def test_a_start_is_cold_or_says_that_it_is_not(tmp_path: Path):
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "weights"
    file.write_bytes(bytes(1 << 20))
    assert cached_part(file) == 1.0
    try:
        drop_cached(tmp_path / "model")
    except Failed as failed:  # a folder in memory, for example
        assert "no cold start" in str(failed)
    else:
        assert cached_part(file) <= LEFT


def test_loops_of_the_twin_are_not_of_a_loop():
    assert loops_of(Cell("tiny", 1, "unrolled", "tg1", 1)) == "no loop"
