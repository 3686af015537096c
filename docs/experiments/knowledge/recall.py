"""What a search of a knowledge base's index finds of the true 10 nearest, and how long it takes.

    python docs/experiments/knowledge/recall.py                    # 10,000 and 100,000 passages; some minutes on 2 cores
    python docs/experiments/knowledge/recall.py --passages 10000

Synthetic keys of 64 numbers go straight into the index, as a knowledge base puts them in. A search compares every key
(what knowledge bases do up to `vectors.EXACT` keys) or follows the graph. Recall counts distinct keys: the passages of one
key are found together. Random keys are the hardest case for a graph; those of texts lie on fewer dimensions.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from rmse_edge.knowledge.rows import point_of
from rmse_edge.knowledge.vectors import nearest, new_index, put_in

NEAREST, QUERIES, OWN = 10, 100, 1000
ROUNDING = 1e-7  # by which the keys of one text differ between machines


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def keys_of(kind: str, count: int, dims: int, random: np.random.Generator) -> np.ndarray:
    """(count, dims) unit vectors."""
    keys = random.standard_normal((count, dims))
    if kind == "half one sentence":
        keys[::2] = keys[0]
    elif kind == "each 100 times":
        keys = keys[random.integers(0, count // 100, count)]
    return unit(unit(keys) + ROUNDING * random.standard_normal(keys.shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passages", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--dims", type=int, default=64)
    args = parser.parse_args()
    print("| passages | keys | index entries | exact: recall, own key, ms | graph: recall, own key, ms |")
    print("|---|---|---|---|---|")
    for count in args.passages:
        for kind in ("all different", "half one sentence", "each 100 times"):
            random = np.random.default_rng(0)
            keys = keys_of(kind, count, args.dims, random)
            points = [point_of(key) for key in keys]
            distinct = dict(zip(reversed(points), reversed(keys)))  # of each point the first
            index = new_index(args.dims)
            put_in(index, distinct)
            measured = [measure(index, distinct, keys, exact, random) for exact in (True, False)]
            print(f"| {count:,} | {kind} | {len(index):,} | {' | '.join(measured)} |", flush=True)


def measure(
    index, distinct: dict[int, np.ndarray], keys: np.ndarray, exact: bool, random: np.random.Generator
) -> str:  # fmt: skip
    """Recall of the 10 nearest to random queries; passages found by their own key; ms of the fastest search."""
    stored = np.stack(list(distinct.values()))
    hits, times = 0, []
    for query in unit(random.standard_normal((QUERIES, keys.shape[1]))):
        begin = time.perf_counter()
        found = nearest(index, query, NEAREST, exact)
        times.append(time.perf_counter() - begin)
        least = np.sort(stored @ query)[-NEAREST]
        hits += sum(distinct[point] @ query >= least - 1e-6 for point in found)
    asked = keys[random.integers(0, len(keys), OWN)]
    own = sum(distinct[nearest(index, key, 1, exact)[0]] @ key > 1 - 1e-6 for key in asked)
    return f"{hits / QUERIES / NEAREST:.1%}, {own / OWN:.1%}, {1e3 * min(times):.2f}"


if __name__ == "__main__":
    main()
