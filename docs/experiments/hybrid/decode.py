"""What a layer of each mixer costs a token in an ONNX package, beside windowed attention of the same width.

    python docs/experiments/hybrid/decode.py --only gated_deltanet,rodimus,mamba3,atlas --plain gated_deltanet,rodimus

Each package has one looped layer of a mixer, without an MLP, random weights, and one loop: what is timed is a call of one position
behind 300 others, with all that the host does. What is no layer is taken off, and known from a package of four layers of attention.
All packages stand side by side and take turns. Times are the processor's of the one thread that computes, so that other
work on the machine is not counted; the medians of all turns, and ratios to attention.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from rmse_edge.arch.common.hybrid_model import HybridModel
from rmse_edge.arch.hybrid.config import HybridConfig
from rmse_edge.export import ExportRequest, export_package
from rmse_edge.export.onnx.options import OnnxOptions
from rmse_edge.loop.dials import Dials
from rmse_edge.package import Package
from rmse_edge.runtimes import runtime_for
from rmse_edge.runtimes.host.text import LoopRuntime

ATTENTION = "gated_attention"
KINDS = (ATTENTION, "gated_deltanet", "mamba3", "rodimus", "atlas", "shared_key_attention")
OPERATORS = ("gated_deltanet", "mamba3", "rodimus", "atlas")  # of which parts are one operator each
LAYERS, WINDOW, BEFORE, TOGETHER = 4, 256, 300, 10  # the last: calls of a turn


def model_of(kind: str, layers: int, width: int, segment: int) -> HybridModel:
    """Sizes as in `HybridConfig` for a width of 256, and in proportion."""
    torch.manual_seed(0)
    part = width // 4
    config = HybridConfig(
        vocab_size=256, d_model=width, layers=(kind,) * layers, max_position_embeddings=4096, window=WINDOW,
        shared_key_window=WINDOW, head_dim=part, rotary_dims=part // 4, deltanet_key_dim=part, deltanet_value_dim=part,
        mamba_head_dim=part, mamba_state_dim=part, rodimus_channels=2 * width, rodimus_state_dim=part,
        atlas_head_dim=part // 4, atlas_hidden=part // 2, atlas_segment=segment, exit_rules=(),
    )  # fmt: skip
    return HybridModel(config).eval()


def packaged(model: HybridModel, folder: Path, operators: bool) -> LoopRuntime:
    options = OnnxOptions(recurrent_operators=operators)
    export_package(model, folder, ExportRequest("onnx", options=options, check=False))
    runtime = runtime_for(Package.open(folder), threads=1)
    runtime.feed(np.arange(BEFORE) % 256, Dials(1))
    return runtime


def turn(runtime: LoopRuntime) -> float:
    """Milliseconds of a token."""
    start = time.thread_time()
    for token in range(TOGETHER):
        runtime.feed(np.array([token]), Dials(1))
    return 1e3 * (time.thread_time() - start) / TOGETHER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--segment", type=int, default=64, help="positions that an ATLAS layer learns together")
    parser.add_argument(
        "--plain", default=",".join(OPERATORS), help="those of which one in plain operators is timed, too"
    )
    parser.add_argument("--only", default=",".join(KINDS), help="mixers, separated by commas")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kinds = [ATTENTION, *(kind for kind in args.only.split(",") if kind != ATTENTION)]
    with tempfile.TemporaryDirectory() as folder:
        forms = [(ATTENTION, LAYERS, True), *((kind, 1, True) for kind in kinds)]
        forms += [(kind, 1, False) for kind in kinds if kind in args.plain.split(",")]
        runtimes = {}
        for i, (kind, layers, operators) in enumerate(forms):
            model = model_of(kind, layers, args.width, args.segment)
            runtimes[kind, layers, operators] = packaged(model, Path(folder) / str(i), operators)
            print(f"{kind}, {layers} layers{'' if operators else ', plain operators'}: exported", flush=True)
        times: dict[tuple[str, int, bool], list[float]] = {form: [] for form in forms}
        for _ in range(args.turns + 1):
            for form, runtime in runtimes.items():
                times[form].append(turn(runtime))
    found = {form: statistics.median(values[1:]) for form, values in times.items()}  # the first turn warms up
    one = (found[ATTENTION, LAYERS, True] - found[ATTENTION, 1, True]) / (LAYERS - 1)
    rest = found[ATTENTION, 1, True] - one
    print(f"\na layer of {ATTENTION}: {one:.3f} ms; the rest of a token: {rest:.3f} ms\n")
    print(f"| layer, width {args.width} | relative to {ATTENTION}, window {WINDOW} | in plain operators |")
    print("|---|---|---|")
    for kind in kinds:
        own = [(found[form] - rest) / one for form in ((kind, 1, True), (kind, 1, False)) if form in found]
        print(f"| `{kind}` | {' | '.join([f'{value:.2f}' for value in own] + [''] * (2 - len(own)))} |")


if __name__ == "__main__":
    main()
