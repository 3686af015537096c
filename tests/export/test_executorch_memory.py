"""What an export to ExecuTorch has in memory beside the weights that lie on disk."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import require_executorch
from later import later
from torch import Tensor, nn

from rmse_edge.export.targets import LowerOptions
from rmse_edge.quantize import Format
from rmse_edge.quantize.tensors import PackedTensor

constants = later("rmse_edge.export.executorch.constants")
executorch_lower = later("rmse_edge.export.executorch.lower")
executorch_ops = later("rmse_edge.export.executorch.ops")

pytestmark = [pytest.mark.executorch, pytest.mark.slow]

require_executorch()

WIDTH, HIDDEN, ROWS, PAIRS = 2048, 16384, 4096, 6


class Layers(nn.Module):
    """A table and linear layers: one is read by ExecuTorch's operators, the others by ours, `plain` by XNNPACK."""

    def __init__(self, width: int, hidden: int, rows: int, pairs: int = 1) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, width)
        self.up = nn.ModuleList(nn.Linear(width, hidden, bias=False) for _ in range(pairs))
        self.down = nn.ModuleList(nn.Linear(hidden, width, bias=False) for _ in range(pairs))
        self.plain = nn.Linear(width, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for up, down in zip(self.up, self.down):
            x = x + down(up(x))
        return self.plain(x)


def written(model: nn.Module, tensors: dict[str, Any], folder: Path, on_disk: bool = True) -> Path:
    """`program.pte` with two methods, of one row and of four, lowered as the target does or without anything on disk."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    folder.mkdir()
    ready = executorch_ops.prepare(model, LowerOptions("int4", tensors, scratch=folder))
    ready.plain.__class__ = nn.Linear  # for XNNPACK
    with torch.no_grad():
        methods = {
            f"run_{n}": torch.export.export(ready, (torch.zeros(1, n, dtype=torch.int64),), strict=False)
            for n in (1, 4)
        }
    with constants.left_on_disk(folder) if on_disk else nullcontext():
        lowered = to_edge_transform_and_lower(methods, partitioner=[XnnpackPartitioner()]).to_executorch()
    path = folder / "program.pte"
    with path.open("wb") as file:
        lowered.write_to_file(file)
    executorch_lower.check_weights(path, tensors)
    assert [p.name for p in folder.iterdir()] == ["program.pte"]  # what was kept there has no name
    return path


def drawn(width: int, hidden: int, rows: int, pairs: int = 1) -> tuple[Layers, dict[str, PackedTensor]]:
    """A model and random integers of all its weights but those of `plain`, which has floats."""
    with torch.device("meta"):
        model = Layers(width, hidden, rows, pairs).eval()
    draw = torch.Generator().manual_seed(0)
    model.plain = nn.Linear(width, 32)
    tensors = {}
    for name, weight in model.named_parameters():
        if weight.is_meta:
            outputs, inputs = weight.shape
            packed = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, generator=draw)
            scales = torch.rand((outputs, inputs // 64), generator=draw).bfloat16().float()
            tensors[name] = PackedTensor(Format(4, 64), scales=scales, packed=packed)
    return model, tensors


@contextmanager
def anonymous_peak() -> Iterator[list[int]]:
    """How far the anonymous memory of this process grows while the block runs, in bytes: the last of a list."""

    def now() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))

    def watch() -> None:
        while not done.wait(0.02):
            grown.append(max(grown[-1], now() - start))

    start, grown, done = now(), [0], threading.Event()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield grown
    finally:
        done.set()
        watcher.join()


def test_the_program_is_the_same_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As what ExecuTorch writes with all constants in memory, those that XNNPACK reads included."""
    monkeypatch.setattr(constants, "LEAST", 256)
    model, tensors = drawn(64, 128, 96)
    ours = written(model, tensors, tmp_path / "ours").read_bytes()
    assert ours == written(model, tensors, tmp_path / "theirs", on_disk=False).read_bytes()
    assert ours.count(model.plain.weight.detach().numpy().tobytes()) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_an_export_holds_no_copy_of_its_weights(tmp_path: Path) -> None:
    """Beside the integers of the model, 220 MB here. Tiles and the exporter's constants would each be as much; what is less is
    what the C library keeps of freed memory, one weight at a time, and graphs.
    """
    written(*drawn(64, 128, 96), tmp_path / "warm")  # imports, and what is made once for all
    model, tensors = drawn(WIDTH, HIDDEN, ROWS, PAIRS)
    size = sum(q.nbytes for q in tensors.values())
    with anonymous_peak() as grown:
        path = written(model, tensors, tmp_path / "package")
    assert path.stat().st_size > size
    assert grown[-1] < 1.5 * size, f"{grown[-1] / size:.2f} times the weights"
