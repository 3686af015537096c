"""Models whose texts have a plan: packages, what their hosts run of them, and the gate. 25 s of one core, most of it the ONNX export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ONNX_ALWAYS, assert_one_line, random_tokens, reseal

from rmse_edge.arch.common.identity import model_info
from rmse_edge.arch.dr_llm.config import DrLlmConfig
from rmse_edge.arch.dr_llm.model import DrLlm
from rmse_edge.checkpoint import save_checkpoint
from rmse_edge.cli.evaluate import main as rmse_eval
from rmse_edge.cli.export import main as rmse_export
from rmse_edge.cli.quantize import main as rmse_quantize
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.errors import PackageError, ParityError, UserError
from rmse_edge.export.gate.compare import compare, compare_host
from rmse_edge.export.gate.reference import Reference
from rmse_edge.info import ModelInfo
from rmse_edge.loop.dials import Dials
from rmse_edge.loop.plan import plan_of
from rmse_edge.package import Package
from rmse_edge.probe.subjects import Looped
from rmse_edge.runtimes import open_runtime
from rmse_edge.runtimes.cuda.batch import TextBatch
from rmse_edge.runtimes.engines.torch import TorchCalls, TorchMethods, TorchRuntime
from rmse_edge.runtimes.host.calls import Computed
from rmse_edge.runtimes.host.session import restore_session, save_session
from rmse_edge.runtimes.host.text import LoopRuntime

VOCABULARY, LAYERS = 31, 3
ROUTED, EACH = Dials(2 * LAYERS, route=-0.5), Dials(2 * LAYERS)


def make() -> DrLlm:
    """Random weights with which prompts have different plans."""
    torch.manual_seed(4)
    config = DrLlmConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, rope_theta=10000.0, tie_word_embeddings=False, router_hidden=8,
        num_windows=4, routed_positions=32,
    )  # fmt: skip
    model = DrLlm(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 3.0
        for router in model.model.routers:
            router.linear2.weight.normal_(std=3.0)
            router.linear2.bias.zero_()
    return model.eval()


@pytest.fixture(scope="module")
def model() -> DrLlm:
    return make()


@pytest.fixture(scope="module")
def checkpoint(model: DrLlm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planned") / "tiny"
    save_checkpoint(model, folder)
    return folder


def prompts() -> list[np.ndarray]:
    """Several, whose plans differ."""
    return [random_tokens(n, seed=n, vocab=VOCABULARY) for n in (1, 5, 12, 30, 45)]


def continued(
    runtime: LoopRuntime, prompt: np.ndarray, dials: Dials, count: int = 8
) -> tuple[list[int], list[int], np.ndarray]:
    """The plan of a prompt, the likeliest tokens behind it, and the logits of each."""
    runtime.reset()
    fed = [runtime.feed(prompt, dials, "last")]
    while len(fed) < count:
        fed.append(runtime.feed([int(fed[-1].logits[-1].argmax())], dials))
    logits = np.stack([f.logits[-1] for f in fed])
    plan = plan_of(runtime.state["past_plan"])
    assert {n for f in fed for n in f.iterations} == {len(plan)}
    return plan, logits.argmax(-1).tolist(), logits


# ----------------------------------------------------------------------------------------------------------- the gate


class DecidesAgain(TorchCalls):
    """As the published code: every call makes a plan of its own tokens."""

    def compute(self, chunk: int, inputs: Any, context: Any, dials: Any, position: int, n: int, *rest: Any) -> Computed:
        true = TorchMethods.run

        def deciding(methods: TorchMethods, method: str, rows: int, feeds: Any) -> Any:
            if method == "loop":
                feeds = feeds | {"prompt": feeds["n_valid"]}
                begins = true(methods, method, rows, feeds | {"position": feeds["position"] * 0})
                plan = [n for n in begins["layer"].flatten().tolist()[: int(begins["iterations"])]]
                feeds = feeds | {"past_plan": torch.tensor(plan + [0] * (2 * LAYERS - len(plan)))}
            return true(methods, method, rows, feeds)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TorchMethods, "run", deciding)
            return super().compute(chunk, inputs, context, dials, position, n, *rest)


class SharesSlots(TorchCalls):
    """All executions of a layer keep what the last one had."""

    def keep(self, call: Computed, n: int, note: bool = True) -> None:
        super().keep(call, n, note)
        for name in ("past_keys", "past_values"):
            self.state[name][:-1] = self.state[name][1:].clone()


class ForgetsThePlan(TorchCalls):
    """What is put back is the keys and values alone."""

    def restore(self, position: int, tensors: Any) -> None:
        super().restore(position, tensors)
        self.state["past_plan"][:] = torch.tensor([1, 2, 3, 0, 0, 0])


def test_the_gate_catches_wrong_hosts(model: DrLlm) -> None:
    info: ModelInfo = model_info(model, "tiny", 0)
    reference, tokens = Reference(model, info), random_tokens(256, vocab=VOCABULARY)
    assert compare_host(model, tokens)["undecided"] == []
    for dials in (ROUTED, Dials(2 * LAYERS, route=1.0)):
        right = TorchRuntime(model, "right")
        assert compare(reference, right, tokens, dials, exact=True)["undecided"] == []
        assert plan_of(right.state["past_plan"]) != [0, 1, 2]
    for wrong in (DecidesAgain, SharesSlots, ForgetsThePlan):
        host = LoopRuntime(info, TorchMethods(model), wrong)
        with pytest.raises(ParityError, match=r"^position \d+: logits differ"):
            compare(reference, host, tokens, ROUTED, exact=True)


# ----------------------------------------------------------------------------------------------------------- packages


@pytest.fixture(scope="module", params=ONNX_ALWAYS[:2])
def package(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip({"onnx": "onnxruntime"}.get(request.param, request.param))
    folder = tmp_path_factory.mktemp("packages") / "tiny.rmse"
    assert rmse_export(["-m", str(checkpoint), "--target", request.param, "-o", str(folder)]) in (None, 0)
    return folder


def test_a_package_is_proved_and_makes_the_same_plans(package: Path, model: DrLlm, tmp_path: Path) -> None:
    parity = Package.open(package).manifest["parity"]
    assert parity["rule"] == "exact" and set(parity["settings"]) == {"full depth", "route", "every layer twice"}
    assert all(s["undecided"] == [] for s in parity["settings"].values())
    assert {"begin_1", "loop_1", "decide_1", "commit_32"} <= set(parity["methods"])
    ours, theirs = TorchRuntime(model, "ours"), open_runtime(package)
    assert isinstance(theirs, LoopRuntime)
    plans = set()
    for prompt in prompts():
        (plan, tokens, logits), got = (continued(r, prompt, ROUTED) for r in (ours, theirs))
        assert got[:2] == (plan, tokens)
        np.testing.assert_allclose(got[2], logits, atol=1e-4)
        plans.add(tuple(plan))
    assert len(plans) > 2 and (0, 1, 2) not in plans
    # A session goes on in the package, by its plan.
    continued(ours, prompts()[2], ROUTED)
    save_session(ours, tmp_path / "text.session")
    theirs.reset()
    restore_session(theirs, tmp_path / "text.session")
    a, b = (r.feed([1, 2, 3, 4, 5, 6, 7, 8, 9], EACH) for r in (ours, theirs))
    np.testing.assert_allclose(b.logits, a.logits, atol=1e-4)
    assert a.iterations == b.iterations != [LAYERS]


def test_layers_that_are_not_in_the_plan_are_not_run(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = open_runtime(package)
    assert isinstance(runtime, LoopRuntime)
    planned = runtime.methods.planned  # type: ignore[attr-defined]
    run: Callable[..., Any] = planned._run
    ran: list[str] = []
    monkeypatch.setattr(planned, "_run", lambda method, *rest: (ran.append(method), run(method, *rest))[1])
    for prompt in prompts():
        plan, _, _ = continued(runtime, prompt, ROUTED, count=1)
        steps = [method for method in ran if method.startswith("step")]
        calls = -(-len(prompt) // 32)
        assert steps == [f"step{layer}" for layer in plan] * calls
        assert ran.count("decide") == LAYERS  # in the first call alone
        ran.clear()


def test_every_weight_is_in_the_package_once(package: Path, model: DrLlm) -> None:
    if (weights := package / "weights.bin").is_file():  # for ONNX, where some are laid out anew
        assert weights.stat().st_size < 1.05 * sum(4 * p.numel() for p in model.parameters())
        return
    content = (package / "program.pte").read_bytes()
    for name, p in model.named_parameters():
        if p.dim() > 1 and p.numel() > 16:
            forms = {w.detach().contiguous().numpy().tobytes() for w in (p, p.T)}
            assert sum(content.count(form) for form in forms) == 1, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["model"]["plan"].update(layers=2), "model.plan.layers: got 2, expected 3, as model.config says"),
        (lambda m: m["model"].update(plan=None), "model.plan.layers: got None, expected 3, as model.config says"),
        (lambda m: m["methods"].pop("step2_1"), "step2_1 among them"),
        (lambda m: m["methods"].pop("decide_32"), "decide_32 among them"),
        (lambda m: m["model"]["state"]["past_plan"].update(kind="ring"), "model.state.past_plan.kind: got ring"),
    ],
)
def test_manifests_that_lie(
    package: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    folder = shutil.copytree(package, tmp_path / "p.rmse")
    reseal(folder, change)
    with pytest.raises(PackageError) as caught:
        open_runtime(folder)
    assert_one_line(str(caught.value), message)


def test_verbs_know_the_dial(package: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--prompt-tokens", ",".join(map(str, prompts()[2])), "-n", "4", "--output", "json", "--temperature", "0"]
    found = []
    for path in (package, checkpoint):
        for route in ([], ["--route", "0.5"], ["--route=-0.9"]):
            assert rmse_run([str(path), *flags, *route]) in (None, 0)
            document = json.loads(capsys.readouterr().out)
            found.append((document["tokens"], document["depth"]))
    assert found[:3] == found[3:] and set(found[1][1]) == {LAYERS} and set(found[2][1]) == {0}
    assert set(found[0][1]) not in ({0}, {LAYERS})
    assert rmse_run([str(package), *flags, "--speculate", "1"]) == 2
    assert_one_line(capsys.readouterr().err, "runs its texts by a plan, which no shallower draft has")


def test_losses_at_several_settings(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "ids.npy", random_tokens(200, vocab=VOCABULARY))
    flags = ["--ids", str(tmp_path / "ids.npy"), "--split", "all", "--block", "64", "-o", "json"]
    assert rmse_eval([str(checkpoint), *flags, "--sweep", "--rule", "route=-0.9,-0.5,0.5"]) in (None, 0)
    result = json.loads(capsys.readouterr().out)
    loops = [point["mean_loops"] for point in result["adaptive"]]
    assert loops[0] == 0 and 0 < loops[1] < 2 * LAYERS and loops[2] == LAYERS


def test_what_knows_no_plans_says_so(model: DrLlm, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rmse_run([str(checkpoint), "--prompt-tokens", "1,2", "--runtime", "cuda", "--device", "cpu"]) == 2
    assert_one_line(capsys.readouterr().err, "cuda runs no layers by a plan, as tiny has; torch does")
    with pytest.raises(UserError, match=r"^tiny: each of its texts has a plan of its own; feed them one by one"):
        TextBatch(model, model_info(model, "tiny", 0), 2, "cpu")
    assert rmse_quantize(["-m", str(checkpoint), "--method", "rtn", "-o", str(checkpoint.parent / "int8")]) == 2
    assert_one_line(capsys.readouterr().err, "dr_llm")


def test_probes_read_states_behind_layers(model: DrLlm) -> None:
    subject = Looped(model)
    states, gates = subject.course(torch.from_numpy(random_tokens(20, vocab=VOCABULARY))[None])
    assert len(states) == LAYERS and gates is None
    scalars = {name: torch.from_numpy(a) for name, a in EACH.arrays().items()}
    whole = model.whole_text(torch.from_numpy(random_tokens(20, vocab=VOCABULARY)), scalars)
    torch.testing.assert_close(subject.logits(states[-1])[0], whole.logits)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target", "coreml"], "its hosts run no layers by a plan of the text; export to onnx or executorch"),
        (["--target", "onnx", "--draft-tokens", "3"], "the model's texts have a plan, and draft nothing"),
    ],
)
def test_exports_that_are_refused(
    checkpoint: Path, tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rmse_export(["-m", str(checkpoint), *flags, "-o", str(tmp_path / "p.rmse")]) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert not (tmp_path / "p.rmse").exists()
