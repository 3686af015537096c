"""rmse-data: a text to train on, fetched; boards to train on, made."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from rmse_edge.errors import UserError

from .common import Parser, non_negative_int, output_path, positive_int, verb

TEXTS, GAMES = ("shakespeare",), ("sudoku", "maze")
OF_GAMES = {"size": {"sudoku": 9, "maze": 30}, "count": 1000, "test": 200, "seed": 0}


@verb("rmse-data")
def main(argv: Sequence[str] | None = None) -> int | None:
    parser = Parser(
        prog="rmse-data",
        description="Download a training text, verified by its SHA-256, or make boards with one answer each: train.csv and "
        "test.csv, of which none is a symmetric form of one of the other.",
    )
    parser.add_argument(
        "name", choices=(*TEXTS, *GAMES), help="tiny Shakespeare, 1.1 MB of plain text; Sudoku of 4, 6 or 9; mazes"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=output_path,
        metavar="FILE",
        help="of a text (default: tinyshakespeare.txt); of boards, a folder",
    )
    parser.add_argument("--url", help=argparse.SUPPRESS)  # a mirror that holds the same file
    group = parser.add_argument_group("boards")
    group.add_argument(
        "--size", type=positive_int, metavar="N", help="cells of a side (default: 9 of Sudoku, 30 of mazes)"
    )
    group.add_argument("--count", type=positive_int, metavar="N", help="training boards (default: 1000)")
    group.add_argument("--test", type=positive_int, metavar="N", help="test boards (default: 200)")
    group.add_argument(
        "--seed", type=non_negative_int, metavar="N", help="the same seed makes the same boards (default: 0)"
    )
    args = parser.parse_args(argv)
    if args.name in GAMES:
        return make(args)
    for flag in OF_GAMES:
        if getattr(args, flag) is not None:
            raise UserError(f"--{flag}: is of boards; {args.name} is a text")

    from rmse_edge.train.download import download

    output = args.output or Path("tinyshakespeare.txt")
    fetched = download(args.name, output, args.url)
    print(f"{output}: {'written' if fetched else 'already there, unchanged'}")
    return None


def make(args: argparse.Namespace) -> int | None:
    """Boards into a folder that has none yet."""
    from rmse_edge.puzzles.known import game_of
    from rmse_edge.puzzles.sets import made, write_boards

    if args.url:
        raise UserError(f"--url: {args.name} is made here, not fetched")
    given = {name: getattr(args, name) for name in OF_GAMES}
    size = given["size"] or OF_GAMES["size"][args.name]  # type: ignore[index]
    count, test, seed = (OF_GAMES[n] if given[n] is None else given[n] for n in ("count", "test", "seed"))
    game = game_of(args.name, size * size)
    folder = args.output or Path(f"{args.name}-{size}")
    files = [folder / f"{part}.csv" for part in ("train", "test")]
    if there := next((file for file in files if file.exists()), None):
        raise UserError(f"{there}: is there already; choose another folder")
    with tqdm(total=count + test, unit=" boards", disable=None, leave=False, file=sys.stderr) as bar:  # type: ignore[operator]
        both = made(game, count, test, seed, bar.update)  # type: ignore[arg-type]
    folder.mkdir(parents=True, exist_ok=True)
    for file, boards in zip(files, both):
        write_boards(file, game, boards, f"rmse-data {args.name} {size} seed {seed}")
        print(f"{file}: {len(boards)} boards, rating {boards.rating.min()} to {boards.rating.max()}")
    return None


if __name__ == "__main__":
    sys.exit(main())
