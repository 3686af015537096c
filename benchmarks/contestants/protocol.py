"""The child's end of the pipe: a line of JSON asks for one measurement, a line of JSON answers.

The first line says that the model is open, or why not. So opening is never timed, and between two questions a contestant
waits for its next turn and computes nothing. Python's own library alone, since llama.cpp has an environment of its own.

    <- {"ready": {"weights": {"loop": 0, "once": 0}}}
    -> {"test": "tg", "tokens": 128, "loops": 4}
    <- {"tok_per_s": 61.2, "mean_loops": 4.0}
    -> {"test": "pp", "tokens": 512, "loops": null}
    <- {"failed": "out of memory"}
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, Protocol

LONGEST = 120  # characters of a reason: it stands in a table
CONTEXT = 64  # tokens that are fed, untimed, before decoding: as rmse-bench does


class Contestant(Protocol):
    """A model that is open."""

    facts: dict[str, Any]  # what the report says of it

    def measure(self, test: str, tokens: int, loops: int | None) -> dict[str, Any]:
        """One measurement.

        Args:
            test: "pp", a prompt of `tokens`; or "tg", `tokens` one by one behind `CONTEXT` others.
            loops: of every token; None: the model stops by itself.
        Returns:
            tok_per_s, and what else there is to tell: mean_loops, gb_per_s, peak_bytes.
        """
        ...


def reason(error: BaseException) -> str:
    """The beginning of what went wrong, one line; its type, where it says nothing. The log has all of it."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= LONGEST else line[: LONGEST - 3] + "..."


def serve(start: Callable[[dict[str, Any]], Contestant]) -> None:
    """Open what the first argument of the command line describes in JSON, and answer until the parent closes the pipe."""
    # Engines print as they like: what they print goes where errors go, and the answers through a file of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(document: dict[str, Any]) -> None:
        answers.write(json.dumps(document) + "\n")
        answers.flush()

    try:
        contestant = start(json.loads(sys.argv[1]))
    except Exception as error:
        traceback.print_exc()
        say({"failed": reason(error)})
        return
    say({"ready": contestant.facts})
    for line in sys.stdin:
        try:
            say(contestant.measure(**json.loads(line)))
        except Exception as error:
            traceback.print_exc()
            say({"failed": reason(error)})
