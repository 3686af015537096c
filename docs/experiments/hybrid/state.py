"""The bytes that a package of a text model keeps between calls, behind more and more positions of a random text.

python docs/experiments/hybrid/state.py PACKAGE.rmse --positions 1000,10000,100000
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from rmse_edge.package import Package
from rmse_edge.runtimes import runtime_for

PIECE = 1000  # positions fed at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--positions", default="1000,10000")
    args = parser.parse_args()
    runtime = runtime_for(Package.open(args.package))
    draw, read = np.random.default_rng(0), 0
    print("| positions | bytes |\n|---|---|")
    for goal in map(int, args.positions.split(",")):
        while read < goal:
            count = min(PIECE, goal - read)
            runtime.feed(draw.integers(0, runtime.info.vocab_size, count), runtime.info.dials)
            read += count
        kept = runtime.tensors()
        print(f"| {read:,} | {sum(kept[name].nbytes for name in runtime.info.state):,} |", flush=True)


if __name__ == "__main__":
    main()
