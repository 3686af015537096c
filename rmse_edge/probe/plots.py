"""The figures of a report, drawn: one panel for each thing that was measured."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rmse_edge.errors import UserError

WIDTH, HEIGHT, COLUMNS = 4.6, 3.4, 3  # inches of a panel; panels in a row


def draw(found: dict[str, Any], picture: Path) -> None:
    """
    Args:
        found: as `report.measure` gives it.
        picture: a PNG.
    """
    matplotlib = check_matplotlib()
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    panels = _panels(found)
    rows = -(-len(panels) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(COLUMNS * WIDTH, rows * HEIGHT), squeeze=False)
    for axis, (title, paint) in zip(axes.flat, panels):
        paint(axis)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title(title, fontsize=10)
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(picture, dpi=100)
    plt.close(figure)


def check_matplotlib() -> Any:
    """
    Raises:
        UserError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("matplotlib is not installed; install it with: pip install 'rmse-edge[probe]'") from None
    return matplotlib


def _panels(found: dict[str, Any]) -> list[tuple[str, Callable[[Any], None]]]:
    rows, unit = found["by_iteration"], found["unit"]
    at = [row["iteration"] for row in rows]

    def lines(*names: str) -> Callable[[Any], None]:
        def paint(axis: Any) -> None:
            for name in names:
                values = [float("nan") if row[name] is None else row[name] for row in rows]
                axis.plot(at, values, "o-", ms=3, label=name.replace("_", " "))
            axis.set_xlabel(unit)
            axis.legend(fontsize=8)

        return paint

    def change(axis: Any) -> None:
        axis.semilogy(at[1:], [row["change"] for row in rows[1:]], "o-", ms=3, label="relative change of the state")
        axis.axhline(found["settled"]["epsilon"], color="grey", lw=0.8, ls=":", label="settled below")
        axis.set_xlabel(unit)
        axis.legend(fontsize=8)

    def shares(axis: Any) -> None:
        lines("agrees_with_last", "cosine_to_last", "settled")(axis)
        axis.set_ylim(-0.02, 1.02)

    panels = [
        ("loss and entropy, nats", lines("loss", "entropy")),
        ("KL to the last prediction, nats", lines("kl_to_last")),
        ("change of the state", change),
        ("like the last, and settled", shares),
        ("exits: loss by mean iterations", lambda axis: _exits(axis, found["exits"], unit)),
        ("tokens that settle, by tenth of difficulty", lambda axis: _tenths(axis, found["difficulty"], unit)),
    ]
    if found["probes"]:
        panels.append(("linear probes, share right", lambda axis: _probes(axis, found["probes"], at, unit)))
    for task, row in found["tasks"].items():
        panels.append((f"{task}: solved", partial(_task, row=row, unit=unit)))
    if found["experts"]:
        panels.append(("experts in common", lambda axis: _matrix(axis, found["experts"]["overlap"], unit)))
    if found["codes"]:
        panels.append(("loss with exchanged codes", lambda axis: _matrix(axis, found["codes"]["loss"], unit)))
    return panels


def _tenths(axis: Any, found: dict[str, Any], unit: str) -> None:
    axis.plot(range(1, 11), found["settled_by_tenth"], "o-", ms=3)
    axis.set_xlabel(f"tenth of the tokens, from easy to hard ({Path(found['judge']).name})")
    axis.set_ylabel(f"mean {unit}")


def _exits(axis: Any, found: dict[str, Any], unit: str) -> None:
    axis.plot(range(1, len(found["fixed"]) + 1), found["fixed"], "ko-", ms=3, label="fixed depth")
    for name, rule in found["rules"].items():
        axis.plot([r["mean_iterations"] for r in rule["rows"]], [r["loss"] for r in rule["rows"]], lw=1, label=name)
    low = min(found["fixed"])
    axis.set_ylim(0.99 * low, 1.15 * low)
    axis.set_xlabel(f"mean {unit}s")
    axis.legend(fontsize=7)


def _probes(axis: Any, found: dict[str, Any], at: list[int], unit: str) -> None:
    for i, (name, row) in enumerate(found.items()):
        axis.plot(at, row["by_iteration"], "o-", ms=3, color=f"C{i}", label=name)
        axis.axhline(row["token"], color=f"C{i}", lw=0.8, ls="--")
        axis.axhline(row["shuffled"], color=f"C{i}", lw=0.8, ls=":")
    axis.plot([], [], "k--", lw=0.8, label="token alone")
    axis.plot([], [], "k:", lw=0.8, label="shuffled labels")
    axis.set_xlabel(unit)
    axis.legend(fontsize=7)


def _task(axis: Any, row: dict[str, Any], unit: str) -> None:
    for difficulty in range(len(row["settled"])):
        shares = [of_iteration[difficulty] for of_iteration in row["solved"]]
        axis.plot(range(1, len(shares) + 1), shares, "o-", ms=2, color=f"C{difficulty}", label=f"{difficulty + 1}")
    axis.set_xlabel(unit)
    axis.set_ylim(-0.02, 1.02)
    axis.legend(fontsize=7, title="difficulty", title_fontsize=7, ncols=2)


def _matrix(axis: Any, values: list[list[float]], unit: str) -> None:
    count = len(values)
    image = axis.imshow(values, extent=(0.5, count + 0.5, count + 0.5, 0.5), aspect="auto")
    axis.figure.colorbar(image, ax=axis)
    axis.set_xlabel(unit)
    axis.set_ylabel(unit)
