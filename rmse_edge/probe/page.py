"""A report as one HTML file that needs no other: verdicts, tables, plots, and a text to pick tokens from."""

from __future__ import annotations

import base64
import html
import json
from importlib import resources
from pathlib import Path
from typing import Any

TEMPLATE = "page.html"


def write_page(found: dict[str, Any], picture: Path, page: Path) -> None:
    """
    Args:
        found: as `report.measure` gives it.
        picture: the PNG of it, which goes into the page.
    """
    template = resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    image = base64.b64encode(picture.read_bytes()).decode()
    # "</" would end the script that holds the document.
    document = json.dumps({name: found[name] for name in ("unit", "trace")}).replace("</", "<\\/")
    parts = {
        "TITLE": html.escape(f"{found['model']}: {found['parameters']:,} parameters, {found['tokens']:,} tokens"),
        "VERDICTS": _table(
            ("claim", "verdict", "evidence"),
            [(row["claim"], row["verdict"], row["evidence"]) for row in found["verdicts"]],
        ),
        "ITERATIONS": _table(*iterations(found)),
        "PICTURE": f"data:image/png;base64,{image}",
        "DOCUMENT": document,
    }
    for name, value in parts.items():
        template = template.replace("{{" + name + "}}", value)
    page.write_text(template, encoding="utf-8")


def iterations(found: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table by iteration: its head and its rows."""
    head: tuple[str, ...] = (
        found["unit"],
        "loss",
        "entropy",
        "falls for",
        "KL to last",
        "same top token",
        "change",
        "cosine",
        "settled",
    )
    rows: list[tuple[str, ...]] = [
        (
            str(row["iteration"]),
            f"{row['loss']:.4f}",
            f"{row['entropy']:.4f}",
            f"{row['entropy_falls']:.1%}" if "entropy_falls" in row else "",
            f"{row['kl_to_last']:.4f}",
            f"{row['agrees_with_last']:.1%}",
            "" if row["change"] is None else f"{row['change']:.4f}",
            f"{row['cosine_to_last']:.4f}",
            "" if row["settled"] is None else f"{row['settled']:.1%}",
        )
        for row in found["by_iteration"]
    ]
    return head, rows


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</table>"])
