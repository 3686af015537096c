"""A report as one HTML file that needs no other: verdicts, tables, plots, and a text to pick tokens from."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

TEMPLATE = "page.html"


COLOURS = {
    "entropy": "entropy after the last iteration",
    "loss": "loss after the last iteration",
    "change": "last change of the state",
}  # what the colour of a token may show, by its name in a trace


def write_page(found: dict[str, Any], picture: Path, page: Path) -> None:
    """
    Args:
        found: as `report.measure` gives it.
        picture: the PNG of it, which goes into the page.
    """
    claims = [(row["claim"], row["verdict"], row["evidence"]) for row in found["verdicts"]]
    tables = {
        "Claims": html_table(("claim", "verdict", "evidence"), claims),
        "By iteration": html_table(*iterations(found)),
    }
    title = f"{found['model']}: {found['parameters']:,} parameters, {found['tokens']:,} tokens"
    write_sections(page, title, tables, picture, {name: found[name] for name in ("unit", "trace")}, COLOURS)


def write_sections(
    page: Path, title: str, tables: dict[str, str], picture: Path, document: dict[str, Any], colours: dict[str, str]
) -> None:
    """
    Args:
        tables: HTML by its heading, before the picture.
        document: `trace`, whose tokens can be chosen, and the `unit` of its iterations.
        colours: see COLOURS; the first is shown first.
    """
    template = resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    image = base64.b64encode(picture.read_bytes()).decode()
    parts = {
        "TITLE": html.escape(title),
        "TABLES": "\n".join(f"<h2>{html.escape(heading)}</h2>\n{table}" for heading, table in tables.items()),
        "PICTURE": f"data:image/png;base64,{image}",
        "COLOURS": "\n".join(
            f'    <option value="{name}">{html.escape(said)}</option>' for name, said in colours.items()
        ),
        # "</" would end the script that holds the document.
        "DOCUMENT": json.dumps(document).replace("</", "<\\/"),
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


def html_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</table>"])
