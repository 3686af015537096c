"""Models held against numbers that their published code gave: what the tests of all such architectures do alike."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_one_line
from safetensors.torch import load_file, save_file
from torch import Tensor

from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.errors import CheckpointError
from rmse_edge.loop.contract import WholeText
from rmse_edge.loop.dials import Dials
from rmse_edge.runtimes.engines.torch import TorchRuntime


def whole(model: Any, tokens: Tensor, dials: Dials, **prefix: int) -> WholeText:
    """What a model says of a text (T,) at once; `prefix=N` for one that knows prefixes."""
    scalars = {name: torch.from_numpy(a) for name, a in dials.arrays().items()}
    return model.whole_text(tokens, {name: scalars[name] for name in model.spec(1).dials}, **prefix)


def fed(
    model: Any, tokens: np.ndarray, cut: tuple[int, ...], dials: Dials | None = None, prefix: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Logits and depth of a text that a host reads in calls of these sizes, its prefix told to the first of them."""
    runtime = TorchRuntime(model, model.config.model_type)
    found = []
    for part in np.split(tokens, np.cumsum(cut)[:-1]):
        if part.size:
            found.append(runtime.feed(part, dials or runtime.info.dials, prefix=0 if found else prefix))
    return np.concatenate([p.logits for p in found]), np.concatenate([p.depth for p in found])


def assert_close(got: Any, expected: Tensor, relative: float = 1e-5) -> None:
    """The largest difference is so small beside the largest number."""
    got = torch.as_tensor(got)
    assert got.shape == expected.shape
    ratio = float((got - expected).abs().max() / expected.abs().max())
    assert ratio < relative, ratio


def assert_refused(checkpoint: Path, damage: Callable[[dict[str, Tensor]], object], message: str, folder: Path) -> None:
    """A copy of a checkpoint whose tensors were damaged is refused by one line that says `message`."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(checkpoint / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert_one_line(str(caught.value), message)
