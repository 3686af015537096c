"""Conversations of the core, by turns that the export made of a chat template: they are those of `rmse-run --chat`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from helpers import reseal
from kotlin_core import Core, CoreRuntime

from rmse_edge.chat_turns import turns_of
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.errors import UserError

pytestmark = [pytest.mark.android, pytest.mark.onnx, pytest.mark.slow]

TEMPLATE = (
    "{% for m in messages %}{{ ('<Q>' if m.role == 'user' else '<A>') + m.content + '!' }}{% endfor %}"
    "{% if add_generation_prompt %}<A>{% endif %}"
)
QUESTIONS = ("WHO-GOES-THERE?", "AND-WHY?", "SO-BE-IT")  # of the characters that the model knows


@pytest.fixture(scope="module")
def talking(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of a small model, as if its checkpoint had had a chat template."""
    folder = shutil.copytree(package, tmp_path_factory.mktemp("talk") / "talk.rmse")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    reseal(folder, lambda manifest: manifest.update(chat=asdict(turns_of(folder))))  # type: ignore[arg-type]
    return folder


@pytest.fixture
def run(core: Core, talking: Path, tmp_path: Path) -> Iterator[CoreRuntime]:
    runtime = CoreRuntime(core, talking, tmp_path)
    yield runtime
    runtime.close()


def talk(run: CoreRuntime, question: str, seed: int) -> dict[str, Any]:
    return run.ask("talk", question=question, count=25, options={"seed": str(seed)})


def rmse_talk(
    package: Path, question: str, seed: int, capsys: pytest.CaptureFixture[str], *flags: str
) -> dict[str, Any]:
    every = ["--chat", "-p", question, "-n", "25", "--seed", str(seed), "-t", "1", "-o", "json", *flags]
    assert rmse_run([str(package), *every]) == 0
    return json.loads(capsys.readouterr().out)


def test_turns_are_those_of_rmse_run(
    run: CoreRuntime, talking: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three of them, and then each goes on from the other's session."""
    theirs, ours = str(tmp_path / "theirs"), str(tmp_path / "ours")
    for seed, question in enumerate(QUESTIONS):
        go_on = ["--session", theirs] if seed > 0 else []
        expected = rmse_talk(talking, question, seed, capsys, *go_on, "--save-session", theirs)
        found = talk(run, question, seed)
        assert (found["tokens"], found["finish_reason"]) == (expected["tokens"], expected["finish_reason"])
        assert found["prompt_tokens"] == expected["prompt_tokens"]  # only what the text has gained
    run.ask("save talk", path=ours)
    expected = rmse_talk(talking, "FAREWELL", 9, capsys, "--session", ours)
    assert run.ask("restore talk", path=theirs) == {"talk": True}
    assert talk(run, "FAREWELL", 9)["tokens"] == expected["tokens"]


def test_a_plain_session_is_no_conversation(run: CoreRuntime, tmp_path: Path) -> None:
    run.generate("HELLO", 5, temperature=0.0)
    run.ask("save text", path=str(tmp_path / "plain"))
    assert run.ask("restore talk", path=str(tmp_path / "plain")) == {"talk": False}


def test_a_template_that_is_not_read_is_told_of(core: Core, package: Path, talking: Path, tmp_path: Path) -> None:
    for source, unread in ((talking, "true"), (package, "false")):
        folder = shutil.copytree(source, tmp_path / unread)
        reseal(folder, lambda manifest: manifest.pop("chat", None))
        runtime = CoreRuntime(core, folder, tmp_path)
        with pytest.raises(UserError, match=f"unread: {unread}"):
            talk(runtime, "WHO?", 0)
        runtime.close()
