"""Well-sealed but wrong files, by the thousand: `python -m tests.fuzz onnx session ... [-n N] [--seed S]`.

Every case runs in a process of its own, forked from one that has imported everything, and is either refused by a `UserError`
of one line or gives finite results of the right shapes. A traceback, a signal, more than `--seconds` or more than `--memory` of
peak memory is a defect: it is listed with the number that `--case` makes it again by, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from rmse_edge.errors import UserError

from . import build
from .subjects import Subject, scratch_folder

COUNTS = {"onnx": 2000, "executorch": 2000, "coreml": 2000, "runner": 2000, "session": 1000, "knowledge": 1000, "config": 500,
          "quantized": 500}  # fmt: skip
FEWEST = 50  # cases of which some must run: many changes do no harm
REFUSED, RAN, WRONG = "refused", "ran", "wrong"


@dataclass
class Tally:
    """What became of the cases of one subject."""

    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    messages: collections.Counter[str] = field(default_factory=collections.Counter)
    defects: list[str] = field(default_factory=list)
    peak: int = 0  # bytes of the largest process
    slowest: float = 0.0  # seconds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"of {', '.join(COUNTS)}; without one, all")
    parser.add_argument(
        "-n", type=int, help="cases of each; by default " + ", ".join(f"{v} {k}" for k, v in COUNTS.items())
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="only this one, in this process, with its traceback")
    parser.add_argument("--seconds", type=float, default=120, help="of one case, at most (default 120)")
    parser.add_argument("--memory", type=float, default=5, help="GiB of one process, at most (default 5)")
    parser.add_argument(
        "--cache", type=Path, default=Path("build/fuzz"), help="folder of the packages that are changed"
    )
    parser.add_argument("-v", action="store_true", help="show the refusals, most frequent first")
    args = parser.parse_args(argv)
    names = args.subjects or list(COUNTS)
    if unknown := [name for name in names if name not in COUNTS]:
        parser.error(f"no subject {unknown[0]}; there are {', '.join(COUNTS)}")
    failed = False
    with tempfile.TemporaryDirectory(dir=args.cache.mkdir(parents=True, exist_ok=True) or args.cache) as base:
        for name in names:
            subject = build.subject(name, args.cache)
            subject.prepare()
            if args.case is not None:
                return show(subject, name, args.seed, args.case, Path(base))
            tally, start = Tally(), time.monotonic()
            try:
                for i in range(args.n or COUNTS[name]):
                    run(subject, name, args.seed, i, Path(base), args.seconds, args.memory, tally)
            finally:  # after Ctrl-C, too: of hours, what there was
                report(name, args.seed, tally, time.monotonic() - start, args.v)
            if tally.outcomes.total() >= FEWEST and not tally.outcomes[RAN]:
                print("  no case ran: what is changed does not run as it is (is the runner built? make runner)")
                failed = True
            failed |= bool(tally.defects)
    return int(failed)


def case(subject: Subject, name: str, seed: int, i: int, folder: Path) -> None:
    subject.use(subject.make(random.Random(f"{name}/{seed}/{i}"), folder))


def show(subject: Subject, name: str, seed: int, i: int, base: Path) -> int:
    with scratch_folder(base, f"{name}-{i}") as folder:
        try:
            case(subject, name, seed, i, folder)
        except UserError as error:
            print(f"refused: {error}")
        else:
            print("ran")
    return 0


def run(
    subject: Subject, name: str, seed: int, i: int, base: Path, seconds: float, memory: float, tally: Tally
) -> None:
    """One case in a child, and what became of it."""
    with scratch_folder(base, f"{name}-{i}") as folder:
        reader, writer = os.pipe()
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            child(subject, name, seed, i, folder, writer, memory)
        os.close(writer)
        said = b""
        while select.select([reader], [], [], max(0.0, start + seconds - time.monotonic()))[0]:
            if not (block := os.read(reader, 1 << 16)):
                break
            said += block
        else:
            os.kill(pid, signal.SIGKILL)
        os.close(reader)
        _, status, used = os.wait4(pid, 0)
        took = time.monotonic() - start
    # Of the child and what it waited for: the runner.
    peak = used.ru_maxrss * 1024
    outcome, _, line = said.decode(errors="replace").partition(" ")
    defect = None
    if os.WIFSIGNALED(status):
        defect = "no end" if took >= seconds else f"signal {signal.Signals(os.WTERMSIG(status)).name}"
    elif outcome not in (REFUSED, RAN):
        defect = line or f"exit code {os.waitstatus_to_exitcode(status)} without a word"
    elif peak > memory * 2**30:
        defect = f"{peak / 2**30:.1f} GiB of memory"
    tally.outcomes[WRONG if defect else outcome] += 1
    tally.peak, tally.slowest = max(tally.peak, peak), max(tally.slowest, took)
    if defect:
        tally.defects.append(f"case {i}: {defect}")
    elif outcome == REFUSED:
        tally.messages[line.replace(str(base), "").split(":", 1)[-1][:160]] += 1


def child(subject: Subject, name: str, seed: int, i: int, folder: Path, writer: int, memory: float) -> None:
    """Does not return. What it says is one of the outcomes and a line."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = mapped + int(3 * memory * 2**30)  # of addresses, of which not all become memory; so that the machine lives
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        case(subject, name, seed, i, folder)
        said = RAN
    except UserError as error:
        lines = str(error).splitlines()
        said = (
            f"{REFUSED} {lines[0]}"
            if len(lines) == 1 and lines[0].isprintable()
            else f"{WRONG} not one line: {str(error)!r}"
        )
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{WRONG} {type(error).__name__}: {str(error)[:200]!r} at {where.filename}:{where.lineno}"
    os.write(writer, said.encode(errors="replace")[:4000])
    os._exit(0)


def report(name: str, seed: int, tally: Tally, took: float, messages: bool) -> None:
    counts = ", ".join(f"{tally.outcomes[outcome]} {outcome}" for outcome in (REFUSED, RAN, WRONG))
    print(
        f"{name} (seed {seed}): {sum(tally.outcomes.values())} cases in {took:.0f} s: {counts}; "
        f"peak {tally.peak / 2**30:.2f} GiB, slowest {tally.slowest:.1f} s",
        flush=True,
    )
    for defect in tally.defects:
        print(f"  {defect}", flush=True)
    if messages:
        for line, count in tally.messages.most_common():
            print(f"  {count:5d}  {line}")


if __name__ == "__main__":
    sys.exit(main())
