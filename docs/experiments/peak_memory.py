"""The memory of a command and of all processes that it starts, at its peak.

    python docs/experiments/peak_memory.py COMMAND

COMMAND has its arguments behind it, as it would have alone. Every process is asked once a second for its proportional share (/proc/PID/smaps_rollup, of Linux): a page that several
of them share counts once in their sum. Two sums are printed. What is anonymous can go nowhere but into memory; the rest are
pages of files that are mapped, which the system drops where it needs them.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil

PERIOD = 1.0  # seconds


def shares(process: psutil.Process) -> tuple[int, int]:
    """(anonymous, all) bytes of a process; nothing of one that has ended."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0, 0
    found = {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":", 1) for line in lines)}
    return found.get("Pss_Anon", 0), found.get("Pss", 0)


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    began = time.monotonic()
    child = subprocess.Popen(sys.argv[1:])
    root = psutil.Process(child.pid)
    anonymous = everything = 0
    while child.poll() is None:
        try:
            parts = [shares(p) for p in (root, *root.children(recursive=True))]
        except psutil.NoSuchProcess:
            break
        anonymous = max(anonymous, sum(part[0] for part in parts))
        everything = max(everything, sum(part[1] for part in parts))
        time.sleep(PERIOD)
    print(
        f"peak memory: {anonymous / 1e9:.2f} GB anonymous, {everything / 1e9:.2f} GB with mapped files; "
        f"{time.monotonic() - began:.0f} s",
        file=sys.stderr,
    )
    sys.exit(child.wait())


if __name__ == "__main__":
    main()
