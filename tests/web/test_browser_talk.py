"""Conversations and sessions of the browser's host, run by Node: it says what rmse-run says, and each reads the other's files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import made_once
from helpers import assert_one_line
from later import later
from web.test_browser_host import drive
from web.test_browser_page import PROBLEM, pick, serving

from rmse_edge.chat import TEMPLATE_FILE, TOKENIZER_CONFIG_FILE, ChatTemplate
from rmse_edge.cli.export import main as rmse_export
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.text import Tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.onnx]
served = later("serve.served")
chromium = later("serve.browser")

COUNT = 12
QUESTIONS = ["to be", "or 'not' \"to\" bé \u2028\n日", "he"]
LLAMA = (
    "{% if messages[0]['role'] == 'system' %}{% set system, rest = messages[0]['content'], messages[1:] %}"
    "{% else %}{% set system, rest = '', messages %}{% endif %}{{ bos_token }}"
    "{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must take turns') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + (system + '\n' if loop.first and system else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
THINKING = """{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == "user" %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.index0 < ns.last and '</think>' in message.content %}
        {{- message.content.split('</think>')[-1].lstrip('\\n') }}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package that talks."""

    def export(folder: Path) -> None:
        model = served.write_talker(tmp_path_factory.mktemp("web") / "talker")
        assert rmse_export(["-m", str(model), "-o", str(folder)]) == 0

    return made_once("web-talker.rmse", tmp_path_factory, export)


def in_python(package: Path, capsys: pytest.CaptureFixture[str], *flags: object) -> dict[str, Any]:
    capsys.readouterr()
    assert rmse_run([str(package), "-n", str(COUNT), "-o", "json", *map(str, flags)]) == 0
    return json.loads(capsys.readouterr().out)


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("tokens", "depth", "text"):
        assert found[name] == expected[name]


def asked(seed: int, **what: Any) -> dict[str, Any]:
    return {"seed": seed, "temperature": 0.8, "max_tokens": COUNT, **what}


def test_turns_of_a_conversation_go_on_here_and_there(
    talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three turns by rmse-run, a session between them; the browser's host makes the same of every one of these files."""
    messages: list[dict[str, str]] = []
    before: list[object] = []
    for turn, question in enumerate(QUESTIONS):
        messages.append({"role": "user", "content": question})
        file = tmp_path / f"python-{turn}.session"
        expected = in_python(talker, capsys, "--chat", "-p", question, "--seed", turn, "--save-session", file, *before)
        job: dict[str, Any] = {"texts": [asked(turn, messages=messages)], "save": str(tmp_path / f"web-{turn}.session")}
        if turn:
            job["session"] = before[1]
        same(drive(talker, tmp_path, **job)["texts"][0], expected)
        if turn:  # and from the other one's file, there
            other = str(tmp_path / f"web-{turn - 1}.session")
            same(in_python(talker, capsys, "--chat", "-p", question, "--seed", turn, "--session", other), expected)
        messages.append({"role": "assistant", "content": expected["text"]})
        before = ["--session", str(file)]
    # Without sessions all of it is read anew, which says the same.
    turns = [asked(turn, messages=messages[: 2 * turn + 1]) for turn in range(len(QUESTIONS))]
    said = drive(talker, tmp_path, texts=turns)["texts"]
    assert [one["text"] for one in said] == [message["content"] for message in messages[1::2]]


def test_a_text_goes_on_in_the_middle_of_a_character(
    talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = (str(tmp_path / f"{name}.session") for name in ("web", "python"))
    first = in_python(talker, capsys, "-p", "to be", "--seed", 1, "--save-session", theirs)
    said = drive(talker, tmp_path, texts=[asked(1, prompt="to be")], save=ours)["texts"][0]
    assert (said["tokens"], said["depth"]) == (first["tokens"], first["depth"])
    second = in_python(talker, capsys, "-p", " or", "--seed", 2, "--session", theirs)
    same(in_python(talker, capsys, "-p", " or", "--seed", 2, "--session", ours), second)
    same(drive(talker, tmp_path, session=theirs, texts=[asked(2, prompt=" or", further=True)])["texts"][0], second)


def test_what_is_no_session_of_the_model_is_refused_in_a_line(
    talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.session"
    in_python(talker, capsys, "-p", "to be", "--save-session", file)
    data = file.read_bytes()
    cases = {
        "cut short": data[:100],
        "its SHA-256 does not fit": data[:-1] + bytes([data[-1] ^ 1]),
        "version 9": re.sub(rb'"version":"\d"', b'"version":"9"', data),
        "a session of another model": data.replace(b'"model":"', b'"model":"other ', 1),
        "got token 999999": data.replace(b'"pending":"', b'"pending":"999999 '),
        "not a session file": data.replace(b"rmse-edge session", b"rmse-edge sessiom"),
        "its header": b"\x10" + b"\0" * 7 + b"no JSON at all..",
    }
    for name, damaged in cases.items():
        if len(damaged) > len(data):  # the header is longer by what was put in
            size = int.from_bytes(data[:8], "little") + len(damaged) - len(data)
            damaged = size.to_bytes(8, "little") + damaged[8:]
        assert damaged != data
        (tmp_path / name).write_bytes(damaged)
    said = drive(talker, tmp_path, damaged=[str(tmp_path / name) for name in cases])["refused"]
    for line, expected in zip(said, cases, strict=True):
        assert_one_line(line, expected)


def test_templates_say_what_they_say_in_python(talker: Path, tmp_path: Path) -> None:
    """Of several shapes, with what they name of the tokenizer, and where an answer ends."""
    talk = [{"role": role, "content": f" {role} <think>hm</think>\nsays é "} for role in ("user", "assistant") * 2]
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "model_max_length": 7}
    folders: list[dict[str, str]] = [
        {TEMPLATE_FILE: served.CHATML},
        {TEMPLATE_FILE: THINKING, TOKENIZER_CONFIG_FILE: json.dumps(config)},
        {TOKENIZER_CONFIG_FILE: json.dumps(config | {"chat_template": LLAMA})},
        {TOKENIZER_CONFIG_FILE: json.dumps(config | {"chat_template": [{"name": "default", "template": LLAMA}]})},
    ]
    renders, expected = [], []
    tokenizer = Tokenizer(talker / "tokenizer.json")
    for number, files in enumerate(folders):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        template = ChatTemplate.open(folder)
        for messages, more in ((talk[:3], True), ([{"role": "system", "content": "Be brief."}, talk[0]], False)):
            renders.append({"files": files, "messages": messages, "open": more})
            expected.append([template.render(messages, more), template.end_of_turn(tokenizer)])
    assert drive(talker, tmp_path, renders=renders)["renders"] == expected
    refused = {"files": folders[2], "messages": talk[1:], "open": True}
    assert_one_line(drive(talker, tmp_path, renders=[refused])["error"], "refuses the conversation", "take turns")


def test_the_page_talks_and_keeps_its_sessions(
    talker: Path, page: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In Chromium: a turn, saved and opened by rmse-run; its next turn, opened by the page; and the same with a text."""
    page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    with serving(talker) as address:
        page.open(address)
        page.until(chromium.READY)
        assert page.value("document.getElementById('talk').hidden") is False
        turns = 0

        def write(text: str, seed: int) -> str:
            """What the page writes behind what it showed before."""
            nonlocal turns
            turns += 1
            for name, value in (("prompt", text), ("max_tokens", COUNT), ("seed", seed)):
                page.value(f"document.getElementById('{name}').value = {json.dumps(value)}")
            before = len(page.value(chromium.TOKENS))
            page.value("document.getElementById('write').click()")
            page.until(f"document.body.dataset.written === '{turns}'", 120)
            assert page.value(PROBLEM) == ""
            return "".join(text for text, _ in page.value(chromium.TOKENS)[before if talks or seed > 5 else 0 :])

        def saved(name: str) -> Path:
            """The session as the page saves it, by another name."""
            there = set(tmp_path.iterdir())
            page.value("document.getElementById('save').click()")
            served.soon(lambda: [f for f in set(tmp_path.iterdir()) - there if f.suffix == ".session"])
            (file,) = set(tmp_path.iterdir()) - there
            return file.rename(tmp_path / name)

        talks = True
        page.value("document.getElementById('chat').click()")
        first = write("he", 1)
        assert first == in_python(talker, capsys, "--chat", "-p", "he", "--seed", 1)["text"]
        ours, theirs = saved("ours"), tmp_path / "theirs"
        second = in_python(
            talker, capsys, "--chat", "-p", "to", "--seed", 2, "--session", ours, "--save-session", theirs
        )
        assert write("to", 2) == second["text"]
        pick(page, "session", theirs)
        page.until("document.querySelectorAll('#text .token').length === 0")
        assert second["text"].strip() in page.value("document.getElementById('text').textContent")
        third = in_python(talker, capsys, "--chat", "-p", "be", "--seed", 3, "--session", theirs)
        assert write("be", 3) == third["text"]

        talks = False
        page.value("document.getElementById('chat').click()")
        write("to be", 4)
        ours = saved("text")
        pick(page, "session", ours)
        page.until("document.getElementById('further').checked")
        expected = in_python(talker, capsys, "-p", " or", "--seed", 6, "--session", ours)
        assert write(" or", 6) == expected["text"]
