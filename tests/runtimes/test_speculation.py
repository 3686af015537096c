"""Speculative decoding: the same text, the same distribution, and the same state as decoding without it.

tests/arch/test_every.py and test_packages.py hold every architecture and target against plain decoding.
"""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import small_dory
from helpers import ALPHABET, assert_one_line, mixed_model, random_heads, require_executorch, reseal
from toy import toy

from rmse_edge.arch.dory.model import Dory
from rmse_edge.checkpoint import save_checkpoint
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.errors import ArgumentError, PackageError
from rmse_edge.export import ExportRequest, export_package
from rmse_edge.heads import save_heads
from rmse_edge.info import DraftingInfo
from rmse_edge.loop.dials import Dials
from rmse_edge.package import Package
from rmse_edge.runtimes import LoopRuntime, runtime_for
from rmse_edge.runtimes.engines.executorch import ExecutorchRuntime
from rmse_edge.runtimes.engines.torch import TorchRuntime
from rmse_edge.runtimes.host.calls import Calls
from rmse_edge.runtimes.host.session import restore_session, save_session
from rmse_edge.runtimes.text.drafts import AGAIN, LATEST, TRIED, Rates
from rmse_edge.runtimes.text.generate import Generation
from rmse_edge.runtimes.text.sampling import Sampler, Sampling, probabilities
from rmse_edge.runtimes.text.speculation import Speculation
from rmse_edge.text import TokenNumbers

ROOT = Path(__file__).resolve().parents[2]
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
SPECULATION = Speculation(1, 4)
BY_HEADS = Speculation("heads", 4)


class Letters:
    """Token i is letter i."""

    def decode(self, ids: list[int]) -> str:
        return "".join(ALPHABET[i % 65] for i in ids)


@pytest.fixture(scope="module")
def model() -> Any:
    """With a memory, and rings that wrap."""
    return mixed_model(memory="titans", memory_dim=16, memory_hidden=32, window=64)


def written(
    runtime: LoopRuntime, count: int, speculation: Speculation | None, dials: Dials | None = None, **options: Any
) -> Generation:
    """Greedy text behind PROMPT."""
    runtime.reset()
    dials = dials or runtime.info.dials
    made = Generation(
        runtime, Letters(), PROMPT, dials, Sampler(Sampling(0.0)), count, speculation=speculation, **options
    )
    for _ in made.spans():
        pass
    list(made.rest())
    return made


def assert_same_state(one: LoopRuntime, other: LoopRuntime) -> None:
    assert one.position == other.position and one.whole and other.whole
    left, right = one.tensors(), other.tensors()
    assert left.keys() == right.keys()
    for name, array in left.items():
        np.testing.assert_allclose(array, right[name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("exits", [False, True], ids=["full depth", "adaptive"])
def test_text_depths_and_state_are_those_of_plain_decoding(model: Any, exits: bool):
    """Beyond two ends of segments, where a round may not go, and beyond where the rings begin anew."""
    one, other = TorchRuntime(model, "tiny"), TorchRuntime(model, "tiny")
    dials = one.info.dials if exits else one.info.full_depth
    plain, fast = written(one, 130, None, dials), written(other, 130, SPECULATION, dials)
    found = fast.statistics()["speculation"]
    assert found["rounds"] < 129 and 0 < found["accepted"] < found["drafted"]
    assert found["tokens_per_round"] == pytest.approx(129 / found["rounds"])
    assert fast.tokens == plain.tokens and fast.depth == plain.depth and fast.text == plain.text
    assert_same_state(one, other)
    helped = TorchRuntime(model, "tiny", heads=random_heads(model))
    for speculation in (BY_HEADS, Speculation("auto", 4)):
        fast = written(helped, 130, speculation, dials)
        assert fast.tokens == plain.tokens and fast.depth == plain.depth and fast.text == plain.text
        assert_same_state(one, helped)
    assert fast.statistics()["speculation"]["accepted"] > 0  # of "auto", which tries loops, too


def test_what_makes_the_most_tokens_a_millisecond_is_taken_after_all_were_tried(model: Any):
    """First each once untimed, then in turns; now and then another is tried again, and a source that falls behind is left."""
    rates = Rates.of(TorchRuntime(model, "tiny", heads=random_heads(model)))
    speed = {"heads": 3.0, 1: 2.0, 2: 4.0, "nothing": 1.0}
    assert list(rates.found) == [*speed]
    chosen = []
    for turn in range(4 * (TRIED + 1) + AGAIN):
        source = rates.choose()
        chosen.append(source)
        slow = source not in rates.warm or turn == 9  # the first, and one that other work on the machine made long
        rates.note(source, 2, 1e9 if slow else 2 / (1000 * speed[source]))
    assert all(chosen[: 4 * (TRIED + 1)].count(source) == TRIED + 1 for source in speed)
    assert chosen[4 * (TRIED + 1) :].count(2) == AGAIN - 1
    assert rates.statistics() == pytest.approx({"heads": 3, "1 loop": 2, "2 loops": 4, "nothing": 1})
    for _ in range(LATEST):
        rates.note(2, 1, 1.0)
    assert sum(rate.rounds for rate in rates.found.values()) % AGAIN != AGAIN - 1
    assert rates.choose() == "heads"
    assert list(Rates.of(TorchRuntime(toy(max_loops=2), "toy")).found) == [1, "nothing"]


def test_a_draft_leaves_nothing_behind(model: Any):
    runtime = TorchRuntime(model, "tiny")
    runtime.feed(np.arange(100) % 65, runtime.info.dials)
    before = {name: array.copy() for name, array in runtime.tensors().items()}
    said = runtime.ahead([1, 2, 3], runtime.info.dials)
    with runtime.aside(3) as feed:
        for row, token in enumerate((1, 2, 3)):
            np.testing.assert_allclose(feed(token, runtime.info.dials), said.logits[row], atol=2e-5)
    assert runtime.position == 100
    assert all(np.array_equal(array, before[name]) for name, array in runtime.tensors().items())
    with pytest.raises(RuntimeError), runtime.aside(2) as feed:
        feed(1, runtime.info.dials)
        raise RuntimeError
    assert runtime.whole and all(np.array_equal(array, before[name]) for name, array in runtime.tensors().items())
    runtime.feed([1], runtime.info.dials)
    with pytest.raises(ValueError, match="computed at position 100, and the text is at 101"):
        runtime.accept(said, 1)


def test_what_ends_a_text_within_a_round_ends_its_state_there(model: Any):
    """A stop string, an end token, the room, and whoever reads no further: as without speculation, in a session, too."""
    one, other = TorchRuntime(model, "tiny"), TorchRuntime(model, "tiny")
    free = written(one, 60, None)
    for at in (20, 22):  # within a round, and at its end
        for options in ({"eos": (free.tokens[at],)}, {"stop": [free.text[at : at + 2]]}):
            plain, fast = written(one, 60, None, **options), written(other, 60, SPECULATION, **options)
            assert (fast.tokens, fast.finish_reason) == (plain.tokens, plain.finish_reason)
            assert fast.text == plain.text and plain.finish_reason != "length"
            assert_same_state(one, other)
        left = []
        for runtime, speculation in ((one, None), (other, SPECULATION)):
            runtime.reset()
            made = Generation(
                runtime, Letters(), PROMPT, runtime.info.dials, Sampler(Sampling(0.0)), 60, speculation=speculation
            )
            for _ in zip(range(at), made.steps()):
                pass
            list(made.rest())
            left.append(made.tokens)
        assert left[0] == left[1]
        assert_same_state(one, other)
    limited = [TorchRuntime(model, "tiny") for _ in range(2)]
    for runtime in limited:
        runtime.info = runtime.info.with_limit(len(PROMPT) + 9)
    plain, fast = written(limited[0], 60, None), written(limited[1], 60, SPECULATION)
    assert (fast.tokens, fast.finish_reason) == (plain.tokens, "max_seq_len")


def test_a_session_goes_on_with_and_without(model: Any, tmp_path: Path):
    runtime, heir = TorchRuntime(model, "tiny"), TorchRuntime(model, "tiny")
    whole = written(runtime, 90, None)
    made = written(runtime, 50, SPECULATION)
    save_session(runtime, tmp_path / "s", made.tokens[-1:])
    for speculation in (None, SPECULATION):
        pending = restore_session(heir, tmp_path / "s").pending
        rest = Generation(
            heir, Letters(), pending, heir.info.dials, Sampler(Sampling(0.0)), 40, speculation=speculation
        )
        assert [token for token, _ in rest.steps()] == whole.tokens[50:]


# --------------------------------------------------------------------------------------------------------------- drawing


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """Over what can be drawn; nothing else may have been."""
    assert not counts[expected == 0].any()
    known = expected > 0
    wanted = expected[known] * counts.sum()
    return float(((counts[known] - wanted) ** 2 / wanted).sum())


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0, seed=1), Sampling(0.7, top_k=4, seed=2), Sampling(1.3, top_p=0.8, seed=3)]
)
def test_verified_tokens_have_the_distribution_of_the_model(sampling: Sampling):
    """Of 6 tokens, where the draft thinks otherwise: 99.9 % of true samples are below 20.5."""
    chance = np.random.default_rng(sampling.seed)
    wanted, drafting = (chance.normal(size=6).astype(np.float32) * 1.5 for _ in range(2))
    sampler, counts, drafts = Sampler(sampling), np.zeros(6), np.zeros(6)
    for _ in range(6_000):
        token, weights = sampler.draft(drafting)
        drafts[token] += 1
        counts[sampler.verify(wanted, token, weights)] += 1
    p, q = probabilities(wanted, sampling), probabilities(drafting, sampling)
    assert chi_square(counts, p) < 20.5 and chi_square(drafts, q) < 20.5
    assert np.abs(p - q).sum() > 0.3


@pytest.mark.parametrize("source", [1, "heads"])
def test_texts_have_the_distribution_of_plain_decoding(source: int | str):
    """All texts of three tokens of a vocabulary of three, against what their probabilities multiply to: 27 texts, of which 99.9 % of
    true samples are below 54.1. The draft itself is far from it.
    """
    model = toy(vocab_size=3)
    runtime = TorchRuntime(model, "toy", heads=random_heads(model))
    dials, draws, texts = runtime.info.full_depth, 500, list(product(range(3), repeat=3))

    def expected(dials: Dials) -> np.ndarray:
        found = []
        for text in texts:
            runtime.reset()
            logits = runtime.feed([0, *text[:2]], dials).logits
            found.append(np.prod([probabilities(row, sampler.sampling)[t] for row, t in zip(logits, text)]))
        return np.array(found)

    sampler, counts = Sampler(Sampling(0.5, seed=5)), np.zeros(27)
    for _ in range(draws):
        runtime.reset()
        made = Generation(runtime, TokenNumbers(), [0], dials, sampler, 3, speculation=Speculation(source, 2))
        counts[texts.index(tuple(token for token, _ in made.steps()))] += 1
    assert chi_square(counts, expected(dials)) < 54.1
    assert chi_square(counts, expected(replace(dials, max_loops=1))) > 100


# -------------------------------------------------------------------------------------------------------------- packages


@pytest.mark.onnx
@pytest.mark.slow
def test_an_onnx_package_verifies_in_calls_of_as_many_rows_as_there_are_tokens(
    remembering_package: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    rows: list[int] = []
    compute = Calls.compute

    def told(self: Calls, chunk: int, *rest: Any) -> Any:
        rows.append(chunk)
        return compute(self, chunk, *rest)

    monkeypatch.setattr(Calls, "compute", told)
    said = []
    for flags in ((), ("--speculate", "1", "--draft-tokens", "4")):
        how = ("--prompt-tokens", "3,1,4", "-n", "30", "--temperature", "0", "--ignore-eos", "-o", "json")
        argv = [str(remembering_package), *how, *flags]
        assert rmse_run(argv) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[1]["tokens"] == said[0]["tokens"] and said[1]["depth"] == said[0]["depth"]
    assert said[1]["speculation"]["rounds"] < 29 and set(rows) >= {1, 5} and max(rows) == 5


@pytest.mark.onnx
@pytest.mark.slow
def test_the_measurements_are_made_of_texts_that_are_the_same(
    remembering_package: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    script = ROOT / "docs" / "experiments" / "speculation" / "measure.py"
    argv = [str(script), str(remembering_package), *"--loops 1 --tokens 2,3 -n 9 -r 1 --prompt ROMEO:".split()]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(script), run_name="__main__")
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| 1 ")]
    assert [row[1] for row in rows] == ["2", "3"] and all(1 <= float(row[3]) <= 4 for row in rows)


@pytest.mark.parametrize(
    "target",
    [
        pytest.param("onnx", marks=pytest.mark.onnx),
        pytest.param("executorch", marks=(pytest.mark.executorch, pytest.mark.nightly)),
    ],
)
@pytest.mark.slow
def test_a_package_has_the_heads_of_its_checkpoint_and_one_copy_of_what_they_share(target: str, tmp_path: Path):
    """20 s of one core. The heads' own weights are all that it is larger by, and it is the same model: sessions go on."""
    model = toy(vocab_size=300)
    save_checkpoint(model, tmp_path / "toy", dtype=torch.float32)
    heads = random_heads(model, 1)
    made = {}
    for name in ("plain", "heads"):
        if name == "heads":
            save_heads(heads, tmp_path / "toy")
        request = ExportRequest(target, draft_tokens=3)
        made[name] = export_package(model, tmp_path / f"{name}.rmse", request, tmp_path / "toy")
    plain, helped = (runtime_for(made[name]) for name in ("plain", "heads"))
    assert isinstance(plain, LoopRuntime) and isinstance(helped, LoopRuntime)
    assert plain.info.drafting is None and helped.info.drafting == DraftingInfo(1, "h")
    assert helped.info.fingerprint == plain.info.fingerprint
    own = 4 * sum(p.numel() for p in heads.parameters())
    weights = "weights.bin" if target == "onnx" else "program.pte"
    more = [(tmp_path / f"{name}.rmse" / weights).stat().st_size for name in ("heads", "plain")]
    embedding = 4 * model.embed.weight.numel()
    assert own <= more[0] - more[1] < own + embedding / 2
    assert "draft0_1" in made["heads"].manifest["parity"]["methods"]
    tokens = written(plain, 30, None).tokens
    assert written(helped, 30, Speculation("heads", 3)).tokens == tokens
    reseal(tmp_path / "heads.rmse", lambda manifest: manifest["model"]["drafting"].update(heads=2))
    with pytest.raises(PackageError, match="draft1_1 among them"):
        runtime_for(Package.open(tmp_path / "heads.rmse"))


@pytest.mark.executorch
@pytest.mark.nightly
def test_an_executorch_package_may_have_calls_to_verify_in(tmp_path: Path):
    require_executorch()
    made = export_package(toy(), tmp_path / "toy.rmse", ExportRequest("executorch", draft_tokens=3))
    runtime = ExecutorchRuntime(made)
    assert runtime.info.chunks[:2] == (1, 4) and len(runtime.info.chunks) == 3
    tokens = written(runtime, 30, None).tokens
    assert written(runtime, 30, Speculation(1, 3)).tokens == tokens
    assert runtime.ahead([1, 2, 3, 4], runtime.info.dials).call.chunk == 4


# --------------------------------------------------------------------------------------------------------------- refused


def test_what_cannot_be_is_one_line(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_checkpoint(model, tmp_path / "tiny", dtype=torch.float32)
    shared = Dory(replace(small_dory().config, recurrent_kv_cache_mode="last_loop", kv_policy="repeat"))
    save_checkpoint(shared, tmp_path / "dory", dtype=torch.float32)
    for name, flags, said in (
        ("tiny", ("--speculate", "4"), "--speculate: got 4, expected 1..3, fewer loops than tiny has"),
        ("tiny", ("--speculate", "1", "--draft-tokens", "64"), "--draft-tokens: got 64, expected 1..63"),
        ("tiny", ("--draft-tokens", "2"), "--draft-tokens: needs --speculate"),
        ("tiny", ("--speculate", "heads"), "--speculate: tiny has no heads that draft; train some"),
        ("tiny", ("--speculate", "much"), "--speculate: got 'much', expected a number of loops, heads or auto"),
        ("dory", ("--speculate", "1"), "--speculate: dory takes one position at a time"),
    ):
        assert rmse_run([str(tmp_path / name), "--prompt-tokens", "1,2", "-n", "3", *flags]) == 2
        out, err = capsys.readouterr()
        assert not out
        assert_one_line(err, said)
    with pytest.raises(ArgumentError):
        Speculation(1, 0)
    with pytest.raises(ArgumentError, match="expected a number of loops, heads or auto"):
        Speculation("tails")
