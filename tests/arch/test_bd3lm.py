"""BD3-LM says what the published code says, and its denoising steps are those of Fast-dLLM and Prophet."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from rmse_edge.arch.bd3lm.config import Bd3lmConfig
from rmse_edge.arch.bd3lm.model import Bd3lm, training_mask
from rmse_edge.checkpoint import load_checkpoint, save_checkpoint
from rmse_edge.errors import CheckpointError, ConfigError
from rmse_edge.loop import unmask
from rmse_edge.loop.dials import Dials
from rmse_edge.train.diffusion import bounds, losses, masks
from rmse_edge.train.noise import SCHEDULES, times

DATA = Path(__file__).parents[1] / "data"
EXACT = 1e-5
# The folder has the settings of the training code; these are the same by the names of released models.
CONFIG = {
    "model_type": "bd3lm", "vocab_size": 40, "block_size": 4, "model_length": 12, "hidden_dim": 32, "n_blocks": 2,
    "n_heads": 4, "cond_dim": 16, "dropout": 0.0, "time_conditioning": False, "cross_attn": True, "adaln": True,
    "causal": False, "attn_backend": "sdpa", "var_min": True, "sampling_eps_min": 0.001, "sampling_eps_max": 0.999,
    "return_dict": False,
}  # fmt: skip


@functools.cache
def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(DATA / name / "inputs.safetensors") | load_file(DATA / name / "outputs.safetensors")


def published_folder(folder: Path, prefix: str = "", **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    weights = load_file(DATA / "bd3lm" / "model.safetensors")
    save_file({prefix + name: t for name, t in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Bd3lm:
    return load_checkpoint(published_folder(tmp_path_factory.mktemp("bd3lm")))


def far(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max())


# ------------------------------------------------------------------------------------------------- the published numbers


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_is_the_published_one(name: str) -> None:
    gold = golden("bd3lm")
    chance, weight = SCHEDULES[name](gold["t"])
    assert far(chance, gold[f"noise.{name}.move_chance"]) < EXACT
    scaling = -gold[f"noise.{name}.loss_scaling"]
    assert far(weight / scaling, torch.ones_like(scaling)) < EXACT


@pytest.mark.parametrize(("least", "most", "name"), [(0.0, 1.0, "full_range"), (0.3, 0.8, "clipped_0.3_0.8")])
def test_times_are_the_published_ones(least: float, most: float, name: str) -> None:
    gold = golden("bd3lm")
    found = times(gold["sample_t.uniform"], least, most).repeat_interleave(4, 1)
    assert far(found, gold[f"sample_t.{name}"]) < 1.1e-3  # published t begins at 1e-3, not at 0


@pytest.mark.parametrize(("count", "block"), [(12, 1), (12, 4), (12, 12), (8, 2)])
def test_what_tokens_see_in_training_is_the_published_mask(count: int, block: int) -> None:
    assert torch.equal(training_mask(count, block), golden("bd3lm")[f"mask.n{count}_block{block}"])


def test_training_is_the_published_one(model: Bd3lm) -> None:
    gold = golden("bd3lm")
    tokens, noisy = gold["x0"], gold["xt"]
    chance, weight = SCHEDULES["loglinear"](gold["sample_t.full_range"])
    assert far(weight, -gold["loss_scale"]) < EXACT * float(weight.max())
    masked = masks(gold["q_xt.uniform"], chance)
    assert torch.equal(masked, noisy == 39)
    with torch.no_grad():
        logits = model.denoised(noisy, tokens)
        assert far(logits, gold["train.logits"]) < EXACT
        log_p = F.log_softmax(unmask.without_mask(logits, 39), -1)[masked]
        assert far(log_p[:, :39], gold["train.log_p"][masked][:, :39]) < EXACT
        found = losses(model, tokens, masked, weight)
    assert far(found, gold["train.nll_per_token"][:, 1:]) < EXACT * float(weight.max())
    assert far(found.mean(), gold["train.loss"]) < EXACT * float(weight.max())


def test_sampling_is_the_published_one(model: Bd3lm) -> None:
    gold = golden("bd3lm")
    # Of the last block nothing is known.
    tokens = torch.cat([gold["x0"][:, :8], torch.full((2, 4), 39)], 1)
    with torch.no_grad():
        logits = model.logits_of(tokens)
    assert far(logits, gold["sample.logits_no_cache"]) < EXACT
    found = torch.softmax(unmask.without_mask(logits[:, 8:].double(), 39), -1)
    assert far(found, gold["sample.p_x0"]) < EXACT


def dials(**changes: Any) -> dict[str, torch.Tensor]:
    return {n: torch.tensor(v) for n, v in Dials(**({"max_loops": 4} | changes)).arrays().items()}


def a_call(model: Bd3lm, block: torch.Tensor, position: int, state: dict[str, torch.Tensor], **changes: Any) -> Any:
    """A call on a block (1, C), by the methods alone."""
    from rmse_edge.loop.drive import run_loop

    spec = model.spec(block.shape[1])
    places = torch.arange(position, position + block.shape[1])
    given = {name: t for name, t in _angles(model, places).items()}
    given |= {"tokens": block, "position": torch.tensor([position]), "slots": torch.arange(12)} | state
    given |= model.prelude(given)
    found = given | run_loop(model, spec, given, dials(**changes))
    return found | model.commit(found) | model.head(found["h"])


def _angles(model: Bd3lm, places: torch.Tensor) -> dict[str, torch.Tensor]:
    from rmse_edge.layers.rope import given_angles

    found = given_angles(places.numpy(), model.config.head_width, 10_000.0)
    return {name: torch.from_numpy(a)[None] for name, a in found.items()}


@torch.no_grad()
def test_blocks_with_a_cache_are_the_published_ones(model: Bd3lm) -> None:
    gold = golden("bd3lm")
    for row in range(2):
        shape = model.spec(4).state[0].shape
        state = {name: torch.zeros(shape) for name in ("past_keys", "past_values")}
        for block in range(3):
            tokens = gold["x0"][row : row + 1, 4 * block : 4 * block + 4] if block < 2 else torch.full((1, 4), 39)
            found = a_call(model, tokens, 4 * block, state, max_loops=1)
            assert int(found["iterations"]) == (block == 2)
            if block == 2:
                assert far(found["logits"], gold["sample.logits_cached_blocks"][row : row + 1, 8:]) < EXACT
            for kind in ("keys", "values"):
                state[f"past_{kind}"][..., 4 * block : 4 * block + 4, :] = found[kind]
        # Of the first layer the values of the blocks that are known; published caches keep q, k and v before the rotation.
        values = gold["sample.kv_cache_block0"][row, :8, 64:].unflatten(-1, (4, 8)).transpose(0, 1)
        assert far(state["past_values"][0, :4, :8], values) < EXACT


def test_a_released_checkpoint_is_the_same_model(model: Bd3lm, tmp_path: Path) -> None:
    again = load_checkpoint(published_folder(tmp_path / "hub", "backbone."))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    save_checkpoint(again, tmp_path / "own")
    own = load_checkpoint(tmp_path / "own")
    assert own.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), own.state_dict().values()))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"time_conditioning": True}, "time_conditioning: got true, expected false"),
        ({"block_size": 5}, r"model_length: got 12, expected a multiple of block_size \(5\)"),
        ({"block_size": 128}, "block_size: got 128"),
        ({"hidden_dim": 36}, "hidden_dim: got 36, expected an even multiple of n_heads"),
        ({"blocksize": 4}, "unknown key 'blocksize'"),
    ],
)
def test_what_is_no_such_model_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Bd3lmConfig.from_dict(CONFIG | changes)


def test_weights_of_another_width_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has shape .*, config.json asks for"):
        load_checkpoint(published_folder(tmp_path / "x", hidden_dim=16))


# ------------------------------------------------------------------------------------------------- which tokens are filled in


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9, 0.99])
def test_confidence_is_that_of_fast_dllm(threshold: float) -> None:
    gold = golden("fast_dllm")
    found = unmask.guess(gold["rule.logits"])
    masked = gold["rule.mask_index"]
    assert far(found.probability[masked], gold["rule.confidence"][masked].float()) < EXACT
    filled = unmask.fills(found, masked, torch.tensor(0), dials(max_loops=64, exit_threshold=threshold))
    assert torch.equal(filled, gold[f"rule.threshold_{threshold}.transfer"])
    proposed = torch.where(masked, found.tokens, gold["rule.x"])
    assert torch.equal(proposed, gold[f"rule.threshold_{threshold}.x0"])


def test_a_number_of_tokens_is_that_of_fast_dllm() -> None:
    gold = golden("fast_dllm")
    found, masked = unmask.guess(gold["rule.logits"]), gold["rule.mask_index"]
    order = unmask.ranks(found.probability, masked)
    assert torch.equal(masked & (order < torch.tensor([[2], [3]])), gold["rule.topk_2_3.transfer"])


def decode(trace: torch.Tensor, prompt: torch.Tensor, steps_of_block: int, length: int, **changes: Any) -> Any:
    """Blocks of 8 behind a prompt, by the logits of a trace in place of a model: tokens, and the text before every call.

    The mask's own logit is not left out, as in published code.
    """
    text = torch.cat([prompt, torch.full((1, length), 23)], 1)
    before, call = [], 0
    for first in range(prompt.shape[1], text.shape[1], 8):
        rows = slice(first, first + 8)
        for k in range(steps_of_block):
            masked = text[:, rows] == 23
            if not masked.any():
                break
            before.append(text.clone())
            found = unmask.guess(trace[min(call, len(trace) - 1)][None, rows])
            call += 1
            filled = unmask.fills(found, masked, torch.tensor(k), dials(max_loops=steps_of_block, **changes))
            text[:, rows] = torch.where(filled, found.tokens, text[:, rows])
    return text, torch.cat(before)


@pytest.mark.parametrize(("threshold", "steps"), [(0.5, 64), (0.8, 64), (0.95, 64), (None, 4)])
def test_texts_are_those_of_fast_dllm(threshold: float | None, steps: int) -> None:
    gold, name = golden("fast_dllm"), f"generate.threshold_{threshold}"
    changes = {} if threshold is None else {"exit_threshold": threshold}
    text, before = decode(gold["logits_trace"], gold["prompt"], steps, 16, **changes)
    assert torch.equal(text, gold[f"{name}.tokens"])
    assert len(before) == int(gold[f"{name}.nfe"])
    assert torch.equal(before, gold[f"{name}.x_before_each_call"])


def test_the_gap_decides_as_prophet() -> None:
    gold = golden("prophet")
    for step, expected in zip(gold["decision.step"], gold["decision.exit_of_32_steps"]):
        k, most, gap = step - 1, torch.tensor(32), torch.tensor(2.5)  # published steps count from 1
        assert torch.equal(unmask.gap_reached(gold["decision.gap"], k, most, gap), expected)
    off = unmask.gap_reached(gold["decision.gap"], torch.tensor(31), torch.tensor(32), torch.tensor(0.0))
    assert not off.any()


@pytest.mark.parametrize("name", ["slow", "medium", "fast"])
def test_texts_stop_where_prophet_stops_them(name: str) -> None:
    """Published: two blocks of 8 in 16 steps, one token each; on exit all that is left of both is filled in."""
    gold = golden("prophet")
    trace, before = gold[f"{name}.logits_trace"], gold[f"{name}.x_before_each_call"]
    answer = torch.zeros(1, 21, dtype=torch.bool)
    answer[:, 14:19] = True
    for k, text in enumerate(before.unsqueeze(1)):
        found = unmask.guess(trace[k][None])
        lead = unmask.mean_lead(found.lead, answer)
        assert far(lead[0], gold[f"{name}.average_gap_by_step"][k]) < EXACT
        stops = bool(unmask.gap_reached(lead, torch.tensor(k), torch.tensor(16), torch.tensor(2.5)))
        last = k + 1 == len(before)
        assert stops == (last and bool(gold[f"{name}.exit_triggered"]))
        rows = slice(5, 13) if (text[0, 5:13] == 23).any() else slice(13, 21)
        masked = text == 23
        if stops:
            following = torch.where(masked, found.tokens, text)
        else:
            following = text.clone()
            block = unmask.Guess(*(part[:, rows] for part in found))
            filled = unmask.fills(block, masked[:, rows], torch.tensor(k % 8), dials(max_loops=8))
            following[:, rows] = torch.where(filled, block.tokens, text[:, rows])
        assert torch.equal(following[0], gold[f"{name}.tokens"][0] if last else before[k + 1])


def test_all_is_filled_in_by_the_last_iteration() -> None:
    torch.manual_seed(0)
    found = unmask.guess(torch.randn(1, 10, 7))
    for most in (1, 3, 4, 10):
        masked, counts = torch.ones(1, 10, dtype=torch.bool), []
        for k in range(most):
            filled = unmask.fills(found, masked, torch.tensor(k), dials(max_loops=most))
            counts.append(int(filled.sum()))
            masked = masked & ~filled
        assert not masked.any()
        assert counts == sorted(counts, reverse=True) and counts[0] - counts[-1] <= 1


def test_min_loops_holds_back_what_would_be_filled_in_sooner() -> None:
    found = unmask.guess(50 * torch.eye(6)[None])
    masked = torch.ones(1, 6, dtype=torch.bool)
    for rule in ({"exit_threshold": 0.5}, {"exit_gap": 1.0}):
        one = unmask.fills(found, masked, torch.tensor(0), dials(max_loops=6, min_loops=2, **rule))
        assert int(one.sum()) == 1
        assert bool(unmask.fills(found, masked, torch.tensor(1), dials(max_loops=6, min_loops=2, **rule)).all())


# ------------------------------------------------------------------------------------------------- blocks of one token


def small(block_size: int, **changes: Any) -> Bd3lm:
    torch.manual_seed(4)
    numbers = {"vocab_size": 17, "model_length": 16, "hidden_dim": 32, "n_blocks": 2, "n_heads": 2, "dropout": 0.0}
    return Bd3lm(Bd3lmConfig(block_size=block_size, **(numbers | changes))).eval()


@torch.no_grad()
def test_blocks_of_one_token_have_the_autoregressive_loss_exactly() -> None:
    """What training computes in one pass over [masks; text] is what reading the text token by token, cache and all, says."""
    model = small(1)
    tokens = torch.randint(0, 16, (1, 12), generator=torch.Generator().manual_seed(1))
    shape = list(model.spec(1).state[0].shape)
    shape[-2] = 12
    state = {name: torch.zeros(shape) for name in ("past_keys", "past_values")}
    sequential = []
    for i, token in enumerate(tokens[0]):
        asked = a_call(model, torch.tensor([[16]]), i, state, max_loops=1)
        sequential.append(-F.log_softmax(asked["logits"][0, 0, :16], -1)[token])
        read = a_call(model, token.view(1, 1), i, state, max_loops=1)
        for kind in ("keys", "values"):
            state[f"past_{kind}"][..., i : i + 1, :] = read[kind]
    expected = torch.stack(sequential)[1:].mean()
    assert far(bounds(model, tokens)[0], expected) < EXACT
    everything = torch.ones(1, 12, dtype=torch.bool)
    assert far(losses(model, tokens, everything, torch.ones(1, 12)).mean(), expected) < EXACT


@torch.no_grad()
def test_the_bound_is_the_mean_over_all_masks() -> None:
    """Of a block of four tokens, the first of which is given, it is the sum over all seven ways to mask the others."""
    model = small(4, model_length=4)
    tokens = torch.tensor([[3, 9, 1, 12]])
    exact = 0.0
    for bits in range(1, 8):
        masked = torch.tensor([[False, *(bool(bits >> i & 1) for i in range(3))]])
        m = int(masked.sum())
        ways = {1: 3, 2: 3, 3: 1}[m]
        exact += float(losses(model, tokens, masked, torch.full((1, 4), 3 / m)).mean()) / 3 / ways
    found = float(bounds(model, tokens.expand(100, 4), 12).mean())
    assert found == pytest.approx(exact, rel=0.01)
