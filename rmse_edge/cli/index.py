"""rmse-index: texts to a knowledge base that the model looks things up in."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from rmse_edge.errors import UserError

from .common import Parser, existing_file, existing_model, key_value, model_folder, positive_float, positive_int, verb
from .flags import add_runtime_flags, open_model

if TYPE_CHECKING:
    from rmse_edge.knowledge import Store
    from rmse_edge.knowledge.building import Embedder


@verb("rmse-index")
def main(argv: Sequence[str] | None = None) -> int | None:
    run(parse(argv))
    return None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="rmse-index",
        description="Build a knowledge base from texts, add to it, or look into it. Texts that are there are skipped.",
    )
    parser.arguments["text"] = "--query"
    parser.add_argument(
        "model", nargs="?", type=existing_model, help="package (NAME.rmse or NAME.rmse.zip) or checkpoint folder"
    )
    parser.add_argument("texts", nargs="*", type=existing_file, metavar="TEXT", help="UTF-8 files; a line is a passage")
    parser.add_argument(
        "-o", "--output", required=True, metavar="KB",
        help="folder (NAME.kb), or LanceDB: s3://BUCKET/PATH, gs://, az://, db://, lance:FOLDER",
    )  # fmt: skip
    parser.add_argument("--replace", action="store_true", help="take out the passages of each TEXT, and add it again")
    group = parser.add_argument_group("instead of adding")
    group = group.add_mutually_exclusive_group()
    group.add_argument("--query", metavar="TEXT", help="print the passages nearest to TEXT (at most 64 tokens)")
    group.add_argument("--list", action="store_true", help="print the sources and their passages; needs no MODEL")
    group.add_argument("--delete", metavar="SOURCE", help="take out a file, as --list names it; needs no MODEL")
    group.add_argument("--rebuild", action="store_true", help="mend a folder's index; needs no MODEL")
    parser.add_argument("-n", type=positive_int, default=5, metavar="N", help="passages that --query prints, at most")
    add_runtime_flags(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--timeout", type=positive_float, default=10, metavar="S", help="seconds to wait for an answer")
    group.add_argument(
        "--storage", action="append", type=key_value, default=[], metavar="KEY=VALUE",
        help="LanceDB storage option, as endpoint=http://HOST:PORT; repeatable",
    )  # fmt: skip
    args = parser.parse_intermixed_args(argv)
    adding = not (args.query is not None or args.list or args.delete is not None or args.rebuild)
    if adding and not args.texts:
        parser.error("missing TEXT" if args.model else "missing MODEL and TEXT")
    if not adding and (args.texts or args.replace):
        parser.error(f"{args.texts[0] if args.texts else '--replace'}: texts are added by a command of their own")
    if args.query is not None and not args.model:
        parser.error("--query needs MODEL")
    args.model = args.model and model_folder(args.model)
    return args


def run(args: argparse.Namespace, embedder: Embedder | None = None) -> None:
    """What the flags ask for, with `embedder` in the place of the model's own."""
    from rmse_edge.knowledge.building import open_store

    if args.rebuild:
        rebuild(args)
        return
    needs_model = args.query is not None or bool(args.texts)
    if needs_model and embedder is None:
        embedder = model_embedder(args)
    if args.texts and embedder:
        add(args, embedder)
        return
    store = open_store(args.output, None, args.timeout, dict(args.storage))
    try:
        if args.list:
            for source, count in store.sources().items():
                print(f"{count:>8,}  {source}")
        elif args.delete is not None:
            delete(store, args)
        elif embedder:
            show_nearest(store, args, embedder)
    finally:
        store.close()


def model_embedder(args: argparse.Namespace) -> Embedder:
    from rmse_edge.knowledge.building import ModelEmbedder
    from rmse_edge.text import Tokenizer

    runtime = open_model(args)
    tokenizer = Tokenizer(args.model / "tokenizer.json").fitting(runtime.info.vocab_size)
    return ModelEmbedder(runtime, tokenizer, args.model)


def add(args: argparse.Namespace, embedder: Embedder) -> None:
    """Build, or add to what is there; Ctrl-C keeps what was committed."""
    from rmse_edge.knowledge.building import cut_files, index_files, open_store

    files = cut_files(args.texts, embedder)
    total = sum(map(len, files.values()))
    if not total:
        raise UserError(f"{', '.join(map(str, args.texts))}: no passage, only white space")
    store = open_store(args.output, embedder.info, args.timeout, dict(args.storage))
    before = store.info.passages
    try:
        with tqdm(total=total, unit=" passages", disable=None, leave=False, file=sys.stderr) as bar:
            done = index_files(store, embedder, files, args.replace, bar.update)
        size = store.nbytes()
        print(
            f"{args.output}: {done.added:,} passages added, {done.skipped:,} skipped (there already), "
            f"{f'{done.removed:,} removed, ' if args.replace else ''}{store.info.passages:,} in all"
            f"{'' if size is None else f', {size:,} bytes'}"
        )
    except KeyboardInterrupt:
        added = store.info.passages - before
        raise KeyboardInterrupt(f"{args.output} has {added:,} passages more; the same command goes on") from None
    finally:
        store.close()


def delete(store: Store, args: argparse.Namespace) -> None:
    removed = store.delete(source=args.delete)
    if not removed:
        near = difflib.get_close_matches(args.delete, store.sources(), 1)
        hint = f"did you mean {near[0]}?" if near else "--list names them"
        raise UserError(f"--delete: {args.output} has no passages of {args.delete}; {hint}")
    print(f"{args.output}: {removed:,} passages removed, {store.info.passages:,} in all")


def rebuild(args: argparse.Namespace) -> None:
    from rmse_edge.knowledge import is_server
    from rmse_edge.knowledge.store import KnowledgeBase

    if is_server(args.output):
        raise UserError(f"--rebuild: {args.output} is on a server, which keeps its own index; nothing to rebuild")
    with KnowledgeBase.open(args.output, check=False) as store:
        with tqdm(total=store.info.passages, unit=" passages", disable=None, leave=False, file=sys.stderr) as bar:
            store.rebuild(bar.update)
        print(f"{args.output}: index rebuilt, {store.info.passages:,} passages, {store.nbytes():,} bytes")


def show_nearest(store: Store, args: argparse.Namespace, embedder: Embedder) -> None:
    from rmse_edge.knowledge import check_fits
    from rmse_edge.knowledge.building import query

    ours = embedder.info
    check_fits(store.info, ours.key_dims, ours.slots, ours.d_model, ours.model, args.output)
    for hit in query(store, embedder, args.query, args.n):
        print(f"{hit.score:.4f}  {hit.source}  {hit.text}")


if __name__ == "__main__":
    sys.exit(main())
