"""A wrong host fails the parity gate: what a runtime does between an engine's calls is compared with a reference that has no
host, on every engine and in every export.

Faults are planted in `LoopRuntime`, which all Python runtimes share, PyTorch's included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import FEW, decided_text, random_tokens, reference_of, remembered_text, remembering_model
from memo import Memo

from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.errors import ParityError
from rmse_edge.export import ExportRequest, export_package
from rmse_edge.export.gate.compare import adaptive_settings, compare, compare_host, compared, computed_ahead
from rmse_edge.export.gate.reference import LEAST_POSITIONS, SINGLES, Reference, conversation, least_positions
from rmse_edge.info import ModelInfo
from rmse_edge.layers.cache import with_cache_dtype
from rmse_edge.loop.contract import TextModel
from rmse_edge.numbers import SEGMENT
from rmse_edge.package import Package
from rmse_edge.quantize import Quantized
from rmse_edge.quantize.parallel import aside
from rmse_edge.runtimes import Dials, LoopRuntime, runtime_for
from rmse_edge.runtimes.engines.torch import TorchRuntime
from rmse_edge.runtimes.host.base import Arrays
from rmse_edge.runtimes.host.calls import SINGLE_CALLS, Calls

pytestmark = pytest.mark.slow

Patch = pytest.MonkeyPatch
Fault = Callable[[Patch], None]

# ------------------------------------------------------------------------------------------------------------- faults


def one_slot_too_far(patch: Patch) -> None:
    """Every key and value lies one slot behind its own."""
    true = Calls.update
    patch.setattr(Calls, "update", lambda self, found, position, n: true(self, found, position + 1, n))


def row_by_row_backwards(patch: Patch) -> None:
    """The rows of a call go into its slots in the wrong order."""
    true = Calls.update

    def wrong(self: Calls, found: Any, position: int, n: int) -> None:
        backwards = range(n - 1, -1, -1)
        true(self, {k: v[..., list(backwards), :] if v.ndim > 2 else v for k, v in found.items()}, position, n)

    patch.setattr(Calls, "update", wrong)


def context_with(change: Callable[[int, int], int]) -> Fault:
    """Calls of some rows are told another position than they stand at."""

    def plant(patch: Patch) -> None:
        true = LoopRuntime.context

        def wrong(self: LoopRuntime, chunk: int, n: int, position: int | None = None) -> Arrays:
            return true(self, chunk, n, change(chunk, self._position if position is None else position))

        patch.setattr(LoopRuntime, "context", wrong)

    return plant


def angles_of_the_token_before(patch: Patch) -> None:
    """Where tokens come one by one, they are turned as the one before; masks are right."""
    true = LoopRuntime.context

    def wrong(self: LoopRuntime, chunk: int, n: int, position: int | None = None) -> Arrays:
        found = true(self, chunk, n, position)
        if chunk == 1:
            before = true(self, chunk, n, max(0, self._position - 1))
            found |= {"cos": before["cos"], "sin": before["sin"]}
        return found

    patch.setattr(LoopRuntime, "context", wrong)


def padding_counted(patch: Patch) -> None:
    """Calls are told that all of their rows are tokens, and padding stays in the ring until it is written over."""
    true = Calls.update
    patch.setattr(
        Calls, "update", lambda self, found, position, n: true(self, found, position, found["keys"].shape[-2])
    )


def last_row_of_the_call(patch: Patch) -> None:
    """Asked for the last token's logits, a padded call gives those of its last row."""
    true = LoopRuntime._call

    def wrong(self: LoopRuntime, chunk: int, ids: np.ndarray, dials: Dials, head: bool) -> Arrays:
        out = true(self, chunk, ids, dials, head)
        return {**out, "logits": np.roll(out["logits"], 1, 1)} if patched and "logits" in out else out

    true_feed, patched = LoopRuntime.feed, []

    def feed(self: LoopRuntime, tokens: Any, dials: Dials, logits: str = "all") -> Any:
        patched[:] = [True] if logits == "last" else []
        return true_feed(self, tokens, dials, logits)

    patch.setattr(LoopRuntime, "_call", wrong)
    patch.setattr(LoopRuntime, "feed", feed)


def restored_without(*names: str) -> Fault:
    """A session comes back with something blank."""

    def plant(patch: Patch) -> None:
        true = LoopRuntime.restore

        def wrong(self: LoopRuntime, position: int, tensors: Arrays) -> None:
            lost = {k: np.zeros_like(v) for k, v in tensors.items() if k in names}
            assert len(lost) == len(names)
            true(self, position, tensors | lost)

        patch.setattr(LoopRuntime, "restore", wrong)

    return plant


def restored_one_further(patch: Patch) -> None:
    """A session goes on one position behind where it was."""
    true = LoopRuntime.restore
    patch.setattr(LoopRuntime, "restore", lambda self, position, tensors: true(self, position + 1, tensors))


def one_segment_row_too_far(patch: Patch) -> None:
    """Exit states lie one row behind their own in what the memory is taught."""
    true = Calls.note

    def wrong(self: Calls, h: Any, position: int, n: int) -> None:
        true(self, h[:, [n - 1, *range(n - 1)]] if n > 1 else h, position, n)

    patch.setattr(Calls, "note", wrong)


def single_tokens_not_taught(patch: Patch) -> None:
    """What tokens that come one by one stop with never reaches the memory."""
    true = Calls.note
    patch.setattr(Calls, "note", lambda self, h, at, n: true(self, h, at, n) if h.shape[1] > 1 else None)


def nothing_written(patch: Patch) -> None:
    """The surprise is told, but the memory stays blank."""
    true = Calls.memorize
    patch.setattr(Calls, "memorize", lambda self, count, learn: true(self, count, False))


def written_a_call_late(patch: Patch) -> None:
    """The first call of a segment still reads the memory without the segment before."""
    true, memorized, pending = LoopRuntime._call, Calls.memorize, []

    def memorize(self: Calls, count: int, learn: bool) -> Arrays:
        before = {name: self.put(np.array(array)) for name, array in self.memory.items()}
        found = memorized(self, count, learn)
        if learn:
            pending.append({name: self.put(np.array(array)) for name, array in self.memory.items()})
            for name, array in self.memory.items():
                array[...] = before[name]
        return found

    def call(self: LoopRuntime, *args: Any, **kwargs: Any) -> Arrays:
        result = true(self, *args, **kwargs)
        for name, array in (pending.pop() if pending else {}).items():
            self.calls.memory[name][...] = array
        return result

    patch.setattr(Calls, "memorize", memorize)
    patch.setattr(LoopRuntime, "_call", call)


def stale_hits(patch: Patch) -> None:
    """What was retrieved is still read after the boundary."""
    true = LoopRuntime.inject

    def wrong(self: LoopRuntime, values: np.ndarray | None, scores: np.ndarray | None = None) -> None:
        if values is not None or self._position == 0:
            true(self, values, scores)

    patch.setattr(LoopRuntime, "inject", wrong)


def hits_without_scores(patch: Patch) -> None:
    """All hits count as if they had matched perfectly."""
    true = LoopRuntime.inject
    patch.setattr(LoopRuntime, "inject", lambda self, values, scores=None: true(self, values))


FAULTS: dict[str, Fault] = {
    "one slot too far": one_slot_too_far,
    "rows of a call backwards": row_by_row_backwards,
    "a position too far": context_with(lambda chunk, position: position + 1),
    "a position too far in decoding": context_with(lambda chunk, position: position + (chunk == 1)),
    "angles of the token before": angles_of_the_token_before,
    "padding kept": padding_counted,
    "the wrong last row": last_row_of_the_call,
    "a session without keys": restored_without("past_keys"),
    "a session one position further": restored_one_further,
}
MEMORY_FAULTS: dict[str, Fault] = {
    "one segment row too far": one_segment_row_too_far,
    "single tokens not taught": single_tokens_not_taught,
    "nothing written": nothing_written,
    "written a call late": written_a_call_late,
    "stale hits": stale_hits,
    "hits without scores": hits_without_scores,
    "a session without its segment": restored_without("segment"),
    "a session without its memory": restored_without("memory_down"),
    "a session without its hits": restored_without("retrieved"),
}

# ------------------------------------------------------------------------------------------------------------ exports


@pytest.mark.parametrize("case", FAULTS | MEMORY_FAULTS)
def test_a_wrong_host_fails_the_export(
    case: str,
    request: pytest.FixtureRequest,
    quick_export: Memo,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The package is sound; the host it is run with in the gate is not. Nothing is left of it."""
    name, package = ("checkpoint", "package") if case in FAULTS else ("remembering", "remembering_package")
    checkpoint: Path = request.getfixturevalue(name)
    request.getfixturevalue(package)  # so that this export need not trace and lower anew
    (FAULTS | MEMORY_FAULTS)[case](monkeypatch)
    with pytest.raises(ParityError, match=r"^parity failed at full depth: position ") as caught:
        export_package(load_checkpoint(checkpoint), tmp_path / "out.rmse", ExportRequest(), checkpoint)
    assert "the reference is decided" in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_sound_host_passes_at_every_setting(request: pytest.FixtureRequest) -> None:
    """What the exports above fail on is the fault: the same packages have passed, with nothing undecided."""
    for package in ("package", "remembering_package"):
        report = Package.open(request.getfixturevalue(package)).manifest["parity"]
        for result in report["settings"].values():
            assert result["max_logit_difference"] <= 1e-4 and result["same_depth"] == 1.0


def test_passages_read_wrongly_fail_the_export(
    remembering: Path, remembering_package: Path, quick_export: Memo, monkeypatch: Patch, tmp_path: Path
) -> None:
    """A knowledge base would be made of passages without their last token, and searched in with all of it."""
    assert set(Package.open(remembering_package).manifest["parity"]["passage"]) == {"key", "value", "query"}
    true = LoopRuntime._read_alone
    monkeypatch.setattr(LoopRuntime, "_read_alone", lambda self, tokens: true(self, tokens[:-1]))
    with pytest.raises(ParityError, match=r"^passage: \w+ differs by "):
        export_package(load_checkpoint(remembering), tmp_path / "out.rmse", ExportRequest(), remembering)
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------- every engine


@pytest.fixture(scope="module")
def model() -> RMSE:
    return remembering_model()


@pytest.fixture(scope="module")
def reference(model: RMSE) -> Reference:
    return reference_of(model)


def test_the_runtime_of_checkpoints_passes_at_every_setting(model: RMSE, reference: Reference) -> None:
    """PyTorch with its host against PyTorch without one; a checkpoint is run without an export's proof."""
    candidate, text = TorchRuntime(model, "candidate"), remembered_text(256)
    settings = adaptive_settings(reference, text)
    assert list(settings) == ["full depth", "gate", "delta"]
    for dials in settings.values():
        assert compare(reference, candidate, text, dials, exact=True)["max_surprise_difference"] < 1e-4


@pytest.mark.parametrize("case", FAULTS | MEMORY_FAULTS)
def test_a_wrong_host_of_checkpoints_fails(case: str, model: RMSE, reference: Reference, monkeypatch: Patch) -> None:
    (FAULTS | MEMORY_FAULTS)[case](monkeypatch)
    with pytest.raises(ParityError, match=r"^position "):
        compare(reference, TorchRuntime(model, "candidate"), remembered_text(256), Dials(4), exact=True)


@pytest.mark.parametrize("case", ["one slot too far", "angles of the token before", "a session without keys"])
@pytest.mark.nightly
@pytest.mark.parametrize("engine", ["executorch", "coreml"])
def test_a_wrong_host_of_other_engines_fails(
    engine: str, case: str, tiny: RMSE, request: pytest.FixtureRequest, monkeypatch: Patch
) -> None:
    """Their packages have passed; a fault that is planted now is seen, and is no more when it is taken out again."""
    runtime = runtime_for(Package.open(request.getfixturevalue(f"{engine}_package")))
    assert isinstance(runtime, LoopRuntime)
    with monkeypatch.context() as patch:
        FAULTS[case](patch)
        with pytest.raises(ParityError, match=r"^position "):
            compare(reference_of(tiny), runtime, decided_text(256), Dials(4), exact=True)
    if case == "one slot too far":
        compare(reference_of(tiny), runtime, decided_text(256), Dials(4), exact=True)


@pytest.mark.parametrize("case", FAULTS | MEMORY_FAULTS)
def test_the_rounded_rule_does_not_hide_a_wrong_host(case: str, calm: Quantized, monkeypatch: Patch) -> None:
    """A model on which most of the faults pass by shares of tokens and depths: its host is compared without the rounding."""
    model = with_cache_dtype(calm.model, "float32")
    tokens = random_tokens(256, 7, FEW)
    assert compare_host(model, tokens)["max_logit_difference"] < 1e-4
    (FAULTS | MEMORY_FAULTS)[case](monkeypatch)
    with pytest.raises(ParityError, match=r"^parity of the host failed: position \d+"):
        compare_host(model, tokens)


def test_a_wrong_host_fails_an_export_by_the_rounded_rule(
    checkpoint: Path, package: Path, quick_export: Memo, monkeypatch: Patch, tmp_path: Path
) -> None:
    """fp16: no package of it is held to the exact rule."""
    one_slot_too_far(monkeypatch)
    with pytest.raises(ParityError, match=r"^parity of the host failed: position \d+"):
        export_package(load_checkpoint(checkpoint), tmp_path / "out.rmse", ExportRequest(quant="fp16"), checkpoint)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.nightly
@pytest.mark.parametrize("engine", ["executorch", "coreml"])
def test_other_engines_with_a_memory_are_held_against_the_whole_text(
    engine: str, calm: Quantized, request: pytest.FixtureRequest, monkeypatch: Patch
) -> None:
    """int4, by the rounded rule. On Core ML the engine keeps the rings, out of the host's reach; the memory is the host's."""
    runtime = runtime_for(Package.open(request.getfixturevalue(f"{engine}_int4")))
    assert isinstance(runtime, LoopRuntime)
    reference, tokens = reference_of(calm.model), random_tokens(512, 7, FEW)
    compare(reference, runtime, tokens, Dials(4), exact=False)
    for case in ("nothing written", "stale hits", "a session without its memory"):
        with monkeypatch.context() as patch:
            MEMORY_FAULTS[case](patch)
            with pytest.raises(ParityError):
                compare(reference, runtime, tokens, Dials(4), exact=False)


# ------------------------------------------------------------------------------------------------------- the reference


def test_a_text_is_computed_once(model: RMSE, monkeypatch: Patch) -> None:
    """Per setting, whoever asks, and for the beginnings of it as well; hits are at the same place in all of them."""
    asked: list[int] = []
    true = model.whole_text
    monkeypatch.setattr(model, "whole_text", lambda tokens, *given: asked.append(len(tokens)) or true(tokens, *given))
    text, full = random_tokens(400, 3), Dials(4)
    info = reference_of(model).info
    whole = Reference(model, info, text)
    first, other = whole.course(text[:256], full), reference_of(model).course(text[:256], full)
    assert asked == [400, 256]
    assert whole.course(text, full).logits.shape[0] == 400 and whole.course(text[:300], full).margin.shape == (300,)
    assert asked == [400, 256]
    assert np.array_equal(first.depth, other.depth) and np.abs(first.logits - other.logits).max() < 1e-4
    assert np.abs(first.surprise - other.surprise).max() < 1e-5 and np.count_nonzero(first.surprise) == 4
    whole.course(text, Dials(4, 1, 0.6))
    whole.course(text[100:], full)  # another text: it begins at position 0
    assert asked == [400, 256, 400, 300]


def with_window(info: ModelInfo, window: int) -> ModelInfo:
    """The same with rings of another size."""
    rings = {n: dataclasses.replace(s, shape=(*s.shape[:-2], window, s.shape[-1])) for n, s in info.rings.items()}
    return dataclasses.replace(info, state=info.state | rings)


def test_all_that_the_gate_asks_is_computed_ahead(model: RMSE) -> None:
    text, info = random_tokens(400, 3), reference_of(model).info
    ahead, waiting = Reference(model, info, text), Reference(model, info, text)
    with aside(lambda: computed_ahead(ahead, text), idle=True) as result:
        known = result()
    assert known is None or not ahead.known()[0]  # elsewhere: in this process nothing was computed
    waiting.learn(known or computed_ahead(ahead, text))
    assert len(waiting.known()[0]) == 3 and len(waiting.known()[1]) == (1 if info.memory else 0)
    waiting.model = None  # type: ignore[assignment]  # not asked again
    for dials in adaptive_settings(waiting, text[: least_positions(info)]).values():
        own = reference_of(model).course(text, dials)
        for count in (len(text), 300):
            assert np.array_equal(waiting.course(text[:count], dials).logits, own.logits[:count])


@pytest.mark.parametrize("window", [64, 100, 128, 256, 1000])
def test_the_conversation_uses_all_of_a_host(window: int, model: RMSE) -> None:
    """In the shortest text: the ring wraps before single tokens are fed, they and the prompts around them pass a segment's
    end from within one, and both kinds of call read what the other left."""
    info = with_window(reference_of(model).info, window)
    count = least_positions(info)
    first, last = conversation(count, info)
    assert first > window and last - first == SINGLES and count - last > SINGLE_CALLS
    starts_and_ends = [(first - SEGMENT, first), (first, last)]
    assert all(start % SEGMENT and start // SEGMENT < end // SEGMENT for start, end in starts_and_ends)
    assert conversation(10 * count, info) == (first, last)


def test_rmse_is_a_text_model(model: RMSE) -> None:
    assert isinstance(model, TextModel)


def test_a_short_sample_is_read_over_again(model: RMSE) -> None:
    info = with_window(reference_of(model).info, 512)
    text = random_tokens(300)
    tokens = compared(text, info, exact=True)
    assert len(tokens) == 512 + 2 * SEGMENT and np.array_equal(tokens[300:600], text)


def test_of_a_large_model_fewer_positions_are_compared(model: RMSE) -> None:
    info, text = reference_of(model).info, random_tokens(2000)
    assert len(compared(text, info, exact=False)) == 2000
    large = dataclasses.replace(info, loop_weights=80_000_000, once_weights=400_000_000 - 80_000_000 * info.max_loops)
    assert len(compared(text, large, exact=False)) == 1000  # 4e11 multiplications
    larger = dataclasses.replace(large, loop_weights=10**9)
    assert len(compared(text, larger, exact=False)) == len(compared(text, larger, exact=True)) == 3 * SEGMENT


def test_the_fewest_positions_use_all_of_a_host(model: RMSE) -> None:
    """Of a model so large that no more are affordable: a padded prompt, a whole call, single tokens over the end of another,
    and a prompt behind them."""
    info = dataclasses.replace(with_window(reference_of(model).info, SEGMENT), loop_weights=10**9)
    count = least_positions(info)
    first, last = conversation(count, info)
    assert count < LEAST_POSITIONS
    assert SEGMENT < first < 2 * SEGMENT < last < count and first % SEGMENT
