"""A prompt that is a prefix, whose positions all see each other: what the commands do by themselves, and when told otherwise."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import small_dory, small_hrm_text
from helpers import assert_one_line, random_tokens
from paths import ROOT
from safetensors.torch import load_file
from small_tokenizers import byte_level

from rmse_edge.arch.hrm_text.config import HrmTextConfig
from rmse_edge.arch.hrm_text.model import HrmText
from rmse_edge.chat import TEMPLATE_FILE, ChatTemplate
from rmse_edge.checkpoint import save_checkpoint
from rmse_edge.cli.evaluate import main as rmse_eval
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.text import Tokenizer

GOLDEN = ROOT / "tests" / "data" / "hrm_text"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def ids(tokens: Any) -> str:
    return ",".join(str(int(token)) for token in tokens)


def said(capsys: pytest.CaptureFixture[str], folder: Path, *flags: object) -> list[int]:
    assert rmse_run([str(folder), "--temperature", "0", "-o", "json", *map(str, flags)]) == 0
    return json.loads(capsys.readouterr().out)["tokens"]


def refusal(capsys: pytest.CaptureFixture[str], folder: Path, *flags: object) -> str:
    assert rmse_run([str(folder), *map(str, flags)]) == 2
    line = capsys.readouterr().err
    assert_one_line(line, "rmse-run: error: --prefix: ")
    return line


@pytest.mark.parametrize("name", ["released", "within"])
def test_a_prompt_is_a_prefix_unless_told_otherwise(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As of transformers' generate with and without token_type_ids."""
    expected = load_file(GOLDEN / name / "outputs.safetensors")
    for row, tokens in enumerate(expected["input_ids"][:, :6]):
        prompt = ("--prompt-tokens", ids(tokens), "-n", 8)
        prefixed = expected["prefix.greedy"][row].tolist()
        assert said(capsys, GOLDEN / name, *prompt) == prefixed != expected["greedy"][row].tolist()
        assert said(capsys, GOLDEN / name, *prompt, "--prefix", "all") == prefixed
        assert said(capsys, GOLDEN / name, *prompt, "--prefix", "none") == expected["greedy"][row].tolist()


def test_a_model_without_prefixes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = load_file(GOLDEN / "causal" / "outputs.safetensors")
    prompt = ("--prompt-tokens", ids(expected["input_ids"][0, :6]), "-n", 8)
    assert said(capsys, GOLDEN / "causal", *prompt) == expected["greedy"][0].tolist()
    save_checkpoint(small_dory(), tmp_path / "dory")
    for folder in (GOLDEN / "causal", tmp_path / "dory"):
        assert "has none: each of its positions sees" in refusal(capsys, folder, *prompt, "--prefix", "all")


def test_a_prompt_that_no_call_has_room_for_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(small_hrm_text(), tmp_path / "c", dtype=torch.float32)
    prompt = ("--prompt-tokens", ids(random_tokens(70, vocab=65)), "-n", 3)
    assert "70 tokens are more than the 64 that one call of c has" in refusal(capsys, tmp_path / "c", *prompt)
    causal = said(capsys, tmp_path / "c", *prompt, "--prefix", "none")
    config = json.loads((tmp_path / "c" / "config.json").read_text()) | {"longest_prefix": 80}
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    assert said(capsys, tmp_path / "c", *prompt) != causal


def test_a_text_that_goes_on_has_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Behind a session positions see those before them, as in transformers' calls with a cache."""
    text, session = known_text(), str(tmp_path / "s")
    save_checkpoint(model := small_hrm_text(), tmp_path / "c", dtype=torch.float32)
    first = said(capsys, tmp_path / "c", "--prompt-tokens", ids(text[:9]), "-n", 4, "--save-session", session)
    more = ("--prompt-tokens", ids(text[9:15]), "-n", 1, "--session", session)
    whole = torch.tensor([*text[:9], *first, *text[9:15]])
    dials = {name: torch.from_numpy(a) for name, a in model.config.dials.arrays().items()}
    logits = model.eval().whole_text(whole, dials, prefix=9).logits
    assert said(capsys, tmp_path / "c", *more) == [int(logits[-1].argmax())]
    assert "has begun already" in refusal(capsys, tmp_path / "c", *more, "--prefix", "all")


def known_text() -> np.ndarray:
    return random_tokens(20, vocab=65)


def test_every_question_is_read_with_all_before_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one prefix: with the first question's keys kept, its positions would not see the second."""
    torch.manual_seed(1)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    model = HrmText(HrmTextConfig(vocab_size=320, H_cycles=2, L_cycles=1, longest_prefix=256, **sizes)).eval()
    folder = tmp_path / "c"
    save_checkpoint(model, folder, dtype=torch.float32)
    byte_level().save(str(folder / "tokenizer.json"))
    (folder / TEMPLATE_FILE).write_text(CHATML)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"to be\nand?\n")))
    assert rmse_run([str(folder), "--chat", "-n", "6", "-o", "json", "--temperature", "0"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    tokenizer, template = Tokenizer(folder / "tokenizer.json"), ChatTemplate.open(folder)
    dials = {name: torch.from_numpy(a) for name, a in model.config.dials.arrays().items()}
    messages: list[dict[str, str]] = []
    for answer in answers:
        messages.append({"role": "user", "content": answer["prompt"]})
        prompt = tokenizer.encode(template.render(messages), special=False)
        text = torch.tensor([*prompt, *answer["tokens"]])
        logits = model.whole_text(text, dials, prefix=len(prompt)).logits
        assert answer["tokens"] == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        messages.append({"role": "assistant", "content": answer["text"]})
    assert len(answers) == 2


def test_a_text_that_is_evaluated_has_no_prefix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(GOLDEN / "released", tmp_path / "c")
    expected = load_file(GOLDEN / "released" / "outputs.safetensors")
    text = expected["input_ids"][0]
    (tmp_path / "ids.txt").write_text(" ".join(map(str, text.tolist())))
    assert rmse_eval([str(tmp_path / "c"), "--ids", str(tmp_path / "ids.txt"), "-o", "json"]) == 0
    log_p = torch.log_softmax(expected["logits"][0][0, :-1], -1).gather(1, text[1:, None])
    assert abs(json.loads(capsys.readouterr().out)["loss"] + float(log_p.mean())) < 1e-4
