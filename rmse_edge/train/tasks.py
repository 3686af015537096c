"""The tasks that a recipe can name."""

from __future__ import annotations

import dataclasses
from typing import Any

from rmse_edge.errors import ConfigError
from rmse_edge.schema import first_of

from .arc import Arc
from .boards import MazeTask, SudokuTask
from .facts import Facts
from .mqar import Mqar
from .needle import Needle
from .recall import Recall
from .sources import Task
from .tracking import ModularAddition, Parity

TASKS: dict[str, Any] = {
    "recall": Recall,
    "facts": Facts,
    **{task.name: task for task in (Mqar, Parity, ModularAddition, Needle)},
    "sudoku": SudokuTask,
    "maze": MazeTask,
    "arc": Arc,
}


def make_task(options: dict[str, Any], config: Any) -> Task:
    """The task that a recipe's `task` names, for a model of this configuration.

    Raises:
        ConfigError: no such task, an option it does not have, or a model that cannot do it.
    """
    name = options.get("name")
    if not isinstance(name, str) or name not in TASKS:
        raise ConfigError(f"task: got {name!r}, expected one of {', '.join(TASKS)}")
    given = {k: v for k, v in options.items() if k != "name"}
    fields = dataclasses.fields(TASKS[name])
    if (unknown := first_of(given, known := [f.name for f in fields])) is not None:
        raise ConfigError(f"task {name}: unknown key {unknown!r}; known keys are {', '.join(sorted(known))}")
    needed = (f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING)
    if (missing := first_of(dict.fromkeys(needed), given)) is not None:
        raise ConfigError(f"task {name}: {missing}: is missing")
    try:
        task = TASKS[name](**given)
    except ConfigError as error:
        raise ConfigError(f"task {name}: {error}") from None
    task.check_model(config)
    return task
