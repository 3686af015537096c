"""The memory on the Hugging Face side: one per row, written at that row's own multiples of 64, and kept in the files.

Every comparison is made with `trajectory`, which knows neither cache nor padding nor calls, on models whose memory is
loud: `test_the_memory_is_heard` shows that none of the numbers here would be the same without it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from later import later, needs
from small_models import dials, lively_model, small_config, whole_sequence
from torch import Tensor

import rmse_edge
from rmse_edge import load_checkpoint, save_checkpoint
from rmse_edge.arch.rmse.parts import make_memory
from rmse_edge.layers.memory.atlas import Atlas

if TYPE_CHECKING:
    from rmse_edge import RMSEForCausalLM

AutoModelForCausalLM = later("transformers:AutoModelForCausalLM")

pytestmark = [pytest.mark.slow, needs("transformers", "hf")]

PAD = 65  # outside the vocabulary
RATES = {"titans": [-2.0, 0.0, -5.0], "atlas": [0.0, 0.0, -1.0, 3.0]}  # learns fast, forgets slowly


def remembering(kind: str, **changes: Any) -> RMSEForCausalLM:
    config = small_config(
        vocab_size=65, d_model=64, max_loops=4, n_experts=32, top_k=4, exit_threshold=0.6, memory=kind, memory_dim=16,
        memory_hidden=24, memory_key_dim=6, retrieval_slots=2, **changes,
    )  # fmt: skip
    model = rmse_edge.RMSEForCausalLM(rmse_edge.RMSEPretrainedConfig.from_rmse(config)).eval()
    model.rmse.load_state_dict(lively_model(config).state_dict())
    memory = model.rmse.memory
    assert memory is not None
    with torch.no_grad():
        memory.down.normal_(std=0.3)
        memory.out_proj.weight.normal_(std=0.5)
        memory.rates_proj.bias.copy_(torch.tensor(RATES[kind]))
        memory.surprise_prior.copy_(torch.tensor([0.9, 0.01, 8.0]))
    return model


@pytest.fixture(scope="module", params=["titans", "atlas"])
def model(request: pytest.FixtureRequest) -> RMSEForCausalLM:
    return remembering(request.param)


def without_memory(model: RMSEForCausalLM) -> RMSEForCausalLM:
    """The same model, deaf to its memory."""
    deaf = copy.deepcopy(model)
    assert deaf.rmse.memory is not None
    with torch.no_grad():
        deaf.rmse.memory.out_proj.weight.zero_()
    return deaf


def tokens(count: int, seed: int = 0, rows: int = 1) -> Tensor:
    return torch.randint(0, 65, (rows, count), generator=torch.Generator().manual_seed(seed))


def reference(model: RMSEForCausalLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    return whole_sequence(model.rmse, ids, dials(model.rmse, exit_threshold=model.config.exit_threshold))


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([F.pad(row, (width - row.shape[1], 0), value=PAD) for row in rows])
    return ids, (ids != PAD).long()


# --------------------------------------------------------------------------------------------------------- the same numbers


@torch.no_grad()
def test_the_memory_is_heard(model: RMSEForCausalLM) -> None:
    """Blank from the start, and by what was written: a write skipped or made in the wrong place would show."""
    ids, deaf = tokens(200), without_memory(model)
    difference = (model(ids).logits - deaf(ids).logits).abs().amax(-1)[0]
    assert difference[:64].max() > 0.1 and difference[64:].max() > 0.1
    memory = model.rmse.memory
    assert memory is not None
    unwritten, write = whole_sequence(model.rmse, ids, dials(model.rmse, exit_threshold=0.6)), memory.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "write", lambda n, count, state: (state, write(n, count, state)[1]))
        forgetful = model(ids)
    difference = (unwritten[0] - forgetful.logits).abs().amax(-1)[0]
    assert difference[:64].max() < 1e-4
    for segment in difference[64:].split(64):
        assert segment.max() > 0.05


@torch.no_grad()
def test_forward_agrees_with_the_training_path(model: RMSEForCausalLM) -> None:
    ids = tokens(200, rows=2)
    logits, depth = reference(model, ids)
    out = model(ids)
    assert torch.equal(out.depth, depth) and len(depth.unique()) == 4
    assert (out.logits - logits).abs().max() < 1e-4
    assert not torch.allclose(out.logits, without_memory(model)(ids).logits, atol=1e-2)


@torch.no_grad()
def test_logits_with_the_cache_equal_logits_without(model: RMSEForCausalLM) -> None:
    ids = tokens(200, seed=1, rows=2)
    whole = model(ids, use_cache=False)
    cache, logits, depth = None, [], []
    for piece in ids.split([60, 4, 1, 30, 33, 1, 71], 1):  # up to a boundary, onto it, across it
        out = model(piece, cache=cache)
        cache = out.cache
        logits.append(out.logits)
        depth.append(out.depth)
    assert torch.equal(torch.cat(depth, 1), whole.depth)
    assert (torch.cat(logits, 1) - whole.logits).abs().max() < 1e-4
    assert cache.memory["surprise_stats"][:, 2].tolist() == [8 + 3, 8 + 3]  # the prior's weight and a write per segment


@torch.no_grad()
def test_each_row_writes_at_its_own_boundaries(model: RMSEForCausalLM) -> None:
    """Left padding puts every row at another position: in one call some end a segment, some do not."""
    lengths = [5, 64, 90, 150]
    rows = [tokens(n, seed=n) for n in lengths]
    ids, mask = left_padded(rows)
    more = tokens(70, seed=9, rows=4)
    first = model(ids, attention_mask=mask)
    written = first.cache.memory["surprise_stats"][:, 2] - 8
    assert written.tolist() == [0, 1, 1, 2]
    second = model(more, cache=first.cache)
    cache = second.cache
    assert (cache.memory["surprise_stats"][:, 2] - 8).tolist() == [1, 2, 2, 3]
    for r, row in enumerate(rows):
        alone = model(torch.cat([row, more[r : r + 1]], 1))
        own = alone.cache
        logits = torch.cat([first.logits[r, mask[r].bool()], second.logits[r]])
        assert (logits - alone.logits[0]).abs().max() < 1e-4
        depth = torch.cat([first.depth[r, mask[r].bool()], second.depth[r]])
        assert torch.equal(depth, alone.depth[0])
        for name, tensor in cache.memory.items():
            assert (tensor[r] - own.memory[name][0]).abs().max() < 1e-4, name


@torch.no_grad()
def test_no_row_reads_the_memory_of_another(model: RMSEForCausalLM) -> None:
    ids = tokens(150, rows=2)
    other = ids.clone()
    other[1] = tokens(150, seed=8)
    a, b = model(ids).logits, model(other).logits
    assert (a[0] - b[0]).abs().max() < 1e-4 and (a[1, 64:] - b[1, 64:]).abs().max() > 0.1


# ---------------------------------------------------------------------------------------------------------------- generate


def test_generation_crosses_a_boundary_as_the_training_path_does(model: RMSEForCausalLM) -> None:
    ids = tokens(120, seed=1)
    out = model.generate(ids, max_new_tokens=16, do_sample=False)
    logits, _ = reference(model, out[:, :-1])
    assert torch.equal(logits[0, 119:].argmax(-1), out[0, 120:])
    assert torch.equal(model.generate(ids, max_new_tokens=16, use_cache=False), out)
    assert not torch.equal(without_memory(model).generate(ids, max_new_tokens=16), out)


def test_left_padded_batch_equals_each_prompt_alone(model: RMSEForCausalLM) -> None:
    """Rows come to a multiple of 64 at different new tokens, one of them twice in the prompt already."""
    rows = [tokens(n, seed=n) for n in (1, 60, 125, 130)]
    ids, mask = left_padded(rows)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=10)
    for r, row in enumerate(rows):
        alone = model.generate(row, max_new_tokens=10)
        assert torch.equal(out[r, 130:], alone[0, row.shape[1] :])


def test_generation_goes_on_from_a_copied_cache(model: RMSEForCausalLM) -> None:
    """The copy has a memory and a segment of its own: going on with one does not teach the other."""
    ids, mask = left_padded([tokens(30), tokens(59, seed=1)])
    whole = model.generate(ids, attention_mask=mask, max_new_tokens=20)
    first = model.generate(ids, attention_mask=mask, max_new_tokens=3, return_dict_in_generate=True)
    longer = torch.cat([mask, mask.new_ones(2, 3)], 1)
    for cache in (copy.deepcopy(first.cache), first.cache):
        rest = model.generate(first.sequences, attention_mask=longer, cache=cache, max_new_tokens=17)
        assert torch.equal(rest, whole)
    assert cache.memory
    cache.reset()
    assert not cache.memory and cache.segment is None
    assert torch.equal(model.generate(ids, attention_mask=mask, cache=cache, max_new_tokens=20), whole)


# ------------------------------------------------------------------------------------------------------------------- files


@torch.no_grad()
def test_files_hold_all_of_the_memory(model: RMSEForCausalLM, tmp_path: Path) -> None:
    ids = tokens(150)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    torch.use_deterministic_algorithms(True)  # memory that nobody fills is NaN
    try:
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
    finally:
        torch.use_deterministic_algorithms(False)
    assert (again(ids).logits - expected).abs().max() < 1e-4  # where weights lie in memory decides how sums round
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    for (name, a), (_, b) in zip(model.named_buffers(), again.named_buffers(), strict=True):
        assert torch.equal(a, b), name  # those that no file holds, too
    assert again.rmse.memory.surprise_prior.tolist() == pytest.approx([0.9, 0.01, 8.0])
    ours = load_checkpoint(tmp_path)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, model.rmse.state_dict()[name]), name
    save_checkpoint(ours, tmp_path / "ours", dtype=torch.float32)
    theirs = rmse_edge.RMSEForCausalLM.from_pretrained(tmp_path / "ours")
    assert (theirs(ids).logits - expected).abs().max() < 1e-4


def test_the_tables_of_atlas_survive_the_meta_device() -> None:
    """from_pretrained builds the model without storage; what is not in the file must be made again."""
    config = remembering("atlas").config
    with torch.device("meta"):
        hollow = rmse_edge.RMSEForCausalLM(config)
    hollow.to_empty(device="cpu")
    for module in hollow.modules():
        for name, buffer in module.named_buffers(recurse=False):
            getattr(module, name).copy_(torch.full_like(buffer, 7))
    hollow.apply(hollow._init_weights)
    memory, fresh = hollow.rmse.memory, make_memory(config.to_rmse())
    assert isinstance(memory, Atlas) and fresh is not None
    for name in ("first", "second", "scale"):
        assert torch.equal(memory.get_buffer(name), fresh.get_buffer(name))


# --------------------------------------------------------------------------------------------------------------- training


def test_gradients_flow_through_the_writes(model: RMSEForCausalLM) -> None:
    """At full depth the training path is differentiable too: both must agree, over three segments."""
    model = copy.deepcopy(model).train()
    ids = tokens(150, rows=2)
    model(ids, labels=ids, exit_threshold=1.0).loss.backward()
    ours = {name: p.grad.clone() for name, p in model.rmse.named_parameters() if p.grad is not None}
    model.zero_grad()
    states, _, _ = model.rmse.trajectory(ids)
    logits = model.rmse.head_proj(states[-1])
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs = {name: p.grad for name, p in model.rmse.named_parameters() if p.grad is not None}
    for name in ("key_proj.weight", "value_proj.weight", "key_conv", "rates_proj.weight", "up", "down"):
        assert theirs[f"memory.{name}"].abs().max() > 0
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() < 1e-3 * gradient.abs().max(), name


def test_gradients_are_finite_where_rows_are_at_different_positions(model: RMSEForCausalLM) -> None:
    """Rows that do not end a segment are computed along with those that do, and left out of the result."""
    model = copy.deepcopy(model).train()
    ids, mask = left_padded([tokens(3), tokens(140, seed=1)])
    labels = torch.where(mask.bool(), ids, -100)
    model(ids, attention_mask=mask, labels=labels).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), name
