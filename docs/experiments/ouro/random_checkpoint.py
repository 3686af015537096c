"""A checkpoint of an Ouro model's shape with random weights, written shard by shard: for sizes, memory and speed.

    python docs/experiments/ouro/random_checkpoint.py FOLDER [--config config.json] [--seed 0]

Without --config it has the shape of Ouro-1.4B: 24 layers of width 2,048, 4 loops, 2.87 GB of float16.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from rmse_edge.arch.ouro.config import OuroConfig
from rmse_edge.arch.ouro.model import Ouro

SHARD = 500_000_000  # bytes, at most, beside one tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = OuroConfig.from_file(args.config) if args.config else OuroConfig()
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Ouro(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    args.folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(args.seed)
    shards: list[dict[str, torch.Tensor]] = [{}]
    files: dict[str, str] = {}
    written = 0

    def write() -> None:
        nonlocal written
        written += 1
        name = f"model-{written:05d}.safetensors"
        save_file(shards[-1], args.folder / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(shards[-1], name))
        shards[-1] = {}

    for name, shape in shapes.items():
        if "norm" in name:
            tensor = torch.ones(shape)
        elif name.endswith("bias"):
            tensor = torch.full(shape, -1.0)
        else:
            tensor = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        shards[-1][name] = tensor.half()
        if sum(2 * t.numel() for t in shards[-1].values()) > SHARD:
            write()
    if shards[-1]:
        write()
    index = {"metadata": {}, "weight_map": files}
    (args.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (args.folder / "config.json").write_text(config.to_json())


if __name__ == "__main__":
    main()
