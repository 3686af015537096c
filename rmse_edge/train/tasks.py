"""The tasks that a recipe can name."""

from __future__ import annotations

from typing import Any

from rmse_edge.arch.rmse.config import RMSEConfig
from rmse_edge.errors import ConfigError

from .facts import Facts
from .recall import Recall
from .sources import Task

TASKS: dict[str, Any] = {"recall": Recall, "facts": Facts}


def make_task(options: dict[str, Any], config: RMSEConfig) -> Task:
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
    if task.vocab_size > config.vocab_size:
        raise ConfigError(f"model.vocab_size: got {config.vocab_size}, the task {name} needs {task.vocab_size}")
    if config.memory == "none":
        raise ConfigError(f"model.memory: got 'none', the task {name} needs one (titans or atlas)")
    if isinstance(task, Facts):
        if not config.retrieval_slots:
            raise ConfigError("model.retrieval_slots: got 0, the task facts needs at least 1")
        if task.hits > config.retrieval_hits:
            raise ConfigError(
                f"task facts: hits: got {task.hits}, expected at most retrieval_hits ({config.retrieval_hits})"
            )
    return task
