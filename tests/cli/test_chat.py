"""Conversations: templates rendered as transformers does, and turns that feed only what the text has gained."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_one_line, mixed_model, write_checkpoint
from small_tokenizers import BOS, EOS, TURN_END, byte_level, with_bos

from rmse_edge.chat import TEMPLATE_FILE, TOKENIZER_CONFIG_FILE, ChatTemplate
from rmse_edge.checkpoint import load_checkpoint, save_checkpoint
from rmse_edge.cli.run import main
from rmse_edge.errors import TextError
from rmse_edge.loop.dials import Dials
from rmse_edge.runtimes.engines.torch import TorchRuntime
from rmse_edge.runtimes.host.base import Fed
from rmse_edge.text import Tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + (system + '\\n' if loop.first and system else '') + message['content'] | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
TOOLS = """{%- if tools is not none and tools %}{{ tools | tojson(indent=2) }}{% endif -%}
{%- set state = namespace(count=0, self=1) -%}
{%- for message in messages -%}
    {%- if message.role == 'system' %}{% continue %}{% endif -%}
    {%- set state.count = state.count + 1 -%}
    <{{ state.count }}:{{ message.role }}>
    {% generation %}{% set inner = 'x' %}{{ message.content }}{{ inner }}{% endgeneration %}
    {{- inner is defined }}{{ dict(a=message.content) | tojson }}</{{ unk_token }}{{ pad_token is defined }}>
{%- endfor -%}
{%- if documents is none %}{{ strftime_now('%Y') }}{% endif %}"""
REASONING = (
    "{% for m in messages %}{{ m.role }}: "
    "{{ m.content.split('he')[-1] if m.role == 'assistant' else m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "tools": TOOLS, "reasoning": REASONING}
TALK = [
    {"role": "system", "content": " be brief & <kind> "},
    {"role": "user", "content": 'hello, 日本語 "you"\n'},
    {"role": "assistant", "content": " he said é "},
    {"role": "user", "content": "and?"},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer begins every text with <s>, without a template."""
    folder = write_checkpoint(mixed_model(vocab_size=320), tmp_path_factory.mktemp("chat") / "chat")
    with_bos(byte_level()).save(str(folder / "tokenizer.json"))
    config = json.loads((folder / TOKENIZER_CONFIG_FILE).read_text())
    config |= {"bos_token": BOS, "eos_token": {"__type": "AddedToken", "content": EOS}, "unk_token": "<unk>"}
    (folder / TOKENIZER_CONFIG_FILE).write_text(json.dumps(config))
    return folder


def with_template(base: Path, folder: Path, template: str, form: str = "file") -> Path:
    """`base` with a template in one of the forms that there are."""
    shutil.copytree(base, folder)
    if form == "file":
        (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
        return folder
    named = [{"name": "tool_use", "template": "other"}, {"name": "default", "template": template}]
    config = json.loads((folder / TOKENIZER_CONFIG_FILE).read_text())
    config["chat_template"] = template if form == "text" else named
    (folder / TOKENIZER_CONFIG_FILE).write_text(json.dumps(config))
    return folder


# ---------------------------------------------------------------------------------------------------------- templates


@pytest.mark.slow
@pytest.mark.parametrize("form", ["file", "text", "named"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_in_transformers(base: Path, tmp_path: Path, name: str, form: str):
    transformers = pytest.importorskip("transformers")
    folder = with_template(base, tmp_path / "model", TEMPLATES[name], form)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), ChatTemplate.open(folder)
    for messages in (TALK, TALK[1:], TALK[:2], TALK[1:2]):
        for prompt in (True, False):
            expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert ours.render(messages, prompt) == expected
    expected = theirs.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"]
    assert Tokenizer(folder / "tokenizer.json").encode(ours.render(TALK), special=False) == expected


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        ("{% for %}", TALK, "line 1"),
        (LLAMA, TALK[1:2] * 2, "roles must alternate user/assistant"),
        ("{{ messages[9].content.strip() }}", TALK, "refuses the conversation"),
        ("{{ ''.__class__.__mro__ }}", TALK, "unsafe"),
        ("{% set n = namespace(__class__=1) %}", TALK, "underscore"),
        ("{{ messages.append(1) }}", TALK, "refuses"),
        ("{{ 1 / 0 }}", TALK, "division by zero"),
    ],
)
def test_a_template_that_fails_is_one_line(base: Path, tmp_path: Path, template: str, messages: Any, said: str):
    folder = with_template(base, tmp_path / "model", template)
    with pytest.raises(TextError) as caught:
        ChatTemplate.open(folder).render(messages)
    assert_one_line(str(caught.value), str(folder / TEMPLATE_FILE), said)


@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, TURN_END), (LLAMA, EOS), (REASONING, "\nuser:"), ("{{ raise_exception('no') }}", None)],
)
def test_the_end_of_a_turn_is_read_from_the_template(base: Path, tmp_path: Path, template: str, end: str | None):
    folder = with_template(base, tmp_path / "model", template)
    assert ChatTemplate.open(folder).end_of_turn(Tokenizer(folder / "tokenizer.json")) == end


def test_saving_a_checkpoint_again_keeps_the_template(base: Path, tmp_path: Path):
    folder = with_template(base, tmp_path / "model", CHATML, "text")
    save_checkpoint(load_checkpoint(folder), folder)
    assert ChatTemplate.open(folder).render(TALK[1:2]).startswith("<|im_start|>user\nhello")


# ------------------------------------------------------------------------------------------------------ conversations


class Tape:
    """What a runtime was fed, from each time on that it began at position 0."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fed: list[list[int]] = []
        feed = TorchRuntime.feed

        def taped_feed(runtime: TorchRuntime, tokens: Any, dials: Dials, logits: str = "all") -> Fed:
            if runtime.position == 0:
                self.fed.append([])
            self.fed[-1] += [int(token) for token in tokens]
            return feed(runtime, tokens, dials, logits)

        monkeypatch.setattr(TorchRuntime, "feed", taped_feed)


def chat(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path, turns: str, *flags: object
) -> list[dict[str, Any]]:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(turns.encode())))
    code = main([str(folder), "--chat", "-n", "12", "-o", "json", *map(str, flags)])
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    return [json.loads(line) for line in captured.out.splitlines()]


def spoken(answers: list[dict[str, Any]], system: str | None = None) -> list[dict[str, str]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for answer in answers:
        messages += [{"role": "user", "content": answer["prompt"]}, {"role": "assistant", "content": answer["text"]}]
    return messages


def test_turns_feed_only_what_is_new(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """What the runtime has read is, at every turn, the beginning of the conversation as the template renders it."""
    folder = with_template(base, tmp_path / "model", CHATML)
    tape, tokenizer = Tape(monkeypatch), Tokenizer(folder / "tokenizer.json")
    answers = chat(capsys, monkeypatch, folder, "he\n\nand a\r\nwhy?\n", "--system", "be brief", "--seed", 7)
    assert [answer["prompt"] for answer in answers] == ["he", "and a", "why?"]
    assert len(tape.fed) == 1  # never from the beginning
    rendered = ChatTemplate.open(folder).render(spoken(answers, "be brief"), add_generation_prompt=False)
    read = tokenizer.decode([*tape.fed[0], answers[-1]["tokens"][-1]])
    assert rendered.startswith(read) and read.count("<|im_start|>user") == 3
    assert tape.fed[0].count(tokenizer.encode("")[0]) == 0  # this template has no <s>


def test_a_template_that_rewrites_an_answer_is_read_anew(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    rewriting = CHATML.replace("message['content'] +", "('...' if not loop.last else '') + message['content'] +")
    folder = with_template(base, tmp_path / "model", rewriting)
    tape, tokenizer = Tape(monkeypatch), Tokenizer(folder / "tokenizer.json")
    answers = chat(capsys, monkeypatch, folder, "he\nand a\n", "--temperature", 0)
    assert len(tape.fed) == 2
    rendered = ChatTemplate.open(folder).render([*spoken(answers[:1]), {"role": "user", "content": "and a"}])
    expected = tokenizer.encode(rendered, special=False)
    assert tape.fed[1][: len(expected)] == expected
    runtime = TorchRuntime.open(folder)
    fed = runtime.feed(expected, runtime.info.dials)
    assert answers[1]["tokens"][0] == int(np.argmax(fed.logits[-1]))


@pytest.mark.parametrize("ends", ["eos", "turn", "length"])
def test_however_an_answer_ends_the_next_turn_follows_it(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, ends: str
):
    """With the model's end token, which may be another than the template's; with the template's; in mid-sentence."""
    from rmse_edge.runtimes.text.sampling import Sampler

    folder = with_template(base, tmp_path / "model", CHATML)
    tokenizer = Tokenizer(folder / "tokenizer.json")
    eos, turn = (tokenizer.encode(name, special=False)[0] for name in (EOS, TURN_END))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    says = tokenizer.encode_more("he said")
    picks = iter((says + {"eos": [eos], "turn": [turn], "length": []}[ends]) * 2)
    monkeypatch.setattr(Sampler, "pick", lambda self, logits, unused: next(picks))
    tape = Tape(monkeypatch)
    answers = chat(capsys, monkeypatch, folder, "a\nb\n", "-n", len(says) + (ends != "length"))
    assert [answer["text"] for answer in answers] == ["he said"] * 2
    assert {answer["finish_reason"] for answer in answers} == {{"turn": "stop"}.get(ends, ends)}
    rendered = ChatTemplate.open(folder).render(spoken(answers), add_generation_prompt=False)
    assert len(tape.fed) == 1 and eos not in tape.fed[0]
    assert rendered.startswith(tokenizer.decode(tape.fed[0]))


def test_a_conversation_is_saved_and_goes_on(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    folder = with_template(base, tmp_path / "model", CHATML)
    session, flags = tmp_path / "talk.session", ("--temperature", 0)
    whole = chat(capsys, monkeypatch, folder, "he\nand a\nwhy?\n", *flags)
    first = chat(capsys, monkeypatch, folder, "he\n", *flags, "--save-session", session)
    second = chat(capsys, monkeypatch, folder, "and a\n", *flags, "--session", session, "--save-session", session)
    (third,) = chat(capsys, monkeypatch, folder, "", *flags, "--session", session, "-p", "why?")
    assert [a["tokens"] for a in (*first, *second, third)] == [a["tokens"] for a in whole]
    code = main([str(folder), "--chat", "--session", str(session), "--system", "x", "-p", "y"])
    assert code == 2 and "--system" in capsys.readouterr().err
    plain = tmp_path / "plain.session"
    assert main([str(folder), "-p", "a", "-n", "2", "--save-session", str(plain)]) == 0
    capsys.readouterr()
    assert main([str(folder), "--chat", "-p", "a", "--session", str(plain)]) == 2
    assert_one_line(capsys.readouterr().err, "rmse-run: error:", "without --chat")


def test_ctrl_c_ends_an_answer_not_the_conversation(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """At a terminal. The runtime was broken off while it read, so the next turn is read from the beginning."""
    folder = with_template(base, tmp_path / "model", CHATML)
    lines = iter(["he", "no\udcff", "and a"])

    def typed(prompt: str = "") -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    feed, count = TorchRuntime.feed, 0

    def broken_off_once(self: TorchRuntime, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == 5:
            self.whole = False
            raise KeyboardInterrupt
        return feed(self, *args, **kwargs)

    monkeypatch.setattr(TorchRuntime, "feed", broken_off_once)
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    session = tmp_path / "talk.session"
    code = main([str(folder), "--chat", "-n", "6", "--temperature", "0", "--save-session", str(session)])
    out, err = capsys.readouterr()
    assert code == 0 and "interrupted" in err and "not UTF-8" in err
    monkeypatch.undo()
    assert out.strip()
    (answer,) = chat(capsys, monkeypatch, folder, "", "--session", session, "-p", "why?")
    assert answer["prompt"] == "why?"


@pytest.mark.parametrize(
    ("stdin", "flags", "said"),
    [
        (b"", ["--chat"], "no question"),
        (b"\n \n", ["--chat"], "no question"),
        (b"he\n\xff\n", ["--chat", "-n", "1"], "stdin:2: not UTF-8 at byte 0"),
        (b"", ["-p", "a", "--system", "be brief"], "--system: is a message of a conversation; add --chat"),
    ],
)
def test_mistaken_chats(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    stdin: bytes, flags: list[str], said: str,
):  # fmt: skip
    folder = with_template(base, tmp_path / "model", CHATML)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    assert main([str(folder), *flags]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_what_was_said_before_a_mistake_is_kept(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    folder, session = with_template(base, tmp_path / "model", CHATML), tmp_path / "talk.session"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"he\n\xff\n")))
    flags = ("-n", "5", "--temperature", "0", "--save-session", str(session))
    assert main([str(folder), "--chat", *flags]) == 2
    assert "stdin:2" in capsys.readouterr().err
    (answer,) = chat(capsys, monkeypatch, folder, "why?\n", "--session", session)
    assert answer["prompt_tokens"] > len("why?")
    session.unlink()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert main([str(folder), "--chat", *flags]) == 2
    assert "nothing was answered" in capsys.readouterr().err and not session.exists()


def test_a_model_without_a_template(base: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(base), "--chat", "-p", "he"]) == 2
    assert_one_line(capsys.readouterr().err, "rmse-run: error:", "has no chat template", TEMPLATE_FILE)


# ------------------------------------------------------------------------------------------------------------ carried


@pytest.fixture
def templated(checkpoint: Path, tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    yield lambda form: with_template(checkpoint, tmp_path / form, "{{ messages[-1].content }}", form)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["file", "text"])
def test_a_package_carries_the_template(templated: Any, quick_export: Any, tmp_path: Path, form: str):
    from rmse_edge.export import ExportRequest, export_package

    source = templated(form)
    package = export_package(load_checkpoint(source), tmp_path / "p.rmse", ExportRequest(check=False), source)
    assert package.manifest["text"]["tokenizer_config"] == TOKENIZER_CONFIG_FILE
    assert ("chat_template" in package.manifest["text"]) == (form == "file")
    assert ChatTemplate.open(package.folder).render([{"role": "user", "content": "HI"}]) == "HI"
    assert main([str(package.folder), "--chat", "-p", "HI", "-n", "2"]) == 0
