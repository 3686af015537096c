"""What is fuzzed. A `Subject` makes case number i, a folder or file with fitting hashes, and puts it to use.

Putting it to use either raises a `UserError`, one line for whoever gave the file, or gives finite results of the right shapes.
All else is a defect.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from rmse_edge.errors import UserError
from rmse_edge.files import digest_file
from rmse_edge.package import MANIFEST, SUMS, write_sums

from .mutate import changed, damaged

TOKENS = np.arange(64) % 4  # a whole segment, of any vocabulary


@dataclass(frozen=True)
class Subject:
    """
    Args:
        prepare: once, before anything forks: imports, and what all cases start from.
        make: case number i in a scratch folder; what it gives goes into `use`.
        use: runs in a process of its own.
    """

    prepare: Callable[[], object]
    make: Callable[[random.Random, Path], Any]
    use: Callable[[Any], None]


class Defect(Exception):
    """A result that is neither a refusal nor right."""


def check_fed(fed: Any, count: int, vocab: int) -> None:
    """Shapes, and finite logits; where they are not, the sampler must refuse them."""
    from rmse_edge.runtimes.text.sampling import Sampler, Sampling

    if fed.logits.shape != (count, vocab) or fed.depth.shape != (count,):
        raise Defect(f"logits {fed.logits.shape}, depth {fed.depth.shape}, expected ({count}, {vocab}) and ({count},)")
    if not np.isfinite(fed.logits).all():
        for row in fed.logits:
            Sampler(Sampling(0.8, 0, 1.0, 0)).pick(row)
        if np.isnan(fed.logits).any() or np.isposinf(fed.logits).any():
            raise Defect("logits that are not finite were sampled from")


def feed(runtime: Any) -> None:
    """One call of a whole segment and one of a single row, at the model's own dials."""
    for tokens in (TOKENS, TOKENS[:1]):
        check_fed(runtime.feed(tokens, runtime.info.dials), len(tokens), runtime.info.vocab_size)


def linked(source: Path, folder: Path) -> None:
    """`source` again without copying what does not change."""
    shutil.copytree(source, folder, copy_function=os.link)


def rewrite(path: Path, text: str | bytes) -> None:
    path.unlink()  # it is linked
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))


# -------------------------------------------------------------------------------------------------------- packages


def change_manifest(source: Path, rng: random.Random, folder: Path) -> Path:
    package = folder / "p.rmse"
    linked(source, package)
    manifest = json.loads((source / MANIFEST).read_text())
    part = rng.choice(["model", "model", "state", "text", "methods", "lowering", "sizes", None])
    if part is None:
        manifest = changed(rng, manifest)
    elif part in ("state", "text"):
        manifest["model"][part] = changed(rng, manifest["model"][part])
    else:
        manifest[part] = changed(rng, manifest[part])
    rewrite(package / MANIFEST, json.dumps(manifest))
    (package / SUMS).unlink()  # it is linked
    write_sums(package)
    if rng.random() < 0.05:
        rewrite(package / SUMS, damaged(rng, (package / SUMS).read_bytes()))
    return package


def package(source: Path, engine: str) -> Subject:
    def prepare() -> None:
        from rmse_edge.runtimes import start_engine

        if engine == "executorch":  # its threads, which begin with the first program, do not live through a fork
            import rmse_edge.runtimes.engines.executorch  # noqa: F401
            from rmse_edge.runtimes.engines.kernels import load_kernels

            load_kernels()
        else:
            start_engine(engine)

    def use(folder: Path) -> None:
        from rmse_edge.runtimes import open_runtime

        feed(open_runtime(folder))

    return Subject(prepare, lambda rng, folder: change_manifest(source, rng, folder), use)


def runner(source: Path, binary: Path) -> Subject:
    """The same manifests for the native runner."""

    def use(folder: Path) -> None:
        logits = folder.parent / "logits"
        tokens = ",".join(map(str, [*TOKENS, 1]))
        command = [str(binary), str(folder), "-t", "1", "--prompt-tokens", tokens, "--logits", str(logits)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode == 2 and done.stderr.startswith("rmse-runner: error: ") and done.stderr.count("\n") == 1:
            raise UserError(done.stderr.removeprefix("rmse-runner: error: ").strip())
        if done.returncode != 0:
            raise Defect(f"exit code {done.returncode}: {done.stderr[-300:]!r}")
        found = np.fromfile(logits, np.float32)
        if len(found) % 65 or not np.isfinite(found).all():
            raise Defect(f"{len(found)} logits, {np.isfinite(found).sum()} of them finite")

    return Subject(lambda: None, lambda rng, folder: change_manifest(source, rng, folder), use)


# -------------------------------------------------------------------------------------------------------- sessions


def session(source: Path) -> Subject:
    """Sessions of a package, with a digest that fits."""
    whole: dict[str, Any] = {}

    def prepare() -> None:
        from safetensors import safe_open

        from rmse_edge.runtimes import start_engine

        start_engine("onnx")
        path = source.with_suffix(".session")
        if not path.exists():
            pid = os.fork()
            if pid == 0:
                from rmse_edge.runtimes import open_runtime
                from rmse_edge.runtimes.host.session import save_session

                runtime: Any = open_runtime(source)
                runtime.feed(np.arange(70) % 4, runtime.info.dials)
                save_session(runtime, path, [1, 2])
                os._exit(0)
            os.waitpid(pid, 0)
        whole["tensors"] = load_file(path)
        with safe_open(path, framework="numpy") as file:
            whole["header"] = file.metadata()

    def make(rng: random.Random, folder: Path) -> Path:
        from rmse_edge.runtimes.host.session import digest

        path = folder / "text.session"
        header: dict[str, Any] = dict(whole["header"])
        tensors = dict(whole["tensors"])
        if rng.random() < 0.4:
            del header["sha256"]
            header = {str(k): v if isinstance(v, str) else json.dumps(v) for k, v in changed(rng, header).items()}
        else:
            for _ in range(rng.choice([1, 1, 3])):
                change_tensor(rng, tensors)
        header = {k.encode(errors="replace").decode(): v.encode(errors="replace").decode() for k, v in header.items()}
        header["sha256"] = digest(tensors, header)
        save_file(tensors, path, metadata=header)
        if rng.random() < 0.1:  # the container itself: no hash can fit, and the length of its header may be anything
            path.write_bytes(damaged(rng, path.read_bytes()))
        return path

    def use(path: Path) -> None:
        from rmse_edge.runtimes import open_runtime
        from rmse_edge.runtimes.host.session import restore_session

        runtime: Any = open_runtime(source)
        pending = restore_session(runtime, path).pending
        if pending:
            check_fed(runtime.feed(pending, runtime.info.dials), len(pending), runtime.info.vocab_size)
        feed(runtime)

    return Subject(prepare, make, use)


def change_tensor(rng: random.Random, tensors: dict[str, np.ndarray]) -> None:
    """Other bytes, another shape, type or name, one more or one less."""
    name = rng.choice(list(tensors))
    array = tensors[name]
    how = rng.randrange(8)
    if how <= 2:
        raw = bytearray(array.tobytes())
        for _ in range(rng.choice([1, 8, 64])):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        tensors[name] = np.frombuffer(bytes(raw), array.dtype).reshape(array.shape)
    elif how == 3:
        value = rng.choice([np.nan, np.inf, -1.0, 3e38, 0.0, 1e-40, -0.0, 255])
        copy = array.copy()
        with np.errstate(all="ignore"):
            copy.reshape(-1)[:: rng.choice([1, 7])] = np.array(value).astype(array.dtype)
        tensors[name] = copy
    elif how == 4:
        tensors[name] = array.astype(rng.choice(["float16", "float64", "int64", "uint8", "bool", "int8"]))
    elif how == 5:
        shape = rng.choice([(0,), (), (1,), (*array.shape, 1), array.shape[1:], (1, 2**20)])
        tensors[name] = np.zeros(shape, array.dtype)
    elif how == 6:
        tensors[rng.choice([name + "x", "", "retrieved", "a\nb"])] = tensors.pop(name)
    elif len(tensors) > 1:
        other = rng.choice(list(tensors))
        tensors[name], tensors[other] = tensors[other], tensors[name]


# -------------------------------------------------------------------------------------------------- knowledge bases


def knowledge(scratch: Path) -> Subject:
    """Manifests, passages and index files with hashes and checksums that fit."""
    source = scratch / "a.kb"
    shape = (16, 2, 8)

    def entries(count: int, name: str = "a.txt") -> list[Any]:
        from rmse_edge.knowledge.base import Passage

        generator = np.random.default_rng(len(name))
        keys = generator.normal(size=(count, shape[0])).astype(np.float32)
        keys /= np.linalg.norm(keys, axis=1, keepdims=True)
        return [(Passage(f"text {i}", name, i), k, np.ones(shape[1:], np.float32)) for i, k in enumerate(keys)]

    def prepare() -> None:
        from rmse_edge.knowledge import KnowledgeInfo
        from rmse_edge.knowledge.store import KnowledgeBase

        if not source.exists():
            with KnowledgeBase.create(source, KnowledgeInfo(*shape, "model-1")) as kb:
                kb.add(entries(80))

    def make(rng: random.Random, folder: Path) -> Path:
        from rmse_edge.knowledge.rows import crc, digest_manifest, point_of

        copy = folder / "a.kb"
        shutil.copytree(source, copy)
        with contextlib.closing(sqlite3.connect(copy / "passages.sqlite")) as db, db:
            manifest = json.loads(db.execute("SELECT json FROM manifest").fetchone()[0])
            del manifest["sha256"]
            how = rng.randrange(4)
            if how == 0:
                index = next(copy.glob("index-*.usearch"))
                index.write_bytes(damaged(rng, index.read_bytes()))
                manifest["index"] = {"bytes": index.stat().st_size, "sha256": digest_file(index)}
            elif how == 1:
                for row in rng.sample(db.execute("SELECT * FROM passages").fetchall(), rng.choice([1, 40])):
                    new = list(row)
                    place = rng.randrange(1, 6)
                    if place >= 4:
                        raw = bytearray(new[place])
                        where = rng.randrange(len(raw))
                        raw[where : where + 4] = rng.choice(
                            [b"\xff\xff\xff\xff", b"\0\0\x80\x7f", b"\0\x7c\0\x7c", b"\xff\x7b\xff\x7b"]
                        )
                        new[place] = bytes(raw)
                    elif place == 2:
                        new[2] = rng.choice([-1, 0, 2**62])
                    else:
                        new[place] = rng.choice(["", "a\nb", "x" * 10_000, "\x1b[31m"])
                    if place == 4 and rng.random() < 0.5:
                        whole = new[4][: len(new[4]) // 4 * 4]  # four bytes in the place of the last one are three more
                        new[6] = point_of(np.frombuffer(whole, "<f4"))
                    new[7] = crc(*new[:6])
                    db.execute(
                        "UPDATE passages SET source=?, line=?, text=?, key=?, value=?, point=?, crc=? WHERE id=?",
                        (*new[1:], new[0]),
                    )
            else:
                manifest = changed(rng, manifest)
            if isinstance(manifest, dict):
                with contextlib.suppress(TypeError, ValueError, RecursionError):
                    manifest["sha256"] = digest_manifest(manifest)
            text = json.dumps(manifest)
            if rng.random() < 0.05:
                db.execute(
                    rng.choice(["DELETE FROM manifest", "INSERT INTO manifest VALUES ('{}')", "DROP TABLE passages"])
                )
            db.execute(
                "UPDATE manifest SET json = ?", (rng.choice([text.encode(), 5, ""]) if rng.random() < 0.05 else text,)
            )
        return copy

    def use(folder: Path) -> None:
        from rmse_edge.knowledge.store import KnowledgeBase

        with KnowledgeBase.open(folder) as kb:
            for _, key, _ in entries(3):
                hits = kb.search(key, 4)
                for hit in hits:
                    if hit.value.shape != (kb.info.slots, kb.info.d_model) or not np.isfinite(hit.value).all():
                        raise Defect(f"a hit of {hit.value.shape} with numbers that are not finite")
                    if not np.isfinite(hit.score):
                        raise Defect(f"a score of {hit.score}")
            kb.sources()
            kb.add(entries(5, "new.txt"))
            kb.delete("new.txt")

    return Subject(prepare, make, use)


# ------------------------------------------------------------------------------------------------------ checkpoints


def config(source: Path) -> Subject:
    """config.json beside weights that stay."""

    def prepare() -> None:
        import rmse_edge.runtimes.engines.torch  # noqa: F401

    def make(rng: random.Random, folder: Path) -> Path:
        copy = folder / "model"
        linked(source, copy)
        values = json.loads((source / "config.json").read_text())
        text = json.dumps(changed(rng, values))
        rewrite(copy / "config.json", damaged(rng, text.encode()) if rng.random() < 0.1 else text)
        return copy

    return Subject(prepare, make, use_checkpoint)


def quantized(source: Path) -> Subject:
    """quantization.json and the integers, with a hash that fits."""

    def prepare() -> None:
        import rmse_edge.runtimes.engines.torch  # noqa: F401

    def make(rng: random.Random, folder: Path) -> Path:
        copy = folder / "model"
        linked(source, copy)
        document = json.loads((source / "quantization.json").read_text())
        if rng.random() < 0.5:
            change_stored_tensor(rng, source / "model.safetensors", copy / "model.safetensors")
            document["sha256"] = digest_file(copy / "model.safetensors")
        elif rng.random() < 0.5:
            document["tensors"] = changed(rng, document["tensors"])
        else:
            report = document.pop("report")
            document = changed(rng, document)
            if isinstance(document, dict) and rng.random() < 0.9:
                document["report"] = report
        rewrite(copy / "quantization.json", json.dumps(document))
        return copy

    return Subject(prepare, make, use_checkpoint)


def change_stored_tensor(rng: random.Random, source: Path, path: Path) -> None:
    """The safetensors file `source` with one tensor changed, bfloat16 taken as its bytes, as which it mostly goes back."""
    import torch
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    tensors = load(source)
    name = rng.choice(list(tensors))
    halves = tensors[name].dtype == torch.bfloat16
    stored = tensors.pop(name)
    arrays = {name: stored.view(torch.int16).numpy() if halves else stored.numpy()}
    change_tensor(rng, arrays)
    for new, array in arrays.items():
        changed_tensor = torch.from_numpy(np.array(array, order="C"))
        back = halves and changed_tensor.dtype == torch.int16
        tensors[new] = changed_tensor.view(torch.bfloat16) if back else changed_tensor
    path.unlink()  # it is linked
    save(tensors, path)


def use_checkpoint(folder: Path) -> None:
    from rmse_edge.runtimes.engines.torch import TorchRuntime

    feed(TorchRuntime.open(folder))


@contextlib.contextmanager
def scratch_folder(base: Path, name: str) -> Iterator[Path]:
    folder = base / name
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
