"""The tasks that a recipe can name."""

from __future__ import annotations

from typing import Any

from rmse_edge.errors import ConfigError

from .arc import Arc
from .boards import MazeTask, SudokuTask
from .facts import Facts
from .recall import Recall
from .sources import Task

TASKS: dict[str, Any] = {"recall": Recall, "facts": Facts, "sudoku": SudokuTask, "maze": MazeTask, "arc": Arc}


def make_task(options: dict[str, Any], config: Any) -> Task:
    """The task that a recipe's `task` names, for a model of this configuration.

    Raises:
        ConfigError: no such task, an option it does not have, or a model that cannot do it.
    """
    name = options.get("name")
    if not isinstance(name, str) or name not in TASKS:
        raise ConfigError(f"task: got {name!r}, expected one of {', '.join(TASKS)}")
    try:
        task = TASKS[name](**{k: v for k, v in options.items() if k != "name"})
    except (TypeError, ConfigError) as error:  # TypeError: an option that it does not have
        raise ConfigError(f"task {name}: {error}") from None
    task.check_model(config)
    return task
