"""The model: calls of any size say the same thing, stopped positions are seen as the KV rule says, padding is nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import RingHost, dials, lively_model, small_config, whole_sequence
from torch import Tensor

from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.errors import ConfigError
from rmse_edge.layers.masks import MASKED, ring_mask
from rmse_edge.loop.contract import LoopModel
from rmse_edge.loop.drive import run_loop

VARIANTS: dict[str, dict[str, Any]] = {
    "learned": {},
    "temporal_rope": {"step_encoding": "temporal_rope", "step_dims": 4},
    "none": {"step_encoding": "none"},
    "elementwise": {"attention_gate": "elementwise", "n_kv_heads": 4, "exit_rules": ("gate", "delta", "entropy")},
}
SETTINGS: dict[str, dict[str, float]] = {
    "full": {},
    "gate": {"exit_threshold": 0.6},
    "delta": {"exit_epsilon": 0.4, "min_loops": 2},
    "gate, 4 loops at most": {"exit_threshold": 0.8, "min_loops": 2, "max_loops": 4},
}
CHUNKS = {"64": [64], "mixed": [17, 1, 64, 5, 33, 2], "1": [64, 53, *[1] * 33]}  # the last behind a full ring


def tokens_for(model: RMSE, length: int, batch: int = 1, seed: int = 1) -> Tensor:
    return torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], tolerance: float = 1e-5) -> None:
    assert torch.equal(ours[1], theirs[1]), "depths differ"
    assert (ours[0] - theirs[0]).abs().max().item() <= tolerance


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_chunked_calls_equal_the_whole_sequence(variant: str, setting: str) -> None:
    """150 positions, a window of 64: the ring wraps twice."""
    model = lively_model(small_config(**VARIANTS[variant]))
    tokens = tokens_for(model, 150)
    dial = dials(model, **SETTINGS[setting])
    if setting == "gate" and "exit_entropy" in dial:
        dial["exit_entropy"] = torch.tensor(2.0)
    expected = whole_sequence(model, tokens, dial)
    if setting != "full":
        assert expected[1].float().std() > 0.3, f"depths hardly vary: {expected[1].unique(return_counts=True)}"
    for name, sizes in CHUNKS.items():
        host = RingHost(model)
        assert_same(host.feed(tokens, dial, sizes, pad_to=64 if name == "64" else 0), expected)


def test_a_rounded_cache_reads_the_same_in_every_chunking() -> None:
    """Rounding before use: were K and V rounded only when cached, a token would read others' numbers from the ring."""
    model = lively_model(small_config(kv_dtype="float16"))
    tokens = tokens_for(model, 150)
    dial = dials(model, exit_threshold=0.6)
    expected, depth = whole_sequence(model, tokens, dial)
    plain = lively_model(small_config())
    rounding = (whole_sequence(plain, tokens, dials(plain))[0] - whole_sequence(model, tokens, dials(model))[0]).abs()
    for sizes in CHUNKS.values():
        host = RingHost(model)
        logits, host_depth = host.feed(tokens, dial, sizes)
        assert host.state["past_keys"].dtype == torch.float16
        assert torch.equal(host_depth, depth)
        # Noise of 1e-7 crosses a rounding boundary of the cache now and then, and one number moves by one step: how often
        # depends on the processor. Other numbers in the ring than in use change logits by a third of `rounding` and more.
        error = (logits - expected).abs().amax(-1)
        assert error.median() <= 0.15 * rounding.amax(-1).median() and error.max() <= rounding.max()


def test_a_stopped_position_supplies_propagated_keys_to_loops_that_never_ran() -> None:
    """Chunk calls whose every row stops at once must leave the same ring as calls that run to the end."""
    model = lively_model(small_config())
    tokens = tokens_for(model, 60)
    host = RingHost(model)
    host.feed(tokens, dials(model, max_loops=1), [20])
    keys = host.state["past_keys"]
    assert keys[:, 0, :, :60].abs().amin((1, 3)).gt(0).all(), "a loop that never ran left no keys"
    # By hand: the exit state of loop 1 enters every deeper loop.
    states = []
    model.trajectory(tokens, 1, lambda k, before, after, gate: states.append(after) or torch.zeros_like(tokens) > 0)
    prelude = model.prelude({"tokens": tokens})
    for k in range(1, model.config.max_loops):
        x = model.block.attention_norm(model.enter(states[0], prelude["injection"], k))
        angles = [torch.from_numpy(a)[None] for a in rotary(model, 60)]
        expected, _ = model.block.attention.keys_values(x, k, *angles)
        torch.testing.assert_close(keys[k, :, :, :60], expected, rtol=0, atol=1e-5)


def rotary(model: RMSE, count: int):
    import numpy as np

    from rmse_edge.layers.rope import rotary_angles

    return rotary_angles(np.arange(count), model.config.rotary_dims, model.config.rope_theta)


def test_the_dial_is_at_most_the_trained_depth_and_counts_from_one() -> None:
    model = lively_model(small_config())
    tokens = tokens_for(model, 30)
    for loops in (1, 3, 5):
        _, depth = RingHost(model).feed(tokens, dials(model, max_loops=loops), [30])
        assert (depth == loops).all()
    _, depth = RingHost(model).feed(tokens, dials(model, exit_epsilon=1e9), [30])
    assert (depth == 1).all()
    _, depth = RingHost(model).feed(tokens, dials(model, exit_epsilon=1e9, min_loops=4), [30])
    assert (depth == 4).all()


@pytest.mark.parametrize(
    "changes", [{}, {"kv_dtype": "float16"}, {"exit_rules": ("gate", "delta", "entropy")}], ids=str
)
def test_a_whole_text_is_what_calls_give(changes: dict[str, Any]) -> None:
    """Rules together and apart, between the least and the most loops: as `RingHost` has it, which composes them itself."""
    model = lively_model(small_config(**changes))
    tokens = tokens_for(model, 200)
    settings: list[dict[str, float]] = [
        {}, {"exit_threshold": 0.7}, {"exit_epsilon": 0.6, "min_loops": 2}, {"max_loops": 3, "exit_threshold": 0.7}
    ]  # fmt: skip
    settings += [{"exit_entropy": 2.5, "exit_threshold": 0.9, "min_loops": 2}] if "exit_rules" in changes else []
    for chosen in settings:
        dial = dials(model, **chosen)
        logits, depth = RingHost(model).feed(tokens, dial, [64, 9])
        found = model.whole_text(tokens[0], dial)
        tight = found.margin < 1e-4  # a decision that may go either way
        assert tight.sum() <= 2 and (found.depth == depth[0])[~tight].all() and len(found.surprise) == 0
        if not tight.any():
            assert (found.logits - logits[0]).abs().max() <= (2e-2 if "kv_dtype" in changes else 1e-4)
        most, least = int(dial["max_loops"]), int(dial["min_loops"])
        assert (
            found.depth.min() >= least
            and found.depth.max() <= most
            and (len(set(depth[0].tolist())) > 1) == (chosen != {})
        )
        assert set(found.scores) == {
            "exit_threshold",
            "exit_epsilon",
            *({"exit_entropy"} if "exit_rules" in changes else ()),
        }
        assert all(score.shape == (most, 200) for score in found.scores.values())


def test_the_loop_physically_stops() -> None:
    model = lively_model(small_config())
    seen: list[int] = []
    model.block.register_forward_pre_hook(lambda block, given: seen.append(int(given[1])))
    RingHost(model).call(tokens_for(model, 8), dials(model, exit_epsilon=1e9, min_loops=2))
    assert seen == [0, 1]


def test_batches_run_as_their_rows_do() -> None:
    model = lively_model(small_config())
    tokens, dial = tokens_for(model, 90, batch=3), dials(model, exit_threshold=0.6)
    logits, depth = RingHost(model, batch=3).feed(tokens, dial, [64, 9])
    for row in range(3):
        assert_same((logits[row : row + 1], depth[row : row + 1]), whole_sequence(model, tokens[row : row + 1], dial))


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_never_reaches_valid_rows(variant: str) -> None:
    model = lively_model(small_config(**VARIANTS[variant]))
    tokens, dial = tokens_for(model, 40), dials(model, exit_threshold=0.6)
    outs, rings = [], []
    for seed in (0, 1):
        host = RingHost(model)
        host.call(tokens[:, :20], dial)
        garbage = tokens_for(model, 64, seed=seed)
        garbage[:, :20] = tokens[:, 20:]
        spec, config = model.spec(64), model.config
        angles = [torch.from_numpy(a[20:84])[None] for a in rotary(model, 84)]
        tensors = model.prelude({"tokens": garbage}) | host.state | dict(zip(("cos", "sin"), angles))
        tensors |= {"position": torch.tensor([20]), "n_valid": torch.tensor([20])}
        with torch.no_grad():
            result = run_loop(model, spec, tensors, dial)
            committed = model.commit(tensors | result)
        assert (result["depth"][:, 20:] == 0).all(), "padding is never active"
        outs.append(torch.cat([result["h"][0, :20].flatten(), result["depth"][0, :20].float()]))
        rings.append(committed["keys"][..., :20, :])
        assert config.window == 64
    # Not bit for bit: other padding sorts other rows between the experts' and moves the matmul's block boundaries.
    torch.testing.assert_close(*outs, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(*rings, rtol=1e-6, atol=1e-5)


def test_masks_are_finite_in_float16_and_every_row_sees_itself() -> None:
    assert torch.isfinite(torch.tensor(MASKED, dtype=torch.float16))
    five = torch.tensor([5])
    mask = ring_mask(torch.tensor([70]), five, 64, 64)  # (1, 1, 64, W + 64)
    assert torch.isfinite(mask.half()).all() and set(mask.unique().tolist()) == {0.0, MASKED}
    assert (mask[0, 0, :, 64:].diagonal() == 0).all()
    # Absolute distance: the query at 70 + i sees positions 70 + i - 63 .. 70 + i, of which the ring holds 6 .. 69.
    for i in range(5):
        assert (mask[0, 0, i, :64] == 0).sum() == 63 - i
        assert (mask[0, 0, i, 64:] == 0).sum() == i + 1
    first = ring_mask(torch.tensor([0]), five, 64, 64)
    assert (first[..., :64] == MASKED).all(), "an empty ring is not seen"


def test_float16_states_stay_finite() -> None:
    model = lively_model(small_config(kv_dtype="float16")).half()
    host = RingHost(model)
    logits, _ = host.feed(tokens_for(model, 70), dials(model, exit_threshold=0.7), [64])
    assert logits.dtype == torch.float16 and torch.isfinite(logits).all()


def test_temporal_rope_is_felt_in_every_loop() -> None:
    """Queries and keys of one loop meet only each other: turned alike, the loop index would cancel in q.k."""
    model = lively_model(small_config(step_encoding="temporal_rope", step_dims=8))
    attention, x = model.block.attention, torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(2))
    cos, sin = (torch.from_numpy(a)[None] for a in rotary(model, 12))
    mask = torch.full((1, 1, 12, 12), MASKED).triu(1)
    with torch.no_grad():
        outs = [attention(x, k, cos, sin, *attention.keys_values(x, k, cos, sin), mask) for k in range(5)]
    for i in range(5):
        for j in range(i):
            assert (outs[i][:, 1:] - outs[j][:, 1:]).abs().max() > 1e-3, f"loops {j} and {i} attend alike"


@pytest.mark.parametrize("encoding", ["learned", "temporal_rope", "none"])
def test_a_tensor_loop_index_equals_a_python_one(encoding: str) -> None:
    model = lively_model(small_config(step_encoding=encoding, step_dims=4))
    x = torch.randn(1, 6, 32)
    cos, sin = (torch.from_numpy(a)[None] for a in rotary(model, 6))
    mask = torch.zeros(1, 1, 6, 6)
    for k in range(5):
        plain = model.block(model.enter(x, x, k), k, cos, sin, mask)
        traced = model.block(model.enter(x, x, torch.tensor(k)), torch.tensor(k), cos, sin, mask)
        assert all(torch.equal(a, b) for a, b in zip(plain, traced))
    every = model.propagate(x, x, cos, sin)
    for k in range(5):
        one = model.block.attention.keys_values(model.block.attention_norm(model.enter(x, x, k)), k, cos, sin)
        for a, b in zip(every, one):
            torch.testing.assert_close(a[k], b, rtol=0, atol=1e-6)


def test_positions_that_stopped_are_not_computed() -> None:
    """A block that computes only who is running, few or many of each sequence, says of them what it says of all."""
    model = lively_model(small_config())
    tokens = torch.cat([tokens_for(model, 64)] * 3)
    last = torch.tensor([0, 2, 4])[:, None] + torch.arange(64) % 2  # (3, 64): each sequence stops at other loops
    stop = lambda k, before, after, gate: k >= last  # noqa: E731
    widths: list[int] = []
    hook = model.block.experts.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    with torch.no_grad():
        few = model.trajectory(tokens[:1], stop=lambda k, before, after, gate: k >= last[:1])
        assert widths == [64, 32]  # then nobody is left
        some = model.trajectory(tokens, stop=stop)
        only = model.trajectory(tokens, stop=stop, every=False)
        model.block.experts.observer = lambda k, routing: None  # whoever observes hears of all positions
        widths.clear()
        every = model.trajectory(tokens, stop=stop)
    hook.remove()
    assert widths == [64] * 5
    assert torch.equal(some[2], every[2]) and torch.equal(only[0][0], some[0][-1]) and len(only[0]) == 1
    for a, b in zip([*some[0], some[1], *few[0]], [*every[0], every[1], *(h[:1] for h in every[0])]):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_frozen_keys_are_another_rule() -> None:
    """The ablated rule must differ where positions stop and agree where none does."""
    model = lively_model(small_config())
    tokens = tokens_for(model, 80)
    never = lambda k, before, after, gate: torch.zeros_like(tokens, dtype=torch.bool)  # noqa: E731
    early = lambda k, before, after, gate: (tokens % 2 == 0) if k == 0 else tokens < 0  # noqa: E731
    with torch.no_grad():
        for stop, same in ((never, True), (early, False)):
            a, b = (model.trajectory(tokens, stop=stop, stopped_kv=rule)[0][-1] for rule in ("propagate", "frozen"))
            assert ((a - b).abs().max() < 1e-5) == same


def test_without_shared_experts_and_with_tied_embeddings() -> None:
    model = lively_model(small_config(n_shared_experts=0, tie_embeddings=True))
    assert model.head_proj.weight is model.embed.weight
    tokens, dial = tokens_for(model, 70), dials(model)
    assert_same(RingHost(model).feed(tokens, dial, [64]), whole_sequence(model, tokens, dial))


def test_the_protocol_and_its_spec() -> None:
    model = lively_model(small_config())
    assert isinstance(model, LoopModel)
    spec = model.spec(8)
    assert spec.max_loops == 5 and [t.name for t in spec.carried] == ["h", "active", "depth", "log_survival"]
    for bad in (0, 65):
        with pytest.raises(ConfigError, match=rf"chunk: got {bad}, expected 1\.\.window \(64\)"):
            model.spec(bad)


def test_sixty_four_loops() -> None:
    model = lively_model(small_config(max_loops=64))
    tokens, dial = tokens_for(model, 10), dials(model)
    logits, depth = RingHost(model).feed(tokens, dial, [4])
    assert (depth == 64).all() and torch.isfinite(logits).all()


def test_without_an_encoding_every_loop_is_one_function() -> None:
    """A loop is told apart by nothing: two loops from one state are alike, where a learned encoding makes them differ."""
    x, mask = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(2)), torch.zeros(1, 1, 6, 6)
    for encoding, alike in (("none", True), ("learned", False)):
        model = lively_model(small_config(step_encoding=encoding))
        cos, sin = (torch.from_numpy(a)[None] for a in rotary(model, 6))
        with torch.no_grad():
            first, last = (model.block(model.enter(x, x, k), k, cos, sin, mask)[0] for k in (0, 4))
        assert torch.equal(first, last) == alike
        assert any("step" in name for name in model.state_dict()) != alike
