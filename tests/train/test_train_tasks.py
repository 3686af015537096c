"""Recall and facts: what the examples promise, what is measured on them, and training on them from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_one_line

from rmse_edge.arch.rmse.config import RMSEConfig
from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.cli.train import main
from rmse_edge.errors import ConfigError
from rmse_edge.train.facts import PASSAGE, QUESTION, Facts, fetched, search_loss
from rmse_edge.train.objective import Objective
from rmse_edge.train.recall import Recall
from rmse_edge.train.recipe import Recipe
from rmse_edge.train.sources import IGNORED
from rmse_edge.train.tasks import make_task

pytestmark = pytest.mark.slow

SMALL = dict(
    d_model=32, n_heads=2, n_kv_heads=1, head_dim=16, window=64, max_loops=2, n_experts=8, top_k=2, expert_width=32,
    shared_width=32, memory="titans", memory_dim=32, memory_hidden=64, block_size=128,
)  # fmt: skip


def model_for(vocab: int, **changes: Any) -> RMSE:
    torch.manual_seed(0)
    return RMSE(RMSEConfig(vocab_size=vocab, **(SMALL | changes))).eval()


# -------------------------------------------------------------------------------------------------------------- recall


def test_every_query_of_recall_asks_for_a_pair_of_its_own_sequence() -> None:
    task = Recall(pairs=5, keys=20, values=30, noise=10, segments=4)
    batch = task.batch(8, (1, 2))
    for tokens, targets in zip(batch["tokens"].numpy(), batch["targets"].numpy()):
        pairs = dict(zip(tokens[0:10:2], tokens[1:10:2]))
        assert len(pairs) == 5 and all(k < 20 <= v < 50 for k, v in pairs.items())
        asked = np.flatnonzero(targets != IGNORED)
        assert (asked >= 64).all() and len(asked) == 5 * (len(tokens) // 64 - 1)
        assert [pairs[tokens[i]] for i in asked] == targets[asked].tolist()
        rest = np.setdiff1d(np.arange(10, len(tokens)), asked)
        assert (tokens[rest] >= 50).all(), "nothing but noise elsewhere: no second place to read an answer"
    assert torch.equal(task.batch(8, (1, 2))["tokens"], batch["tokens"])
    assert batch["tokens"].shape != task.batch(8, (1, 3))["tokens"].shape or not torch.equal(
        task.batch(8, (1, 3))["tokens"], batch["tokens"]
    )
    last = task.validation(2)["targets"]
    assert (last[:, :192] == IGNORED).all() and ((last != IGNORED).sum(1) == 5).all()


def test_recall_is_measured_by_distance(tmp_path: Path) -> None:
    """A model that answers by a table of its own gets full marks, an untrained one chance."""
    task = Recall(pairs=4, keys=10, values=50, noise=10, segments=3)
    model = model_for(task.vocab_size)
    result = task.evaluate(model, count=8, distances=(1, 8))
    assert result["distance"] == [1, 8] and result["queries"] == 32 and result["beyond_windows"] == 6
    assert max(*result["memory"], *result["blank"]) < 0.3 and result["beyond"].keys() == {"memory", "blank"}
    picture = tmp_path / "recall.png"
    task.draw_plot(result, picture, 64)
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_a_memory_learns_to_recall_and_nothing_else_does(tmp_path: Path) -> None:
    """Two segments further back than attention reaches, few pairs: soon right with the memory, chance without it."""
    recipe = {
        "task": {"name": "recall", "pairs": 4, "keys": 16, "values": 16, "noise": 16, "segments": 3},
        "model": {"vocab_size": 48, **SMALL, "max_loops": 1, "head_dim": 32},
        "batch_size": 16, "steps": 120, "depths": [1], "entropy_weight": 0.0, "gate_steps": 0, "exit_steps": 0, "lr": 8e-3,
        "warmup": 10, "weight_decay": 0.0, "eval_every": 60, "eval_blocks": 16, "seed": 1,
    }  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert main(["--recipe", str(tmp_path / "recipe.json"), "-o", str(tmp_path / "out"), "--threads", "1"]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    at = found["distance"].index(4)
    assert found["memory"][at] > 0.6 > 0.2 > found["blank"][at]
    model = load_checkpoint(tmp_path / "out")
    mean, variance, weight = model.memory.surprise_prior.tolist()
    assert 0 < mean < 1.5 and variance > 0 and weight == 16
    assert (tmp_path / "out" / "recall.png").is_file() and (tmp_path / "out" / "curve.png").is_file()


# --------------------------------------------------------------------------------------------------------------- facts


def test_questions_passages_and_answers_belong_together() -> None:
    task = Facts(names=8, relations=3, values=12, words=6, segments=3, hits=3, ask=1.0)
    batch = {name: tensor.numpy() for name, tensor in task.batch(16, (7,)).items()}
    at = task.offsets
    asked = 0
    for b, s in zip(*np.nonzero(batch["truth"] >= 0)):
        fact = batch["passages"][b, s, batch["truth"][b, s]]
        tokens = batch["tokens"][b]
        across = batch["rows"][b, s] == 64
        start = s * 64 + (60 if across else batch["rows"][b, s] - 4)
        assert tokens[start] == QUESTION and tokens[start + 1 : start + 4].tolist() == fact[:3].tolist()
        assert tokens[start + 5] == fact[3] and at["value"] <= fact[3] < at["word"]
        seen = s + 1 if across else s
        assert batch["since"][b, seen] == (0 if across else batch["rows"][b, s])
        assert (batch["passages"][b, seen] == batch["passages"][b, s]).all()
        if batch["valid"][b, seen]:
            asked += 1
            assert batch["targets"][b, start + 4] == fact[3]
        others = np.delete(batch["passages"][b, s], batch["truth"][b, s], 0)
        assert not (others[:, :3] == fact[:3]).all(1).any(), "only one passage answers the question"
    assert asked > 10


def test_subjects_of_the_evaluation_are_never_drawn_in_training() -> None:
    task, draw = Facts(names=6), np.random.default_rng(0)
    ours, theirs = ({tuple(task.fact(draw, held)[:2]) for _ in range(500)} for held in (False, True))
    assert not ours & theirs and len(theirs) == 4


def test_search_loss_falls_when_queries_find_their_passages() -> None:
    task = Facts(names=8, relations=3, values=12, words=6)
    model = model_for(task.vocab_size, retrieval_slots=2, retrieval_hits=4, retrieval_dim=16)
    batch = task.batch(4, (3,))
    hits, keys = fetched(model, batch, 2)
    assert hits.values.shape == (4, 3, 4 * 2, 32) and keys.shape == (4, 3, 4, 16)
    states, _, _ = model.trajectory(batch["tokens"], hits=hits)
    loss = search_loss(model, states[-1], batch, keys)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(15):
        optimizer.zero_grad()
        total, _, _ = Objective(model, Recipe(model=SMALL, depths=(2,)))(batch, "loops", 2)
        total.backward()
        optimizer.step()
    hits, keys = fetched(model, batch, 2)
    states, _, _ = model.trajectory(batch["tokens"], hits=hits)
    assert search_loss(model, states[-1], batch, keys) < 0.7 * loss


def test_hits_are_seen_from_their_row_on_and_until_the_segment_ends() -> None:
    task = Facts(names=8, relations=3, values=12, words=6)
    model = model_for(task.vocab_size, retrieval_slots=2, retrieval_hits=4, retrieval_dim=16, memory="titans")
    batch = task.batch(4, (3,))
    hits, _ = fetched(model, batch, 2)
    only = hits._replace(valid=torch.zeros_like(hits.valid), since=torch.full_like(hits.since, 10))
    some = only._replace(valid=only.valid.clone())
    some.valid[:, 1] = True
    with torch.no_grad():
        without, nothing, changed = (model.trajectory(batch["tokens"], hits=h)[0][-1] for h in (None, only, some))
    torch.testing.assert_close(without, nothing, rtol=0, atol=1e-6)
    torch.testing.assert_close(changed[:, : 64 + 10], nothing[:, : 64 + 10], rtol=0, atol=1e-5)
    assert (changed[:, 64 + 10 : 128] - nothing[:, 64 + 10 : 128]).abs().amax(-1).min() > 1e-4


def test_facts_are_measured_with_and_without_a_knowledge_base(tmp_path: Path) -> None:
    task = Facts(names=8, relations=3, values=12, words=6)
    model = model_for(task.vocab_size, retrieval_slots=2, retrieval_hits=4, retrieval_dim=16)
    result = task.evaluate(model, questions=20)
    assert {"with", "swapped", "without", "found_with", "questions", "chance"} <= result.keys()
    assert all(0 <= result[name] <= 1 for name in ("with", "swapped", "without", "found_with", "found_swapped"))
    task.draw_plot(result, tmp_path / "facts.png", 64)
    assert PASSAGE == 5 and (tmp_path / "facts.png").is_file()


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "sums"}, "task: got 'sums', expected one of recall, facts"),
        ({"name": "recall", "pears": 3}, "task recall: unknown key 'pears'; known keys are "),
        ({"name": "recall", "pairs": 40}, "task recall: pairs: got 40, expected at most"),
        ({"name": ["recall"]}, "task: got ['recall'], expected one of recall, facts"),
        ({"name": "recall", "pairs": 2.5}, "task recall: pairs: got 2.5, expected a whole number"),
        ({"name": "facts", "names": 1}, "task facts: names: got 1, expected a whole number from 2 to 1048576"),
        ({"name": "facts", "hits": 9}, "task facts: hits: got 9, expected at most retrieval_hits (4)"),
        ({"name": "facts", "ask": 2}, "task facts: ask: got 2, expected a share in 0..1"),
    ],
)
def test_wrong_tasks_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_task(options, RMSEConfig(vocab_size=1000, memory="titans", retrieval_slots=2))
    assert_one_line(str(error.value), said)


def test_a_vocabulary_too_small_for_the_task() -> None:
    with pytest.raises(ConfigError, match=r"model.vocab_size: got 100, the task recall needs 192"):
        make_task({"name": "recall"}, RMSEConfig(vocab_size=100, memory="titans"))


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [("recall", {}, "model.memory: got 'none'"), ("facts", {"memory": "titans"}, "model.retrieval_slots: got 0")],
)
def test_a_model_that_cannot_do_the_task(name: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_task({"name": name}, RMSEConfig(vocab_size=1000, **changes))


def test_a_memory_wants_more_than_one_segment() -> None:
    with pytest.raises(ConfigError, match=r"model.block_size: got 64, expected at least 128"):
        Recipe(model={"memory": "titans", "block_size": 64})


def test_a_task_takes_no_text_and_a_text_needs_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("abc\n")
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"task": {"name": "recall"}, "model": {"vocab_size": 192}}))
    assert main(["--recipe", str(recipe), "--text", str(tmp_path / "text.txt"), "-o", str(tmp_path / "o")]) == 2
    assert_one_line(capsys.readouterr().err, "the recipe has a task and takes no text")
    assert main(["-o", str(tmp_path / "o")]) == 2
    assert_one_line(capsys.readouterr().err, "missing --text FILE")
    assert not (tmp_path / "o").exists()
