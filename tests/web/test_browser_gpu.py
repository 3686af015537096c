"""The browser's host on WebGPU, in Chromium with the GPU that it has in software: its own loop around `step`, the state on the GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import whole
from conftest import made_once
from helpers import mixed_model, write_checkpoint
from later import later
from ouro_models import lively_ouro
from web.test_browser_host import DENSE, exported, run_of, sample
from web.test_browser_page import PROBLEM, expected, serving, write

from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.cli.export import main as rmse_export
from rmse_edge.cli.quantize import main as rmse_quantize
from rmse_edge.export.gate.compare import agreement
from rmse_edge.loop.dials import Dials
from rmse_edge.package import Package
from rmse_edge.quantize import load_quantized

chromium = later("serve.browser")

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.onnx]

TOKENS = 110
GPU = "document.getElementById('gpu')"
NOTICE = "document.getElementById('progress').textContent"

# What the page's worker does, with what it is told of, and the steps that it took.
DRIVE = """(async (runs) => {
  const [ort, { Package }, { Runtime }] = await Promise.all(
    ["/parts/onnxruntime-webgpu/dist/ort.webgpu.min.mjs", "/host/package.js", "/host/runtime.js"].map((file) => import(file)));
  ort.env.wasm.wasmPaths = new URL("/parts/onnxruntime-webgpu/dist/", location).href;
  const pack = await Package.fromFolder(new URL("/package/", location).href), found = [];
  const runtime = await Runtime.open(pack, ort, { gpu: true }), call = runtime.engine.run.bind(runtime.engine);
  for (const { dials, feeds } of runs) {
    const run = { logits: [], depth: [], steps: 0, there: 0 };
    runtime.engine.run = async (method, chunk, feeds) => {
      run.steps += method === "step";
      if (method === "step") run.there += Object.values(feeds).filter((array) => array.buffer).length;
      return call(method, chunk, feeds);
    };
    runtime.reset();
    for (const ids of feeds) {
      const { logits, depth } = await runtime.feed(ids, runtime.info.dialsWith(dials), true);
      run.logits.push(...logits.map((row) => Array.from(row)));
      run.depth.push(...depth);
    }
    found.push(run);
  }
  await runtime.close();
  return JSON.stringify(found);
})"""


@pytest.fixture
def gpu_page() -> Iterator[Any]:
    """A tab of Chromium with a GPU in software, which has nothing to complain of."""
    if chromium.found() is None:
        pytest.skip("needs Chromium: apt install chromium")
    with chromium.browser("--enable-unsafe-webgpu") as tab:
        yield tab
        assert tab.logged == []


def on_gpu(package: Path, page: Any, settings: list[Dials], text: np.ndarray) -> list[dict[str, Any]]:
    with serving(package) as address:
        page.open(f"{address}?package=")  # the page itself, with no package yet
        page.until("document.getElementById('file') !== null")
        adapter = page.value("navigator.gpu?.requestAdapter().then((adapter) => adapter !== null)")
        if not adapter:
            pytest.skip("this Chromium has no GPU in software")
        return json.loads(page.value(f"{DRIVE}({json.dumps([run_of(dials, text) for dials in settings])})"))


def small_dense(folder: Path) -> None:
    write_checkpoint(lively_ouro(hidden_size=64, intermediate_size=128), folder)


def small_experts(folder: Path) -> None:
    """A hidden size of two blocks."""
    write_checkpoint(mixed_model(d_model=64, expert_width=32, n_experts=16, top_k=4, max_loops=4), folder)


SMALL = {"dense": small_dense, "experts": small_experts}


def checkpoint_of(kind: str, factory: pytest.TempPathFactory) -> Path:
    return made_once(f"web-{kind}", factory, SMALL[kind])


def exported_as(source: Path, name: str, factory: pytest.TempPathFactory, *flags: str) -> Path:
    """Its package, experts gathered, as GPUs need them."""
    flags = (*flags, "--experts", "gathered")
    return made_once(name, factory, lambda folder: rmse_export(["-m", str(source), "-o", str(folder), *flags]))


@pytest.mark.parametrize("kind", ["shipped", "experts"])
def test_logits_and_depths_are_pytorchs(kind: str, gpu_page: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """fp32, by the exact rule, at full depth and with the model's own exits."""
    if kind == "shipped":
        source, package = DENSE, exported(DENSE, f"web-{DENSE.name}.rmse", tmp_path_factory)
    else:
        source = checkpoint_of(kind, tmp_path_factory)
        package = exported_as(source, f"web-{kind}-gathered.rmse", tmp_path_factory)
    model = load_checkpoint(source)
    info = Package.open(package).manifest["model"]
    settings = [Dials(info["max_loops"]), Dials(**info["dials"] | {"exit_threshold": 0.9})]
    text = sample(TOKENS)
    said = on_gpu(package, gpu_page, settings, text)
    for dials, run in zip(settings, said):
        logits, depth = whole(model, text, dials)
        assert run["depth"] == depth.tolist()
        np.testing.assert_allclose(np.array(run["logits"]), logits, atol=1e-4)
        assert run["there"] >= 3 * run["steps"]  # the state of the loop and both caches, at least
    assert len(set(said[1]["depth"])) > 1
    assert said[1]["steps"] < said[0]["steps"]  # an exit ends the loop


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_int4_by_the_rounded_rule(
    kind: str, gpu_page: Any, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against PyTorch on the same integers; and the page, which is told to use the GPU."""
    source = checkpoint_of(kind, tmp_path_factory)
    integers = made_once(
        f"web-{kind}-int4",
        tmp_path_factory,
        lambda folder: rmse_quantize(["-m", str(source), "--method", "rtn", "-o", str(folder)]),
    )
    package = exported_as(integers, f"web-{kind}-int4.rmse", tmp_path_factory, "--accuracy-level", "0")
    model, info, text = load_quantized(integers).model, Package.open(package).manifest["model"], sample(TOKENS)
    dials = Dials(**info["dials"])
    (run,) = on_gpu(package, gpu_page, [dials], text)
    logits, depth = whole(model, text, dials)
    depths = np.stack([depth, run["depth"]])
    assert agreement(logits, np.array(run["logits"]), depths, [], len(text), exact=False)["positions"] == TOKENS
    with serving(package) as address:
        gpu_page.open(f"{address}?gpu")
        gpu_page.until(chromium.READY, 600)
        assert gpu_page.value(f"{GPU}.checked") and gpu_page.value(NOTICE) == ""
        assert "on the GPU" in gpu_page.value("document.getElementById('about').textContent")
        assert write(gpu_page, 12, 1) == expected(package, 12, capsys)


def test_what_the_gpu_cannot_is_said_and_done_in_webassembly(
    package: Path, gpu_page: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(package) as address:
        gpu_page.open(f"{address}?gpu")
        gpu_page.until(chromium.READY, 120)
        said = gpu_page.value(NOTICE)
        assert (
            said == "WebGPU has no com.microsoft.MoE; export with --experts gathered: the package runs in WebAssembly."
        )
        assert write(gpu_page, 20, 1) == expected(package, 20, capsys)


def test_without_a_gpu_there_is_nothing_to_choose(package: Path, page: Any) -> None:
    with serving(package) as address:
        page.open(f"{address}?gpu")
        page.until(chromium.READY, 120)
        assert page.value(f"{GPU}.disabled") and not page.value(f"{GPU}.checked")
        assert page.value("document.getElementById('no-gpu').textContent") == "the browser's WebGPU finds no GPU here"
        assert page.value(PROBLEM) == ""
