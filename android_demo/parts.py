"""Fetches what the app is built with, and what its tests need: compilers, Android's tools, ONNX Runtime.

    python android_demo/parts.py                # all parts, into build/android/parts/NAME
    python android_demo/parts.py ktlint         # some of them
    python android_demo/parts.py --lock         # prints parts.lock anew, with the hashes of what there is now

`rmse_edge/registries.py` says what stands in `parts.lock`, and fetches it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rmse_edge import registries
from rmse_edge.cli.common import Parser, verb
from rmse_edge.errors import UserError
from rmse_edge.registries import Part, have, lock

HERE = Path(__file__).resolve().parent
LOCK = HERE / "parts.lock"
PARTS = HERE.parent / "build" / "android" / "parts"


def read_lock(path: Path = LOCK) -> dict[str, Part]:
    """The parts of the app, by name."""
    return registries.read_lock(path)


@verb("parts")
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="parts", description="Fetch what the Android app is built with.")
    parser.add_argument("parts", nargs="*", metavar="NAME", help="of parts.lock (default: all)")
    parser.add_argument("--into", type=Path, default=PARTS, metavar="DIR", help="where they are unpacked")
    parser.add_argument("--lock", action="store_true", help="print their lines of parts.lock with new hashes instead")
    args: argparse.Namespace = parser.parse_args(argv)
    known = read_lock()
    if unknown := [name for name in args.parts if name not in known]:
        raise UserError(f"{unknown[0]}: no such part, expected some of {', '.join(known)}")
    chosen = [known[name] for name in args.parts or known]
    if args.lock:
        lock(chosen)
        return
    for part in chosen:
        print(have(part, args.into))


if __name__ == "__main__":
    raise SystemExit(main())
