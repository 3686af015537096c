"""rmse-data: a text to train on, fetched, or with problems of known difficulty in it; boards to train on, made."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from rmse_edge.errors import UserError
from rmse_edge.probe import KINDS

from .common import Parser, existing_file, fraction, list_of, non_negative_int, one_of, output_path, positive_int, verb

TEXTS, GAMES, MIXED = ("shakespeare",), ("sudoku", "maze"), "problems"
OF_GAMES = {"size": {"sudoku": 9, "maze": 30}, "count": 1000, "test": 200, "seed": 0}


@verb("rmse-data")
def main(argv: Sequence[str] | None = None) -> int | None:
    parser = Parser(
        prog="rmse-data",
        description="Download a training text, verified by its SHA-256; put problems of known difficulty between the paragraphs of "
        "one; or make boards with one answer each: train.csv and test.csv, of which none is a symmetric form of one of the other.",
    )
    parser.add_argument(
        "name", choices=(*TEXTS, MIXED, *GAMES),
        help="tiny Shakespeare, 1.1 MB of plain text; a text with problems in it; Sudoku of 4, 6 or 9; mazes",
    )  # fmt: skip
    parser.add_argument(
        "-o",
        "--output",
        type=output_path,
        metavar="FILE",
        help="of a text (default: tinyshakespeare.txt, problems.txt); of boards, a folder",
    )
    parser.add_argument("--url", help=argparse.SUPPRESS)  # a mirror that holds the same file
    group = parser.add_argument_group("boards")
    group.add_argument(
        "--size", type=positive_int, metavar="N", help="cells of a side (default: 9 of Sudoku, 30 of mazes)"
    )
    group.add_argument("--count", type=positive_int, metavar="N", help="training boards (default: 1000)")
    group.add_argument("--test", type=positive_int, metavar="N", help="test boards (default: 200)")
    group = parser.add_argument_group("problems")
    group.add_argument("--text", type=existing_file, metavar="FILE", help="the text that they are put into")
    group.add_argument("--share", type=fraction, metavar="S", help="of all characters, 0 to 1 (default: 0.3)")
    group.add_argument(
        "--kinds", type=list_of(one_of(*KINDS)), metavar="KIND,...", help=f"of {', '.join(KINDS)} (default: all)"
    )
    parser.add_argument(
        "--seed",
        type=non_negative_int,
        metavar="N",
        help="the same seed makes the same boards or problems (default: 0)",
    )
    args = parser.parse_args(argv)
    for flag in () if args.name == MIXED else ("text", "share", "kinds"):
        if getattr(args, flag) is not None:
            raise UserError(f"--{flag}: is of problems, not of {args.name}")
    if args.name in GAMES:
        return make(args)
    for flag in OF_GAMES:
        if getattr(args, flag) is not None and not (flag == "seed" and args.name == MIXED):
            raise UserError(f"--{flag}: is of boards; {args.name} is a text")
    if args.name == MIXED:
        return mix(args)

    from rmse_edge.train.download import download

    output = args.output or Path("tinyshakespeare.txt")
    fetched = download(args.name, output, args.url)
    print(f"{output}: {'written' if fetched else 'already there, unchanged'}")
    return None


def mix(args: argparse.Namespace) -> int | None:
    """A text with problems in it, into a file that is not there yet."""
    from rmse_edge.files import write_text
    from rmse_edge.probe.problems import mixed
    from rmse_edge.text import read_text

    if args.url:
        raise UserError(f"--url: {args.name} are made here, not fetched")
    if args.text is None:
        raise UserError("problems: need a text to be put into; add --text FILE")
    share = 0.3 if args.share is None else args.share
    if not 0 < share < 1:
        raise UserError(f"--share: got {share:g}, expected a share between 0 and 1")
    output = args.output or Path("problems.txt")
    if output.exists():
        raise UserError(f"{output}: is there already; choose another file")
    text = read_text(args.text)
    found = mixed(text, share, args.kinds or list(KINDS), args.seed or 0)
    write_text(output, found)
    print(f"{output}: {len(found):,} characters, {1 - len(text) / len(found):.1%} of them problems")
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
