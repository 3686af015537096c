"""Beside a task file of lm-eval that names a function of it: reading the file makes the model `rmse` known."""

from typing import Any

import rmse_edge.harness  # noqa: F401


def unchanged(docs: Any) -> Any:
    """The documents of a task, as they are."""
    return docs
