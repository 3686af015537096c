"""The example of CONTRIBUTING.md: an architecture in one short file, from its configuration to tokens out of a package."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from paths import ROOT

from rmse_edge.arch import registry
from rmse_edge.arch.registry import arch_of, register
from rmse_edge.checkpoint import load_checkpoint, save_checkpoint
from rmse_edge.cli.export import main as rmse_export
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.errors import ConfigError, PackageError
from rmse_edge.loop.dials import Dials
from rmse_edge.package import Package
from rmse_edge.runtimes import LoopRuntime, open_runtime
from rmse_edge.runtimes.engines.torch import TorchRuntime

EXAMPLE = ROOT / "docs" / "examples" / "echo.py"
LONGEST = 150  # lines; the example stays below


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example as a module, registered as CONTRIBUTING says, and nothing else."""
    monkeypatch.setattr(registry, "_REGISTERED", {})
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    monkeypatch.delitem(sys.modules, "echo", raising=False)
    import echo

    register("echo", echo.ARCH)
    yield echo
    del sys.modules["echo"]


@pytest.fixture
def model(echo: ModuleType) -> Any:
    torch.manual_seed(0)
    return echo.Echo(echo.EchoConfig()).eval()


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 65, 100)


def test_contributing_goes_through_the_example() -> None:
    """It leads to the file; what it names and what it quotes is there, and the file stays short."""
    document, source = (ROOT / "CONTRIBUTING.md").read_text(), EXAMPLE.read_text()
    assert "(docs/examples/echo.py)" in document and len(source.splitlines()) < LONGEST
    named = re.findall(r"`Echo\.(\w+)`", document)
    assert len(named) > 5
    for name in named:
        assert f"def {name}(" in source, name
    quoted = re.findall(r"```python\n(.*?)```", document, flags=re.DOTALL)
    assert quoted
    for block in quoted:
        assert textwrap.indent(block, "    ") in source


def test_an_installed_package_may_bring_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the entry point that CONTRIBUTING writes, without `register`."""
    monkeypatch.setattr(registry, "_REGISTERED", {})
    entry = re.search(r'^ *echo = "(echo:ARCH)"$', (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert entry is not None
    shutil.copyfile(EXAMPLE, tmp_path / "echo.py")
    information = tmp_path / "echo-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: echo\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[{registry.GROUP}]\necho = {entry[1]}\n")
    with pytest.raises(ConfigError, match="got 'echo'"):
        arch_of("echo")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "echo", raising=False)
    assert arch_of("echo").config(window=8).to_dict()["window"] == 8
    del sys.modules["echo"]


def test_installed_packages_are_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads a file of each of them, and a checkpoint's architecture is asked for a dozen times as it is opened."""
    searched: list[str] = []

    def search(group: str) -> tuple[()]:
        searched.append(group)
        return ()

    registry._entries.cache_clear()
    monkeypatch.setattr(registry, "entry_points", search)
    for _ in range(3):
        arch_of("rmse")
    registry._entries.cache_clear()
    assert searched == [registry.GROUP]


@pytest.mark.parametrize("sizes", [(1,), (16, 9, 1), (100,)])
def test_a_text_may_be_cut_in_any_way(sizes: tuple[int, ...], model: Any, text: np.ndarray) -> None:
    runtime = TorchRuntime(model, "echo")
    dials = runtime.info.dials
    whole = model.whole_text(torch.from_numpy(text), {k: torch.from_numpy(v) for k, v in dials.arrays().items()})
    done, fed = 0, []
    while done < len(text):
        fed.append(runtime.feed(text[done : done + sizes[len(fed) % len(sizes)]], dials))
        done += len(fed[-1].depth)
    depth = np.concatenate([f.depth for f in fed])
    assert np.array_equal(depth, whole.depth.numpy()) and len(set(depth)) > 2
    np.testing.assert_allclose(np.concatenate([f.logits for f in fed]), whole.logits.numpy(), atol=1e-5)


def greedy(runtime: LoopRuntime, prompt: np.ndarray, count: int) -> list[int]:
    """The tokens that follow `prompt`, each the likeliest."""
    runtime.reset()
    row, tokens = runtime.feed(prompt, runtime.info.dials).logits[-1], []
    for _ in range(count):
        tokens.append(int(row.argmax()))
        row = runtime.feed(tokens[-1:], runtime.info.dials).logits[-1]
    return tokens


@pytest.mark.slow
@pytest.mark.onnx
def test_the_example_runs_as_it_stands(
    echo: ModuleType, text: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command that CONTRIBUTING gives; then its package is held against its checkpoint in PyTorch."""
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"loops:( \d){20} next token: \d+", done.stdout.splitlines()[-1])
    parity = Package.open(tmp_path / "echo.rmse").manifest["parity"]
    assert parity["rule"] == "exact" and set(parity["settings"]) == {"full depth", "delta"}
    ours, theirs = TorchRuntime(load_checkpoint("echo"), "echo"), open_runtime("echo.rmse")
    assert isinstance(theirs, LoopRuntime)
    for dials in (theirs.info.dials, Dials(3)):
        for runtime in (ours, theirs):
            runtime.reset()
        a, b = ours.feed(text, dials), theirs.feed(text, dials)
        assert np.array_equal(a.depth, b.depth) and b.depth.max() <= dials.max_loops
        np.testing.assert_allclose(a.logits, b.logits, atol=1e-4)
    written = greedy(theirs, text[:10], 40)
    assert written == greedy(ours, text[:10], 40) and len(set(written)) > 2
    registry._REGISTERED.clear()
    with pytest.raises(PackageError, match=r"model\.model_type: got echo, expected one of"):
        open_runtime("echo.rmse")


@pytest.mark.slow
@pytest.mark.executorch
def test_the_commands_know_it(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`rmse-export` and `rmse-run`, for the target whose loop is the host's."""
    pytest.importorskip("executorch")
    monkeypatch.chdir(tmp_path)
    save_checkpoint(model, "echo", torch.float32)
    assert not rmse_export(["-m", "echo", "--target", "executorch", "-o", "echo.rmse"])
    capsys.readouterr()
    assert not rmse_run(["echo.rmse", "--prompt-tokens", "1,2,3", "-n", "30", "--temperature", "0", "-o", "json"])
    written = json.loads(capsys.readouterr().out)
    assert written["tokens"] == greedy(TorchRuntime(load_checkpoint("echo"), "echo"), np.array([1, 2, 3]), 30)
