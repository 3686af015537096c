"""lm-eval on our runtimes: the same likelihoods as rmse-eval, the same texts as rmse-run, and the command on tasks of files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from helpers import ALPHABET, assert_one_line, mixed_model, random_tokens, remembering_model, write_checkpoint
from paths import ROOT
from small_tokenizers import byte_fallback, with_bos

from rmse_edge.checkpoint import save_checkpoint
from rmse_edge.cli.evaluate import main as rmse_eval
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.errors import UserError

if TYPE_CHECKING:
    from rmse_edge.harness import LoopedLM

pytestmark = pytest.mark.slow
TEXT = "".join(ALPHABET[i] for i in random_tokens(150, seed=3))


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Nothing is asked of a server, and what data sets are made into is thrown away."""
    pytest.importorskip("lm_eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        yield


def opened(package: Path | str, **settings: Any) -> LoopedLM:
    from rmse_edge.harness import LoopedLM

    return LoopedLM(str(package), **settings)


def asked(kind: str, *arguments: tuple[Any, ...], task: str = "task") -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, a, i, (task, i, 1)) for i, a in enumerate(arguments)]  # type: ignore[arg-type]


def evaluated(folder: Path, text: Path, capsys: pytest.CaptureFixture[str], *flags: object) -> dict[str, Any]:
    assert rmse_eval([str(folder), "--text", str(text), "-o", "json", *map(str, flags)]) == 0
    return json.loads(capsys.readouterr().out)


def agrees(lm: LoopedLM, text: str, found: dict[str, Any]) -> None:
    """Loss within 1e-4 per token, and the same depths."""
    (total,) = lm.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)))
    assert found["tokens"] > 100 and found["loss"] > 1
    assert abs(-total / found["tokens"] - found["loss"]) < 1e-4
    loops = lm.mean_loops["task"]
    assert loops["positions"] == found["tokens"] and loops["mean_loops"] == pytest.approx(found["mean_loops"])


@pytest.mark.parametrize("dials", [{}, {"exit_threshold": 0.9}, {"max_loops": 2}])
def test_a_checkpoint_says_what_rmse_eval_says(
    dials: dict[str, Any], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text(TEXT)
    flags = [word for name, value in dials.items() for word in (f"--{name.replace('_', '-')}", value)]
    agrees(opened(checkpoint, **dials), TEXT, evaluated(checkpoint, tmp_path / "text", capsys, *flags))


def test_a_memory_learns_or_stays_blank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(remembering_model(), tmp_path / "remembering")
    (tmp_path / "text").write_text(TEXT)
    learnt, blank = (evaluated(folder, tmp_path / "text", capsys, *flags) for flags in ((), ("--no-memory",)))
    assert abs(learnt["loss"] - blank["loss"]) > 1e-3
    agrees(opened(folder), TEXT, learnt)
    agrees(opened(folder, memory=False), TEXT, blank)


def test_a_package_says_what_rmse_eval_says(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text(TEXT)
    lm = opened(package, threads=1)
    agrees(lm, TEXT, evaluated(package, tmp_path / "text", capsys))
    assert lm.get_model_info()["runtime"] == "onnx"


def test_a_text_begins_with_the_tokenizers_own_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = with_bos(byte_fallback())
    save_checkpoint(mixed_model(vocab_size=tokenizer.get_vocab_size()), tmp_path / "bos")
    tokenizer.save(str(tmp_path / "bos" / "tokenizer.json"))
    text = "the sea, the sea! he hears the sea.\n" * 4
    (tmp_path / "text").write_text(text)
    lm = opened(tmp_path / "bos")
    agrees(lm, text, evaluated(tmp_path / "bos", tmp_path / "text", capsys))
    whole, first, rest = lm.loglikelihood(asked("loglikelihood", ("", text), ("", "the"), ("the", text[3:])))
    assert whole[0] == pytest.approx(lm.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)))[0], abs=1e-3)
    assert whole[0] == pytest.approx(first[0] + rest[0], abs=1e-3)  # the chain rule


def test_a_continuation_is_scored_behind_its_context(checkpoint: Path) -> None:
    """However many share the context, and whether it is read at once or not."""
    lm = opened(checkpoint)
    lm.runtime.reset()
    ids = lm.text.encode(TEXT)
    logits = lm.runtime.feed(ids[:-1], lm.dials).logits.astype(np.float64)
    p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    cuts = [1, 63, 64, 65, 100, 149]
    requests = [(TEXT[:cut], TEXT[cut:end]) for cut in cuts for end in (cut + 1, (cut + 150) // 2, 150)]
    expected = [p[np.arange(len(a), len(a + b)) - 1, ids[len(a) : len(a + b)]].sum() for a, b in requests]
    found = lm.loglikelihood(asked("loglikelihood", *requests))
    assert np.allclose([total for total, _ in found], expected, atol=2e-3)
    greedy = "".join(lm.text.decode([int(i)]) for i in [p[64].argmax()])
    found = lm.loglikelihood(asked("loglikelihood", (TEXT[:65], greedy), (TEXT[:65], "!" if greedy != "!" else "A")))
    assert [likeliest for _, likeliest in found] == [True, False]


def test_a_long_text_is_read_in_windows(checkpoint: Path) -> None:
    """As lm-eval's own models: each window as a text of its own, every token scored once."""
    lm, limit = opened(checkpoint), 40
    lm.runtime.info = lm.info = lm.info.with_limit(limit)
    lm.runtime.calls.info = lm.info
    (total,) = lm.loglikelihood_rolling(asked("loglikelihood_rolling", (TEXT,)))
    assert lm.mean_loops["task"]["positions"] == len(TEXT) - 1
    windows = [(TEXT[:1], TEXT[1:41]), *((TEXT[i : i + 1], TEXT[i + 1 : i + 41]) for i in (40, 80))]
    rest = len(TEXT) - 1 - 3 * limit
    windows.append((TEXT[-limit - 1 : -rest], TEXT[-rest:]))
    assert total == pytest.approx(sum(a for a, _ in lm.loglikelihood(asked("loglikelihood", *windows))), abs=1e-3)
    short, long = lm.loglikelihood(asked("loglikelihood", (TEXT[59:99], TEXT[99]), (TEXT[:99], TEXT[99])))
    assert short == long  # the context's beginning is left out
    with pytest.raises(UserError, match="reads 40 at most"):
        lm.loglikelihood(asked("loglikelihood", (TEXT[0], TEXT[1:50])))


def test_texts_are_those_of_rmse_run(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm = opened(checkpoint)

    def run(*flags: object) -> str:
        assert rmse_run([str(checkpoint), "-p", TEXT[:20], "-n", "24", "-o", "json", *map(str, flags)]) == 0
        return json.loads(capsys.readouterr().out)["text"]

    greedy = run("--temperature", 0)
    stop = greedy[9:11]
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 9, "until": [], "max_gen_toks": 24}
    found = lm.generate_until(
        asked(
            "generate_until",
            (TEXT[:20], {"until": ["\x00"], "max_gen_toks": 24}),
            (TEXT[:20], {"until": [stop, ""], "max_gen_toks": 24}),
            (TEXT[:20], sampling),
        )
    )
    assert found == [greedy, greedy[: greedy.index(stop)], run("--temperature", 0.7, "--top-k", 9, "--seed", 2)]
    assert lm.mean_loops["task"]["positions"] >= 48


def test_a_chat_template_is_the_models_own(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "chat"
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}(END){% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    lm, asks = opened(folder), [{"role": "user", "content": "A"}]
    assert lm.apply_chat_template(asks) == "[user]A(END)[assistant]"
    begun = [*asks, {"role": "assistant", "content": "SO "}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == "[user]A(END)[assistant]SO"
    assert "messages" in (lm.chat_template(True) or "") and lm.chat_template(False) is None


def task(folder: Path, name: str, rows: list[dict[str, Any]], **settings: Any) -> None:
    """A task of a file, as lm-eval reads it: YAML has JSON in it."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}
    (folder / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test"} | data | settings))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of every kind, of files."""
    folder = tmp_path_factory.mktemp("tasks")
    task(
        folder, "texts", [{"text": TEXT}, {"text": TEXT[:60]}], output_type="loglikelihood_rolling", doc_to_text="",
        doc_to_target="{{text}}", metric_list=[{"metric": "bits_per_byte"}],
    )  # fmt: skip
    task(
        folder, "choices", [{"q": TEXT[i : i + 40].strip(), "good": i % 2} for i in range(4)], doc_to_text="{{q}}",
        output_type="multiple_choice", doc_to_choice=["AB", "CD"], doc_to_target="good", target_delimiter="",
        metric_list=[{"metric": "acc"}],
    )  # fmt: skip
    task(
        folder, "answers", [{"q": TEXT[:30], "a": "A"}], output_type="generate_until", doc_to_text="{{q}}",
        doc_to_target="{{a}}", generation_kwargs={"until": ["\x00"], "max_gen_toks": 8},
        metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    return folder


def check_results(found: dict[str, Any], checkpoint: Path) -> None:
    """Of the three tasks, at exit_threshold 0.9."""
    loops = found["config"]["mean_loops"]
    assert {name: row["positions"] for name, row in loops.items()} == {"texts": 149 + 59, "choices": 16, "answers": 8}
    assert all(1 <= row["mean_loops"] <= row["max_loops"] == 4 for row in loops.values())
    lm = opened(checkpoint, exit_threshold=0.9)
    totals = lm.loglikelihood_rolling(asked("loglikelihood_rolling", (TEXT,), (TEXT[:60],)))
    assert lm.mean_loops["task"] == loops["texts"]
    bits = -sum(totals) / (len(TEXT) + 60) / np.log(2)
    assert found["results"]["texts"]["bits_per_byte,none"] == pytest.approx(bits, abs=1e-4)
    assert {"acc,none", "exact_match,none"} < found["results"]["choices"].keys() | found["results"]["answers"].keys()


def test_tasks_of_every_kind_say_their_loops(checkpoint: Path, tasks: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)  # reading lm-eval's own tasks takes seconds
    found = simple_evaluate(
        model="rmse",
        model_args=f"package={checkpoint},exit_threshold=0.9",
        tasks=["texts", "choices", "answers"],
        task_manager=manager,
        bootstrap_iters=0,
    )
    check_results(found, checkpoint)


@pytest.mark.nightly
def test_the_command_runs_them(checkpoint: Path, tasks: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "rmse_edge.cli.harness", "--model", "rmse",
        "--model_args", f"package={checkpoint},exit_threshold=0.9", "--include_path", str(tasks),
        "--tasks", "texts,choices,answers", "--output_path", str(tmp_path / "out.json"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("bits_per_byte", "acc", "exact_match"))
    assert "texts: " in done.stderr and "of 4 loops (208 positions)" in done.stderr
    (file,) = tmp_path.glob("out_*.json")
    check_results(json.loads(file.read_text()), checkpoint)


@pytest.mark.nightly
def test_the_command_of_lm_eval_finds_the_model_through_a_task_file() -> None:
    """The documented one, of a shipped model: its tokenizer knows the text that the task reads."""
    command = [
        sys.executable, "-m", "lm_eval", "--model", "rmse", "--model_args", "package=models/rmse-shakespeare",
        "--tasks", "docs/examples/shakespeare.yaml",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "bits_per_byte" in done.stdout and "of 12 loops" in done.stderr


def test_what_cannot_be_run_is_one_line(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"package": ""}, "package: is missing"),
        ({"package": "none.rmse"}, "none.rmse: no such"),
        ({"exit_treshold": 1}, "exit_treshold: is no argument of the model; known: package"),
        ({"exit_steady": 2}, "exit_steady: "),
        ({"max_loops": 9}, "max_loops: got 9, expected 1..4"),
        ({"memory": False}, "memory: "),
        ({"runtime": "onnx"}, "is not a package"),
        ({"batch_size": 8}, "batch_size: got 8, expected 1"),
        ({"exit_threshold": "x"}, "exit_threshold: got 'x', expected a number"),
        ({"threads": 0}, "threads: got 0, expected a whole number from 1"),
        ({"seed": "x"}, "seed: got 'x', expected a whole number from 0"),
        ({"max_gen_toks": 0}, "max_gen_toks: got 0, expected a whole number from 1"),
        ({"prefix_token_id": 999}, "prefix_token_id: got 999, the model has"),
        ({"memory": "no"}, "memory: got 'no', expected True or False"),
        ({"device": "tpu"}, "device: got 'tpu', expected cpu or cuda"),
        ({"package": str(ROOT / "models" / "trm-sudoku")}, "reads no text"),
    ]
    for settings, needle in cases:
        with pytest.raises(UserError) as error:
            opened(**({"package": checkpoint} | settings))
        assert_one_line(str(error.value), needle)
