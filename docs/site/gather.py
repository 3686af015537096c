"""Lay out the documents for the site, in the folder that mkdocs.yml names: `make docs` runs this and then mkdocs.

Documents link to each other by relative paths that hold on a code host. The site has the same tree, with the files that they
link to, so the same links hold there; `mkdocs build --strict` refuses one that does not. Besides it has a page of the API for
every module in MODULES, made from docstrings.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "build" / "site-pages"
DOCUMENTS = ("*.md", "docs/**/*.md", "models/**/*.md", "findings/*.md", "android_demo/*.md", "web_demo/*.md")
LINK = re.compile(r"\]\(([^()\s]+)\)")
MODULES = {
    "Runtimes": "rmse_edge.runtimes",
    "The dial": "rmse_edge.loop.dials",
    "Texts and tokenizers": "rmse_edge.text",
    "Generation": "rmse_edge.runtimes.text.generate",
    "Sampling": "rmse_edge.runtimes.text.sampling",
    "Sessions": "rmse_edge.runtimes.host.session",
    "Evaluation": "rmse_edge.runtimes.measure.evaluate",
    "Checkpoints": "rmse_edge.checkpoint",
    "Export": "rmse_edge.export",
    "Quantising": "rmse_edge.quantize",
    "Packages": "rmse_edge.package",
    "Contract of a looped model": "rmse_edge.loop.contract",
    "Architectures": "rmse_edge.arch.registry",
    "Targets": "rmse_edge.export.targets",
    "Mixers": "rmse_edge.layers.mixers.base",
    "Errors": "rmse_edge.errors",
}


def gather() -> None:
    shutil.rmtree(SITE, ignore_errors=True)
    found = sorted(path for pattern in DOCUMENTS for path in ROOT.glob(pattern))
    for document in found:
        text = document.read_text(encoding="utf-8")
        for link in LINK.findall(text):
            target = (document.parent / link.partition("#")[0]).resolve()
            if "://" not in link and target.is_file() and target not in found:
                put(target, target.read_bytes())
        put(document, text.encode())
    for title, module in MODULES.items():
        page = f"# {title}\n\n::: {module}\n"
        put(ROOT / "api" / f"{module}.md", page.encode())
    rows = "".join(f"- [{title}]({module}.md): `{module}`\n" for title, module in MODULES.items())
    put(ROOT / "api" / "README.md", f"# API\n\n{rows}".encode())


def put(path: Path, content: bytes) -> None:
    """A file of the site at the place that it has in the repository."""
    copy = SITE / path.relative_to(ROOT)
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(content)


if __name__ == "__main__":
    gather()
