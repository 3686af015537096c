"""Sessions on disk: what was saved goes on as if nothing had happened, and a damaged file changes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_one_line, mixed_model, remembered_text, remembering_model
from safetensors import SafetensorError
from safetensors.numpy import save_file

from rmse_edge.export.gate.reference import made_up_hits
from rmse_edge.runtimes import Dials, LoopRuntime, open_runtime
from rmse_edge.runtimes.engines.torch import TorchRuntime
from rmse_edge.runtimes.host import session
from rmse_edge.runtimes.host.base import Arrays
from rmse_edge.runtimes.host.session import FORMAT, VERSION, SessionError, digest, restore_session, save_session

DIALS = Dials(4, 1, 0.6)  # positions stop at every depth
COUNT = 260  # four segments and a bit
INJECT_AT = 90


def torch_runtime() -> TorchRuntime:
    return TorchRuntime(remembering_model(), "mem")


class Told:
    """What a runtime said, over several calls."""

    def __init__(self) -> None:
        self.logits: list[np.ndarray] = []
        self.depth: list[np.ndarray] = []
        self.surprises: list[tuple[float, ...]] = []

    def feed(self, runtime: LoopRuntime, tokens: np.ndarray, hits_at: int | None = None) -> None:
        """Feed `tokens`; before position `hits_at`, if it is among them, hits are injected."""
        cut = len(tokens) if hits_at is None else hits_at - runtime.position
        for part in (tokens[:cut], tokens[cut:]):
            if len(part):
                fed = runtime.feed(part, DIALS)
                self.logits.append(fed.logits)
                self.depth.append(fed.depth)
                self.surprises += [(s.position, s.value, s.mean, s.std, s.segments) for s in fed.surprises]
            if part is not tokens and hits_at == runtime.position:
                runtime.inject(*made_up_hits(runtime.info))

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.concatenate(self.logits), np.concatenate(self.depth), np.array(self.surprises)


def snapshot(runtime: LoopRuntime) -> tuple[int, Arrays]:
    return runtime.position, {name: array.copy() for name, array in runtime.tensors().items()}


def assert_unchanged(runtime: LoopRuntime, before: tuple[int, Arrays]) -> None:
    position, tensors = snapshot(runtime)
    assert position == before[0] and tensors.keys() == before[1].keys()
    for name, array in tensors.items():
        assert np.array_equal(array, before[1][name]), name


# ------------------------------------------------------------------------------------------------------- it goes on


def one_pass(make: Callable[[], LoopRuntime], at: int, hits_at: int | None) -> tuple[np.ndarray, ...]:
    runtime, told, text = make(), Told(), remembered_text(COUNT)
    told.feed(runtime, text[:at], hits_at)
    told.feed(runtime, text[at:])
    return told.arrays()


def two_lives(
    first: Callable[[], LoopRuntime], second: Callable[[], LoopRuntime], path: Path, at: int, hits_at: int | None
) -> tuple[np.ndarray, ...]:
    """The text up to `at` on one runtime, the rest on a fresh one that knows only the file."""
    runtime, told, text = first(), Told(), remembered_text(COUNT)
    told.feed(runtime, text[:at], hits_at)
    save_session(runtime, path)
    before = snapshot(runtime)
    heir = second()
    heir.feed(text[:70], DIALS)  # whatever it was doing is forgotten
    restore_session(heir, path)
    assert_unchanged(heir, before)
    told.feed(heir, text[at:])
    return told.arrays()


BREAKS = [(128, None), (100, None), (100, INJECT_AT), (INJECT_AT, INJECT_AT), (1, None)]


@pytest.mark.slow
@pytest.mark.parametrize(("at", "hits_at"), BREAKS)
def test_a_text_goes_on_where_it_was_saved(tmp_path: Path, at: int, hits_at: int | None) -> None:
    expected = one_pass(torch_runtime, at, hits_at)
    got = two_lives(torch_runtime, torch_runtime, tmp_path / "text.session", at, hits_at)
    for a, b in zip(expected, got):
        assert np.array_equal(a, b)
    assert expected[2][:, 0].tolist() == [64, 128, 192, 256]
    assert [p.name for p in tmp_path.iterdir()] == ["text.session"]


def test_at_a_boundary_it_is_one_feed_of_everything(tmp_path: Path) -> None:
    """No call crosses a multiple of 64 anyway, so not even rounding differs."""
    fed = torch_runtime().feed(remembered_text(COUNT), DIALS)
    logits, depth, _ = two_lives(torch_runtime, torch_runtime, tmp_path / "text.session", 128, None)
    assert np.array_equal(fed.logits, logits) and np.array_equal(fed.depth, depth)


@pytest.mark.parametrize("lost", ["past_keys", "memory_down", "momentum_up", "key_tail", "surprise_stats", "segment",
                                  "retrieved_valid"])  # fmt: skip
def test_every_part_of_a_session_matters(tmp_path: Path, lost: str) -> None:
    """Were it left out of the file, the comparison above would show it."""
    expected = one_pass(torch_runtime, 100, INJECT_AT)
    runtime, told, text = torch_runtime(), Told(), remembered_text(COUNT)
    told.feed(runtime, text[:100], INJECT_AT)
    runtime.tensors()[lost].fill(0)
    told.feed(runtime, text[100:])
    assert any(not np.array_equal(a, b) for a, b in zip(expected, told.arrays()))


@pytest.mark.parametrize("at", [128, 100])
def test_a_model_without_memory_has_sessions_too(tmp_path: Path, at: int) -> None:
    def plain() -> LoopRuntime:
        return TorchRuntime(mixed_model(), "tiny")

    got = two_lives(plain, plain, tmp_path / "text.session", at, None)
    for a, b in zip(one_pass(plain, at, None), got):
        assert np.array_equal(a, b)


def test_a_session_replaces_the_one_before(tmp_path: Path) -> None:
    path, runtime = tmp_path / "text.session", torch_runtime()
    for count in (10, 70):
        runtime.feed(remembered_text(count), DIALS)
        save_session(runtime, path)
    heir = torch_runtime()
    restore_session(heir, path)
    assert heir.position == 80
    assert [p.name for p in tmp_path.iterdir()] == ["text.session"]


@pytest.fixture(scope="module")
def makers(remembering: Path, remembering_package: Path) -> dict[str, Callable[[], LoopRuntime]]:
    return {
        "torch": lambda: opened(remembering),
        "onnx": lambda: opened(remembering_package),
    }


class TestOnnx:
    """A package saves and restores as its checkpoint does, and each goes on with what the other saved."""

    @pytest.mark.parametrize(("at", "hits_at"), [(128, None), (100, INJECT_AT)])
    def test_a_text_goes_on(
        self, makers: dict[str, Callable[[], LoopRuntime]], tmp_path: Path, at: int, hits_at: int | None
    ) -> None:
        got = two_lives(makers["onnx"], makers["onnx"], tmp_path / "text.session", at, hits_at)
        for a, b in zip(one_pass(makers["onnx"], at, hits_at), got):
            assert np.array_equal(a, b)

    @pytest.mark.parametrize(("first", "second"), [("torch", "onnx"), ("onnx", "torch")])
    @pytest.mark.parametrize(("at", "hits_at"), [(128, None), (100, INJECT_AT)])
    def test_the_other_runtime_goes_on(
        self,
        makers: dict[str, Callable[[], LoopRuntime]],
        tmp_path: Path,
        first: str,
        second: str,
        at: int,
        hits_at: int | None,
    ) -> None:
        logits, depth, surprises = one_pass(makers["torch"], at, hits_at)
        got = two_lives(makers[first], makers[second], tmp_path / "text.session", at, hits_at)
        assert np.abs(got[0] - logits).max() < 1e-4
        assert np.array_equal(got[1], depth)
        assert np.abs(got[2] - surprises).max() < 1e-4


def opened(folder: Path) -> LoopRuntime:
    runtime = open_runtime(folder, threads=1)
    assert isinstance(runtime, LoopRuntime)
    return runtime


# ----------------------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A session file of `remembering_model()`, saved in the middle of a segment with hits in force."""
    path, runtime = tmp_path_factory.mktemp("saved") / "text.session", torch_runtime()
    Told().feed(runtime, remembered_text(100), INJECT_AT)
    save_session(runtime, path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def busy() -> tuple[LoopRuntime, tuple[int, Arrays]]:
    """A runtime in the middle of another text, and what it must still be after every failed restore."""
    runtime = torch_runtime()
    runtime.feed(remembered_text(80)[::-1].copy(), DIALS)
    return runtime, snapshot(runtime)


def refused(busy: tuple[LoopRuntime, tuple[int, Arrays]], path: Path) -> str:
    """The one line that `path` is refused with."""
    runtime, before = busy
    with pytest.raises(SessionError) as caught:
        restore_session(runtime, path)
    assert_unchanged(runtime, before)
    assert_one_line(str(caught.value), str(path))
    return str(caught.value)


def header_of(data: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])


def with_metadata(data: bytes, **changes: str) -> bytes:
    """The file with other entries in its header; its SHA-256 stays as it was."""
    (length,) = struct.unpack("<Q", data[:8])
    header = header_of(data)
    header["__metadata__"] |= changes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def test_the_undamaged_file_is_taken(saved: bytes, tmp_path: Path) -> None:
    for data in (saved, with_metadata(saved)):
        (tmp_path / "text.session").write_bytes(data)
        runtime = torch_runtime()
        restore_session(runtime, tmp_path / "text.session")
        assert runtime.position == 100


def test_no_file(busy: Any, tmp_path: Path) -> None:
    assert "no such session file" in refused(busy, tmp_path / "none.session")
    assert "is a folder, expected a file" in refused(busy, tmp_path)
    assert "session" in refused(busy, tmp_path / ("long" * 200))


@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"hello", bytes(range(256)) * 40, b"\xff" * 1000, b"{}" * 100], ids=lambda d: repr(d[:5])
)
def test_something_else_altogether(busy: Any, tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "text.session"
    path.write_bytes(data)
    refused(busy, path)


def test_tensors_that_are_no_session(busy: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for metadata in (None, {"format": "pt"}):
        save_file({"weight": np.zeros(3, np.float32)}, path, metadata=metadata)
        assert "not a session file" in refused(busy, path)


def test_truncated_anywhere(busy: Any, saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "text.session"
    (length,) = struct.unpack("<Q", saved[:8])
    lengths = {*range(0, 12), 8 + length - 1, 8 + length, 8 + length + 1, len(saved) - 1}
    for count in sorted(lengths | set(np.linspace(12, len(saved) - 1, 20, dtype=int).tolist())):
        path.write_bytes(saved[:count])
        refused(busy, path)
    path.write_bytes(saved + b"\x00")
    refused(busy, path)


def positions(saved: bytes) -> Iterator[int]:
    """All of the length, then bytes spread over header and payload."""
    (length,) = struct.unpack("<Q", saved[:8])
    yield from range(8)
    yield from np.linspace(8, 8 + length - 1, 60, dtype=int).tolist()
    yield from np.linspace(8 + length, len(saved) - 1, 24, dtype=int).tolist()


@pytest.mark.parametrize("flip", [0xFF, 0x01, 0x20], ids=hex)
def test_one_wrong_byte_anywhere(busy: Any, saved: bytes, tmp_path: Path, flip: int) -> None:
    path = tmp_path / "text.session"
    for place in positions(saved):
        damaged = bytearray(saved)
        damaged[place] ^= flip
        path.write_bytes(damaged)
        refused(busy, path)


def test_another_version(busy: Any, saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "text.session"
    path.write_bytes(with_metadata(saved, version="1"))
    assert_one_line(refused(busy, path), "version 1", f"reads {VERSION}", "start a new one")


@pytest.mark.parametrize(
    "changes", [{"position": "101"}, {"name": "other"}, {"model": "0" * 64}, {"sha256": "0" * 64}], ids=str
)  # fmt: skip
def test_an_edited_header(busy: Any, saved: bytes, tmp_path: Path, changes: dict[str, str]) -> None:
    path = tmp_path / "text.session"
    path.write_bytes(with_metadata(saved, **changes))
    assert "SHA-256" in refused(busy, path)


def test_another_model(busy: Any, tmp_path: Path) -> None:
    """Equal shapes, other weights; other shapes; no memory at all."""
    path = tmp_path / "text.session"
    for model in (remembering_model(seed=1), remembering_model(memory_hidden=96), mixed_model()):
        save_session(TorchRuntime(model, "stranger"), path)
        assert_one_line(refused(busy, path), "another model", "stranger", "not of mem")


def test_the_digest_is_of_bytes_that_any_language_writes() -> None:
    """Lengths are of UTF-8; how a language would print a text is no part of it."""
    text = 'it\'s "\u200b\U0001fadf"'
    written = b"chat %d\n%s\nname 1\nm\n" % (len(text.encode()), text.encode())
    written += b"flag bool \n\x01\n" + b"ring float32 1x2\n" + struct.pack("<2f", 1.5, -2) + b"\n"
    tensors = {"ring": np.array([[1.5, -2]], np.float32), "flag": np.array(True)}
    assert digest(tensors, {"name": "m", "sha256": "0" * 64, "chat": text}) == hashlib.sha256(written).hexdigest()


def forged(runtime: LoopRuntime, path: Path, change: Callable[[dict[str, str], Arrays], object]) -> None:
    """A session of `runtime` written by hand: its SHA-256 fits, whatever else `change` does."""
    header = {"format": FORMAT, "version": VERSION, "model": runtime.info.fingerprint, "name": runtime.info.name,
              "position": "80"}  # fmt: skip
    tensors = {name: array.copy() for name, array in runtime.tensors().items()}
    change(header, tensors)
    save_file(tensors, path, metadata=header | {"sha256": digest(tensors, header)})


@pytest.mark.parametrize(
    "change",
    [
        lambda header, tensors: header.pop("position"),
        lambda header, tensors: header.update(position="²"),
        lambda header, tensors: header.pop("model"),
        lambda header, tensors: tensors.pop("segment"),
        lambda header, tensors: tensors.update(segment=np.zeros((1, 64, 3), np.float32)),
        lambda header, tensors: tensors.update(more=np.zeros(3, np.float32)),
    ],
    ids=["no position", "position ²", "no model", "tensor missing", "tensor of another shape", "tensor too many"],
)
def test_a_whole_file_that_does_not_fit(busy: Any, tmp_path: Path, change: Callable[..., object]) -> None:
    """Hash and model are right, the rest is not: from another program, or an earlier form of the same version."""
    path = tmp_path / "text.session"
    forged(busy[0], path, change)
    refused(busy, path)


# ------------------------------------------------------------------------------------------------- it cannot be written


def no_space(*args: object, **kwargs: object) -> None:
    raise OSError(28, "No space left on device")


def serialization_fails(tensors: Arrays, filename: Path, **kwargs: object) -> None:
    """As safetensors reports a full disk: some bytes are there, and the error is its own."""
    filename.write_bytes(b"half a")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def interrupted(tensors: Arrays, filename: Path, **kwargs: object) -> None:
    filename.write_bytes(b"half a")
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("where", "name", "fault"),
    [(session, "save_file", serialization_fails), (session, "save_file", no_space), (os, "fsync", no_space),
     (os, "replace", no_space)],
    ids=["serializing", "opening", "fsync", "replace"],
)  # fmt: skip
def test_a_full_disk_leaves_the_old_session(
    tmp_path: Path, saved: bytes, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, fault: Callable[..., None]
) -> None:
    path = tmp_path / "text.session"
    path.write_bytes(saved)
    monkeypatch.setattr(where, name, fault)
    with pytest.raises(SessionError) as caught:
        save_session(torch_runtime(), path)
    assert_one_line(str(caught.value), str(path), "No space left")
    assert path.read_bytes() == saved and [p.name for p in tmp_path.iterdir()] == ["text.session"]


def test_ctrl_c_leaves_the_old_session(tmp_path: Path, saved: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.session"
    path.write_bytes(saved)
    monkeypatch.setattr(session, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_session(torch_runtime(), path)
    assert path.read_bytes() == saved and [p.name for p in tmp_path.iterdir()] == ["text.session"]


@pytest.mark.parametrize(
    "inside",
    [("none", "x"), ("file", "x"), ("folder",), ("long" * 200,)],
    ids=["no folder", "a file for a folder", "a folder", "too long"],
)
def test_a_place_that_cannot_be_written(tmp_path: Path, inside: tuple[str, ...]) -> None:
    """A folder that is not there, a file for a folder, a folder for the file, a name too long."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    path = tmp_path.joinpath(*inside)
    with pytest.raises(SessionError) as caught:
        save_session(torch_runtime(), path)
    assert_one_line(str(caught.value), str(path), "expected a file" if inside == ("folder",) else "cannot be written")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "mine" and not any((tmp_path / "folder").iterdir())


def test_a_link_stays_and_leads_to_the_session(tmp_path: Path, saved: bytes) -> None:
    (tmp_path / "text.session").symlink_to("elsewhere")
    for _ in range(2):
        save_session(torch_runtime(), tmp_path / "text.session")
        assert os.readlink(tmp_path / "text.session") == "elsewhere"
        assert restore_session(torch_runtime(), tmp_path / "elsewhere").pending == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
def test_a_fifo_is_refused_and_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(SessionError) as caught:
        save_session(torch_runtime(), tmp_path / "fifo")
    assert_one_line(str(caught.value), "fifo: is a FIFO, expected a file; choose another name")
    assert [(p.name, p.is_fifo()) for p in tmp_path.iterdir()] == [("fifo", True)]


@pytest.mark.parametrize("path", [".", "/", ""])
def test_a_path_without_a_name(path: str) -> None:
    with pytest.raises(SessionError) as caught:
        save_session(torch_runtime(), path)
    assert_one_line(str(caught.value), "is a folder")
