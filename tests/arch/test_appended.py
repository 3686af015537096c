"""State that is appended: it grows by a page, whatever the host, and a text ends where there is no room for more."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from architectures import whole
from helpers import random_tokens
from safetensors import safe_open
from safetensors.numpy import save_file
from toy_tower import Tower, lively_tower

from rmse_edge.errors import UserError
from rmse_edge.export import ExportRequest, describe, trace
from rmse_edge.export.program import SLOTS
from rmse_edge.info import PAGE
from rmse_edge.loop.contract import check_spec
from rmse_edge.loop.dials import Dials
from rmse_edge.runtimes.engines.torch import TorchRuntime
from rmse_edge.runtimes.host.session import SessionError, digest, restore_session, save_session

SETTINGS = {"full depth": Dials(4), "adaptive": Dials(4, 1, 0.6)}


@pytest.fixture(scope="module")
def tower() -> Tower:
    return lively_tower()


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    return random_tokens(150)


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


@pytest.mark.slow
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
