"""The documents as a site: `make docs`, but for the folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from paths import ROOT

SITE = ROOT / "docs" / "site"


def test_citation_is_of_this_version() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert found["cff-version"] == "1.2.0" and found["title"] == "rmse-edge" and found["authors"] and found["message"]
    assert f'\nversion = "{found["version"]}"\n' in project
    assert f'\nlicense = "{" AND ".join(found["license"])}"' in project


@pytest.mark.slow
@pytest.mark.nightly
def test_every_link_leads_somewhere_on_the_site(tmp_path: Path) -> None:
    """And one that does not is refused."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    plain = dict(os.environ, NO_MKDOCS_2_WARNING="1")
    lib, pages = tmp_path / "lib", tmp_path / "pages"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--target", lib, ROOT]
    subprocess.run(pip, check=True, capture_output=True)
    code = f"import gather; from pathlib import Path; gather.SITE = Path({str(pages)!r}); gather.gather()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=SITE)
    text = (SITE / "mkdocs.yml").read_text()
    for name, place in (("docs_dir", pages), ("site_dir", tmp_path / "site")):
        text = re.sub(rf"^{name}: .*$", f"{name}: {place}", text, flags=re.MULTILINE)
    (tmp_path / "mkdocs.yml").write_text(re.sub(r"paths: \[[^]]*\]", f"paths: [{lib}]", text))
    command = [sys.executable, "-m", "mkdocs", "build", "-f", str(tmp_path / "mkdocs.yml")]
    done = subprocess.run(command, env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "api" / "rmse_edge.runtimes.html").read_text()
    assert "open_runtime" in page and "UserError" in page
    assert (tmp_path / "site" / "models" / "rmse-shakespeare" / "curve.png").is_file()
    with (pages / "docs" / "running.md").open("a") as file:
        file.write("\n[nowhere](none.md) and [no heading](memory.md#none)\n")
    done = subprocess.run(command, env=plain, capture_output=True, text=True)
    assert done.returncode != 0 and "none.md" in done.stderr and "#none" in done.stderr
