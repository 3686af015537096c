"""A package or PyTorch model driven from Python: a row of rmse-bench, one at a time."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from rmse_edge.cli.bench import opened, parse, prepare
from rmse_edge.runtimes.measure.bench import weight_bytes_per_token

from .looped import facts_of
from .protocol import serve


class InPython:
    """The rows that rmse-bench would time with these arguments."""

    def __init__(self, arguments: list[str], compiled: bool) -> None:
        args = parse(arguments)
        self._open = ExitStack()  # exports of random weights would end with it
        (self.runtime,), _ = self._open.enter_context(opened(args))
        if compiled:
            compile_model(self.runtime)
        bench, *_ = prepare(self.runtime, None, None, args)
        self.rows = {(r.test, r.dials.max_loops if r.mode == "fixed" else None): r for r in bench.rows}
        self.facts = facts_of(self.runtime.info)

    def measure(self, test: str, tokens: int, loops: int | None) -> dict[str, Any]:
        row = self.rows[f"{test}{tokens}", loops]
        speed = row.work(row)
        mean_loops = float(row.depth.mean())
        answer = {"tok_per_s": speed, "mean_loops": mean_loops}
        if test == "tg":  # rows of a prompt share what they read
            answer["gb_per_s"] = speed * weight_bytes_per_token(self.runtime.info, mean_loops) / 1e9
        return answer


def compile_model(runtime: Any) -> None:
    """torch.compile of every method; the host still asks after each loop whether a token is active.

    Two parts of routed experts stay eager: the selection goes through NumPy, whose arrays fail a guard in inference mode,
    and compiled code refuses a grouped product of float32, which eager PyTorch computes.
    """
    import torch

    from rmse_edge.layers import experts

    for name in ("best_partitioned", "grouped_experts"):
        setattr(experts, name, torch.compiler.disable(getattr(experts, name)))
    model = runtime.model
    for name in ("prelude", "begin", "step", "head", "commit"):
        setattr(model, name, torch.compile(getattr(model, name), dynamic=False))


def start(given: dict[str, Any]) -> InPython:
    return InPython(given["arguments"], given.get("compiled", False))


if __name__ == "__main__":
    serve(start)
