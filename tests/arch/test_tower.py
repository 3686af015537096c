"""An architecture that is not RMS-E, with every kind of state, on all targets and through the gate; see tests/toy_tower.py."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import reseal
from native_runner import Runner
from safetensors import safe_open
from safetensors.numpy import save_file
from toy_tower import ARCH, Tower, lively_tower

from rmse_edge.arch import registry
from rmse_edge.arch.registry import arch_of, model_types, register
from rmse_edge.errors import ConfigError, PackageError, ParityError, UserError
from rmse_edge.export import ExportRequest, describe, export_package, trace
from rmse_edge.export.gate.compare import compare, compare_host
from rmse_edge.export.gate.reference import Reference
from rmse_edge.export.program import SLOTS
from rmse_edge.info import PAGE
from rmse_edge.loop.contract import Tensors, check_spec
from rmse_edge.loop.dials import Dials
from rmse_edge.package import MANIFEST, Package
from rmse_edge.runtimes import runtime_for
from rmse_edge.runtimes.engines.torch import TorchRuntime
from rmse_edge.runtimes.host.calls import Calls
from rmse_edge.runtimes.host.session import SessionError, digest, restore_session, save_session

SETTINGS = {"full depth": Dials(4), "adaptive": Dials(4, 1, 0.6), "shallow": Dials(2, 1, 0.6)}


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_REGISTERED", {})
        register("tower", ARCH)
        yield


@pytest.fixture(scope="module")
def tower() -> Tower:
    return lively_tower()


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 65, 150)


def whole(model: Tower, text: np.ndarray, dials: Dials) -> tuple[np.ndarray, np.ndarray]:
    scalars = {name: torch.from_numpy(value) for name, value in dials.arrays().items()}
    found = model.whole_text(torch.from_numpy(text), scalars)
    return found.logits.numpy(), found.depth.numpy()


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("sizes", [(1,), (16, 1, 1, 9), (150,), (7, 31)])
def test_a_text_may_be_cut_in_any_way(setting: str, sizes: tuple[int, ...], tower: Tower, text: np.ndarray) -> None:
    """Rings wrap six times, the recurrence goes on, padding leaves no trace, and loops that did not run still learn."""
    runtime, done, fed = TorchRuntime(tower, "tower"), 0, []
    for i in range(len(text)):
        if done < len(text):
            part = text[done : done + sizes[i % len(sizes)]]
            fed.append(runtime.feed(part, SETTINGS[setting]))
            done += len(part)
    logits, depth = whole(tower, text, SETTINGS[setting])
    assert np.array_equal(np.concatenate([f.depth for f in fed]), depth)
    np.testing.assert_allclose(np.concatenate([f.logits for f in fed]), logits, atol=1e-5)
    assert setting == "full depth" or len(set(depth)) > 1


def test_a_deep_call_reads_what_shallow_ones_left(tower: Tower, text: np.ndarray) -> None:
    """Tokens that ran two loops at most have fed the keys, the values and the recurrence of the other two as well."""
    runtime = TorchRuntime(tower, "tower")
    runtime.feed(text[:100], SETTINGS["shallow"])
    deep = runtime.feed(text[100:], SETTINGS["full depth"])
    other = TorchRuntime(tower, "tower")
    for token in text[:100]:
        other.feed([token], SETTINGS["shallow"])
    np.testing.assert_allclose(other.feed(text[100:], SETTINGS["full depth"]).logits, deep.logits, atol=1e-5)


def test_the_architectures_there_are(tower: Tower) -> None:
    assert {"rmse", "tower"} <= set(model_types()) and arch_of("tower") is ARCH
    with pytest.raises(ConfigError, match=r"^config: model_type: got 'towel', expected one of .*rmse, tower$"):
        arch_of("towel")


def test_a_text_ends_where_its_keys_do(text: np.ndarray) -> None:
    runtime = TorchRuntime(lively_tower(capacity=100), "tower")
    runtime.feed(text[:90], Dials(2))
    with pytest.raises(UserError, match=r"^101 tokens are more than the 100 that tower attends to; shorten the text$"):
        runtime.feed(text[:11], Dials(2))
    assert runtime.position == 90
    runtime.feed(text[:10], Dials(2))


def test_appended_keys_take_a_page_at_a_time(tower: Tower, text: np.ndarray, tmp_path: Path) -> None:
    """Memory, sessions and time are those of the text there is, not of the longest there may be."""
    long = np.resize(text, 2 * PAGE)
    runtime, dials = TorchRuntime(tower, "tower"), SETTINGS["adaptive"]
    first = runtime.state_bytes()
    assert runtime.state["past_keys"].shape == (4, 1, 4, PAGE, 16)
    fed = [runtime.feed(long[: PAGE - 3], dials)]
    save_session(runtime, tmp_path / "short")
    fed.append(runtime.feed(long[PAGE - 3 : PAGE + 5], dials))
    assert runtime.state["past_keys"].shape[-2] == runtime.state["past_last_values"].shape[-2] == 2 * PAGE
    assert runtime.state_bytes() > 1.8 * first and runtime.state["past_first_keys"].shape[-2] == tower.config.window
    save_session(runtime, tmp_path / "long")
    sizes = [(tmp_path / name).stat().st_size for name in ("short", "long")]
    slot = sum(s.of_slots(1).nbytes for s in tower.spec(1).state if s.kind == "append")
    assert sizes[1] - sizes[0] == pytest.approx(8 * slot, abs=64)  # what is empty is in no session
    logits, depth = whole(tower, long[: PAGE + 5], dials)
    assert np.array_equal(np.concatenate([f.depth for f in fed]), depth)
    np.testing.assert_allclose(np.concatenate([f.logits for f in fed]), logits, atol=1e-5)
    wanted = runtime.feed(long[PAGE + 5 :], dials).logits
    for start, rest in (("short", long[PAGE - 3 :]), ("long", long[PAGE + 5 :])):  # forth, and back over the page's end
        restore_session(runtime, tmp_path / start)
        np.testing.assert_allclose(runtime.feed(rest, dials).logits[-100:], wanted[-100:], atol=1e-5)
    runtime.reset()
    assert runtime.state_bytes() == first


def test_a_session_beyond_the_end_is_refused(tower: Tower, text: np.ndarray, tmp_path: Path) -> None:
    runtime = TorchRuntime(tower, "tower")
    runtime.feed(text, SETTINGS["full depth"])
    for position, said in (
        ("513", "position: got 513, and tower takes 512 tokens at most"),
        ("149", "its tensors are not"),
    ):
        move(runtime, tmp_path / "s", position)
        with pytest.raises(SessionError, match=said):
            restore_session(runtime, tmp_path / "s")
    assert runtime.position == len(text)


def move(runtime: TorchRuntime, path: Path, position: str) -> None:
    """A session that says it is at another position, its hash right."""
    save_session(runtime, path)
    with safe_open(path, framework="numpy") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header["position"] = position
    save_file(tensors, path, metadata=header | {"sha256": digest(tensors, header)})


def test_what_fits_into_memory_is_what_a_text_may_have() -> None:
    """Ten million positions are no reason to refuse a model whose state grows; the text ends where 4 GiB are full."""
    info = TorchRuntime(lively_tower(capacity=10_000_000), "tower").info
    assert info.capacity == 10_000_000 and info.longest == info.room < info.capacity
    assert info.kept_bytes(info.room) == pytest.approx(4 << 30, rel=1e-3)
    whole = dataclasses.replace(info, page=None)
    assert whole.kept_bytes() > 4 << 30


@pytest.mark.parametrize("grows", [True, False])
def test_methods_take_as_many_slots_as_there_are(grows: bool) -> None:
    """Or, where an engine cannot, as many as the export is for."""
    program = trace(lively_tower(), (1, 16), host_loop=True, grows=grows, most=100)
    assert program.specs[16].capacity == 100
    begin = program.method("begin", 16)
    slots = next(t.shape for t in begin.takes if t.name == "slots")
    mask = next(t.shape for t in begin.gives if t.name == "slots_mask")
    assert (slots, mask) == (((SLOTS,), (1, 1, 16, SLOTS)) if grows else ((100,), (1, 1, 16, 100)))
    past = next(t.shape for t in program.method("step", 1).takes if t.name == "past_keys")
    assert past == (1, 4, SLOTS if grows else 100, 16)


def test_a_package_for_short_texts_is_small() -> None:
    whole, short = (describe(lively_tower(), ExportRequest(max_seq_len=n))["state_bytes"] for n in (None, 64))
    assert short < 0.25 * whole


def test_a_spec_whose_slots_do_not_fit_is_refused() -> None:
    spec = lively_tower().spec(16)
    wide = dataclasses.replace(spec.invariants[0], shape=(1, 1, 16, 500))
    with pytest.raises(ValueError, match="slots_mask: has 500 slots, where the state that is appended to has 512"):
        check_spec(dataclasses.replace(spec, invariants=(wide,)))
    with pytest.raises(ValueError, match="y: says slots_axis"):
        check_spec(dataclasses.replace(spec, coda=(dataclasses.replace(spec.coda[0], slots_axis=1), *spec.coda[1:])))


def test_a_session_holds_every_kind_of_state(tower: Tower, text: np.ndarray, tmp_path: Path) -> None:
    runtime = TorchRuntime(tower, "tower")
    runtime.feed(text[:77], SETTINGS["adaptive"])
    save_session(runtime, tmp_path / "s")
    wanted = runtime.feed(text[77:], SETTINGS["adaptive"])
    heir = TorchRuntime(tower, "tower")
    heir.feed(text[::-1][:50].copy(), SETTINGS["full depth"])
    restore_session(heir, tmp_path / "s")
    assert heir.position == 77
    assert np.array_equal(heir.feed(text[77:], SETTINGS["adaptive"]).logits, wanted.logits)


# ------------------------------------------------------------------------------------------- wrong rules for the state


class CountsPadding(Tower):
    """The recurrence takes in the rows of a call that are none of its tokens."""

    def commit(self, tensors: Tensors) -> Tensors:
        rows = torch.full_like(tensors["n_valid"], tensors["h"].shape[1])
        return super().commit(tensors | {"n_valid": rows})


class ForgetsDeepLoops(Tower):
    """Loops that did not run keep the memory they had."""

    def commit(self, tensors: Tensors) -> Tensors:
        found = super().commit(tensors)
        ran = torch.arange(self.config.max_loops).view(-1, 1, 1, 1, 1) < tensors["iterations"]
        return found | {"next_memory": torch.where(ran, found["next_memory"], tensors["memory"])}


class LastKeysForAll(Tower):
    """A position that goes on makes its keys from the state before, as one that stopped."""

    def commit(self, tensors: Tensors) -> Tensors:
        found = super().commit(tensors)
        return found | {"keys": found["keys"][-1:].expand_as(found["keys"])}


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


def an_eighth(patch: pytest.MonkeyPatch) -> None:
    """A host that takes what is replaced for positions in slots: in calls of one row it writes one row of the matrix."""
    true = Calls.update

    def wrong(self: Calls, found: Any, position: int, n: int) -> None:
        before = self.state["memory"].clone()
        true(self, found, position, n)
        after = self.state["memory"].clone()
        self.state["memory"][...] = before
        self.state["memory"][..., position % 16, :] = after[..., position % 16, :]

    patch.setattr(Calls, "update", wrong)


@pytest.mark.parametrize("kind", [CountsPadding, ForgetsDeepLoops, LastKeysForAll])
def test_the_gate_catches_a_model_with_a_wrong_rule(kind: type[Tower], text: np.ndarray) -> None:
    candidate = TorchRuntime(lively_tower(kind=kind), "tower")
    reference = Reference(candidate.model, candidate.info)
    with pytest.raises(ParityError, match=r"^position \d+: logits differ"):
        for dials in SETTINGS.values():
            compare(reference, candidate, np.resize(text, 256), dials, exact=True)


@pytest.mark.parametrize(
    "fault", [*map(kept, ("past_first_keys", "past_values", "memory", "past_last_keys")), an_eighth]
)
def test_the_gate_catches_a_host_with_a_wrong_rule(
    fault: Callable[[pytest.MonkeyPatch], None], tower: Tower, text: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare_host(tower, np.resize(text, 256))
    fault(monkeypatch)
    with pytest.raises(ParityError, match=r"^parity of the host failed: position \d+: logits differ"):
        compare_host(tower, np.resize(text, 256))


# ------------------------------------------------------------------------------------------------------- packages

TARGETS = [
    pytest.param(name, marks=[getattr(pytest.mark, name), pytest.mark.slow])
    for name in ("onnx", "executorch", "coreml")
]


@pytest.fixture(scope="module", params=TARGETS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Package:
    """A tower as a package of each target, proved by the gate."""
    pytest.importorskip({"onnx": "onnxruntime", "coreml": "coremltools"}.get(request.param, request.param))
    folder = tmp_path_factory.mktemp("tower") / f"{request.param}.rmse"
    return export_package(lively_tower(max_loops=3), folder, ExportRequest(request.param))


def test_a_package_says_what_the_model_says(
    exported: Package, text: np.ndarray, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Beyond the gate: in a host of its own, from a session of PyTorch's, and with an unknown kind of state refused."""
    parity = exported.manifest["parity"]
    assert parity["rule"] == "exact" and set(parity["settings"]) == {"full depth", "gate", "delta"}
    assert all(setting["undecided"] == [] for setting in parity["settings"].values())
    model = lively_tower(max_loops=3)
    ours, theirs = TorchRuntime(model, "tower"), runtime_for(exported)
    ours.feed(text[:61], Dials(3, 1, 0.6))
    save_session(ours, tmp_path / "s")
    restore_session(theirs, tmp_path / "s")  # type: ignore[arg-type]
    a, b = (runtime.feed(text[61:110], Dials(3, 1, 0.6)) for runtime in (ours, theirs))
    assert np.array_equal(a.depth, b.depth)
    np.testing.assert_allclose(a.logits, b.logits, atol=1e-4)
    long = np.resize(text, PAGE + 40)
    runtimes = ours, theirs
    for runtime in runtimes:
        runtime.reset()  # type: ignore[union-attr]
    a, b = (runtime.feed(long, Dials(3, 1, 0.6)) for runtime in runtimes)  # type: ignore[union-attr]
    assert np.array_equal(a.depth, b.depth)
    np.testing.assert_allclose(a.logits, b.logits, atol=1e-4)
    if exported.target == "executorch":
        runner = Runner([request.getfixturevalue("runner")], exported.folder)
        logits, depth = runner.feed(long, tmp_path / "logits", "--exit-threshold", "0.6")
        assert np.array_equal(depth, a.depth)
        np.testing.assert_allclose(logits, a.logits, atol=1e-4)
    grows = exported.target != "coreml"
    assert theirs.info.page == (PAGE if grows else None) and theirs.calls.slots == 512  # type: ignore[union-attr]
    kinds = {
        name: s["kind"] for name, s in json.loads((exported.folder / MANIFEST).read_text())["model"]["state"].items()
    }
    assert set(kinds.values()) == {"ring", "append", "replace"}
    reseal(exported.folder, lambda m: m["model"]["state"]["memory"].update(kind="whirl"))
    with pytest.raises(
        PackageError, match=r"model\.state\.memory\.kind: got 'whirl', expected one of ring, append, replace"
    ):
        runtime_for(Package.open(exported.folder))
