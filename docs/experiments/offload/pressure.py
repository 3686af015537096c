"""A package larger than its memory: speed, hits and reads at several budgets, beside all of it in memory and beside plain mapping.

    python docs/experiments/offload/pressure.py wide.rmse --text shakespeare.txt

Every row is a run of rmse-runner that reads 64 tokens in one call and writes others one by one, in rounds: a row of one round is
followed by the same row of the next only after all others had their turn. The rows under a hard limit run in a cgroup of their own
(limit.py), where everything counts: weights, code, cached pages. They begin with nothing cached, and what they read comes from the disk;
the others find all of the file in the system's cache. All rows must write the same tokens at the same depths.

Beside the speed stands the processor time per token that is written, of all threads: what a run costs that writes many, less what one
costs that writes one. It says what a budget costs where other work takes the processors away, and readers find none idle. Last, what the
disk gives when pieces of 1 MiB are read in any order, none of them cached, and how near the rows under a limit come to it: of the time
that a token takes, how much reading alone takes at that rate, or computing alone, whichever is more.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from limit import Limited, NoCgroup, forget, size

from rmse_edge.text import Tokenizer, read_text, split

ROWS = 64  # tokens of the prompt
PIECE = 1 << 20  # bytes of a read that the disk is timed with
HEAD = (
    *("experts", "limit", "threads", "loops", "decoding, of mapped without limit", "64 rows, of the same"),
    *("processor time per token, of the same", "hits", "MiB read per token", "waiting, ms per token"),
    *("experts in memory, MiB", "memory at most, MiB"),
)


@dataclass
class Row:
    budget: str | None  # of --expert-ram; None: mapped
    limit: str | None  # of all memory
    threads: int
    full: bool  # no exits
    documents: list[dict[str, Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of processors, per token
    peaks: list[int] = field(default_factory=list)
    failed: str = ""

    def run(self, runner: Path, package: Path, prompt: str, count: int) -> None:
        words = [str(runner), str(package), "--prompt-tokens", prompt, "--temperature", "0", "--ignore-eos"]
        words += ["-t", str(self.threads), "-o", "json", *(["--exit-threshold", "1"] if self.full else [])]
        words += ["--expert-ram", self.budget] if self.budget else []
        _, little = self._run([*words, "-n", "1"])
        said, much = self._run([*words, "-n", str(count)])
        if not self.failed:
            self.documents.append(json.loads(said))
            self.seconds.append((much - little) / (count - 1))

    def _run(self, words: list[str]) -> tuple[str, float]:
        """What it said, and the seconds of processors that it took."""
        before = os.times()
        if self.limit is None:
            done = subprocess.run(words, capture_output=True, text=True)
        else:
            forget(Path(words[1]))
            with Limited(size(self.limit)) as group:
                done = subprocess.run(group.command(*words), capture_output=True, text=True)
                self.peaks.append(group.peak())
        after = os.times()
        if done.returncode:
            self.failed = done.stderr.strip() or f"ended by signal {-done.returncode}"
        return done.stdout, after.children_user + after.children_system - before.children_user - before.children_system

    def figure(self, name: str) -> float:
        return median(document[name] for document in self.documents)

    def expert(self, name: str) -> float | None:
        found = [d["expert_ram"][name] for d in self.documents if "expert_ram" in d]
        return median(found) if found else None


def rows_of(args: argparse.Namespace) -> list[Row]:
    found = []
    for full in (True, False) if args.exits else (True,):
        for threads in args.threads:
            found += [Row(budget, None, threads, full) for budget in (None, *args.budgets)]
            if args.limit:
                found += [Row(budget, args.limit, threads, full) for budget in (None, *args.limited_budgets)]
    return found


def disk_rate(path: Path, count: int = 128) -> float:
    """Bytes per second of pieces that are not cached, in any order."""
    forget(path.parent)
    file = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        there = path.stat().st_size // PIECE
        pieces = random.Random(0).sample(range(there), min(count, there))
        start = perf_counter()
        for piece in pieces:
            os.pread(file, PIECE, piece * PIECE)
        return len(pieces) * PIECE / (perf_counter() - start)
    finally:
        os.close(file)


def cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--runner", type=Path, default=Path("build/native/rmse-runner"))
    parser.add_argument("--tokens", type=int, default=48, help="to write, behind 64 that are read")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", default="300M", help="of all memory; empty: no rows under a limit")
    parser.add_argument("--budgets", type=lambda text: text.split(","), default=["75%", "50%", "25%"])
    parser.add_argument("--limited-budgets", type=lambda text: text.split(","), default=["200M", "100M"])
    parser.add_argument("--threads", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2])
    parser.add_argument("--exits", action="store_true", help="also with the model's own exits")
    args = parser.parse_args()
    ids = split(Tokenizer(args.package / "tokenizer.json").encode(read_text(args.text)), "validation")
    prompt = ",".join(map(str, ids[:ROWS]))
    rows = rows_of(args)
    for _ in range(args.rounds):
        for row in rows:
            try:
                if not row.failed:
                    row.run(args.runner, args.package, prompt, args.tokens)
            except NoCgroup as reason:
                row.failed = f"no cgroup: {reason}"
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
    rate = disk_rate(args.package / "program.pte")
    notes = []
    for row in rows:
        base = next(
            r for r in rows if r.limit is None and not r.budget and (r.threads, r.full) == (row.threads, row.full)
        )
        what = f"{row.budget} in memory" if row.budget else "mapped"
        head = f"| {what} | {row.limit or ''} | {row.threads} | {'all' if row.full else 'exits'} | "
        if row.failed or not row.documents:
            print(head + f"{row.failed} |" + " |" * (len(HEAD) - 5))
            continue
        same = all(d[name] == base.documents[0][name] for d in row.documents for name in ("tokens", "depth"))
        hits, resident = row.expert("hit_rate"), row.expert("resident_expert_bytes")
        cells = [
            f"{row.figure('tokens_per_s') / base.figure('tokens_per_s'):.2f}",
            f"{row.figure('prompt_tokens_per_s') / base.figure('prompt_tokens_per_s'):.2f}",
            f"{median(row.seconds) / median(base.seconds):.2f}",
            cell(None if hits is None else 100 * hits, "{:.0f} %"),
            cell(row.expert("mib_read_per_token"), "{:.1f}"),
            cell(row.expert("stall_ms_per_token"), "{:.1f}"),
            cell(None if resident is None else resident / 2**20, "{:.1f}"),
            cell(max(row.peaks) / 2**20 if row.peaks else None, "{:.1f}"),
        ]
        print(head + " | ".join(cells) + " |")
        if not same:
            notes.append(f"{what}, limit {row.limit}: OTHER TOKENS OR DEPTHS")
        read = row.expert("mib_read_per_token")
        if row.limit and read:
            least = max(read * 2**20 / rate, 1 / base.figure("tokens_per_s"))  # seconds of a token
            share = row.figure("tokens_per_s") * least
            notes.append(f"{what}, limit {row.limit}, {row.threads} threads: {share:.2f} of what the disk allows")
    if not any("OTHER" in note for note in notes):
        notes.insert(0, "all rows wrote the same tokens at the same depths")
    first = rows[0]
    if first.documents:
        notes.append(f"mapped, {first.threads} thread: {first.figure('tokens_per_s'):.1f} tokens/s")
    print(f"\n{'; '.join(notes)}; the disk gives {rate / 1e6:.0f} MB/s in pieces of {PIECE >> 20} MiB, not cached")


if __name__ == "__main__":
    main()
