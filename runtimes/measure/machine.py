"""What the machine gives and what the process takes: memory bandwidth and resident memory."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

BUFFER = 128 << 20  # bytes of each of two arrays: far beyond the caches of phones and most desktops


def copy_bandwidth(threads: int = 1, nbytes: int = BUFFER, repeats: int = 5) -> float:
    """Bytes per second that `threads` threads read and write together while copying arrays, the median of `repeats`."""
    source, target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads)))
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats + 1):  # the first one warms up: pages are mapped, threads start
            start = perf_counter()
            list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), parts))  # NumPy lets go of the GIL while copying
            seconds.append(perf_counter() - start)
    return 2 * nbytes / median(seconds[1:])


def device_bandwidth(nbytes: int = 1 << 30, repeats: int = 20) -> float:
    """Bytes per second that a GPU reads and writes together while copying a tensor, the median of `repeats`."""
    import torch

    source = torch.ones(nbytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    milliseconds = []
    for _ in range(repeats + 1):  # the first one warms up
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        milliseconds.append(start.elapsed_time(end))
    return 2 * nbytes / (median(milliseconds[1:]) / 1000)


def resident_bytes() -> tuple[int | None, int | None]:
    """(now, at most so far) resident memory of this process; None where the system does not tell."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not ru_maxrss: on Linux a new process inherits the maximum of the one that started it.
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        now, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        return now, peak
    try:
        import resource
    except ImportError:  # Windows
        return None, None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None, peak if sys.platform == "darwin" else peak * 1024
