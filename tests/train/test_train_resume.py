"""A run that stops and goes on is bit for bit the run that never stopped; a run killed while saving keeps its state."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import small_recipe, small_text, text_source

from rmse_edge.errors import CheckpointError, UserError
from rmse_edge.train.journal import best_validation, read_rows
from rmse_edge.train.recipe import Recipe
from rmse_edge.train.trainer import STATE_FILE, Trainer

pytestmark = pytest.mark.slow  # each of them trains


def trainer_in(out: Path, recipe: Recipe | None = None, seed: int = 0) -> Trainer:
    out.mkdir(exist_ok=True)
    ids = small_text(seed=seed)
    return Trainer(recipe or small_recipe(), text_source(ids), out)


def log_of(out: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in read_rows(out / "log.csv")]


def state_of(out: Path) -> dict[str, Any]:
    return torch.load(out / STATE_FILE, weights_only=True)


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert log_of(ours) == log_of(theirs)
    a, b = state_of(ours), state_of(theirs)
    assert a["step"] == b["step"] and a["best"] == b["best"] and a["recipe"] == b["recipe"]
    for part in ("model", "average", "best_weights"):
        for name, value in a[part].items():
            assert torch.equal(value, b[part][name]), (part, name)
    for index, slots in a["optimizer"]["state"].items():
        for name, value in slots.items():
            assert torch.equal(value, b["optimizer"]["state"][index][name]), (index, name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    trainer_in(out).run()
    return out


@pytest.mark.parametrize("stops", [[4], [6], [8], [9], [10], [1, 6, 7, 11]], ids=str)
def test_stopping_and_going_on_changes_nothing(whole: Path, tmp_path: Path, stops: list[int]) -> None:
    """Stops inside each stage and on both boundaries (6, 9); dropout and sampled exits are on."""
    trainer_in(tmp_path).run(stop_at=stops[0])
    for stop in [*stops[1:], None]:
        trainer = trainer_in(tmp_path)
        trainer.resume()
        trainer.run(stop_at=stop)
    assert_same_run(tmp_path, whole)


def test_rows_written_after_the_last_saved_state_are_written_again(whole: Path, tmp_path: Path) -> None:
    trainer_in(tmp_path).run(stop_at=5)
    log = tmp_path / "log.csv"
    log.write_text(log.read_text() + log.read_text().splitlines()[-1].replace("4,", "5,", 1) + "\n6,loo")
    trainer = trainer_in(tmp_path)
    trainer.resume()
    trainer.run()
    assert_same_run(tmp_path, whole)


def test_the_log_tells_the_stages_and_the_best_step(whole: Path) -> None:
    rows = read_rows(whole / "log.csv")
    assert [r["stage"] for r in rows] == ["loops"] * 6 + ["gate"] * 3 + ["exits"] * 3
    assert [int(r["step"]) for r in rows if r["val_loss"]] == [2, 5, 8, 11]
    best = best_validation(rows)
    assert best is not None and best[1] == min(float(r["val_loss"]) for r in rows[:6] if r["val_loss"])
    assert best[1] == pytest.approx(state_of(whole)["best"], rel=1e-5)


@pytest.mark.parametrize("broken", ["save", "replace"])
def test_failing_while_saving_keeps_the_old_state(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    trainer_in(tmp_path).run(stop_at=4)
    before = (tmp_path / STATE_FILE).read_bytes()

    def half_save(state: Any, file: Any) -> None:
        file.write(before[: len(before) // 2])
        raise OSError(28, "No space left on device")

    def no_replace(source: Path, target: Path) -> None:
        raise OSError(5, "Input/output error")

    trainer = trainer_in(tmp_path)
    trainer.resume()
    with monkeypatch.context() as patch:
        if broken == "save":
            patch.setattr(torch, "save", half_save)
        with pytest.raises(CheckpointError, match=r"cannot be written .*; nothing was changed"):
            real = os.replace
            if broken == "replace":
                patch.setattr(os, "replace", lambda s, t: no_replace(s, t) if str(t).endswith(".pt") else real(s, t))
            trainer.run()
    assert (tmp_path / STATE_FILE).read_bytes() == before
    assert not list(tmp_path.glob(".*"))
    trainer = trainer_in(tmp_path)
    trainer.resume()
    assert trainer.step == 4
    trainer.run()
    assert_same_run(tmp_path, whole)


KILLED = """
import sys
from pathlib import Path
sys.path[:0] = {tests!r}
from test_train_resume import trainer_in
trainer_in(Path({out!r})).run(save_every=1)
"""


def test_a_killed_run_goes_on(whole: Path, tmp_path: Path) -> None:
    """SIGKILL at an arbitrary moment while every step is saved."""
    out = tmp_path / "run"
    code = KILLED.format(tests=[str(p) for p in Path(__file__).parents[:2]], out=str(out))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / STATE_FILE).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / STATE_FILE).exists(), "the run was over or died before it saved anything"
    trainer = trainer_in(out)
    trainer.resume()
    trainer.run()
    theirs = state_of(out)
    for name, value in state_of(whole)["average"].items():
        # Another process may have another number of threads, and so another order of additions.
        torch.testing.assert_close(theirs["average"][name], value, rtol=1e-4, atol=1e-4)
    assert [r["step"] for r in log_of(out)] == [str(i) for i in range(12)]


def test_a_state_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file; nothing to resume"):
        trainer_in(tmp_path).resume()
    trainer_in(tmp_path).run(stop_at=1)
    with pytest.raises(CheckpointError, match="was written by another recipe; resume with the recipe"):
        trainer_in(tmp_path, small_recipe(lr=1e-4)).resume()
    with pytest.raises(CheckpointError, match="was trained on another text or tokenizer"):
        trainer_in(tmp_path, seed=1).resume()
    state = tmp_path / STATE_FILE
    state.write_bytes(state.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="damaged training state"):
        trainer_in(tmp_path).resume()


def test_a_diverged_run_says_so_and_saves_nothing(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    with torch.no_grad():
        trainer.model.embed.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="training diverged at step 0: loss nan"):
        trainer.run()
    assert not (tmp_path / STATE_FILE).exists()
