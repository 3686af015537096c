"""A checkpoint of a published model's shape with random weights, written shard by shard: for sizes, memory and speed.

    python docs/experiments/random_checkpoint.py FOLDER [--shape inkling-2-mini] [--set n_routed_experts=16] [--seed 0]

Weights are drawn as the architecture draws its first ones, one at a time; matrices that begin as zeros, such as those of exit
gates, are drawn as well, so that positions differ. The files are float16, with the model's own names.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rmse_edge.arch.registry import arch_of
from rmse_edge.checkpoint import stored_keys
from rmse_edge.errors import ConfigError
from rmse_edge.quantize.scheme import table_of

SHAPES = {  # the configurations' own defaults are those of the published models
    "ouro-1.4b": "ouro",
    "huginn-0125": "huginn_raven",
    "hrm-text-1b": "hrm_text",
    "dory-4b": "dory",
    "inkling-2-mini": "inkling2_loop_text",
}
SHARD = 500_000_000  # bytes, at most, beside one tensor


class Deviations(TorchFunctionMode):
    """Tensors that are to be filled with random numbers stay as they are. Of normal ones the deviation is noted, by address."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, float] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ not in ("normal_", "uniform_", "kaiming_uniform_"):
            return func(*args, **kwargs)
        tensor: Tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
        if func.__name__ == "normal_":
            self.found[tensor.data_ptr()] = kwargs.get("std", args[2] if len(args) > 2 else 1.0)
        return tensor


def tensors(config: Any, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint, float16, one at a time."""
    with Deviations() as deviations:
        model = arch_of(config.model_type).build(config)  # memory that nobody has written to is not taken yet
    state, table = model.state_dict(), table_of(model)
    for name in stored_keys(config, state):
        tensor = state[name]
        deviation = deviations.found.get(tensor.data_ptr())
        if deviation is None and tensor.dim() > 1 and not tensor.any():
            deviation = tensor.shape[-1] ** -0.5
        if deviation is None:
            yield name, tensor.half()
            continue
        same = table.embedding if name == table.head else name
        generator = torch.Generator().manual_seed(crc32(f"{seed} {same}".encode()))
        yield name, torch.randn(tensor.shape, generator=generator).mul_(deviation).half()


def write(folder: Path, named: Iterable[tuple[str, Tensor]]) -> None:
    """Shards and their index."""
    shard: dict[str, Tensor] = {}
    files: dict[str, str] = {}

    def finish() -> None:
        name = f"model-{len(set(files.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, tensor in named:
        shard[name] = tensor
        if sum(t.nbytes for t in shard.values()) > SHARD:
            finish()
    if shard:
        finish()
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected a field of config.json, = and its value in JSON"
        ) from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="ouro-1.4b")
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="FIELD=JSON", help="of config.json")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        config = arch_of(SHAPES[args.shape]).config.from_dict(dict(args.set))
        args.folder.mkdir(parents=True)
    except (ConfigError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    write(args.folder, tensors(config, args.seed))
    (args.folder / "config.json").write_text(config.to_json())


if __name__ == "__main__":
    main()
