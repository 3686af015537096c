"""What a package gives on this machine, for the app to hold a phone against: a step of build_apk.sh.

    python android_demo/reference.py PACKAGE.rmse.zip -o reference.json

The document has a text's `tokens`, of each the likeliest next token (`top`) and the loops it took at the package's own dials
(`depth`), and which package it is of. The parity gate has held that package against PyTorch when it was exported.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from rmse_edge.archive import unpacked
from rmse_edge.cli.common import Parser, existing_path, output_path, verb
from rmse_edge.errors import PackageError
from rmse_edge.files import write_text

TOKENS = 320  # across ends of the memory's segments, and for the shipped model once around the ring


@verb("reference")
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="reference", description="Write down what a package gives on this machine.")
    parser.add_argument("package", type=existing_path, help="NAME.rmse or NAME.rmse.zip")
    parser.add_argument("-o", "--output", type=output_path, required=True, metavar="FILE", help="JSON")
    args = parser.parse_args(argv)
    from rmse_edge.runtimes import open_runtime
    from rmse_edge.text import Tokenizer, read_text

    folder = unpacked(args.package)
    runtime = open_runtime(folder)
    sample = folder / "sample.txt"
    if not sample.is_file():
        raise PackageError(f"{args.package}: holds no sample.txt; export a checkpoint that has one")
    tokens = Tokenizer(folder / "tokenizer.json").encode(read_text(sample))[
        : min(TOKENS, runtime.info.longest or TOKENS)
    ]
    fed = runtime.feed(tokens, runtime.info.dials)
    document = {
        "fingerprint": runtime.info.fingerprint,
        "quant": runtime.info.quant,
        "tokens": tokens,
        "top": fed.logits.argmax(1).tolist(),
        "depth": fed.depth.tolist(),
    }
    write_text(args.output, json.dumps(document))


if __name__ == "__main__":
    raise SystemExit(main())
