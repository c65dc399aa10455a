"""Channels of which equally many must leave, though none arrives at another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pliant
from pliant.surgery.prove import cuttable


class Halves(nn.Module):
    """Cuts what a layer gives in parts, which go different ways."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.first = nn.Conv2d(3, 6 * parts, 3, padding=1)
        self.inner = nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Conv2d(6 * (parts + 1), 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(self.parts, 1))
        parts.append(self.inner(parts[-1]).relu())
        return self.last(torch.cat(parts, 1)).mean((2, 3))


class Sliced(Halves):
    """The same, where the halves are slices."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        half = x.shape[1] // 2
        parts = [x[:, :half], x[:, half:], self.inner(x[:, half:]).relu()]
        return self.last(torch.cat(parts, 1)).mean((2, 3))


def test_halves_that_are_slices_leave_in_equal_numbers() -> None:
    torch.manual_seed(0)
    model, x = Sliced(2), torch.randn(8, 3, 6, 6)
    groups = {group.name: group for group in cuttable(model, (x[:1],))[0]}
    assert set(groups) == {"first", "inner"}
    place = groups["first"].slots.index(("first", "out"))
    assert [unit[place] for unit in groups["first"].units] == [(i, i + 6) for i in range(6)]


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_of_a_chunk_leave_in_equal_numbers(parts: int) -> None:
    torch.manual_seed(0)
    model, x = Halves(parts), torch.randn(8, 3, 6, 6)
    groups = {group.name: group for group in cuttable(model, (x[:1],))[0]}
    assert set(groups) == {"first", "inner"}
    place = groups["first"].slots.index(("first", "out"))
    assert [len(unit[place]) for unit in groups["first"].units] == [parts] * 6
    with torch.no_grad():
        model.first.weight[:6] *= 9  # the first part is worth far more than the others
    data = (x, torch.randint(0, 5, (8,)))
    result = pliant.compress(model, data, "magnitude(scope='global')", "params=0.6")
    assert result.report.met
    assert result.model(x).shape == (8, 5)


def test_groups_whose_numbers_do_not_matter_stay_apart() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1)
    )
    groups, _ = cuttable(model, (torch.randn(1, 3, 8, 8),))
    assert [group.name for group in groups] == ["0", "2"]
