"""A package without its parity gate: for sizes, memory and times of random weights, at shapes where the gate takes hours.

    python docs/experiments/ungated.py FOLDER-int4 FOLDER.rmse [--target executorch] [--max-seq-len 4096]

FOLDER-int4 is a checkpoint that rmse-quantize wrote. Otherwise it is what rmse-export does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rmse_edge.export.pipeline import ExportRequest, export_package
from rmse_edge.quantize import load_quantized


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("package", type=Path)
    parser.add_argument("--target", default="executorch")
    parser.add_argument("--max-seq-len", type=int)
    args = parser.parse_args()
    stored = load_quantized(args.checkpoint)
    request = ExportRequest(args.target, stored.quant, max_seq_len=args.max_seq_len, check=False)
    export_package(stored.model, args.package, request, quantized=stored)


if __name__ == "__main__":
    main()
