"""How the blocks of the Triton kernels are best cut, on the GPU at hand: one row times packed and plain weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product as pairs_of
from statistics import median
from typing import Any

import torch

from rmse_edge.quantize.tensors import Format, round_to_nearest
from rmse_edge.runtimes.measure.machine import device_bandwidth

SIZES = ((2304, 768), (768, 2304), (4096, 4096))  # outputs, inputs
OUTPUTS, INPUTS, WARPS = (4, 8, 16), (128, 256, 512), (2, 4)


def sweep(rounds: int, say: Callable[[str], object]) -> list[dict[str, Any]]:
    """Every cut of `rows_kernel` on a dense layer in int4 and int8, best first of each, and cuBLAS in bfloat16 beside them."""
    from rmse_edge.layers.triton_kernels import ROWS, Blocks, product

    bandwidth, found = device_bandwidth(), []
    for outputs, inputs in SIZES:
        x = torch.randn(1, inputs, device="cuda")
        plain = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)
        short = x.to(torch.bfloat16)
        cases: list[tuple[str, str, int, Callable[[], object]]] = []
        multiply = partial(torch.nn.functional.linear, short, plain)
        cases.append((f"bf16 {outputs} x {inputs}", "cuBLAS", plain.nbytes, multiply))
        for fmt in (Format(4, 32), Format(8)):
            q = round_to_nearest(torch.randn(outputs, inputs), fmt)
            codes, scales = q.packed().cuda(), q.scales.to(torch.bfloat16).cuda()
            for cut in (Blocks(*sizes) for sizes in pairs_of(OUTPUTS, INPUTS, WARPS)):
                name = f"{'* ' if cut == ROWS else ''}{cut.outputs} x {cut.inputs}, {cut.warps} warps"
                work = partial(product, x, codes, scales, None, fmt.bits, None, 1, False, torch.float32, cut)
                cases.append((f"int{fmt.bits} {outputs} x {inputs}", name, codes.nbytes + scales.nbytes, work))
        say(f"kernels: {outputs} x {inputs}")
        rows = []
        for name, blocks, nbytes, work in cases:
            seconds = timed(work, rounds)
            rows.append(
                {"product": name, "blocks": blocks, "us": 1e6 * seconds, "of_bandwidth": nbytes / seconds / bandwidth}
            )
        found += sorted(rows, key=lambda row: (row["product"], row["us"]))
    return found


def timed(work: Callable[[], object], rounds: int, calls: int = 50) -> float:
    """Seconds of one call, replayed as a graph so that launching costs nothing; the median of rounds. Small weights come from L2."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            work()
    seconds = []
    for _ in range(rounds + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000 / calls)
    return median(seconds[1:])
