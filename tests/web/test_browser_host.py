"""The browser's host of a loop, run by Node on onnxruntime-web: it says what PyTorch says, and writes what rmse-run writes."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import whole
from conftest import made_once
from helpers import assert_one_line
from paths import ROOT
from web.page_parts import fetched

from rmse_edge.archive import pack
from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.cli.export import main as rmse_export
from rmse_edge.cli.quantize import main as rmse_quantize
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.export.gate.compare import agreement
from rmse_edge.info import PAGE
from rmse_edge.loop.dials import Dials
from rmse_edge.package import Package
from rmse_edge.quantize import load_quantized
from rmse_edge.runtimes.host.calls import plan_calls
from rmse_edge.text import Tokenizer

HERE = Path(__file__).parent
SHIPPED, DENSE = (ROOT / "models" / name for name in ("rmse-shakespeare", "ouro-shakespeare"))
engine = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.onnx]


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_numbers_and_plans_are_those_of_every_host() -> None:
    draw, plans = random.Random(0), []
    for _ in range(200):
        asked: Any = (
            draw.randrange(300),
            draw.randrange(1, 200),
            *draw.choice([((1, 64), 64), ((1,), None), ((16, 64), None)]),
        )
        plans.append({"asked": asked, "calls": plan_calls(*asked)})
    job = {"golden": json.loads((ROOT / "tests" / "data" / "sampler.json").read_text()), "plans": plans}
    done = subprocess.run(
        ["node", str(HERE / "numbers.mjs")], input=json.dumps(job), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["wrong"] == [] and said["held"] > 200


# ------------------------------------------------------------------------------------------------- on onnxruntime-web


def drive(package: Path, folder: Path, **job: Any) -> dict[str, Any]:
    """What the driver says of a package, read from its archive by slices."""
    archive = folder / "package.rmse.zip"
    if not archive.exists():
        pack(Package.open(package), archive)
    return drive_archive(archive, **job)


def drive_archive(archive: Path, **job: Any) -> dict[str, Any]:
    command = ["node", str(HERE / "driver.mjs"), str(fetched()), str(archive)]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout, done.stderr
    return json.loads(done.stdout)


def pieces(text: np.ndarray) -> list[list[int]]:
    """A text as it is fed: a prompt, single tokens, another prompt."""
    half = len(text) // 2
    parts: Sequence[np.ndarray] = [text[:half], *text[half : half + 9, None], text[half + 9 :]]
    return [part.tolist() for part in parts]


def run_of(dials: Dials, text: np.ndarray) -> dict[str, Any]:
    return {"dials": vars(dials), "feeds": pieces(text)}


def sample(count: int) -> np.ndarray:
    ids = Tokenizer(SHIPPED / "tokenizer.json").encode((SHIPPED / "sample.txt").read_text(encoding="utf-8"))
    return np.array(ids[:count])


def exported(source: Path, name: str, factory: pytest.TempPathFactory) -> Path:
    return made_once(name, factory, lambda folder: rmse_export(["-m", str(source), "-o", str(folder)]))


def expected_text(model: Path, capsys: pytest.CaptureFixture[str], *flags: object) -> dict[str, Any]:
    capsys.readouterr()
    assert rmse_run([str(model), "-p", "ROMEO:", "-o", "json", *map(str, flags)]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("source", [SHIPPED, DENSE], ids=["shipped", "dense"])
class TestShippedModels:
    pytestmark = engine

    def test_logits_and_depths_are_pytorchs(
        self, source: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """By the exact rule, at full depth and with the model's own exits: past its window, segments and pages."""
        model, package = load_checkpoint(source), exported(source, f"web-{source.name}.rmse", tmp_path_factory)
        info = Package.open(package).manifest["model"]
        settings = [Dials(info["max_loops"]), Dials(**info["dials"] | {"exit_threshold": 0.9})]
        text = sample(PAGE + 44)
        said = drive(package, tmp_path, runs=[run_of(dials, text) for dials in settings])
        assert "error" not in said
        for dials, run in zip(settings, said["runs"]):
            logits, depth = whole(model, text, dials)
            assert run["depth"] == depth.tolist()
            np.testing.assert_allclose(np.array(run["logits"]), logits, atol=1e-4)
        assert len(set(said["runs"][1]["depth"])) > 2

    def test_texts_are_those_of_rmse_run(
        self, source: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """On the checkpoint, that is PyTorch: 150 tokens and their depths, the likeliest and drawn ones."""
        package = exported(source, f"web-{source.name}.rmse", tmp_path_factory)
        asked = [
            {"temperature": 0},
            {"temperature": 0.8, "seed": 1},
            {"temperature": 1.2, "top_k": 9, "top_p": 0.9, "seed": 2},
        ]
        said = drive(
            package, tmp_path, texts=[{"prompt": "ROMEO:", "max_tokens": 150, "dials": {}, **one} for one in asked]
        )
        for one, found in zip(asked, said["texts"]):
            flags = [f"--{name.replace('_', '-')}={value}" for name, value in one.items()]
            expected = expected_text(source, capsys, "-n", 150, *flags)
            for name in ("tokens", "depth", "text"):
                assert found[name] == expected[name]


class TestInt4:
    pytestmark = engine

    def test_the_shipped_model_by_the_rounded_rule(
        self, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """Against PyTorch on the same integers. Without rounded activations: the engine does not know that of experts."""
        source = made_once(
            "shakespeare-int4",
            tmp_path_factory,
            lambda folder: rmse_quantize(["-m", str(SHIPPED), "--method", "rtn", "-o", str(folder)]),
        )
        package = made_once(
            "shakespeare-int4.rmse",
            tmp_path_factory,
            lambda folder: rmse_export(["-m", str(source), "--accuracy-level", "0", "-o", str(folder)]),
        )
        model, text = load_quantized(source).model, sample(1000)
        info = Package.open(package).manifest["model"]
        for dials in (Dials(info["max_loops"]), Dials(**info["dials"])):
            said = drive(package, tmp_path, runs=[run_of(dials, text)])
            assert "error" not in said, said["error"]
            (run,) = said["runs"]
            logits, depth = whole(model, text, dials)
            depths = np.stack([depth, run["depth"]])
            assert agreement(logits, np.array(run["logits"]), depths, [], len(text), exact=False)["positions"] == 1000


class TestDamaged:
    pytestmark = engine

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda data: data[: len(data) // 2], "not a whole zip archive"),
            (
                lambda data: data.replace(b'"max_loops": 4', b'"max_loops": 5'),
                "manifest.json: its SHA-256 is not that in",
            ),
            (lambda data: b"no archive", "not a whole zip archive"),
            (lambda data: data.replace(b"PK\x01\x02", b"PK\x01\x03", 1), "damaged"),
        ],
    )
    def test_what_is_damaged_is_refused_in_a_line(self, package: Path, tmp_path: Path, change: Any, said: str) -> None:
        archive = tmp_path / "package.rmse.zip"
        pack(Package.open(package), archive)
        data = archive.read_bytes()
        archive.write_bytes(change(data))
        assert archive.read_bytes() != data
        assert_one_line(drive_archive(archive)["error"], said)
