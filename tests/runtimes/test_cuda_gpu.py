"""The CUDA engine on a GPU: recordings, kernels and types against the CPU. One command runs all of it: make gpu."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import TEXTS, Case, settings_of, text_of, whole
from helpers import fed_in

from rmse_edge.arch.common.identity import model_info
from rmse_edge.quantize import load_quantized
from rmse_edge.runtimes.cuda.batch import TextBatch
from rmse_edge.runtimes.engines.cuda import DTYPES, CudaMethods, CudaRuntime, matrices_in

pytestmark = pytest.mark.gpu
# Some models of the tests make tensors on the CPU, whatever their own place.
ON_GPU = [case for case in TEXTS if case.name not in ("tower", "toy_recurrent", "toy")]
texts = pytest.mark.parametrize("case", ON_GPU, ids=lambda case: case.name)
SIZES = (16, 1, 1, 1, 9, 1, 1, 1)  # calls of one row often enough to be recorded, and replayed


def replays(runtime: CudaRuntime) -> bool:
    assert isinstance(runtime.methods, CudaMethods)
    return all(recording.graph is not None for recording in runtime.methods.loops[1].recordings[:1])


@texts
@pytest.mark.parametrize("exits", ["flags", "cond"])
@pytest.mark.parametrize("ahead", [1, 2, 4])
def test_float32_says_what_the_cpu_says(case: Case, exits: str, ahead: int) -> None:
    """Tokens and depths equal, by recordings that were replayed."""
    if exits == "cond" and ahead > 1:
        pytest.skip("the device decides: nothing is launched ahead")
    text = text_of(case)
    runtime = CudaRuntime(copy.deepcopy(case.model()), case.name, ahead=ahead, exits=exits)
    for setting in ("full depth", "adaptive", "shallow"):
        dials = settings_of(case)[setting]
        logits, depth = whole(case.model(), text, dials)
        ours, our_depth = fed_in(runtime, text, dials, SIZES)
        assert np.array_equal(our_depth, depth)
        assert np.array_equal(ours.argmax(-1), logits.argmax(-1))
        np.testing.assert_allclose(ours, logits, atol=2e-4)
    assert replays(runtime)


@texts
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_16_bits_by_the_rounded_rule(case: Case, dtype: str) -> None:
    """Against the identically rounded model on the CPU: the same top token of 98 % of the positions, the same depth of 97 %."""
    text, dials = text_of(case), settings_of(case)["adaptive"]
    rounded = copy.deepcopy(case.quantizable())
    with torch.no_grad():
        for name, weight in matrices_in(rounded, DTYPES[dtype]).items():
            rounded.get_parameter(name).copy_(weight.float())
    logits, depth = whole(rounded, text, dials)
    runtime = CudaRuntime(copy.deepcopy(case.quantizable()), case.name, dtype=dtype)
    ours, our_depth = fed_in(runtime, text, dials, SIZES)
    assert (ours.argmax(-1) == logits.argmax(-1)).mean() >= 0.98
    assert (our_depth == depth).mean() >= 0.97


@texts
def test_integers_by_the_rounded_rule(case: Case, tmp_path: Path) -> None:
    if "int4" not in case.quants or case.name == "hybrid":
        pytest.skip("its integers have another format than those of this test")
    case.stored(tmp_path / "q", "int4")
    text, dials = text_of(case), settings_of(case)["adaptive"]
    logits, depth = whole(load_quantized(tmp_path / "q", lean=False).model, text, dials)
    ours, our_depth = fed_in(CudaRuntime.open(tmp_path / "q"), text, dials, SIZES)
    assert (ours.argmax(-1) == logits.argmax(-1)).mean() >= 0.98
    assert (our_depth == depth).mean() >= 0.97


@texts
def test_a_batch_says_what_each_text_says_alone(case: Case) -> None:
    info, text = model_info(case.model(), case.name, 0), text_of(case)
    dials = settings_of(case)["adaptive"]
    batch = TextBatch(copy.deepcopy(case.model()).to("cuda"), info, rows=5, device="cuda")
    alone = CudaRuntime(copy.deepcopy(case.model()), case.name)
    given = [text[i : i + 12] for i in range(5)]
    for ids, fed in zip(given, batch.feed(given, dials)):
        alone.reset()
        expected = alone.feed(ids, dials, "last")
        assert np.array_equal(fed.depth, expected.depth)
        np.testing.assert_allclose(fed.logits, expected.logits, atol=2e-4)


def test_the_host_waits_for_nothing_but_flags_and_answers() -> None:
    """Replayed, a call at full depth asks the device for as many flags as it has to, and no kernel call makes it wait."""
    case = next(c for c in ON_GPU if c.name == "rmse")
    runtime = CudaRuntime(copy.deepcopy(case.model()), case.name)
    dials = settings_of(case)["full depth"]
    for token in text_of(case)[:4]:
        runtime.feed([int(token)], dials)
    methods = runtime.methods
    assert isinstance(methods, CudaMethods) and replays(runtime)
    loop = methods.loops[1]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # events, which the flags are, are no synchronising calls to it
    try:
        loop(dials.max_loops)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert loop.launched == dials.max_loops
