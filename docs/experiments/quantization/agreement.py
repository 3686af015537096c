"""A quantised package against PyTorch with the weights its integers stand for, on a text of one's choice.

    python docs/experiments/quantization/agreement.py PACKAGE.rmse QUANTISED-CHECKPOINT --text shakespeare.txt

The rules are those of the parity gate (docs/quantization.md): exact where activations are float32, rounded otherwise, at full
depth and at two adaptive settings, over the first 2,000 tokens of the validation split.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from rmse_edge.arch.common.identity import model_info
from rmse_edge.export.gate.compare import adaptive_settings, compare
from rmse_edge.export.gate.reference import Reference
from rmse_edge.package import Package
from rmse_edge.quantize import load_quantized
from rmse_edge.runtimes import LoopRuntime, runtime_for
from rmse_edge.text import Tokenizer, read_text, split

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("package", type=Path)
parser.add_argument("checkpoint", type=Path)
parser.add_argument("--text", type=Path, required=True)
parser.add_argument("--tokens", type=int, default=2000)
args = parser.parse_args()
package = Package.open(args.package)
exact = package.manifest["parity"]["rule"] == "exact"
model, candidate = load_quantized(args.checkpoint).model, runtime_for(package)
assert isinstance(candidate, LoopRuntime)
ids = np.asarray(Tokenizer(args.checkpoint / "tokenizer.json").encode(read_text(args.text)), np.int64)
tokens = split(ids, "validation")[: args.tokens]
reference = Reference(model, model_info(model, "reference", 0), tokens)
print(f"{args.package}: {'exact' if exact else 'rounded'} rule, {len(tokens)} tokens")
for name, dials in adaptive_settings(reference, tokens[:256]).items():
    r = compare(reference, candidate, tokens, dials, exact)
    print(
        f"{name}: max |d logit| {r['max_logit_difference']:.1e}, same top token {r['same_top_token']:.2%}, "
        f"same depth {r['same_depth']:.2%}, mean depth {r['mean_depth'][0]:.3f} and {r['mean_depth'][1]:.3f}, "
        f"KL {r['kl']:.1e}, undecided {len(r['undecided'])}"
    )
