"""How far the routers of a model were from another selection, while it read a text."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .experts import Routing, SparseExperts


class RouterMargins:
    """Listens to all routers of a model as long as it is entered; of texts that are read alone, all positions in order."""

    def __init__(self, model: nn.Module) -> None:
        self.experts = [module for module in model.modules() if isinstance(module, SparseExperts)]
        self.heard: list[Tensor] = []

    def __enter__(self) -> RouterMargins:
        for experts in self.experts:

            def hear(k: int, routing: Routing, experts: SparseExperts = experts) -> None:
                self.heard.append(experts.margin(routing).double())

            experts.observer = hear
        return self

    def __exit__(self, *_: object) -> None:
        for experts in self.experts:
            experts.observer = None

    def take(self, count: int) -> Tensor:
        """The smallest margin of each position since the last call of this, (count,) float64.

        What was said of positions that had stopped is not to be read.
        """
        found = torch.stack(self.heard).amin(0) if self.heard else torch.full((count,), torch.inf, dtype=torch.float64)
        self.heard.clear()
        return found
