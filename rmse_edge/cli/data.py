"""rmse-data: fetch a text to train on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .common import Parser, output_path, verb


@verb("rmse-data")
def main(argv: Sequence[str] | None = None) -> int | None:
    parser = Parser(prog="rmse-data", description="Download a training text, verified by its SHA-256.")
    parser.add_argument("name", choices=("shakespeare",), help="tiny Shakespeare, 1.1 MB of plain text")
    parser.add_argument("-o", "--output", type=output_path, default="tinyshakespeare.txt", metavar="FILE")
    parser.add_argument("--url", help=argparse.SUPPRESS)  # a mirror that holds the same file
    args = parser.parse_args(argv)

    from rmse_edge.train.download import download

    fetched = download(args.name, args.output, args.url)
    print(f"{args.output}: {'written' if fetched else 'already there, unchanged'}")
    return None


if __name__ == "__main__":
    sys.exit(main())
