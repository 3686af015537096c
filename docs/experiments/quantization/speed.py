"""How long quantising and exporting the shipped model takes in two checkouts, in turns, and what it costs in quality.

    python docs/experiments/quantization/speed.py BASE NEW --text shakespeare.txt [--rounds 3] [--seeds 0] [--threads N]

BASE and NEW are checkouts with an environment of their own in .venv. Every round runs both, one after the other, so that other
work on the machine meets both alike: read the ratios. CPU seconds tell less of that work than seconds do. Quality is
that of `rmse-quantize`'s report, against the float model on held-out text.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

MODEL = Path("models/rmse-shakespeare")


def timed(checkout: Path, verb: str, *flags: str) -> tuple[dict[str, float], str]:
    """Runs a verb of a checkout: seconds, CPU seconds and MiB at most, and what it printed."""
    start = perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen([checkout / f".venv/bin/{verb}", *flags], stdout=out)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{checkout}: {verb} failed with {process.returncode}")
        out.seek(0)
        said = out.read()
    return {"seconds": perf_counter() - start, "cpu": used.ru_utime + used.ru_stime, "mib": used.ru_maxrss / 1024}, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", type=Path, nargs=2, metavar="CHECKOUT", help="the base, then the new one")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", default="0", help="of the calibration text, one after the other by round")
    parser.add_argument("--threads", help="PyTorch's own choice without it")
    args = parser.parse_args()
    seeds = args.seeds.split(",")
    threads = ["--threads", args.threads] if args.threads else []
    found: dict[str, list[dict[str, dict[str, float]]]] = {"base": [], "new": []}
    for i in range(args.rounds):
        for side, checkout in zip(found, args.checkouts):
            with tempfile.TemporaryDirectory() as scratch:
                seed = ["--calibration-seed", seeds[i % len(seeds)]]
                quantised, package = f"{scratch}/q", f"{scratch}/p.rmse"
                text = ["--calibrate", str(args.text), *seed, "--report", "json"]
                cost, said = timed(checkout, "rmse-quantize", "-m", str(MODEL), "-o", quantised, *text, *threads)
                export, _ = timed(checkout, "rmse-export", "-m", quantised, "-o", package, *threads)
            both = {k: max(cost[k], export[k]) if k == "mib" else cost[k] + export[k] for k in cost}
            found[side].append({"quantise": cost, "export": export, "both": both})
            for setting in ("full_depth", "adaptive"):
                r = json.loads(said.splitlines()[-1])["evaluation"][setting]
                print(
                    f"{side}, seed {seed[1]}, {setting}: perplexity {r['perplexity']['float']:.3f} float, "
                    f"{r['perplexity']['quantized']:.3f} quantised, {r['increase']:+.4f} ± {r['increase_se']:.4f} nats, "
                    f"KL {r['kl']:.4f}, same top token {r['same_top_token']:.1%}"
                )
            print(f"{side}: " + ", ".join(f"{part} {c['seconds']:.0f} s ({c['cpu']:.0f} CPU, {c['mib']:.0f} MiB)"
                                          for part, c in found[side][-1].items()), flush=True)  # fmt: skip
    for part in ("quantise", "export", "both"):
        for unit in ("seconds", "cpu", "mib"):
            old, new = (median(run[part][unit] for run in found[side]) for side in found)
            ratios = [a[part][unit] / b[part][unit] for a, b in zip(*found.values())]
            print(f"{part}, {unit}: {old:.0f} -> {new:.0f}, median ratio {median(ratios):.2f}")


if __name__ == "__main__":
    main()
