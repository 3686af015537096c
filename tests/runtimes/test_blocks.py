"""Models that write by blocks: the host, rmse-run, the gate, and packages."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ONNX_ALWAYS, assert_one_line

from rmse_edge.arch.bd3lm.config import Bd3lmConfig
from rmse_edge.arch.bd3lm.model import Bd3lm
from rmse_edge.arch.common.identity import model_info
from rmse_edge.checkpoint import save_checkpoint
from rmse_edge.cli.evaluate import main as rmse_eval
from rmse_edge.cli.export import main as rmse_export
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.errors import ArgumentError, PackageError, ParityError, UserError
from rmse_edge.export import LoopProgram
from rmse_edge.export.gate import blocks as gate
from rmse_edge.export.gate.blocks import block_gate, written
from rmse_edge.loop.dials import Dials
from rmse_edge.package import MANIFEST, Package, seal
from rmse_edge.runtimes import BlockRuntime, open_runtime, open_writer
from rmse_edge.runtimes.engines.torch import TorchBlocks

SIZE, VOCABULARY, MASK = 4, 17, 16
PROMPT = [1, 2, 3, 4, 5, 6]
SETTINGS = {
    "one": Dials(SIZE),
    "half": Dials(2),
    "confidence": Dials(SIZE, exit_threshold=0.6),
    "gap": Dials(SIZE, exit_gap=0.7),
    "late gap": Dials(SIZE, 2, exit_gap=0.01),
}


def make() -> Bd3lm:
    """Random weights under which blocks have different tokens, and end after two to four steps."""
    torch.manual_seed(0)
    model = Bd3lm(Bd3lmConfig(VOCABULARY, SIZE, model_length=64, hidden_dim=32, n_blocks=2, n_heads=2, dropout=0.0))
    with torch.no_grad():
        model.lm_head.weight *= 4.0
        model.embed_tokens.weight[MASK] *= 0.2  # so that what stands around it is felt
        for layer in model.stack.layers:
            layer.attn.o_proj.weight *= 3.0
            layer.attn.q_proj.weight *= 2.0
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Bd3lm:
    return make()


@pytest.fixture(scope="module")
def checkpoint(model: Bd3lm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save_checkpoint(model, folder := tmp_path_factory.mktemp("blocks") / "tiny")
    return folder


def on_torch(model: Bd3lm) -> TorchBlocks:
    return TorchBlocks(model, model_info(model, "tiny", 0))


def write(
    runtime: BlockRuntime, prompt: list[int], dials: Dials, blocks: int
) -> tuple[list[int], list[int], list[int]]:
    """Tokens and depths behind a prompt, and the steps of each block."""
    runtime.reset()
    runtime.read(prompt)
    found = [runtime.write(dials) for _ in range(blocks)]
    return [t for b in found for t in b.tokens], [d for b in found for d in b.depth], [b.iterations for b in found]


def whole(model: Bd3lm, prompt: list[int], dials: Dials, blocks: int) -> tuple[list[int], list[int], list[int]]:
    """The same without a cache: the text and its last block as one sequence, at every step."""
    text, depths, steps = list(prompt), [], []
    for _ in range(blocks):
        found = written(model, text, dials)
        text += found.tokens.tolist()
        depths += found.depth.tolist()
        steps.append(len(found.leads))
    return text[len(prompt) :], depths, steps


# ------------------------------------------------------------------------------------------------------------- the host


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("count", [1, 6, 8])  # of nothing but masks all positions are alike
def test_blocks_with_a_cache_are_those_of_the_whole_sequence(model: Bd3lm, name: str, count: int) -> None:
    dials, prompt = SETTINGS[name], (PROMPT + PROMPT)[:count]
    found = write(on_torch(model), prompt, dials, 3)
    assert found == whole(model, prompt, dials, 3)
    assert MASK not in found[0]


def test_rules_save_steps(model: Bd3lm) -> None:
    steps = {name: sum(write(on_torch(model), PROMPT, dials, 4)[2]) for name, dials in SETTINGS.items()}
    assert steps["one"] == 2 + 3 * SIZE and steps["half"] == 4 * 2
    assert all(steps[name] < steps["one"] for name in ("confidence", "gap", "late gap"))
    assert min(write(on_torch(model), PROMPT, SETTINGS["late gap"], 4)[2]) == 2


def test_a_prompt_in_parts_is_the_same_text(model: Bd3lm) -> None:
    runtime = on_torch(model)
    expected = write(runtime, PROMPT, SETTINGS["one"], 2)[0]
    runtime.reset()
    for token in PROMPT:
        runtime.read([token])
    assert [*runtime.write(SETTINGS["one"]).tokens, *runtime.write(SETTINGS["one"]).tokens] == expected
    assert runtime.position == 12


def test_drafts_show_every_step(model: Bd3lm) -> None:
    runtime = on_torch(model)
    runtime.read(PROMPT[:5])
    block = runtime.write(SETTINGS["one"])
    assert block.drafts.shape == (3, 3) and np.array_equal(block.drafts[-1], block.tokens)
    masks = (block.drafts == MASK).sum(1)
    assert masks.tolist() == [2, 1, 0]
    assert [(block.drafts[d - 1, i], d) for i, d in enumerate(block.depth)] == [*zip(block.tokens, block.depth)]
    assert all(block.drafts[d - 2, i] == MASK for i, d in enumerate(block.depth) if d > 1)


def test_a_text_has_an_end(model: Bd3lm) -> None:
    runtime = on_torch(model)
    with pytest.raises(UserError, match="65 tokens are more than the 64 that tiny attends to"):
        runtime.read([1] * 65)
    runtime.read([1] * 64)
    with pytest.raises(UserError, match="has no room for another block behind 64 tokens"):
        runtime.write(SETTINGS["one"])


@pytest.mark.parametrize("token", [-1, MASK, VOCABULARY])
def test_what_is_no_token_is_refused(model: Bd3lm, token: int) -> None:
    with pytest.raises(UserError, match=rf"^token {token} is outside the vocabulary \(0..16\), or the mask$"):
        on_torch(model).read([1, token])
    with pytest.raises(ArgumentError, match="max_loops: got 5"):
        on_torch(model).write(Dials(5))


# ------------------------------------------------------------------------------------------------------------- rmse-run


def test_rmse_run_writes_blocks(checkpoint: Path, model: Bd3lm, capsys: pytest.CaptureFixture[str]) -> None:
    ids = ",".join(map(str, PROMPT))
    flags = [str(checkpoint), "--prompt-tokens", ids, "-n", "9", "--exit-threshold", "0.6", "-o", "json"]
    assert rmse_run(flags) == 0
    document = json.loads(capsys.readouterr().out)
    tokens, depth, steps = whole(model, PROMPT, SETTINGS["confidence"], 3)
    assert (document["tokens"], document["depth"]) == (tokens[:9], depth[:9])
    assert (document["denoising_steps"], document["blocks"]) == (sum(steps), 3)
    assert document["tokens_per_forward"] == pytest.approx(10 / (sum(steps) + 3))
    assert document["text"].split() == [str(t) for t in tokens[:9]]
    assert rmse_run([str(checkpoint), "--prompt-tokens", ids, "-n", "100", "--show-depth", "--show-prompt"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("[1 2 3 4 5 6/0]") and "ended at the longest text that it takes" in err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--temperature", "0.7"],
            "--temperature: a model that writes by blocks takes the likeliest tokens; leave it out",
        ),
        (["--session", "x"], "--session: a model that writes by blocks keeps no sessions; leave it out"),
        (["--prefix", "all"], "--prefix: is for models that write token by token; leave it out"),
        (["--exit-epsilon", "0.1"], "has no such rule; it has max_loops, min_loops, exit_threshold, exit_gap"),
        (["--expert-ram", "auto"], "--expert-ram: the torch runtime keeps no budget"),
    ],
)
def test_what_does_not_go_with_blocks_is_refused(
    checkpoint: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rmse_run([str(checkpoint), "--prompt-tokens", "1", *flags]) == 2
    assert_one_line(capsys.readouterr().err, said)


def test_what_reads_token_by_token_refuses_it(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"^tiny: writes by blocks, not token by token; rmse-run MODEL -p TEXT"):
        open_runtime(checkpoint)
    (text := tmp_path / "t.txt").write_text("a")
    assert rmse_eval([str(checkpoint), "--text", str(text)]) == 2
    assert_one_line(capsys.readouterr().err, "writes by blocks, not token by token")


# ------------------------------------------------------------------------------------------------------------- the gate


class TooFew(BlockRuntime):
    """A host that lets blocks have a step less than they may."""

    def write(self, dials: Dials) -> Any:
        return super().write(dataclasses.replace(dials, max_loops=max(1, dials.max_loops - 1)))


class Forgets(BlockRuntime):
    """A host that does not keep what it has read."""

    def _call(self, canvas: np.ndarray, dials: Dials, write: bool) -> Any:
        found = super()._call(canvas, dials, write)
        self.calls.state["past_values"][...] = 0
        return found


def test_the_gate_catches_wrong_hosts(model: Bd3lm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "compare_methods", lambda *_: {})  # PyTorch's methods have no step
    program = LoopProgram(model, {SIZE: model.spec(SIZE)}, ())
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 100)
    right = on_torch(model)
    report = block_gate(program, model, right, tokens, exact=True)
    found = report["settings"]
    assert set(found) == {"full depth", "half the steps", "confidence", "gap"}
    assert all(s["same_tokens"] == 1 and 2 * s["undecided"] < s["blocks"] for s in found.values())
    assert all(found[name]["mean_steps"] < found["full depth"]["mean_steps"] for name in found if name != "full depth")
    for wrong in (TooFew, Forgets):
        host = wrong(right.info, right.calls.methods, type(right.calls))
        with pytest.raises(ParityError, match=r"^parity failed at full depth: logits differ"):
            block_gate(program, model, host, tokens, exact=True)


def test_the_gate_passes_nothing_that_it_could_not_compare() -> None:
    """Logits that are all the same: every choice is a tie, whatever the host does."""
    model = make()
    torch.nn.init.zeros_(model.lm_head.weight)
    program = LoopProgram(model, {SIZE: model.spec(SIZE)}, ())
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 100)
    for exact in (True, False):
        with pytest.raises(
            ParityError, match=r"^parity failed at full depth: nothing could be compared, since each of"
        ):
            block_gate(program, model, on_torch(model), tokens, exact)


# ------------------------------------------------------------------------------------------------------------- packages


@pytest.fixture(scope="module", params=ONNX_ALWAYS[:2])
def package(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip({"onnx": "onnxruntime"}.get(request.param, request.param))
    folder = tmp_path_factory.mktemp("packages") / "tiny.rmse"
    assert rmse_export(["-m", str(checkpoint), "--target", request.param, "-o", str(folder)]) in (None, 0)
    return folder


def test_a_package_writes_the_same_blocks(
    package: Path, model: Bd3lm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parity = Package.open(package).manifest["parity"]
    assert parity["rule"] == "exact" and {"loop_4", "step_4", "commit_4"} & set(parity["methods"])
    runtime = open_writer(package)
    assert isinstance(runtime, BlockRuntime)
    for dials in SETTINGS.values():
        assert write(runtime, PROMPT, dials, 3) == whole(model, PROMPT, dials, 3)
    with pytest.raises(UserError, match="writes by blocks, not token by token"):
        open_runtime(package)
    assert rmse_run([str(package), "--prompt-tokens", "1,2", "-n", "6", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == whole(model, [1, 2], SETTINGS["one"], 2)[0]
    # A manifest that lies about the blocks.
    opened = Package.open(package)
    manifest = json.loads((package / MANIFEST).read_text())
    manifest["model"]["blocks"]["mask_token_id"] = 3
    lying = tmp_path / "lying.rmse"
    shutil.copytree(opened.folder, lying)
    seal(lying, manifest)
    with pytest.raises(PackageError, match=r"model\.blocks\.mask_token_id: got 3, expected 16"):
        open_writer(lying)
