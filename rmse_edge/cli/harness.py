"""rmse-lm-eval: the command of lm-eval, which knows our packages and checkpoints as its model `rmse`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .common import verb


@verb("rmse-lm-eval")
def main(argv: Sequence[str] | None = None) -> int | None:
    """lm-eval parses and prints; its parser reads `sys.argv`."""
    from rmse_edge.errors import UserError

    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        raise UserError("lm-eval is not installed; install it with: pip install 'rmse-edge[eval]'") from None
    import rmse_edge.harness  # noqa: F401

    before = sys.argv
    sys.argv = ["rmse-lm-eval", *(before[1:] if argv is None else argv)]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return None


if __name__ == "__main__":
    sys.exit(main())
