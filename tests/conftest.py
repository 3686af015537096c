"""What every test can use."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from filelock import FileLock

if TYPE_CHECKING:
    from architectures import Case
    from kotlin_core import Core
    from memo import Memo
    from native_runner import Runner

    from rmse_edge.arch.rmse.model import RMSE
    from rmse_edge.quantize import Quantized


# The models of the tests are tiny: more threads only wait for each other. The commands that tests start inherit this.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# --------------------------------------------------------------------------------------- which tests, and in what order

# Fixtures that export a model, which takes half a minute and more: every test that uses one is slow, and of this target.
EXPORTS = {
    "memo": "onnx",
    "package": "onnx",
    "remembering_package": "onnx",
    "executorch_package": "executorch",
    "executorch_int4": "executorch",
    "toy_package": "executorch",
    "coreml_package": "coreml",
    "coreml_int4": "coreml",
}
SLOW_FILE = re.compile(r"^pytestmark = .*\bmark\.slow\b", re.MULTILINE)
# With `pytest -n`, the tests of one file run in one process, and those of these files in one, too: they export models
# that are the same but for a flag, and `memo` knows what its own process has traced.
TOGETHER = ("test_export", "test_export_quantized", "test_onnx_graph", "test_parity")
# Files whose tests are of a package each: those of one package run in one process, the packages in any.
BY_PACKAGE = ("test_packages",)
# The files that take longest come first, and the two first export for different targets: no process waits for the other.
FIRST = (
    "test_runner",
    "test_coreml",
    *TOGETHER,
    *BY_PACKAGE,
    "test_streamed",
    "test_runner_speed",
    "test_shipped",
    "test_export_memory",
    "test_session",
    "test_coreml_failures",
    "test_coreml_program",
    "test_executorch",
    "test_train_tasks",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name in EXPORTS.keys() & getattr(item, "fixturenames", ()):
            item.add_marker(EXPORTS[name])
            item.add_marker("slow")
        given = getattr(getattr(item, "callspec", None), "params", {}).values()
        for mark in ("slow", "nightly"):  # of architectures
            if any(getattr(value, mark, False) for value in given):
                item.add_marker(mark)
    order = {name: rank for rank, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A run without slow tests does not even import files of nothing else."""
    if "not slow" not in config.option.markexpr or collection_path.suffix != ".py":
        return None
    return True if SLOW_FILE.search(collection_path.read_text(encoding="utf-8")) else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out whole files, in the order of collection: `TOGETHER` as if it were one, `BY_PACKAGE` package by package."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            if Path(file).stem in BY_PACKAGE:
                return file + nodeid.partition("[")[2]
            return TOGETHER[0] if Path(file).stem in TOGETHER else file

    config.option.loadscopereorder = False
    return Files(config, log)


# The packages that tests of a target need, by their marker. Nothing of this is imported when tests are found.
NEEDED = {"onnx": "onnx", "executorch": "executorch", "coreml": "coremltools"}


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, package in NEEDED.items():
        if item.get_closest_marker(marker) and importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install 'rmse-edge[{marker}]'")
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


# ------------------------------------------------------------------------------------- one export for all tests


def made_once(name: str, factory: pytest.TempPathFactory, make: Callable[[Path], object]) -> Path:
    """A folder that the first of all processes of a test run makes, and the others find: such an export takes a minute."""
    base = factory.getbasetemp()
    root = base.parent if base.name.startswith("popen-") else base
    folder = root / name
    with FileLock(root / f"{name}.lock"):
        if not folder.exists():
            # What a maker that fails leaves is not taken for a folder: the next test that asks makes it anew.
            with tempfile.TemporaryDirectory(dir=root, prefix="made-") as scratch:
                make(Path(scratch) / name)
                (Path(scratch) / name).rename(folder)
    return folder


def made_package(case: Case, target: str, quant: str, factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of this precision, and its package by `rmse-export`, the parity gate included. Read only both."""
    from rmse_edge.cli.export import main

    source = made_once(f"{case.name}-{quant}", factory, lambda folder: case.stored(folder, quant))

    def make(folder: Path) -> None:
        assert main(["--target", target, "-m", str(source), "-o", str(folder)]) == 0

    return source, made_once(f"{case.name}-{quant}-{target}.rmse", factory, make)


@pytest.fixture(scope="session")
def runner() -> Path:
    """rmse-runner, built against this interpreter's ExecuTorch."""
    from native_runner import build_folder, make

    from rmse_edge.runtimes.engines.kernels import executorch_folder

    for tool in ("make", "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    folder = executorch_folder()
    return make(folder, build_folder(folder))


@pytest.fixture(scope="session")
def core() -> Iterator[Core]:
    """The Kotlin core of the Android app, compiled against Android's API, on desktop Java."""
    from kotlin_core import Core, built, missing

    if reason := missing():
        pytest.skip(reason)
    core = Core.desktop(built())
    yield core
    core.close()


@pytest.fixture(scope="session")
def archive(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of a small model, as one file."""
    from rmse_edge.archive import pack
    from rmse_edge.package import Package

    path = tmp_path_factory.mktemp("archive") / "tiny.rmse.zip"
    pack(Package.open(package), path)
    return path


@pytest.fixture(scope="session")
def apk(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Android app with that inside."""
    from app import build

    return build(archive, tmp_path_factory.mktemp("apk") / "demo.apk")


@pytest.fixture(scope="session")
def shipped_int4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The shipped model in int4, and its package as the app has it."""
    from shipped import SHIPPED

    from rmse_edge.cli.export import main as rmse_export
    from rmse_edge.cli.quantize import main as rmse_quantize
    from rmse_edge.quantize import load_quantized

    def quantize(folder: Path) -> None:
        assert rmse_quantize(["-m", str(SHIPPED), "--method", "rtn", "-o", str(folder)]) == 0

    def export(folder: Path) -> None:
        assert rmse_export(["-m", str(source), "--accuracy-level", "0", "-o", str(folder)]) == 0

    source = made_once("shakespeare-int4", tmp_path_factory, quantize)
    return load_quantized(source).model, made_once("shakespeare-int4.rmse", tmp_path_factory, export)


@pytest.fixture
def page() -> Iterator[Any]:
    """A tab of Chromium that has nothing to complain of."""
    from serve import browser

    if browser.found() is None:
        pytest.skip("needs Chromium: apt install chromium")
    with browser.browser() as tab:
        yield tab
        assert tab.logged == []


@pytest.fixture
def fp32(runner: Path, executorch_package: Path) -> Runner:
    from native_runner import Runner

    return Runner([runner], executorch_package)


@pytest.fixture
def int4(runner: Path, executorch_int4: Path) -> Runner:
    from native_runner import Runner

    return Runner([runner], executorch_int4)


@pytest.fixture(scope="session")
def memo() -> Memo:
    """Traced programs and lowered graphs of this session; see `memo.Memo`."""
    from memo import Memo

    return Memo()


@pytest.fixture
def quick_export(memo: Memo, monkeypatch: pytest.MonkeyPatch) -> Memo:
    """Exports of a model that was exported before skip tracing and lowering."""
    memo.install(monkeypatch)
    return memo


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint folder of a tiny model whose positions stop at every depth. Read only: copy it to change it."""
    from helpers import mixed_model, write_checkpoint

    return write_checkpoint(mixed_model(), tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def tiny(checkpoint: Path) -> RMSE:
    """The model of `checkpoint`."""
    from rmse_edge.checkpoint import load_checkpoint

    return load_checkpoint(checkpoint)


@pytest.fixture(scope="session")
def package(checkpoint: Path, memo: Memo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`checkpoint` exported by `rmse-export`, fp32, the parity gate included. Read only: copy it to change it."""
    from rmse_edge.cli.export import main

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            memo.install(monkeypatch)
            assert main(["-m", str(checkpoint), "-o", str(folder)]) == 0

    return made_once("tiny.rmse", tmp_path_factory, make)


@pytest.fixture(scope="session")
def remembering(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint folder of a tiny model with a Titans memory and a retrieval head. Read only."""
    from helpers import remembering_model, write_checkpoint

    return write_checkpoint(remembering_model(), tmp_path_factory.mktemp("remembering") / "mem")


@pytest.fixture(scope="session")
def remembering_package(remembering: Path, memo: Memo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`remembering` exported, fp32, the parity gate included. Read only."""
    from rmse_edge.checkpoint import load_checkpoint
    from rmse_edge.export.pipeline import ExportRequest, export_package

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            memo.install(monkeypatch)
            export_package(load_checkpoint(remembering), folder, ExportRequest(), remembering)

    return made_once("mem.rmse", tmp_path_factory, make)


# ------------------------------------------------------------------------------------------------------ ExecuTorch


@pytest.fixture(scope="session")
def executorch_package(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`checkpoint` through `rmse-export --target executorch`, fp32, the parity gate included. Read only."""
    from helpers import require_executorch

    from rmse_edge.cli.export import main

    require_executorch()

    def make(folder: Path) -> None:
        assert main(["--target", "executorch", "-m", str(checkpoint), "-o", str(folder)]) == 0

    return made_once("executorch.rmse", tmp_path_factory, make)


@pytest.fixture(scope="session")
def calm() -> Quantized:
    """The model of `executorch_int4` and `coreml_int4`: a memory, a retrieval head, an int8 cache, int4 weights."""
    from helpers import calm_quantized

    return calm_quantized()


@pytest.fixture(scope="session")
def executorch_int4(calm: Quantized, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`calm` exported, the parity gate included; without tokenizer and text. In parts, as large files are. Read only."""
    from helpers import require_executorch

    from rmse_edge import parts
    from rmse_edge.export import ExportRequest, export_package

    require_executorch()

    def make(folder: Path) -> None:
        request = ExportRequest("executorch", "int4")
        with pytest.MonkeyPatch.context() as monkeypatch:
            for name, value in {"SMALLEST_FILE": 1, "SMALLEST_WEIGHTS": 2048, "PIECE": 16384}.items():
                monkeypatch.setattr(parts, name, value)
            export_package(calm.model, folder, request, quantized=calm)

    return made_once("executorch-int4.rmse", tmp_path_factory, make)


@pytest.fixture(scope="session")
def toy_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of tests/toy_recurrent.py, which is not RMS-E, exported for ExecuTorch; no tokenizer. Read only."""
    from helpers import require_executorch, reseal
    from toy_recurrent import PAGE, ToyRecurrent

    from rmse_edge.export import ExportRequest, export_package

    require_executorch()

    def make(folder: Path) -> None:
        export_package(ToyRecurrent().eval(), folder, ExportRequest("executorch"))
        reseal(folder, lambda manifest: manifest["model"].update(page=PAGE))  # so that it grows within a few tokens

    return made_once("toy.rmse", tmp_path_factory, make)


# --------------------------------------------------------------------------------------------------------- Core ML


@pytest.fixture(scope="session")
def coreml_package(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`checkpoint` through `rmse-export --target coreml`, fp32, the parity gate included. Read only."""
    from rmse_edge.cli.export import main

    pytest.importorskip("coremltools")

    def make(folder: Path) -> None:
        assert main(["--target", "coreml", "-m", str(checkpoint), "-o", str(folder)]) == 0

    return made_once("coreml.rmse", tmp_path_factory, make)


@pytest.fixture(scope="session")
def coreml_int4(calm: Quantized, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a memory and a retrieval head in int4, its rings in states, the parity gate included. Read only."""
    from rmse_edge.export import ExportRequest, export_package

    pytest.importorskip("coremltools")

    def make(folder: Path) -> None:
        export_package(calm.model, folder, ExportRequest("coreml", "int4"), quantized=calm)

    return made_once("coreml-int4.rmse", tmp_path_factory, make)
