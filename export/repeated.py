"""Work that PyTorch's exporter does anew for every method and every pass, done once for one export.

A pass of ExecuTorch traces a method again, and a deep model goes through dozens of them. Two parts of each depend on nothing
that changes meanwhile, and take a quarter of the time: which composite operators there are, and copies of where every node
came from, a chain that grows by one with every pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch.export.decomp_utils
import torch.export.exported_program
import torch.fx.traceback


@contextmanager
def done_once() -> Iterator[None]:
    """Without that repetition while the block runs. Operators registered in it are not seen by passes that list them all."""
    collect = "_collect_all_valid_cia_ops"
    with ExitStack() as stack:
        for module in (torch.export.exported_program, torch.export.decomp_utils):
            if (own := getattr(module, collect, None)) is not None:
                stack.enter_context(patch.object(module, collect, cache(own)))
        source: Any = getattr(torch.fx.traceback, "NodeSource", None)
        if source is not None:  # nobody changes one, so that it need not be copied
            stack.enter_context(patch.object(source, "__deepcopy__", lambda self, memo: self, create=True))
        yield
