"""Chat templates as plain text around messages: found where a template is so, and only there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_tokenizers import BOS, EOS, byte_level, with_bos

from rmse_edge.chat import ChatTemplate
from rmse_edge.chat_turns import Turns, turns_of

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
HEADERS = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<' + m.role + '>' + m.content | trim + '</t>' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
OWN_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}" + CHATML
)
# A system's message becomes part of the first question.
INSTRUCTIONS = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + (system if loop.first else '') + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
MARK = "<|im_end|>\n"
FORMS = {
    CHATML: Turns("", ("<|im_start|>system\n", MARK), ("<|im_start|>user\n", MARK), ("<|im_start|>assistant\n", MARK), "<|im_start|>assistant\n", False, "<|im_end|>"),
    HEADERS: Turns("<s>", ("<s><system>", "</t>"), ("<user>", "</t>"), ("<assistant>", "</t>"), "<assistant>", True, "</t><user>"),
    OWN_SYSTEM: Turns("<|im_start|>system\nBe kind.<|im_end|>\n", ("<|im_start|>system\n", MARK), ("<|im_start|>user\n", MARK), ("<|im_start|>assistant\n", MARK), "<|im_start|>assistant\n", False, "<|im_end|>"),
    INSTRUCTIONS: Turns("<s>", None, ("[INST] ", " [/INST]"), (" ", EOS), "", True, EOS),
}  # fmt: skip
OTHERS = {
    "leaves out what was reasoned": CHATML.replace("m.content", "(m.content.split('</think>')[-1] if m.role == 'assistant' else m.content)"),
    "counts": "{% for m in messages %}{{ loop.index ~ m.role ~ m.content }}{% endfor %}",
    "treats the last one apart": "{% for m in messages %}{{ m.role + m.content + ('!' if loop.last else '.') }}{% endfor %}",
    "escapes": "{% for m in messages %}{{ m.role + (m.content | e) + '.' }}{% endfor %}",
    "refuses": "{{ raise_exception('no') }}",
    "is none": "{% for %}",
}  # fmt: skip


def folder_with(template: str, folder: Path) -> Path:
    with_bos(byte_level()).save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": BOS, "eos_token": EOS, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return folder


@pytest.mark.parametrize("template", FORMS)
def test_a_template_of_turns_is_found_out(template: str, tmp_path: Path) -> None:
    turns = turns_of(folder_with(template, tmp_path))
    assert turns == FORMS[template]
    talk = [
        {"role": "user", "content": " who? "},
        {"role": "assistant", "content": "\nI"},
        {"role": "user", "content": "why"},
    ]
    assert turns.render(talk) == ChatTemplate.open(tmp_path).render(talk)


@pytest.mark.parametrize("name", OTHERS)
def test_a_template_of_another_kind_has_no_such_form(name: str, tmp_path: Path) -> None:
    assert turns_of(folder_with(OTHERS[name], tmp_path)) is None


def test_a_folder_without_a_template_has_none(tmp_path: Path) -> None:
    assert turns_of(tmp_path) is None
    folder_with(CHATML, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert turns_of(tmp_path) is None
