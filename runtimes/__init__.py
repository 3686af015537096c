"""Runtimes: the same small `Runtime` over PyTorch, ONNX Runtime and other engines.

`open_runtime` takes a package or a checkpoint folder and returns the runtime for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rmse_edge.archive import unpacked
from rmse_edge.errors import ArgumentError, PackageError, UserError
from rmse_edge.info import ModelInfo
from rmse_edge.loop.dials import Dials
from rmse_edge.package import MANIFEST, Package

from .host.base import Fed, Methods, Runtime, Surprise
from .host.blocks import Block, BlockRuntime
from .host.board import BoardRuntime, Solved
from .host.calls import Opened
from .host.text import LoopRuntime

__all__ = [
    "Block",
    "BlockRuntime",
    "BoardRuntime",
    "Dials",
    "Fed",
    "LoopRuntime",
    "Methods",
    "ModelInfo",
    "Runtime",
    "Solved",
    "Surprise",
    "blocks_for",
    "board_for",
    "open_boards",
    "open_runtime",
    "open_writer",
    "other_runtimes",
    "runtime_for",
]

RUNTIMES = ("torch", "cuda", "onnx", "executorch", "coreml")
OF_CHECKPOINTS = ("torch", "cuda")  # the others run packages


def board_for(package: Package, threads: int | None = None, engine: str | None = None) -> BoardRuntime:
    """The runtime of a verified package of a model that fills in boards.

    Raises:
        PackageError: no runtime here runs its target.
        UserError: it is a model of texts.
    """
    found = _opened(package, threads, engine)
    together: int | None = 1
    if package.target == "onnx":
        from .engines.onnx import largest_batch

        together = largest_batch(found.methods)
    if found.info.board is None:
        raise UserError(f"{package.folder}: is a model of texts; give it a prompt, or a text to read")
    return BoardRuntime(found.info, found.methods, found.loop, together)


def blocks_for(package: Package, threads: int | None = None, engine: str | None = None) -> BlockRuntime:
    """The runtime of a verified package of a model that writes by blocks.

    Raises:
        PackageError: no runtime here runs its target.
        UserError: it is another kind of model.
    """
    return BlockRuntime(*_opened(package, threads, engine))


def _opened(package: Package, threads: int | None, engine: str | None) -> Opened:
    """The engine's part of a verified package, whatever kind of model it is.

    Raises:
        PackageError: no runtime here runs its target.
    """
    if package.target == "onnx":
        from .engines.onnx import opened as onnx

        return onnx(package, threads)
    if package.target == "executorch":
        from .engines.executorch import opened as executorch

        return executorch(package, threads)
    if package.target == "coreml":
        from .engines.coreml import opened as coreml

        return coreml(package, engine, threads)
    raise no_runtime(package)


def no_budget(target: str) -> ArgumentError:
    """docs/offload.md says why."""
    return ArgumentError(
        "expert_ram", f"the {target} runtime keeps no budget; export the model for executorch, whose packages do"
    )


def no_runtime(package: Package) -> PackageError:
    known = ", ".join(name for name in RUNTIMES if name not in OF_CHECKPOINTS)
    return PackageError(f"{package.folder}: made for {package.target}, which has no runtime here; known: {known}")


def runtime_for(package: Package, threads: int | None = None, expert_ram: str | None = None) -> Runtime:
    """The runtime of a verified package of a model of texts.

    Args:
        expert_ram: memory that experts may take, see `open_runtime`.
    Raises:
        PackageError: no runtime here runs its target.
        ArgumentError: `expert_ram` of a package that keeps no budget.
    """
    if expert_ram is not None and package.target != "executorch":
        raise no_budget(package.target)
    if package.target == "onnx":
        from .engines.onnx import OnnxRuntime

        return OnnxRuntime(package, threads)
    if package.target == "executorch":
        from .engines.executorch import ExecutorchRuntime

        return ExecutorchRuntime(package, threads, expert_ram=expert_ram)
    if package.target == "coreml":
        from .engines.coreml import CoremlRuntime

        return CoremlRuntime(package, threads=threads)
    raise no_runtime(package)


def other_runtimes(package: Package) -> list[LoopRuntime]:
    """Further runtimes on which a package must agree with PyTorch: where Core ML itself runs it, the interpreter as well."""
    if package.target != "coreml":
        return []
    from .engines.coreml import CoremlRuntime, engines

    return [CoremlRuntime(package, engine) for engine in engines()[1:]]


def start_engine(target: str) -> None:
    """Load what runs packages of `target`, without a model, so that its own memory can be told from the model's."""
    if target == "onnx":
        from .engines.onnx import start_engine as start
    elif target == "executorch":
        from .engines.executorch import start_engine as start
    elif target == "coreml":
        from .engines.coreml import start_engine as start
    else:
        return
    start()


def open_runtime(
    path: str | Path,
    runtime: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    expert_ram: str | None = None,
    dtype: str | None = None,
) -> Runtime:
    """The runtime for a package, as a folder or an archive, or for a checkpoint folder.

    Args:
        runtime: "torch", "cuda", "onnx", "executorch" or "coreml"; by default whatever the folder was made for.
        device: "cpu" or "cuda", for a checkpoint folder; by default that of the cuda runtime is "cuda", of torch "cpu".
        threads: threads of one call; by default the engine's own choice.
        expert_ram: memory that the experts of an ExecuTorch package may take: a size (`300M`), a share of them (`25%`) or `auto`,
            what the system leaves free; by default the system decides.
        dtype: "fp32", "bf16" or "fp16": how the cuda runtime holds the weights of a float checkpoint; float32 by default.
    Raises:
        UserError: the folder is neither, or the runtime does not fit it.
    """
    package = _package_of(path, runtime, device)
    _check_dtype(dtype, runtime)
    if package is not None:
        return runtime_for(package, threads, expert_ram)
    if expert_ram is not None:
        raise no_budget(runtime or "torch")
    from .engines.torch import TorchRuntime, set_threads

    set_threads(threads)
    if runtime == "cuda":
        from .engines.cuda import CudaRuntime

        return CudaRuntime.open(path, device or "cuda", dtype)
    return TorchRuntime.open(path, device or "cpu")


def open_writer(
    path: str | Path,
    runtime: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    expert_ram: str | None = None,
    dtype: str | None = None,
) -> Runtime | BlockRuntime:
    """As `open_runtime`, of any model of texts: also of one that writes by blocks.

    Raises:
        UserError: as there.
    """
    package = _package_of(path, runtime, device)
    _check_dtype(dtype, runtime)
    if package is not None:
        if package.section(dict[str, Any], "model").get("blocks") is None:
            return runtime_for(package, threads, expert_ram)
        if expert_ram is not None:
            raise ArgumentError("expert_ram", "models that write by blocks have no experts; leave it out")
        return blocks_for(package, threads)
    if runtime == "cuda" or expert_ram is not None:
        return open_runtime(path, runtime, device, threads, expert_ram, dtype)
    from .engines.torch import open_writer as open_checkpoint
    from .engines.torch import set_threads

    set_threads(threads)
    return open_checkpoint(path, device or "cpu")


def open_boards(
    path: str | Path, runtime: str | None = None, device: str | None = None, threads: int | None = None
) -> BoardRuntime:
    """As `open_runtime`, of a model that fills in boards.

    Raises:
        UserError: as there, or it is a model of texts.
    """
    package = _package_of(path, runtime, device)
    if package is not None:
        return board_for(package, threads)
    from .engines.torch import TorchBoards, set_threads

    set_threads(threads)
    return TorchBoards.open(path, device or ("cuda" if runtime == "cuda" else "cpu"))


def _check_dtype(dtype: str | None, runtime: str | None) -> None:
    """
    Raises:
        ArgumentError: a type for a runtime that takes none.
    """
    if dtype is not None and runtime != "cuda":
        raise ArgumentError("dtype", "is of the cuda runtime (runtime=cuda); packages say how they hold weights", dtype)


def _package_of(path: str | Path, runtime: str | None, device: str | None) -> Package | None:
    """The package of a folder or an archive, verified; None: it is to be run by PyTorch.

    Raises:
        UserError: see `open_runtime`.
    """
    path = Path(path)
    if runtime is not None and runtime not in RUNTIMES:
        raise ArgumentError("runtime", f"got {runtime!r}, expected one of {', '.join(RUNTIMES)}")
    if not path.exists():
        raise UserError(f"{path}: no such package or checkpoint folder")
    path = unpacked(path)
    if (path / MANIFEST).is_file() or path.suffix == ".rmse":
        package = Package.open(path)
        if runtime not in (None, package.target):
            raise UserError(f"{path}: made for {package.target}; runtime={runtime} needs a checkpoint folder")
        if device not in (None, "cpu"):
            raise ArgumentError(
                "device", f"the {package.target} runtime runs on the CPU; use a checkpoint folder", device
            )
        return package
    if runtime not in (None, *OF_CHECKPOINTS):
        raise UserError(f"{path}: is not a package; runtime={runtime} needs one (make it with rmse-export)")
    return None
