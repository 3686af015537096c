"""Where the time goes in prefill and in decoding, by operator: ExecuTorch's own event dump (ETDump), PyTorch's profiler."""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rmse_edge.errors import ArgumentError, quiet
from rmse_edge.loop.dials import Dials
from rmse_edge.numbers import SEGMENT
from rmse_edge.package import Package
from rmse_edge.runtimes.engines.executorch import ExecutorchMethods, ExecutorchRuntime
from rmse_edge.runtimes.host.text import LoopRuntime

WHOLE = "Method::execute"
PARTS = ("DELEGATE_CALL", "OPERATOR_CALL")  # of which the other events are details
BETWEEN = "(between operators)"
PREFILL, DECODE = 4 * SEGMENT, 32  # tokens


@dataclass(frozen=True)
class Profile:
    """What an operator took in one kind of call."""

    test: str  # "pp256", "tg32"
    operator: str
    calls: int
    ms: float  # all calls together
    share: float  # of the time inside the runtime

    def to_json(self) -> dict[str, Any]:
        return vars(self)


def _profiled(ids: np.ndarray) -> tuple[tuple[str, np.ndarray], ...]:
    """Prefill and decoding of a text: a name, and the tokens of each call.

    Raises:
        ArgumentError: there are fewer than `PREFILL` tokens.
    """
    if len(ids) < PREFILL:
        raise ArgumentError("ids", f"the text has {len(ids)} tokens, a profile needs {PREFILL}; give a longer one")
    return (f"pp{PREFILL}", ids[None, :PREFILL]), (f"tg{DECODE}", ids[:DECODE, None])


def profile(package: Package, ids: np.ndarray, dials: Dials, threads: int | None) -> list[Profile]:
    """Prefill and decode a text, each in a runtime of its own; the costliest operators first.

    Args:
        ids: at least `PREFILL` tokens.
    Raises:
        UserError: there are fewer.
    """
    rows = []
    for test, calls in _profiled(ids):
        runtime = ExecutorchRuntime(package, threads, profile=True)
        runtime.info = runtime.info.with_limit(None)
        for tokens in calls:
            runtime.feed(tokens, dials, "last")
        assert isinstance(runtime.methods, ExecutorchMethods)
        with tempfile.TemporaryDirectory() as folder:
            dump = Path(folder) / "calls.etdp"
            runtime.methods.write_profile(dump)
            rows += summary(test, events(dump))
    return rows


def profile_torch(runtime: LoopRuntime, ids: np.ndarray, dials: Dials) -> list[Profile]:
    """The same of an engine that PyTorch runs: kernels on a GPU, those of replayed graphs too; on a CPU operators.

    Raises:
        ArgumentError: there are fewer than `PREFILL` tokens.
    """
    tests = _profiled(ids)
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watched

    gpu = torch.cuda.is_available()
    rows = []
    for test, calls in tests:
        for _ in range(2):  # graphs are recorded in the first round, whose times are let go
            runtime.reset()
            with watched(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as found:
                for tokens in calls:
                    runtime.feed(tokens, dials, "last")
        events = found.key_averages()
        times = {e.key: (e.self_device_time_total if gpu else e.self_cpu_time_total) / 1000 for e in events}
        total = sum(times.values())
        of = [Profile(test, e.key, e.count, times[e.key], times[e.key] / total) for e in events if times[e.key]]
        rows += sorted(of, key=lambda row: -row.ms)
    return rows


def events(dump: Path) -> dict[str, list[float]]:
    """Name -> milliseconds of every event in an ETDump."""
    found: dict[str, list[float]] = defaultdict(list)
    with quiet():  # it warns of what an ETDump without debug data does not have
        from executorch.devtools import Inspector

        for block in Inspector(etdump_path=str(dump)).event_blocks:
            for event in block.events:
                if event.perf_data is not None:
                    found[event.name] += event.perf_data.raw
    return found


def summary(test: str, found: dict[str, list[float]]) -> list[Profile]:
    """Operators by time. What the delegates and the runtime take beside their operators is a line of its own."""
    total = sum(found[WHOLE])
    grouped: dict[str, list[float]] = defaultdict(list)
    for name, times in found.items():
        if name.startswith("native_call_"):
            grouped[_plain(name.removeprefix("native_call_"))] += times
        elif name not in PARTS and not name.startswith(("Method", "Program")):
            grouped[f"xnnpack: {_plain(name)}"] += times
    inside = sum(sum(times) for times in grouped.values())
    grouped[BETWEEN] = [max(0.0, total - inside)]
    rows = [Profile(test, name, len(times), sum(times), sum(times) / total) for name, times in grouped.items()]
    return sorted(rows, key=lambda row: -row.ms)


def _plain(name: str) -> str:
    """ "Fully Connected (NC, F32) GEMM #3" -> "Fully Connected (NC, F32) GEMM"; "mean.out" -> "mean"."""
    return re.sub(r"\.\w*out$", "", re.sub(r" #\d+$", "", name))
