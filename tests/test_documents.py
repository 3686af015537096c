"""The documents hang together: one leads to every other, and every link leads to something."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from paths import ROOT

INDEX = ROOT / "docs" / "README.md"
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(
            f
            for folder in ("docs", "models", "findings", "android_demo", "web_demo")
            for f in ROOT.glob(f"{folder}/**/*.md")
        ),
    ]
)
LINK = re.compile(r"\]\(([^()\s]+)\)")


def text_of(document: Path) -> str:
    """Without blocks of code."""
    return re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """The names that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ (.+)$", text_of(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(document: Path) -> dict[str, tuple[Path, str]]:
    """Links within the project, as written -> the file or folder, and the anchor in it."""
    found = {}
    for link in LINK.findall(text_of(document)):
        if not link.startswith("https://"):
            name, _, anchor = link.partition("#")
            found[link] = ((document.parent / name).resolve() if name else document, anchor)
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)).replace("/", "."))
def test_every_link_leads_to_something(document: Path) -> None:
    for link, (target, anchor) in links(document).items():
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


def test_every_document_is_found_from_the_index() -> None:
    """Not by way of the README, which leads to the rest."""
    found, todo = {INDEX}, [INDEX]
    while todo:
        for target, _ in links(todo.pop()).values():
            if target in DOCUMENTS and target not in found and target.parent != ROOT:
                found.add(target)
                todo.append(target)
    assert sorted(found) == [document for document in DOCUMENTS if document.parent != ROOT]
