"""The report of benchmarks/gpu.py: what was tested, what was timed, and which bars that meets."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rmse_edge.cli.display import table

NOT_MEASURED = "not measured"
# What has to hold on a GPU, in words.
BARS = (
    "decoding at batch 1 reaches 60 % of the bandwidth for the bytes it reads (fp32, all iterations)",
    "a third of the iterations takes 0.40 of the time of all at most (fp32)",
    "int4 decodes at least twice as fast as bf16",
    "a batch with mixed exits takes its mean depth's share of the time of all iterations, within 15 %",
)


def read_tests(path: Path | None) -> dict[str, Any] | None:
    """What pytest wrote (--junitxml): numbers of tests, and the names of those that failed or were skipped."""
    if path is None:
        return None
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    by = {"failed": ("failure", "error"), "skipped": ("skipped",)}
    found: dict[str, Any] = {
        kind: [c.get("name") for c in cases if any(c.find(tag) is not None for tag in tags)]
        for kind, tags in by.items()
    }
    return {"passed": len(cases) - sum(map(len, found.values()))} | found


@dataclass
class Report:
    """Everything of one run."""

    machine: Mapping[str, Any]
    tests: Mapping[str, Any] | None
    dry: dict[str, list[int]] = field(default_factory=dict)  # recordings that were built from shapes, and loops
    sections: list[dict[str, Any]] = field(default_factory=list)
    kernels: list[dict[str, Any]] = field(default_factory=list)

    def add(self, model: str, section: str, times: Mapping[str, float], timed: Mapping[str, Any]) -> None:
        """Seconds per token, or per token of each text, of the contestants of a section."""
        bandwidth = self.machine.get("bandwidth")
        rows = []
        for name, seconds in times.items():
            facts = dict(timed[name].facts)
            if "bytes" in facts and bandwidth:
                facts["of_bandwidth"] = facts["bytes"] / seconds / bandwidth
            rows.append({"name": name, "ms": 1000 * seconds} | facts)
        self.sections.append({"model": model, "section": section, "rows": rows})

    def failed_tests(self) -> bool:
        return bool(self.tests and self.tests["failed"])

    def bars(self) -> list[dict[str, Any]]:
        """Each bar for each model: the number that it is about, and whether it holds; None: not measured on a GPU."""
        found: list[dict[str, Any]] = []
        measured = "l2_bytes" in self.machine
        for model in dict.fromkeys(s["model"] for s in self.sections):
            rows = {r["name"]: r for s in self.sections if s["model"] == model for r in s["rows"]}
            full = {n.split(",")[0]: r for n, r in rows.items() if ", all " in n}
            third = next(r for n, r in rows.items() if n.startswith("fp32, ") and " of " in n)
            adaptive, every = rows["adaptive"], rows["all iterations"]
            share = adaptive["mean_depth"] / every["mean_depth"]
            numbers = (
                full["fp32"]["of_bandwidth"],
                third["ms"] / full["fp32"]["ms"],
                full["bf16"]["ms"] / full["int4"]["ms"],
                adaptive["ms"] / every["ms"] / share,
            )
            holds = (numbers[0] >= 0.6, numbers[1] <= 0.4, numbers[2] >= 2, abs(numbers[3] - 1) <= 0.15)
            found += [
                {"model": model, "bar": bar, "number": number, "holds": bool(met) if measured else None}
                for bar, number, met in zip(BARS, numbers, holds)
            ]
        return found

    def document(self) -> dict[str, Any]:
        """For programs."""
        return {
            "machine": dict(self.machine),
            "tests": self.tests,
            "dry_run": self.dry,
            "sections": self.sections,
            "kernels": self.kernels,
            "bars": self.bars(),
        }

    def markdown(self) -> str:
        """For people."""
        parts = ["# The CUDA engine", ", ".join(f"{name} {value}" for name, value in self.machine.items())]
        if self.tests is None:
            parts.append("Tests: not run with this report.")
        else:
            failed, skipped = self.tests["failed"], self.tests["skipped"]
            parts.append(f"Tests: {self.tests['passed']} passed, {len(failed)} failed, {len(skipped)} skipped.")
            parts += [f"- failed: {name}" for name in failed] + [f"- skipped: {name}" for name in skipped]
        if self.dry:
            parts.append(
                table(
                    ("model", "recordings built from shapes", "loops"),
                    [(name, str(count), str(loops)) for name, (count, loops) in self.dry.items()],
                )
            )
        for section in self.sections:
            parts.append(f"## {section['model']}: {section['section']}")
            parts.append(
                table(("contestant", "ms a token", "iterations", "of bandwidth"), [_cells(r) for r in section["rows"]])
            )
        if self.kernels:
            parts.append("## Kernels")
            heads = ("product", "blocks", "µs", "of bandwidth")
            parts.append(
                table(
                    heads,
                    [(k["product"], k["blocks"], f"{k['us']:.1f}", f"{k['of_bandwidth']:.1%}") for k in self.kernels],
                )
            )
        if self.sections:
            parts.append("## What has to hold")
            said = {True: "holds", False: "does not hold", None: NOT_MEASURED}
            rows = [(b["model"], b["bar"], f"{b['number']:.2f}", said[b["holds"]]) for b in self.bars()]
            parts.append(table(("model", "bar", "number", ""), rows))
        return "\n\n".join(parts)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    iterations = row.get("mean_iterations", row.get("mean_depth"))
    share = row.get("of_bandwidth")
    return (
        row["name"],
        f"{row['ms']:.3f}",
        "" if iterations is None else f"{iterations:.2f}",
        "" if share is None else f"{share:.1%}",
    )
