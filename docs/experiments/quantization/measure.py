"""What quantising the shipped model costs, method by method, on the whole validation split in PyTorch.

    python docs/experiments/quantization/measure.py --text shakespeare.txt [--only "NAME;NAME"] [--seeds 0,1,2]

Every variant is compared with the float model block by block (256 characters from an empty past), at full depth and with
the model's own exits; increases are paired, their standard errors are over blocks. Calibration reads the training split
only. A row is printed as soon as it is measured, and -o, results.json beside this file by default, is brought up to date.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.arch.rmse.reading import deployed_exit
from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.losses import token_loss
from rmse_edge.quantize import QuantizeRequest, Scheme, quantize
from rmse_edge.text import Tokenizer, consecutive_blocks, read_text, split

MODEL = Path("models/rmse-shakespeare")
BLOCK = 256
SINGLE_PASS = {"loops": "first", "in_flow": False}  # what a quantiser sees that takes the block for a layer
VARIANTS: dict[str, dict] = {
    "int8 rtn": {"quant": "int8", "method": "rtn"},
    "int8 gptq": {"quant": "int8"},
    "int4 rtn": {"method": "rtn"},
    "int4 gptq single pass": SINGLE_PASS,
    "int4 gptq": {},
    "int4 gptq, all loops alike": {"loops": "even"},
    "int8 gptq, kv int8": {"quant": "int8", "kv": "int8"},
    "int4 rtn, kv int8": {"method": "rtn", "kv": "int8"},
    "int4 gptq single pass, kv int8": SINGLE_PASS | {"kv": "int8"},
    "int4 gptq, kv int8": {"kv": "int8"},
}
SEEDED = ("int4 gptq single pass", "int4 gptq", "int4 gptq, all loops alike")


@torch.inference_mode()
def losses(model: RMSE, blocks: Tensor) -> tuple[dict[str, Tensor], float]:
    """Losses (n, T) at full depth and with early exit, and the mean depth of the latter."""
    found: dict[str, list[Tensor]] = {"full": [], "adaptive": []}
    depths = []
    for part in tqdm(blocks.split(16), leave=False, disable=None, unit="batch"):
        tokens, targets = part[:, :-1], part[:, 1:]
        states, _, _ = model.trajectory(tokens)
        found["full"].append(token_loss(model.head_proj(states[-1]), targets))
        states, _, depth = model.trajectory(tokens, stop=deployed_exit(model))
        found["adaptive"].append(token_loss(model.head_proj(states[-1]), targets))
        depths.append(depth)
    return {name: torch.cat(parts).double() for name, parts in found.items()}, torch.cat(depths).double().mean().item()


def paired(difference: Tensor) -> dict[str, float]:
    by_block = difference.mean(1)
    return {"mean": by_block.mean().item(), "se": by_block.std().item() / math.sqrt(len(by_block))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--only", help="names of variants, separated by semicolons")
    parser.add_argument("--seeds", default="0", help="of the calibration text of " + ", ".join(SEEDED))
    parser.add_argument("--max-blocks", type=int, help="for a quick look")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).with_name("results.json"))
    args = parser.parse_args()
    model = load_checkpoint(MODEL)
    ids = np.asarray(Tokenizer(MODEL / "tokenizer.json").encode(read_text(args.text)), np.int64)
    blocks = torch.from_numpy(consecutive_blocks(split(ids, "validation"), BLOCK))[: args.max_blocks]
    reference, depth = losses(model, blocks)
    path = args.output  # variants measured before stay in it
    results = json.loads(path.read_text()) if path.is_file() else {}
    results |= {"float": {name: x.mean().item() for name, x in reference.items()} | {"mean_depth": depth, "seconds": 0}}
    print(
        f"float: full depth {results['float']['full']:.4f}, adaptive {results['float']['adaptive']:.4f} at {depth:.2f}"
    )
    kept: dict[str, dict[str, Tensor]] = {}
    for seed in map(int, args.seeds.split(",")):
        for name, changes in VARIANTS.items():
            if (args.only and name not in args.only.split(";")) or (seed and name not in SEEDED):
                continue
            changes = dict(changes)
            scheme = Scheme(changes.pop("quant", "int4"))
            start = perf_counter()
            found = quantize(model, QuantizeRequest(scheme, evaluation_tokens=0, seed=seed, **changes), ids)
            seconds = perf_counter() - start
            ours, depth = losses(found.model, blocks)
            label = f"{name}, seed {seed}" if name in SEEDED else name
            kept[label] = ours
            row = {setting: paired(ours[setting] - reference[setting]) for setting in ours}
            results[label] = row | {"mean_depth": depth, "seconds": seconds, "gate": found.report["gate"]}
            cells = (f"{s} {r['mean']:+.5f} ± {r['se']:.5f} ({math.expm1(r['mean']):+.2%})" for s, r in row.items())
            print(f"{label}: {', '.join(cells)} at {depth:.2f} loops; {seconds:.0f} s", flush=True)
            single = kept.get(f"int4 gptq single pass, seed {seed}")
            if name != "int4 gptq single pass" and name in SEEDED and single is not None:
                gain = paired(single["full"] - ours["full"])
                results[label]["gain_over_single_pass"] = gain
                print(f"  better than single pass at full depth by {gain['mean']:+.5f} ± {gain['se']:.5f}", flush=True)
            path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
