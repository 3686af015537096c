"""Quantised weights as an operator: what `with_stored` makes of a model, whoever lowers it."""

from __future__ import annotations

import pytest
import torch
from helpers import mixed_model
from torch import Tensor, nn

from rmse_edge.layers.held import OPERATOR, Stored, with_stored
from rmse_edge.quantize import Format, QuantizedTensor, QuantizeRequest, Scheme, quantize
from rmse_edge.quantize.tensors import round_to_nearest
from rmse_edge.runtimes import Dials
from rmse_edge.runtimes.engines.torch import TorchRuntime


class Reader(nn.Module):
    """A layer that is none of PyTorch's, which reads one weight in two ways, and one that is the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 32))
        self.embed = nn.Embedding(8, 32)
        self.head = nn.Linear(32, 8)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.table[ids]
        return self.head(x) + x @ self.table.T


@pytest.mark.parametrize("fmt", [Format(4, 16), Format(8), Format(4, 32, symmetric=False)], ids=str)
def test_every_read_of_a_weight_is_the_operator(fmt: Format) -> None:
    """In modules of any type, under every name that a tensor has. The model itself stays as it is."""
    model = Reader()
    tensors = {name: round_to_nearest(model.get_parameter(name).detach(), fmt) for name in ("table", "embed.weight")}
    ready, names = with_stored(model, tensors, {}), [*model.state_dict()]
    assert [*model.state_dict()] == names and not any(isinstance(m, Stored) for m in model.modules())
    assert ready.head.bias is model.head.bias and isinstance(ready.head, nn.Linear)  # shared, and still what it was
    assert not {"table", "embed.weight", "head.weight"} & set(dict(ready.named_parameters()))
    ids = torch.tensor([3, 1])
    traced = torch.export.export(ready, (ids,), strict=False)
    assert sum(node.target == OPERATOR for node in traced.graph.nodes) == 4
    with torch.no_grad():
        for name, q in tensors.items():
            model.get_parameter(name).copy_(q.dequantize())
        torch.testing.assert_close(ready(ids), model(ids))
        torch.testing.assert_close(traced.module()(ids), model(ids))


def test_a_tied_weight_that_is_another_tensor_is_named() -> None:
    model = Reader()
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    tensors: dict[str, QuantizedTensor] = {"embed.weight": round_to_nearest(model.embed.weight.detach(), Format(8))}
    assert "weight" in dict(with_stored(model, tensors, {}).head.named_parameters())
    ready = with_stored(model, tensors, {"head.weight": "embed.weight"})
    assert ready.head.stored_weight is ready.embed.stored_weight


def test_a_whole_model_says_the_same() -> None:
    """Experts, attention and head read what their integers stand for."""
    made = quantize(mixed_model(), QuantizeRequest(Scheme("int4"), method="rtn"))
    ids, dials = torch.arange(20).numpy(), Dials(4, 1, 0.6)
    ours, theirs = (
        TorchRuntime(m, "m").feed(ids, dials) for m in (made.model, with_stored(made.model, made.tensors, {}))
    )
    torch.testing.assert_close(torch.from_numpy(ours.logits), torch.from_numpy(theirs.logits), atol=2e-5, rtol=0)
    assert (ours.depth == theirs.depth).all()
