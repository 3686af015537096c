"""What checks found, as Markdown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rmse_edge.errors import UserError
from rmse_edge.files import write_text


@dataclass
class Outcome:
    """What a check found: Markdown, and what is wrong; nothing wrong is ok."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    skipped: str = ""  # why it did not run

    @property
    def verdict(self) -> str:
        if self.problems:
            return f"**FAILED**: {'; '.join(self.problems)}"
        return f"skipped: {self.skipped}" if self.skipped else "ok"


class Report:
    """Collects outcomes and writes them down."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.sections: list[str] = []
        self.verdicts: list[tuple[str, Outcome]] = []

    def section(self, title: str, lines: Iterable[str]) -> None:
        self.sections += [f"## {title}", "", *lines, ""]
        if self.path is not None:
            write_text(self.path, self.text())

    def check(self, title: str, run: Callable[[], Outcome]) -> None:
        """Run a check; an exception is what is wrong with it, in one line."""
        print(f"mac_checklist: {title} ...", file=sys.stderr, flush=True)
        try:
            outcome = run()
        except Exception as error:
            outcome = Outcome(problems=[one_line(error)])
        self.verdicts.append((title, outcome))
        self.section(title, [f"Verdict: {outcome.verdict}", "", *outcome.lines])

    @property
    def failed(self) -> bool:
        return any(outcome.problems for _, outcome in self.verdicts)

    def text(self) -> str:
        summary = table(("check", "verdict"), ((title, cell(o.verdict)) for title, o in self.verdicts))
        return "\n".join(["# rmse-edge on Core ML", "", *summary, "", *self.sections]).rstrip() + "\n"


def one_line(error: BaseException) -> str:
    message = " ".join(str(error).split())
    return message if isinstance(error, UserError) else f"{type(error).__name__}: {message}"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]


def bullets(values: dict[str, Any]) -> list[str]:
    return [f"- {name}: {value}" for name, value in values.items()]
