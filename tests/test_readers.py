"""Weights that other modules read are found by watching, and their layers are left alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pliant
from pliant.errors import ModelError
from pliant.observe.readers import readers


class Tied(nn.Module):
    """Decodes by the transposed weight of its encoder, and penalizes another's norm."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head, self.free = nn.Linear(8, 6), nn.Linear(8, 4), nn.Linear(8, 8)
        self.penalty = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        assert self.free.weight.dtype == x.dtype  # asking for a type reads nothing
        code = self.encoder(self.free(x)).relu()
        back = F.linear(code, self.encoder.weight.t())
        self.penalty = self.head.weight.norm()
        return self.head(back)  # type: ignore[no-any-return]


def test_only_layers_that_others_read_are_found() -> None:
    found = readers(Tied(), (torch.randn(2, 8),))
    assert found == {"encoder": "Tied", "head": "Tied"}
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    assert readers(model, (torch.randn(2, 8),)) == {}
    x = torch.randn(2, 3, 8)
    assert readers(attention, (x, x, x)) == {"out_proj": "MultiheadAttention"}


def test_nothing_stays_in_the_model() -> None:
    model = Tied()
    readers(model, (torch.randn(2, 8),))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ModelError, match="must take inputs"):
        readers(model, (torch.randn(2, 7),))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.training


@pytest.mark.parametrize("method", ["energy", "hac(prune=0.5)"])
def test_such_layers_are_left_alone_and_say_why(method: str) -> None:
    result = pliant.compress(Tied(), None, method, example=torch.randn(2, 8))
    rows = {row.layer: row for row in result.report.layers}
    for name in ("encoder", "head"):
        assert (rows[name].form, rows[name].reason) == ("dense", "Tied reads this weight directly")
