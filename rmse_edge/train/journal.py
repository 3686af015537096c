"""The training log: one CSV row per step, and the picture drawn from it."""

from __future__ import annotations

import csv
from itertools import pairwise
from pathlib import Path

from rmse_edge.files import new_file

FIELDS = (
    "step", "stage", "loops", "loss", "last_loss", "depth", "lr", "grad_norm", "idle_experts", "solved", "tokens_per_s", "val_loss"
)  # fmt: skip


class Journal:
    """Appends rows to log.csv; a resumed run first drops the rows it is about to write again."""

    def __init__(self, path: Path, step: int) -> None:
        rows = [r for r in read_rows(path) if int(r["step"]) < step] if path.exists() else []
        with new_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS, restval="")
            writer.writeheader()
            writer.writerows(rows)
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, FIELDS, restval="")

    def add(self, **row: object) -> None:
        self._writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_rows(path: Path) -> list[dict[str, str]]:
    """Whole rows; a last one that was cut off while being written is left out."""
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if (row["step"] or "").isdigit() and row["val_loss"] is not None]


def best_validation(rows: list[dict[str, str]]) -> tuple[int, float] | None:
    """(number of steps done, loss) of the best validation of stage 1, whose weights the later stages start from."""
    valued = [(float(r["val_loss"]), int(r["step"]) + 1) for r in rows if r["val_loss"] and r["stage"] == "loops"]
    return (min(valued)[1], min(valued)[0]) if valued else None


def draw(path: Path, picture: Path, loss: str = "next-token loss (nats)", depth: str = "mean depth (loops)") -> None:
    """Loss and mean depth over the steps, with the stages marked; of boards, the share that was solved besides."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_rows(path)
    steps = [int(r["step"]) for r in rows]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=[2, 1])
    top.plot(steps, smooth([float(r["last_loss"]) for r in rows]), lw=1, label="training, last loop (moving mean)")
    valued = [(int(r["step"]), float(r["val_loss"])) for r in rows if r["val_loss"]]
    if valued:
        top.plot(*zip(*valued), "o-", ms=3, lw=1, label="validation, full depth, averaged weights")
    top.set_ylabel(loss)
    bottom.plot(steps, smooth([float(r["depth"]) for r in rows]), lw=1, color="tab:green")
    bottom.set_ylabel(depth)
    solved = [(int(r["step"]), float(r["solved"])) for r in rows if r.get("solved")]
    if solved:
        share = top.twinx()
        share.plot([s for s, _ in solved], smooth([v for _, v in solved]), lw=1, color="tab:purple")
        share.set_ylabel("boards solved when they halt (moving mean)", color="tab:purple", fontsize=8)
        share.set_ylim(0, 1)
    bottom.set_xlabel("step")
    for before, after in pairwise(rows):
        if before["stage"] != after["stage"]:
            for axis in (top, bottom):
                axis.axvline(int(after["step"]), color="grey", lw=0.8, ls="--")
            top.text(int(after["step"]), top.get_ylim()[1], f" {after['stage']}", va="top", fontsize=8, color="grey")
    top.legend(fontsize=8)
    figure.tight_layout()
    with new_file(picture) as part:
        figure.savefig(part, dpi=110)
    plt.close(figure)


def smooth(values: list[float], width: int = 20) -> list[float]:
    """Trailing mean over at most `width` values."""
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(width, i + 1) for i in range(len(values))]
