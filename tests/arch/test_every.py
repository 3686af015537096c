"""Every architecture of tests/architectures.py in PyTorch: its methods, its calls, its state, quantising, and the verbs.

tests/arch/test_packages.py takes the same architectures to packages.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import CASES, TEXTS, Case, argmax_of_whole_text, flags_of, greedy, settings_of, text_of, whole
from helpers import assert_one_line, random_heads
from torch import Tensor

from rmse_edge.arch.common.identity import model_info
from rmse_edge.arch.registry import Arch, arch_of, model_types
from rmse_edge.checkpoint import load_checkpoint, stored_keys
from rmse_edge.cli.bench import main as rmse_bench
from rmse_edge.cli.evaluate import main as rmse_eval
from rmse_edge.cli.quantize import main as rmse_quantize
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.cli.train import main as rmse_train
from rmse_edge.errors import ConfigError, ParityError, UserError
from rmse_edge.export.gate.compare import compare, compare_host
from rmse_edge.export.gate.methods import compare_methods, example_feeds
from rmse_edge.export.gate.reference import Reference
from rmse_edge.export.program import LoopProgram, dial_specs, signature, trace
from rmse_edge.info import dtype_name
from rmse_edge.loop.contract import LoopModel, LoopSpec, TensorSpec, check_spec
from rmse_edge.loop.dials import Dials
from rmse_edge.loop.drive import run_loop
from rmse_edge.quantize import QuantizeRequest, Scheme, load_quantized, quantize, save_quantized
from rmse_edge.runtimes.engines.torch import TorchMethods, TorchRuntime
from rmse_edge.runtimes.host.base import Arrays
from rmse_edge.runtimes.host.calls import Calls
from rmse_edge.runtimes.host.session import restore_session, save_session
from rmse_edge.runtimes.text.speculation import Speculation

every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
texts = pytest.mark.parametrize("case", TEXTS, ids=lambda case: case.name)
boards = pytest.mark.parametrize("case", [c for c in CASES if c not in TEXTS], ids=lambda case: case.name)


def dials_of(spec: LoopSpec, chosen: Dials) -> Arrays:
    return {t.name: np.array(getattr(chosen, t.name), dtype_name(t.dtype)) for t in dial_specs(spec)}


def test_the_architectures_there_are() -> None:
    names = {case.name for case in CASES}
    assert all(isinstance(arch_of(name), Arch) for name in model_types())  # no other file of the folder counts as one
    assert names <= set(model_types()) and all(case.arch in (None, arch_of(case.name)) for case in CASES)
    with pytest.raises(
        ConfigError, match=r"^config: model_type: got 'towel', expected one of .*rmse, rodimus, tower\b"
    ):
        arch_of("towel")


# ------------------------------------------------------------------------------------------------------------- methods


@every
def test_every_method_has_the_shapes_of_its_spec(case: Case) -> None:
    model = case.model()
    assert isinstance(model, LoopModel)
    for chunk in model.call_sizes():
        spec, methods = model.spec(chunk), TorchMethods(model)
        check_spec(spec)
        found = example_feeds(spec, methods) | dials_of(spec, settings_of(case)["adaptive"])
        for name in spec.methods:
            gives = methods.run(name, chunk, found)
            wanted = {t.name: (t.shape, dtype_name(t.dtype)) for t in signature(spec, name)[1]}
            assert {n: (gives[n].shape, str(gives[n].dtype)) for n in wanted} == wanted, name
            found |= gives
        first, fixed = model.begin({name: torch.from_numpy(np.asarray(a)) for name, a in found.items()})
        carried = {t.name: t for t in (*spec.carried, *spec.invariants) if t.name != "depth"}
        assert {n: (tuple(t.shape), t.dtype) for n, t in (first | fixed).items()} == {
            n: (t.shape, t.dtype) for n, t in carried.items()
        }


def in_batch(spec: TensorSpec, given: list[Arrays]) -> np.ndarray:
    """What several calls are given for one tensor, as a batch of them is given it."""
    arrays = [g[spec.name] for g in given]
    return arrays[0] if spec.batch_axis is None or not spec.shape else np.concatenate(arrays, spec.batch_axis)


@every
@torch.no_grad()
def test_a_row_of_a_batch_is_what_it_is_alone(case: Case) -> None:
    """Three calls with other tokens, state, positions and padding, which stop when they do."""
    model = case.model()
    chunk = model.call_sizes()[-1]
    spec, methods = model.spec(chunk), TorchMethods(model)
    dials = dials_of(spec, settings_of(case)["adaptive"])
    takes = {t.name: t for t in (*spec.inputs, *spec.context, *spec.state)}
    calls = []
    for seed in range(3):
        found = example_feeds(spec, methods, seed)
        found |= {name: found[name] - seed for name in ("position", "n_valid") if name in found}
        calls.append({name: found[name] for name in takes})

    def run(given: Arrays) -> dict[str, Tensor]:
        tensors = {name: torch.from_numpy(array) for name, array in given.items()}
        tensors |= model.prelude(tensors)
        scalars = {name: torch.from_numpy(array) for name, array in dials.items()}
        tensors |= run_loop(model, spec, tensors, scalars)
        tensors |= model.coda(tensors) if spec.coda else {}
        tensors |= model.head(tensors[spec.final.name])
        return tensors | (model.commit(tensors) if spec.commit else {})

    together = run({name: in_batch(t, calls) for name, t in takes.items()})
    depth = next(t for t in spec.carried if t.name == "depth")
    for row, given in enumerate(calls):
        alone = run(given)
        for t in (*spec.prelude, spec.h, depth, *spec.coda, *spec.head, *spec.commit):
            of_row = (
                together[t.name].narrow(t.batch_axis or 0, row, 1) if t.batch_axis is not None else together[t.name]
            )
            np.testing.assert_allclose(of_row, alone[t.name], atol=1e-5, err_msg=f"{t.name} of row {row}")


@texts
def test_padding_changes_nothing(case: Case) -> None:
    """Whatever stands in rows that are no tokens: what the others say, and what the call leaves behind."""
    found, true = [], TorchRuntime.inputs
    for filling in (0, 1):
        runtime = TorchRuntime(case.model(), case.name)

        def padded(self: TorchRuntime, chunk: int, ids: np.ndarray, filling: int = filling, *rest: Any) -> Arrays:
            given = true(self, chunk, ids)
            given["tokens"][:, len(ids) :] = filling
            return given

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TorchRuntime, "inputs", padded)
            fed = runtime.feed(text_of(case)[: runtime.info.chunks[-1] * 2 - 1], settings_of(case)["adaptive"])
        assert fed.chunks[-1] > 1  # a padded one
        found.append((fed, {name: array.copy() for name, array in runtime.tensors().items()}))
    (a, left), (b, right) = found
    assert np.array_equal(a.logits, b.logits) and np.array_equal(a.depth, b.depth)
    assert all(np.array_equal(left[name], right[name]) for name in left)


class Traced:
    """`Methods` of a traced program, run by PyTorch."""

    def __init__(self, program: LoopProgram) -> None:
        self.methods = {(m.name, m.chunks[0]): (m, m.program.module()) for m in program.methods}

    @torch.no_grad()
    def run(self, method: str, chunk: int, feeds: Arrays) -> Arrays:
        traced, module = self.methods[method, chunk]
        given = [torch.from_numpy(np.asarray(feeds[t.name])) for t in traced.takes]
        return {t.name: array.numpy() for t, array in zip(traced.gives, module(*given))}


# Of the models with many layers the nightly run says it again; one of them is among those that every change makes packages of.
@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[pytest.mark.nightly] if c.slow and c.always == () else [], id=c.name) for c in CASES],
)
def test_the_traced_methods_say_what_the_model_says(case: Case) -> None:
    """`loop` with its loop in the graph, and `step` driven by a host, in calls of every size."""
    program = trace(case.model(), case.model().call_sizes())
    for dials in settings_of(case).values():
        worst = compare_methods(program, Traced(program), vars(dials), 1e-5)
        assert {label.rpartition("_")[0] for label in worst} == {m.name for m in program.methods}


# --------------------------------------------------------------------------------------------------------------- texts


@texts
@pytest.mark.parametrize("setting", ["full depth", "adaptive", "shallow"])
@pytest.mark.parametrize("sizes", [(1,), (16, 1, 1, 9), (150,), (7, 31)], ids=str)
def test_a_text_may_be_cut_in_any_way(case: Case, setting: str, sizes: tuple[int, ...]) -> None:
    """Rings wrap, recurrences go on, padding leaves no trace, and loops that did not run still learn."""
    text, dials = text_of(case), settings_of(case)[setting]
    runtime, done, fed = TorchRuntime(case.model(), case.name), 0, []
    for i in range(len(text)):
        if done < len(text):
            part = text[done : done + sizes[i % len(sizes)]]
            fed.append(runtime.feed(part, dials))
            done += len(part)
    logits, depth = whole(case.model(), text, dials)
    assert np.array_equal(np.concatenate([f.depth for f in fed]), depth)
    np.testing.assert_allclose(np.concatenate([f.logits for f in fed]), logits, atol=2e-5)
    assert setting != "adaptive" or len(set(depth)) > 1


@texts
def test_a_deep_call_reads_what_shallow_ones_left(case: Case) -> None:
    """Tokens that ran two loops at most have fed what is kept for the other loops as well."""
    text, settings = text_of(case), settings_of(case)
    half = len(text) * 2 // 3
    runtime, other = (TorchRuntime(case.model(), case.name) for _ in range(2))
    runtime.feed(text[:half], settings["shallow"])
    deep = runtime.feed(text[half:], settings["full depth"])
    for token in text[:half]:
        other.feed([token], settings["shallow"])
    np.testing.assert_allclose(other.feed(text[half:], settings["full depth"]).logits, deep.logits, atol=2e-5)


@texts
def test_a_text_ends_where_its_room_does(case: Case) -> None:
    runtime, dials = TorchRuntime(case.model(), case.name), settings_of(case)["shallow"]
    room = runtime.info.capacity
    if room is None:
        assert all(state.kind != "append" for state in runtime.info.state.values())
        return
    runtime.feed(np.resize(text_of(case), room - 5), dials)
    with pytest.raises(UserError, match=f"^{room + 1} tokens are more than the {room} that {case.name} attends to; "):
        runtime.feed(text_of(case)[:6], dials)
    assert runtime.position == room - 5
    runtime.feed(text_of(case)[:5], dials)


@texts
def test_a_session_holds_every_kind_of_state(case: Case, tmp_path: Path) -> None:
    text, settings = text_of(case), settings_of(case)
    half = len(text) // 2
    runtime, heir = (TorchRuntime(case.model(), case.name) for _ in range(2))
    runtime.feed(text[:half], settings["adaptive"])
    save_session(runtime, tmp_path / "s")
    wanted = greedy(runtime, text[half : half + 5], settings["adaptive"])
    heir.feed(text[::-1][: half - 3].copy(), settings["full depth"])
    restore_session(heir, tmp_path / "s")
    assert heir.position == half
    assert greedy(heir, text[half : half + 5], settings["adaptive"]) == wanted


@texts
def test_greedy_tokens_are_those_of_the_whole_text(case: Case) -> None:
    prompt, dials = text_of(case)[:20], settings_of(case)["adaptive"]
    tokens = greedy(TorchRuntime(case.model(), case.name), prompt, dials)
    assert len(tokens) == 12
    assert tokens == argmax_of_whole_text(case.model(), prompt, tokens, dials)


@texts
def test_speculation_leaves_the_text_and_the_state_that_there_are_without_it(case: Case) -> None:
    """Drafts that are refused, and rows that are not kept, leave no trace in state of any kind."""
    prompt, dials = text_of(case)[:20], settings_of(case)["full depth"]
    plain, fast = (TorchRuntime(case.model(), case.name) for _ in range(2))
    tokens = greedy(plain, prompt, dials, 16)
    assert greedy(fast, prompt, dials, 16, Speculation(1, 3)) == tokens
    runtimes = [fast]
    if case.name != "inkling2_loop_text":  # whose states are two streams, and its embedding is one
        runtimes.append(TorchRuntime(case.model(), case.name, heads=random_heads(case.model())))
        assert greedy(runtimes[1], prompt, dials, 16, Speculation("heads", 3)) == tokens
    wanted = plain.tensors()
    for runtime in runtimes:
        assert runtime.position == plain.position == 20 + 15
        for name, array in runtime.tensors().items():
            np.testing.assert_allclose(array, wanted[name], atol=5e-5, err_msg=name)


# ------------------------------------------------------------------------------------------- wrong rules for the state


def kept(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A host that leaves a state as it was."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        true = Calls.update

        def wrong(self: Calls, found: Any, position: int, n: int) -> None:
            before = self.state[name].clone()
            true(self, found, position, n)
            self.state[name][...] = before

        patch.setattr(Calls, "update", wrong)

    return plant


def one_row(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A host that takes what is replaced for positions in slots: in calls of one row it writes one row of it."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        true = Calls.update

        def wrong(self: Calls, found: Any, position: int, n: int) -> None:
            before = self.state[name].clone()
            true(self, found, position, n)
            after = self.state[name].clone()
            row = position % after.shape[-2]
            self.state[name][...] = before
            self.state[name][..., row, :] = after[..., row, :]

        patch.setattr(Calls, "update", wrong)

    return plant


def faults() -> list[Any]:
    """Of the host, for every tensor of every architecture's state."""
    found = []
    for case in TEXTS:
        for name, state in model_info(case.model(), case.name, 0).state.items():
            planted = {"kept": kept} | ({"one row": one_row} if state.kind == "replace" and state.shape[-2] > 1 else {})
            found += [pytest.param(case, fault(name), id=f"{case.name}-{name}-{how}") for how, fault in planted.items()]
    return found


@pytest.mark.parametrize(("case", "fault"), faults())
def test_the_gate_catches_a_host_with_a_wrong_rule(
    case: Case, fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text_of(case)
    fault(monkeypatch)
    with pytest.raises(ParityError, match=r"^parity of the host failed: position \d+: logits differ"):
        compare_host(case.model(), text)


@texts
def test_the_gate_passes_a_host_with_the_true_rules(case: Case) -> None:
    """So that what the tests beside this one refuse was refused for its fault."""
    assert compare_host(case.model(), text_of(case))["same_depth"] == 1


@pytest.mark.parametrize(
    ("case", "wrong"),
    [pytest.param(case, w, id=f"{case.name}-{name}") for case in TEXTS for name, w in case.wrong.items()],
)
def test_the_gate_catches_a_model_with_a_wrong_rule(case: Case, wrong: Callable[[], Any]) -> None:
    candidate = TorchRuntime(wrong(), case.name)
    reference = Reference(candidate.model, candidate.info)
    with pytest.raises(ParityError, match=r"^position \d+: logits differ"):
        for dials in settings_of(case).values():
            compare(reference, candidate, np.resize(text_of(case), 256), dials, exact=True)


# ---------------------------------------------------------------------------------------------------------- quantising


@every
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_quantised_by_its_table_and_what_is_on_disk(case: Case, quant: str, tmp_path: Path) -> None:
    model = case.quantizable()
    found = quantize(model, QuantizeRequest(Scheme(quant), method="rtn"), None, "a fingerprint")
    known = {*found.tensors, *found.report["float_tensors"]}
    assert known >= set(stored_keys(model.config, list(model.state_dict()))) and found.tensors
    save_quantized(found, tmp_path / "q")
    back = load_quantized(tmp_path / "q")
    assert type(back.model) is type(model) and back.model.config == found.model.config
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(back.model.state_dict()[name], tensor), name


@pytest.mark.slow
@texts
def test_calibrated_integers_say_more_than_rounded_ones(case: Case) -> None:
    model, ids = case.quantizable(), np.resize(case.ids(8000), 8000)
    request = {"evaluation_tokens": 512, "calibration_tokens": 2048}
    both = [quantize(model, QuantizeRequest(Scheme("int4"), method=m, **request), ids) for m in ("gptq", "rtn")]
    assert all(set(q.tensors) == set(both[0].tensors) for q in both)
    gptq, rounded = (q.report["evaluation"]["full_depth"]["kl"] for q in both)
    assert gptq < rounded


# ----------------------------------------------------------------------------------------------------------- the verbs


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {case.name: case.checkpoint(tmp_path_factory.mktemp("checkpoints") / case.name) for case in CASES}


@every
def test_what_is_written_is_read(case: Case, folders: dict[str, Path]) -> None:
    read = load_checkpoint(folders[case.name])
    assert type(read) is type(case.model()) and read.config == case.model().config
    for name, tensor in case.model().state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name


@texts
def test_the_verbs_on_a_checkpoint(
    case: Case, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, ids, dials = str(folders[case.name]), text_of(case)[:40], settings_of(case)["adaptive"]
    flags = [*flags_of(dials), "-o", "json", "-t", "1"]
    prompt = ["--prompt-tokens", ",".join(map(str, ids[:20])), "-n", "8", "--temperature", "0"]
    assert rmse_run([folder, *prompt, *flags, *case.run_flags]) == 0
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    assert tokens == argmax_of_whole_text(case.model(), ids[:20], tokens, dials)
    (tmp_path / "ids.txt").write_text(" ".join(map(str, ids)))
    assert rmse_eval([folder, "--ids", str(tmp_path / "ids.txt"), *flags]) == 0
    measured = json.loads(capsys.readouterr().out)
    logits, depth = whole(case.model(), ids[:-1], dials)
    log_p = torch.log_softmax(torch.from_numpy(logits), -1)[torch.arange(len(ids) - 1), torch.from_numpy(ids[1:])]
    assert abs(measured["loss"] + float(log_p.mean())) < 1e-4 and abs(measured["mean_loops"] - depth.mean()) < 1e-6
    small = ["-p", "16", "-n", "4", "-r", "1", "-d", "1", "-t", "1", "-o", "json"]
    (tmp_path / "ids.txt").write_text(" ".join(map(str, np.resize(ids, 100))))
    own = [folder, "--ids", str(tmp_path / "ids.txt"), *flags_of(dials)]
    for read in (["--config", f"{folder}/config.json", "--runtime", "torch"], own):
        assert rmse_bench([*read, *small]) == 0
        document = json.loads(capsys.readouterr().out)
        assert {row["test"] for row in document["rows"]} == {"pp16", "tg4"}
        assert any("has room for" in note for note in document["notes"]) == (len(text_of(case)) < 68)


@boards
def test_the_verbs_of_texts_refuse_a_board(
    case: Case, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(folders[case.name])
    (tmp_path / "ids.txt").write_text("1 2 3")
    for done in (
        lambda: rmse_run([folder, "--prompt-tokens", "1"]),
        lambda: rmse_eval([folder, "--ids", str(tmp_path / "ids.txt")]),
        lambda: rmse_bench(["--config", f"{folder}/config.json", "--runtime", "torch"]),
        lambda: rmse_bench([folder]),
    ):
        assert done() == 2
        assert_one_line(capsys.readouterr().err, "fills in boards and reads no text")


@every
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_the_verb_that_quantises(
    case: Case, quant: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["-m", str(folders[case.name]), "-o", str(tmp_path / "q"), "--quant", quant, "--report", "json"]
    assert rmse_quantize([*flags, "--method", "rtn"]) == 0
    assert json.loads(capsys.readouterr().out)["quant"] == quant
    assert load_quantized(tmp_path / "q").quant == quant


@every
def test_the_verb_that_trains_says_what_it_cannot(
    case: Case, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it can is tests/cli/test_train_cli.py."""
    if case.trains:
        return
    (tmp_path / "text.txt").write_text("A text to train on. " * 200)
    (tmp_path / "recipe.json").write_text(json.dumps({"architecture": case.name}))
    every = ["--text", str(tmp_path / "text.txt"), "-o", str(tmp_path / "run")]
    for flags in (["--recipe", str(tmp_path / "recipe.json")], ["--init", str(folders[case.name])]):
        assert rmse_train([*every, *flags]) == 2
        assert_one_line(capsys.readouterr().err, case.name)
    assert not (tmp_path / "run").exists()
