"""How the source is built: who may import whom, and how long a file may be. Nothing is imported here, only read."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import made_once

ROOT = Path(__file__).resolve().parents[1]
# Folders and the packages they are; pyproject.toml maps them.
PACKAGES = {
    "rmse_edge": "rmse_edge",
    "export": "rmse_edge.export",
    "runtimes": "rmse_edge.runtimes",
    "quantize": "rmse_edge.quantize",
    "models": "rmse_edge.shipped",
    "web_demo": "rmse_edge.web_demo",
}

# Rooms from the top down, those of one floor side by side: a module imports from its own room and from floors below.
FLOORS = (
    ("rmse_edge",),  # `import rmse_edge` itself
    ("web_demo",),
    ("cli",),
    ("export", "harness", "serve"),
    ("probe",),
    ("runtimes",),
    ("exits", "quantize", "train", "hf", "knowledge"),
    ("checkpoint", "heads"),
    ("arch",),
    ("layers", "puzzles"),
    ("info",),
    ("archive", "loop"),
    ("chat_turns",),
    ("chat", "losses", "package", "shards", "vocabulary"),
    ("numbers", "parts", "registries", "text"),
    ("cache",),
    ("files", "progress", "schema", "shipped"),
    ("errors",),
)
# The same inside of the large rooms.
INNER_FLOORS = {
    "rmse_edge.export": (("pipeline",), ("gate", "onnx", "executorch", "coreml"), ("targets",), ("program",)),
    "rmse_edge.runtimes": (("measure",), ("text",), ("engines",), ("host",), ("mil",)),
    "rmse_edge.hf": (
        ("auto",),
        ("model",),
        ("looped_model", "cache", "config"),
        ("generation",),
        ("looped_cache", "looped_config", "inputs", "loading"),
        ("known",),
    ),
    "rmse_edge.arch.rmse": (("model",), ("parts", "costs"), ("config",)),
    "rmse_edge.layers": (("experts", "memory", "retrieval"), ("attention",), ("norm", "rope")),
}
# Modules that name RMS-E, beside those of its own folder and of the rooms that are about it. Also a list to shorten.
RMSE_ONLY = ("rmse_edge.arch", "rmse_edge.train", "rmse_edge.hf")
KNOW_RMSE = {
    "rmse_edge",
}

# Messages of the library name arguments, which the command line calls by its flags.
FLAG = re.compile(r"(?:^|[ (])--(?:[a-z]|\0|$)")
COMMAND = re.compile(r"rmse-[a-z]+ (?:[A-Z.]+ )*--[a-z-]+")  # which may be named with its flags: "rmse-index --rebuild"

SPEAK = ("cli", "web_demo", "registries")  # rooms that have flags, or give them to other programs

LONGEST = 600  # lines of a file


def read_modules() -> dict[str, Path]:
    """Every module of the package and its file."""
    found = {}
    for folder, package in PACKAGES.items():
        for file in (ROOT / folder).rglob("*.py"):
            names = file.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *names)).removesuffix(".__init__")] = file
    return found


MODULES = read_modules()


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """The modules of ours that `module` imports, in functions too, and whether only for type checkers."""
    file = MODULES[module]
    tree = ast.parse(file.read_text(encoding="utf-8"))
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    for_types = {inner for block in blocks for part in block.body for inner in ast.walk(part)}
    for node in ast.walk(tree):
        named = []
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            # `from package import name`: a module of that name, or what the package's own file defines
            named = [n if n in MODULES else source for n in (f"{source}.{alias.name}" for alias in node.names)]
        yield from ((name, node in for_types) for name in named if name in MODULES)


GRAPH = {module: sorted(set(imports(module))) for module in MODULES}


def room(module: str, of: str = "rmse_edge") -> str:
    """The part of `of` that a module belongs to: "rmse_edge.layers.norm" is of "layers"."""
    return module.removeprefix(of).lstrip(".").partition(".")[0] or of


def upward(of: str, floors: tuple[tuple[str, ...], ...]) -> set[tuple[str, str]]:
    """Imports between rooms of `of` that do not go down."""
    floor = {name: level for level, names in enumerate(floors) for name in names}
    found = set()
    for module, targets in GRAPH.items():
        for target, _ in targets:
            here, there = room(module, of), room(target, of)
            inside = all(m.startswith(of + ".") for m in (module, target)) or of == "rmse_edge"
            if inside and here != there and {here, there} <= floor.keys() and floor[here] >= floor[there]:
                found.add((module, target))
    return found


def test_imports_are_seen() -> None:
    """The tests below pass where nothing is read: relative, in functions, of a package, for types, of submodules."""
    graph = {module: dict(targets) for module, targets in GRAPH.items()}
    assert graph["rmse_edge.layers.dense"] == dict.fromkeys(
        ("rmse_edge.layers.attend", "rmse_edge.layers.attention"), False
    )
    assert graph["rmse_edge.runtimes"]["rmse_edge.runtimes.engines.coreml"] is False
    assert graph["rmse_edge.runtimes.text.generate"]["rmse_edge.runtimes.text.librarian"] is True
    assert graph["rmse_edge.runtimes.mil.prepare"]["rmse_edge.runtimes.mil.operators_math"] is False
    assert graph["rmse_edge.export.pipeline"]["rmse_edge.runtimes"] is False


def test_every_room_has_a_floor() -> None:
    assert {room(module) for module in MODULES} == {name for floor in FLOORS for name in floor}


def test_imports_go_down() -> None:
    found = upward("rmse_edge", FLOORS)
    for of, floors in INNER_FLOORS.items():
        found |= upward(of, floors)
    assert not found


def test_no_circles() -> None:
    """Between modules; imports for type checkers do not count."""
    left = {module: {t for t, for_types in targets if not for_types} for module, targets in GRAPH.items()}
    while free := [module for module, targets in left.items() if not targets & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"a circle, or what imports one: {', '.join(sorted(left))}"


def test_who_knows_rmse() -> None:
    found = {
        module
        for module, targets in GRAPH.items()
        if not module.startswith(RMSE_ONLY) and any(t.startswith("rmse_edge.arch.rmse") for t, _ in targets)
    }
    assert sorted(found) == sorted(KNOW_RMSE)


def texts(tree: ast.AST) -> Iterator[str]:
    """Strings of a module that are no documentation, and those of its f-strings, as far as they are constant."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = None
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value != "--":  # a style of lines
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)


def test_the_library_does_not_speak_of_flags() -> None:
    found = set()
    for module, file in MODULES.items():
        if room(module) not in SPEAK:
            said = list(texts(ast.parse(file.read_text(encoding="utf-8"))))
            if any(FLAG.search(COMMAND.sub("", text)) for text in said):
                found.add(file.relative_to(ROOT).as_posix())
    assert found == set()


EXPORTERS = (
    *(
        "onnx",
        "onnxruntime",
        "onnxscript",
        "executorch",
        "torchao",
        "coremltools",
        "transformers",
        "lancedb",
        "pyarrow",
        "lm_eval",
        "datasets",
    ),
    *("torch.onnx._internal.exporter", "torch._inductor"),
)
COLLECT = """
import sys, pytest

class Plugin:
    def pytest_collection_finish(self, session):
        found = [name for name in sys.argv[1].split(",") if name in sys.modules]
        print(len(session.items), "tests", *found, file=sys.__stderr__)

raise SystemExit(pytest.main(["--collect-only", "-q", *sys.argv[2:]], plugins=[Plugin()]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [["-m", "not slow"], pytest.param([], marks=pytest.mark.nightly)], ids=["quick", "all"]
)
def test_finding_tests_imports_no_exporter(flags: list[str]) -> None:
    """Every process of a test run finds all tests first, and one file that imports what takes seconds would be enough
    to slow them down: name it by `later` (tests/later.py), or import it where the test needs it."""
    command = [sys.executable, "-c", COLLECT, ",".join(EXPORTERS), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    count, *found = done.stderr.splitlines()[-1].split()
    assert int(count) > 1000 and found == ["tests"]


def test_what_is_made_once_is_made_whole(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A maker that fails half way leaves nothing that other tests would take for its work."""

    def fails(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise RuntimeError

    def works(folder: Path) -> None:
        folder.mkdir()
        (folder / "whole").touch()

    with pytest.raises(RuntimeError):
        made_once("half-made", tmp_path_factory, fails)
    for _ in range(2):
        assert [file.name for file in made_once("half-made", tmp_path_factory, works).iterdir()] == ["whole"]
        works = fails


@pytest.mark.parametrize("folder", [*PACKAGES, "android_demo", "benchmarks", "tests", "docs", "findings"])
def test_no_file_is_long(folder: str) -> None:
    files = {file.relative_to(ROOT).as_posix(): file for file in (ROOT / folder).rglob("*.py")}
    lengths = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in files.items()}
    assert not {name: lines for name, lines in lengths.items() if lines > LONGEST}
