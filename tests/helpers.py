"""Tiny models for the export tests, and an export that does each slow step only once per test session."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rmse_edge.arch.common.identity import fingerprint, model_info
from rmse_edge.arch.rmse.config import RMSEConfig
from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.checkpoint import save_checkpoint
from rmse_edge.export.gate.compare import MARGIN
from rmse_edge.export.gate.reference import Reference, conversation, made_up_hits
from rmse_edge.heads import embedding_of
from rmse_edge.layers.mtp import HeadsConfig, MtpHeads
from rmse_edge.loop.contract import InjectedHits
from rmse_edge.package import MANIFEST, SUMS, seal, write_sums
from rmse_edge.quantize import Quantized, QuantizeRequest, Scheme, quantize
from rmse_edge.runtimes import Dials, LoopRuntime
from rmse_edge.runtimes.engines.kernels import COMPILERS
from rmse_edge.runtimes.engines.torch import TorchRuntime
from rmse_edge.text import train_character_tokenizer

RATES = {"titans": [-3.0, 1.0, -5.0], "atlas": [0.0, 0.0, -1.0, 3.0]}  # logits, as the memories' `learn` reads them
ALPHABET = "\n" + "".join(chr(33 + i) for i in range(64))  # 65 characters, as tiny Shakespeare has
SAMPLE_TOKENS = 2000
# Targets as parameters: what a package says of ONNX at every change, of the others in the nightly run.
ONNX_ALWAYS = (
    pytest.param("onnx", marks=pytest.mark.onnx),
    pytest.param("executorch", marks=(pytest.mark.executorch, pytest.mark.nightly)),
    pytest.param("coreml", marks=(pytest.mark.coreml, pytest.mark.nightly)),
)

TINY = {
    "vocab_size": 65, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "window": 64, "max_loops": 4,
    "n_experts": 32, "top_k": 4, "expert_width": 32, "shared_width": 32, "block_size": 64, "exit_threshold": 0.6,
}  # fmt: skip


def random_heads(model: Any, count: int = 2, seed: int = 0) -> MtpHeads:
    """Heads that have learnt nothing, for a model."""
    heads = MtpHeads(HeadsConfig(count, model.spec(1).h.shape[-1], 24, 1e-6, embedding_of(model), fingerprint(model)))
    heads.reset_parameters(seed)
    return heads.eval().requires_grad_(False)


def tiny_config(**changes: Any) -> RMSEConfig:
    return RMSEConfig(**(TINY | changes))


def mixed_model(seed: int = 0, **changes: Any) -> RMSE:
    """Random weights on which a wrong export shows.

    The gate makes positions stop at every depth, the norms of queries and keys differ, the balancing bias makes the
    experts that are selected others than those with the largest weights, and the logits are of a trained model's size.
    """
    torch.manual_seed(seed)
    model = RMSE(tiny_config(**changes)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("post_norm.weight"):
                p.fill_(0.5)
            if name.endswith("norm.weight"):
                p.mul_(1 + 0.3 * torch.randn_like(p))
        model.gate.weight.normal_(std=2.0 * model.config.d_model**-0.5)
        model.gate.bias.fill_(-0.7)
        model.head_proj.weight.normal_(std=0.4)
        model.block.experts.balance_bias.normal_(std=0.5)
    return model


def decisive_model() -> RMSE:
    """Random weights that int8 activations do not sway: all experts run, and the branches are small."""
    model = mixed_model(n_experts=4, top_k=4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("post_norm.weight"):
                p.mul_(0.4)
    return model


def remembering_model(memory: str = "titans", seed: int = 0, **changes: Any) -> RMSE:
    """`mixed_model` with a memory whose every part shows in the logits, and a retrieval head.

    The blank memory recalls something, it is heard clearly, and what a write does depends on the position.
    """
    sizes = {"memory_dim": 32, "memory_hidden": 64, "memory_key_dim": 8}
    head = {"retrieval_slots": 2, "retrieval_hits": 2, "retrieval_dim": 16}
    model = mixed_model(seed, memory=memory, **(sizes | head | changes))
    assert model.memory is not None
    with torch.no_grad():
        model.memory.down.normal_(std=0.3)
        model.memory.out_proj.weight.normal_(std=0.3)
        # Every write shows for several segments, but rounding does not grow from one to the next, as it would at higher rates.
        model.memory.rates_proj.bias.copy_(torch.tensor(RATES[memory]))
        model.memory.surprise_prior.copy_(torch.tensor([0.5, 0.01, 16.0]))  # so that the first segment is judged
    return model


def reference_of(model: RMSE) -> Reference:
    """What the parity gate would hold a package of `model` against."""
    return Reference(model, model_info(model, "reference", 0))


FEW = 4  # tokens of a small vocabulary


def calm_quantized() -> Quantized:
    """`remembering_model` with an int8 cache, in int4, made to be held against packages that round activations.

    With random weights, what such a rounding does grows from loop to loop, and of many tokens the two likeliest are often
    as good as tied. So here the branches are small and the tokens few, as decided as a trained model's.
    """
    model = remembering_model(vocab_size=FEW)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("post_norm.weight"):
                p.mul_(0.3)
    request = QuantizeRequest(Scheme("int4"), method="rtn", kv="int8", calibration_tokens=512, evaluation_tokens=128)
    return quantize(model, request, random_tokens(4000, 5, FEW), "f")


def random_tokens(count: int, seed: int = 0, vocab: int = 65) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, count)


QUICK_CALIBRATION = {"calibration_tokens": 512, "evaluation_tokens": 256}


def calibration_text(count: int = 4000, seed: int = 5) -> np.ndarray:
    return random_tokens(count, seed)


def decided_text(count: int) -> np.ndarray:
    """Up to 330 tokens at which no decision of `mixed_model()`, of router or exit rules, is closer than 1e-4.

    So a comparison at the settings of `test_export.DIALS` does not hinge on how a machine rounds.
    """
    assert count <= 330
    return random_tokens(330, seed=12)[:count]


@functools.cache
def _remembered_text() -> np.ndarray:
    model = remembering_model()
    info = reference_of(model).info
    vectors, cosines = (torch.from_numpy(a) for a in made_up_hits(info) or ())
    settings = [{k: torch.from_numpy(v) for k, v in d.arrays().items()} for d in (Dials(4), Dials(4, 1, 0.6))]
    places = [None, *(InjectedHits(at, vectors, cosines) for at in (90, conversation(256, info)[0]))]
    for seed in (43, *range(100)):  # 43 does, for models as they are now
        tokens = torch.from_numpy(random_tokens(260, seed))
        courses = (model.whole_text(tokens, dials, hits) for dials, hits in itertools.product(settings, places))
        if all(course.margin.min() >= 2 * MARGIN for course in courses):
            return tokens.numpy()
    raise AssertionError("no seed gives a decided text")


def remembered_text(count: int) -> np.ndarray:
    """Up to 260 tokens at which `remembering_model()` decides clearly, at full depth and with the gate, with hits from
    position 90 on, from where the gate puts them, and without: what `decided_text` is to `mixed_model()`, found anew."""
    assert count <= 260
    return _remembered_text()[:count].copy()


def write_checkpoint(model: RMSE, folder: Path) -> Path:
    """A checkpoint folder with a character tokenizer and a text sample, as the shipped model has them."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    train_character_tokenizer(ALPHABET, folder.parent / "tokenizer.json")
    # In float32: bfloat16 weights would survive fp16 storage unrounded, and prove nothing about it.
    save_checkpoint(model, folder, dtype=torch.float32, tokenizer=folder.parent / "tokenizer.json")
    text = "".join(ALPHABET[i] for i in random_tokens(SAMPLE_TOKENS, seed=1))
    (folder / "sample.txt").write_text(text, encoding="utf-8")
    return folder


def reseal(folder: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """Give a changed package the sizes and hashes that fit, as if it had been made like that.

    Args:
        change: of the manifest, in place; it has the last word, on sizes too.
    """
    path = folder / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for name in (MANIFEST, SUMS):
        (folder / name).unlink(missing_ok=True)  # it may be a hard link to that of the package this is a copy of
    manifest = seal(folder, manifest)
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")
    write_sums(folder)


def require_executorch() -> None:
    """Skip where ExecuTorch packages cannot run: without the wheel, or a compiler for the kernels."""
    if importlib.util.find_spec("executorch") is None:
        pytest.skip("needs executorch", allow_module_level=True)
    if not any(shutil.which(compiler) for compiler in COMPILERS):
        pytest.skip(f"needs a C++ compiler ({', '.join(COMPILERS)})", allow_module_level=True)


def assert_one_line(message: str, *parts: str) -> None:
    """One line of text that says all of `parts`."""
    assert message.strip() and len(message.strip().splitlines()) == 1, message
    for part in parts:
        assert part in message, message


def assert_memory_and_hits_take_part(runtime: LoopRuntime, calm: Quantized) -> None:
    """The memory learns at the segment's end and hits change what follows, as in PyTorch with the same integers.

    Args:
        runtime: of a package made of `calm`.
    """
    tokens, full = random_tokens(200, vocab=FEW), Dials(4)
    hits = np.random.default_rng(0).standard_normal((2, 2, 64)).astype(np.float32)
    found = []
    for each in (runtime, TorchRuntime(calm.model, "mem")):
        each.feed(tokens[:130], full)
        each.inject(hits)
        found.append(each.feed(tokens[130:], full))
    assert len(found[0].surprises) == len(found[1].surprises) == 1
    assert abs(found[0].surprises[0].value / found[1].surprises[0].value - 1) < 0.05
    assert (found[0].logits.argmax(-1) == found[1].logits.argmax(-1)).mean() > 0.9
    runtime.reset()
    runtime.feed(tokens[:130], full)
    assert np.abs(runtime.feed(tokens[130:], full).logits - found[0].logits).max() > 0.1  # without hits


def refused_export(target: str, checkpoint: Path, folder: Path, flags: list[str]) -> int | None:
    """The exit code of `rmse-export --target` with `flags` into `folder`; in these, "x" stands for a text."""
    from rmse_edge.cli.export import main

    (folder / "text").write_text("A" * 100)
    given = [str(folder / "text") if flag == "x" else flag for flag in flags]
    return main(["--target", target, "-m", str(checkpoint), "-o", str(folder / "p.rmse"), *given])


def fed_in(runtime: Any, text: np.ndarray, dials: Dials, sizes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Logits and depths of a text, fed in pieces of these sizes from an empty past."""
    runtime.reset()
    fed, done, i = [], 0, 0
    while done < len(text):
        fed.append(runtime.feed(text[done : done + sizes[i % len(sizes)]], dials))
        done, i = done + sizes[i % len(sizes)], i + 1
    return np.concatenate([f.logits for f in fed]), np.concatenate([f.depth for f in fed])
