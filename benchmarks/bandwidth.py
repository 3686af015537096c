"""How fast this machine reads memory, by the size of what is read again and again: python -m benchmarks.bandwidth THREADS.

A looped block is such a working set: where it fits a cache, its weights come at that cache's speed. Each thread has a
part of it to itself, as rows of a matrix are divided, and looks for its largest number, which writes nothing. What counts
is the fastest of many short readings: it is a limit, and other work on the machine only makes readings slower.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

from .child import ROOT

MEGABYTES = (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
ROUNDS = 20
SECONDS = 0.004  # of one reading, at least
# The threads are ours: a library that makes its own would have too many.
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


def read_bandwidth(threads: int, megabytes: tuple[float, ...] = MEGABYTES, rounds: int = ROUNDS) -> dict[float, float]:
    """Working set in MB -> GB/s that all threads read together, at most. Measured in this process."""
    import numpy as np

    def floats(size: float) -> int:
        return int(size * 1e6) // 4 // threads

    whole = [np.ones(floats(max(megabytes)), np.float32) for _ in range(threads)]
    best, times = dict.fromkeys(megabytes, 0.0), dict.fromkeys(megabytes, 1)

    def read(part: np.ndarray, count: int) -> None:
        for _ in range(count):
            part.max()

    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            for size in megabytes:
                parts = [array[: floats(size)] for array in whole]
                while True:
                    start = perf_counter()
                    list(pool.map(read, parts, [times[size]] * threads))
                    seconds = perf_counter() - start
                    if seconds >= SECONDS:
                        break
                    times[size] *= 2
                best[size] = max(best[size], sum(part.nbytes for part in parts) * times[size] / seconds / 1e9)
    return best


def measured(threads: int) -> dict[float, float]:
    """The same in a process of its own, whose libraries start no threads."""
    command = [sys.executable, "-m", "benchmarks.bandwidth", str(threads)]
    environment = os.environ | ONE_THREAD
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    return {float(size): speed for size, speed in json.loads(done.stdout).items()}


if __name__ == "__main__":
    print(json.dumps(read_bandwidth(int(sys.argv[1]))))
