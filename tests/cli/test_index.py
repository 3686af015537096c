"""rmse-index from texts to answers, with an embedder that needs no network, and how it fails: one line, nothing spoilt."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from hashed_embedder import FACTS, HashedEmbedder, files_of

from rmse_edge.cli import index
from rmse_edge.cli.common import run_verb
from rmse_edge.errors import TextError, UserError
from rmse_edge.knowledge import KnowledgeError
from rmse_edge.knowledge.building import ModelEmbedder, cut_files, index_files, open_store, query

pytest.importorskip("usearch", reason="needs usearch: pip install 'rmse-edge[knowledge]'")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a stand-in model folder and two texts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "facts.txt").write_text(FACTS)
    (tmp_path / "more.txt").write_text("Lisbon is the capital of Portugal.\nCats purr.\nCats purr.\n")
    return tmp_path


@pytest.fixture
def embedder(monkeypatch: pytest.MonkeyPatch) -> HashedEmbedder:
    """In the place of every model's own."""
    hashed = HashedEmbedder()
    monkeypatch.setattr(index, "model_embedder", lambda args: hashed)
    return hashed


def says(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert index.main(argv) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def fails(capsys: pytest.CaptureFixture[str], argv: Sequence[str], message: str) -> None:
    capsys.readouterr()
    assert index.main(argv) == 2
    captured = capsys.readouterr()
    err = captured.err.strip()
    assert err.startswith("rmse-index: error: ") and message in err and "\n" not in err, err
    assert captured.out == ""


def test_from_texts_to_answers(place: Path, embedder: HashedEmbedder, capsys) -> None:
    out = says(capsys, "model", "facts.txt", "-o", "a.kb")
    size = sum(len(data) for data in files_of(place / "a.kb").values())
    assert out == f"a.kb: 7 passages added, 0 skipped (there already), 7 in all, {size:,} bytes\n"
    out = says(capsys, "model", "facts.txt", "-o", "a.kb", "more.txt")
    assert out.startswith("a.kb: 2 passages added, 8 skipped (there already), 9 in all, ")
    assert embedder.embedded == 9, "what is there is not embedded again"
    assert says(capsys, "-o", "a.kb", "--list") == "       7  facts.txt\n       2  more.txt\n"
    out = says(capsys, "model", "-o", "a.kb", "--query", "the capital of Portugal", "-n", "2").splitlines()
    assert len(out) == 2 and out[0].endswith("  more.txt:1  Lisbon is the capital of Portugal.")
    assert 0.5 < float(out[0].split()[0]) <= 1


def test_replacing_and_taking_out(place: Path, embedder: HashedEmbedder, capsys) -> None:
    says(capsys, "model", "facts.txt", "more.txt", "-o", "a.kb")
    (place / "more.txt").write_text("\nLisbon is the capital of Portugal.\nDogs bark.\n")
    out = says(capsys, "model", "more.txt", "-o", "a.kb", "--replace")
    assert out.startswith("a.kb: 2 passages added, 0 skipped (there already), 2 removed, 9 in all, ")
    out = says(capsys, "model", "-o", "a.kb", "--query", "Lisbon, Portugal", "-n", "1")
    assert "more.txt:2" in out, "the line it is on now"
    assert "Cats" not in says(capsys, "model", "-o", "a.kb", "--query", "Cats purr.", "-n", "9")
    assert says(capsys, "-o", "a.kb", "--delete", "facts.txt") == "a.kb: 7 passages removed, 2 in all\n"
    fails(capsys, ["-o", "a.kb", "--delete", "mor.txt"], "no passages of mor.txt; did you mean more.txt?")
    fails(capsys, ["-o", "a.kb", "--delete", "zzz"], "a.kb has no passages of zzz; --list names them")


def test_rebuilding(place: Path, embedder: HashedEmbedder, capsys) -> None:
    says(capsys, "model", "facts.txt", "-o", "a.kb")
    [path] = (place / "a.kb").glob("index-*")
    path.write_bytes(b"noise")
    for argv in (["-o", "a.kb", "--list"], ["model", "more.txt", "-o", "a.kb"]):
        fails(capsys, argv, f"a.kb/{path.name}: 5 bytes, expected")
        fails(capsys, argv, "rebuild it with rmse-index --rebuild -o a.kb")
    assert says(capsys, "--rebuild", "-o", "a.kb").startswith("a.kb: index rebuilt, 7 passages, ")
    assert "Everest" in says(capsys, "model", "-o", "a.kb", "--query", "highest mountain", "-n", "1")
    fails(capsys, ["--rebuild", "-o", "s3://a/b"], "--rebuild: s3://a/b is on a server")
    fails(capsys, ["--rebuild", "-o", "none.kb"], "none.kb: no such knowledge base; make one with rmse-index")


@pytest.mark.slow
def test_on_a_server(place: Path, embedder: HashedEmbedder, capsys) -> None:
    pytest.importorskip("lancedb", reason="needs LanceDB: pip install 'rmse-edge[lancedb]'")
    out = says(capsys, "model", "facts.txt", "-o", "lance:table")
    assert out == "lance:table: 7 passages added, 0 skipped (there already), 7 in all\n"
    out = says(capsys, "model", "facts.txt", "more.txt", "-o", "lance:table", "--replace")
    assert out == "lance:table: 9 passages added, 1 skipped (there already), 7 removed, 9 in all\n"
    assert says(capsys, "-o", "lance:table", "--list") == "       7  facts.txt\n       2  more.txt\n"
    assert "Lisbon" in says(capsys, "model", "-o", "lance:table", "--query", "Portugal", "-n", "1")
    assert says(capsys, "-o", "lance:table", "--delete", "more.txt").endswith("2 passages removed, 7 in all\n")
    fails(capsys, ["-o", "lance:none", "--list"], "lance:none: no knowledge base there; make one with rmse-index")


def test_another_models_base_is_left_alone(place: Path, embedder: HashedEmbedder, capsys, monkeypatch) -> None:
    says(capsys, "model", "facts.txt", "-o", "a.kb")
    before = files_of(place / "a.kb")
    for other in (HashedEmbedder(model="hashed-letters-2"), HashedEmbedder(slots=4)):
        monkeypatch.setattr(index, "model_embedder", lambda args, other=other: other)
        for argv in (["model", "more.txt", "-o", "a.kb"], ["model", "-o", "a.kb", "--query", "x"]):
            fails(capsys, argv, "a.kb: was built by another model (")
            fails(capsys, argv, "build it again with rmse-index MODEL TEXT...")
    assert files_of(place / "a.kb") == before


def test_a_text_that_cannot_be_indexed_writes_nothing(place: Path, embedder: HashedEmbedder, capsys) -> None:
    (place / "bad.txt").write_text("Fine.\nNot fine: é\n", encoding="utf-8")
    fails(capsys, ["model", "facts.txt", "bad.txt", "-o", "a.kb"], "bad.txt:2: the tokenizer has no token for 'é'")
    (place / "white.txt").write_text(" \n\n")
    fails(capsys, ["model", "white.txt", "-o", "a.kb"], "white.txt: no passage, only white space")
    (place / "latin.txt").write_bytes(b"caf\xe9")
    fails(capsys, ["model", "latin.txt", "-o", "a.kb"], "latin.txt: not UTF-8 at byte 3")
    assert not (place / "a.kb").exists() and embedder.embedded == 0
    with pytest.raises(TextError, match="not a printable file name"):
        cut_files([Path("a\udcff.txt")], embedder)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-o", "a.kb"], "missing MODEL and TEXT"),
        (["model", "-o", "a.kb"], "missing TEXT"),
        (["model", "facts.txt"], "missing -o/--output"),
        (["none", "facts.txt", "-o", "a.kb"], "model: none: no such file or folder"),
        (["model", "none.txt", "-o", "a.kb"], "TEXT: none.txt: no such file or folder"),
        (["model", "model", "-o", "a.kb"], "TEXT: model: is a folder, expected a file"),
        (["-o", "a.kb", "--query", "x"], "--query needs MODEL"),
        (["model", "facts.txt", "-o", "a.kb", "--query", "x"], "facts.txt: texts are added by a command of their own"),
        (["-o", "a.kb", "--list", "--replace"], "--replace: texts are added by a command of their own"),
        (["-o", "a.kb", "--list", "--rebuild"], "--rebuild: not allowed with argument --list"),
        (["-o", "a.kb", "--list", "--storage", "x"], "--storage: got 'x', expected KEY=VALUE"),
        (["-o", "a.kb", "--list"], "a.kb: no such knowledge base"),
        (["-o", "a.kb", "--lst"], "unknown argument --lst; did you mean --list?"),
        (
            ["model", "facts.txt", "-o", "facts.txt"],
            "facts.txt: is a file, expected a knowledge base folder; choose another",
        ),
        (
            ["model", "facts.txt", "-o", os.devnull],
            f"{os.devnull}: is a device, expected a knowledge base folder; choose",
        ),
        (["-o", os.devnull, "--list"], f"{os.devnull}: is a device, expected a knowledge base folder; choose another"),
        (["model", "facts.txt", "-o", "no/a.kb"], "there is no folder"),
        (["model", "-o", "a.kb", "--query", "x" * 65], "--query: the text has 65 tokens, expected 1 to 64"),
        (["model", "-o", "a.kb", "--query", " "], "--query: the text has 0 tokens, expected 1 to 64"),
    ],
)
def test_mistaken_commands(place: Path, embedder: HashedEmbedder, capsys, argv: list[str], message: str) -> None:
    if "tokens" in message:
        says(capsys, "model", "facts.txt", "-o", "a.kb")
    fails(capsys, argv, message)
    assert (place / "a.kb").exists() == ("tokens" in message)


def test_help(capsys) -> None:
    with pytest.raises(SystemExit):
        index.main(["--help"])
    out = capsys.readouterr().out
    assert all(flag in out for flag in ("--replace", "--delete", "--rebuild", "--query", "--storage", "--threads"))


def test_progress_counts_every_passage_once(place: Path) -> None:
    embedder, counts = HashedEmbedder(), []
    files = cut_files([Path("facts.txt"), Path("more.txt")], embedder)
    for replace in (False, False, True):
        store = open_store("a.kb", embedder.info)
        index_files(store, embedder, files, replace, counts.append)
        store.close()
    assert sum(counts) == 3 * 10
    [hit, *_] = query(open_store("a.kb"), embedder, " honey bees ", 3)
    assert hit.text.startswith("Honey bees")


def test_ctrl_c_keeps_what_was_committed(place: Path, embedder: HashedEmbedder, capsys, monkeypatch) -> None:
    embed = embedder.embed

    def interrupted(tokens: Sequence[int]):
        if embedder.embedded == 5:
            raise KeyboardInterrupt
        return embed(tokens)

    monkeypatch.setattr(embedder, "embed", interrupted)
    assert index.main(["model", "facts.txt", "-o", "a.kb"]) == 130
    assert capsys.readouterr().err.strip() == (
        "rmse-index: interrupted; a.kb has 5 passages more; the same command goes on"
    )
    embedder.embedded = 3
    assert index.main(["model", "facts.txt", "-o", "a.kb", "--replace"]) == 130
    assert "a.kb has 0 passages more" in capsys.readouterr().err, "replaced as a whole or not at all"
    monkeypatch.setattr(embedder, "embed", embed)
    assert says(capsys, "model", "facts.txt", "-o", "a.kb").startswith("a.kb: 2 passages added, 5 skipped")


def test_a_real_ctrl_c(place: Path) -> None:
    """SIGINT to a process at work: one line, and a knowledge base that is whole."""
    process = subprocess.Popen(
        [sys.executable, __file__, "facts.txt"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    assert process.stdout and process.stdout.readline() == "at work\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "; the same command goes on" in err and "Traceback" not in err, err
    store = open_store("a.kb", HashedEmbedder().info)
    assert store.sources() in ({}, {"facts.txt": store.info.passages})
    assert f"a.kb has {store.info.passages} passages more" in err and store.info.passages > 0


def test_a_model_without_a_retrieval_head() -> None:
    info = SimpleNamespace(retrieval=None)
    with pytest.raises(UserError, match=r"^tiny has no retrieval head \(retrieval_slots in its config.json\)$"):
        ModelEmbedder(SimpleNamespace(info=info), SimpleNamespace(encode=list), "tiny")


def test_a_model_with_one() -> None:
    hashed = HashedEmbedder()
    info = SimpleNamespace(retrieval={"key_dims": 48, "slots": 2}, width=16, fingerprint="f")
    tokenizer = SimpleNamespace(encode=hashed.encode)
    made = ModelEmbedder(
        SimpleNamespace(info=info, embed=hashed.embed, embed_query=hashed.embed_query), tokenizer, "tiny"
    )
    assert (made.info.key_dims, made.info.slots, made.info.d_model, made.info.model) == (48, 2, 16, "f")
    assert made.embed(made.encode("x"))[0].shape == (48,)


def test_the_models_own_embedder(remembering: Path, checkpoint: Path, place: Path, capsys) -> None:
    """The whole verb on a real, tiny model with a retrieval head; it is not trained, so only equal texts are near."""
    (place / "codes.txt").write_text("PARIS=FRANCE\nROME=ITALY\n\nWATER:H2O\n")
    model = str(remembering)
    assert says(capsys, model, "codes.txt", "-o", "a.kb", "-t", "1").startswith("a.kb: 3 passages added, 0 skipped")
    [line] = says(capsys, model, "-o", "a.kb", "--query", "ROME=ITALY", "-n", "1").splitlines()
    assert line == "1.0000  codes.txt:2  ROME=ITALY"
    assert says(capsys, model, "codes.txt", "-o", "a.kb").startswith("a.kb: 0 passages added, 3 skipped")
    (place / "codes.txt").write_text("OK\nnot in the alphabet\n")
    fails(capsys, [model, "codes.txt", "-o", "a.kb", "--replace"], "codes.txt:2: the tokenizer has no token for 'n'")
    fails(capsys, [str(checkpoint), "codes.txt", "-o", "a.kb"], "has no retrieval head (retrieval_slots in its config")
    assert says(capsys, "-o", "a.kb", "--list") == "       3  codes.txt\n"


def test_a_failed_opening_lets_go(place: Path, embedder: HashedEmbedder, capsys) -> None:
    says(capsys, "model", "facts.txt", "-o", "a.kb")
    with pytest.raises(KnowledgeError):
        open_store("a.kb", HashedEmbedder(model="other").info)
    shutil.rmtree("a.kb")
    says(capsys, "model", "facts.txt", "-o", "a.kb")


if __name__ == "__main__":

    class Slow(HashedEmbedder):
        def embed(self, tokens: Sequence[int]):
            time.sleep(0.02)
            if self.embedded == 5:
                print("at work", flush=True)
            return super().embed(tokens)

    Path(sys.argv[1]).write_text("\n".join(f"Fact number {i}." for i in range(3000)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    arguments = index.parse(["model", sys.argv[1], "-o", "a.kb"])
    sys.exit(run_verb("rmse-index", lambda _: index.run(arguments, Slow())))
