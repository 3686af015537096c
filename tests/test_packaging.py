"""What a user installs: the sdist, the wheel that is built of it, and its commands, in an environment with its dependencies only."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from helpers import assert_one_line
from packaging.requirements import Requirement
from paths import ROOT

from rmse_edge.cli.export import main as rmse_export

pytestmark = pytest.mark.slow
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = (
    "rmse_edge",
    "export",
    "runtimes",
    "quantize",
    "models",
    "optimum_commands",
    "web_demo",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
SCRIPTS = PROJECT["project"]["scripts"]
OPTIMUM = """
import sys
from optimum.commands.optimum_cli import main
sys.argv[0] = "optimum-cli"
main()
"""  # as its console script has it


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both, of the sources alone: the repository may hold what an earlier build left."""
    folder = tmp_path_factory.mktemp("built")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / "sources" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (folder / "sources").mkdir(exist_ok=True)
            shutil.copyfile(source, folder / "sources" / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "-o", str(folder / "dist"), str(folder / "sources")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


def needed(names: list[str]) -> dict[str, importlib.metadata.Distribution]:
    """Distributions that these need, and those, with the extras that are asked for, as far as they are installed here."""
    found: dict[str, importlib.metadata.Distribution] = {}
    known: set[tuple[str, str]] = set()  # name, extra
    todo = [(Requirement(name), "") for name in names]
    while todo:
        requirement, asked = todo.pop()  # by the extra `asked` of another
        if requirement.marker and not requirement.marker.evaluate({"extra": asked}):
            continue
        for extra in {"", *requirement.extras} - {extra for name, extra in known if name == requirement.name}:
            known.add((requirement.name, extra))
            distribution = found[requirement.name] = importlib.metadata.distribution(requirement.name)
            todo += [(Requirement(line), extra) for line in distribution.requires or ()]
    return found


def environment(folder: Path, wheel: Path, names: list[str]) -> Path:
    """One with the wheel and these distributions, which are linked, and its interpreter."""
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    for distribution in needed(names).values():
        for file in distribution.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))  # type: ignore[arg-type]
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(folder),
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        str(wheel),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def python(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (wheel,) = built.glob("*.whl")
    return environment(tmp_path_factory.mktemp("plain") / "venv", wheel, PROJECT["project"]["dependencies"])


def run(command: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """In a folder of its own, without what the tests' own environment has in its variables."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run([str(word) for word in command], cwd=folder, env=plain, capture_output=True, text=True)


def test_the_wheel_has_every_source_and_the_shipped_models(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    packed = set(zipfile.ZipFile(wheel).namelist())
    folders = PROJECT["tool"]["setuptools"]["package-dir"]
    for package, folder in folders.items():
        for file in (ROOT / folder).rglob("*.py"):
            path = Path(package.replace(".", "/")) / file.relative_to(ROOT / folder)
            assert path.as_posix() in packed, f"{file}: pyproject.toml does not list its folder"
    for name in ("rmse-shakespeare", "ouro-shakespeare", "trm-sudoku"):
        assert f"rmse_edge/shipped/{name}/model.safetensors" in packed
    assert {"rmse_edge/py.typed", "rmse_edge/probe/page.html", "rmse_edge/runtimes/native/Makefile"} <= packed
    assert "optimum/commands/register/register_rmse.py" in packed
    page = [
        file.relative_to(ROOT / "web_demo")
        for kind in ("*.js", "*.html", "*.lock")
        for file in (ROOT / "web_demo").rglob(kind)
    ]
    assert len(page) > 10 and {f"rmse_edge/web_demo/{file.as_posix()}" for file in page} <= packed
    assert not any(
        name.startswith(("optimum/__init__", "optimum/commands/__init__", "tests", "build/")) for name in packed
    )
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "pyproject.toml", "models/trm-sudoku/model.safetensors"} <= inside
    license_files = [name for name in packed if "/licenses/" in name]
    assert len(license_files) == len(PROJECT["project"]["license-files"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_starts(script: str, python: Path, tmp_path: Path) -> None:
    """From the wheel alone, with no extra; of those that need one, in one line that names it."""
    done = run([python.parent / script, "--help"], tmp_path)
    if script == "rmse-lm-eval":
        assert done.returncode == 2
        assert_one_line(done.stderr, "rmse-lm-eval: error: ", "pip install 'rmse-edge[eval]'")
    else:
        assert done.returncode == 0 and done.stdout.startswith(f"usage: {script}"), done.stderr


def test_a_missing_extra_is_named(python: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("To be, or not to be.")
    shipped = run([python, "-c", "from rmse_edge.shipped import shipped; print(shipped('trm-sudoku'))"], tmp_path)
    model = shipped.stdout.strip()
    assert model.startswith(str(python.parent.parent))
    cases: dict[str, list[str | Path]] = {
        "probe": ["rmse-probe", model, "--text", "text", "-o", "out"],
        "onnx": ["rmse-export"],
        "serve": ["rmse-serve", "rmse-shakespeare"],
    }
    for extra, (script, *flags) in cases.items():
        done = run([python.parent / script, *flags], tmp_path)
        assert done.returncode == 2 and not (tmp_path / "out").exists()
        assert_one_line(done.stderr, f"{script}: error: ", f"pip install 'rmse-edge[{extra}]'")
    page = run([python, "-m", "rmse_edge.web_demo"], tmp_path)
    assert page.returncode == 2
    assert_one_line(page.stderr, "web_demo: error: ", "pip install 'rmse-edge[serve]'")
    solved = run(
        [python.parent / "rmse-eval", "trm-sudoku", "--boards", f"{model}/test.csv", "--max-tokens", "2"], tmp_path
    )
    assert solved.returncode == 0 and "boards" in solved.stdout, solved.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["text"]


@pytest.fixture(scope="module")
def with_optimum(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("optimum")
    (wheel,) = built.glob("*.whl")
    extras = PROJECT["project"]["optional-dependencies"]
    names = [*PROJECT["project"]["dependencies"], *extras["optimum"], *extras["onnx"]]
    return environment(tmp_path_factory.mktemp("optimum") / "venv", wheel, names)


def test_optimum_has_our_export(with_optimum: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def optimum(*flags: str) -> subprocess.CompletedProcess[str]:
        return run([with_optimum, "-c", OPTIMUM, "export", *flags], tmp_path)

    assert re.search(r"^ +rmse +Export a looped model", optimum("--help").stdout, re.MULTILINE)
    assert rmse_export(["--dry-run"]) == 0
    ours = capsys.readouterr().out
    assert "9,844,677 parameters" in ours and optimum("rmse", "--dry-run").stdout == ours
    wrong = optimum("rmse", "-o", "a.rmse.zip")
    assert wrong.returncode == 2
    assert_one_line(wrong.stderr, "optimum-cli export rmse: error: -o: a.rmse.zip", "add --archive")


@pytest.mark.nightly
@pytest.mark.onnx
def test_optimum_exports_the_same_package(with_optimum: Path, checkpoint: Path, package: Path, tmp_path: Path) -> None:
    command = [with_optimum, "-c", OPTIMUM, "export", "rmse", "-m", checkpoint, "--target", "onnx", "-o", "tiny.rmse"]
    done = run(command, tmp_path)
    assert done.returncode == 0 and "parity at" in done.stdout, done.stderr
    sums = [
        {line.split()[1]: line.split()[0] for line in (folder / "SHA256SUMS").read_text().splitlines()}
        for folder in (package, tmp_path / "tiny.rmse")
    ]
    assert sums[0].keys() == sums[1].keys()
    assert {n for n in sums[0] if sums[0][n] != sums[1][n]} <= {"manifest.json"}  # it says when and with what parity
