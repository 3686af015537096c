"""rmse-runner: one row of its --bench, each time in a process of its own.

It opens the package, runs the row once to warm up, and times it once; its document also has its own peak memory.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

from rmse_edge.package import Package
from rmse_edge.runtimes.host.signatures import read_model

from .looped import facts_of
from .protocol import serve


class Native:
    def __init__(self, runner: str, package: str, threads: int, text: str | None) -> None:
        self.command = [runner, package, "--bench", "-r", "1", "-t", str(threads), "-o", "json"]
        if text:
            self.command += ["--text", text]
        info = read_model(Package.open(package))
        self.full = info.max_loops
        self.facts = facts_of(info)

    def measure(self, test: str, tokens: int, loops: int | None) -> dict[str, Any]:
        counts = {"pp": 0, "tg": 0} | {test: tokens}
        sizes = ["-p", str(counts["pp"]), "-n", str(counts["tg"]), "-d", str(loops or self.full)]
        done = subprocess.run([*self.command, *sizes], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(last_line(done.stderr) or f"ended with code {done.returncode}")
        document = json.loads(done.stdout)
        mode = "adaptive" if loops is None else "fixed"
        row = next((r for r in document["rows"] if r["mode"] == mode), None)
        if row is None:
            raise RuntimeError("its package has no exit rule that is on: no adaptive row")
        return {
            "tok_per_s": row["tok_per_s"]["median"],
            "mean_loops": row["mean_loops"],
            "gb_per_s": row["gb_per_s"],
            "peak_bytes": document["peak_rss_bytes"],
        }


def last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


def start(given: dict[str, Any]) -> Native:
    return Native(given["runner"], given["package"], given["threads"], given.get("text"))


if __name__ == "__main__":
    serve(start)
