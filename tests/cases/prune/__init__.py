"""What the cases of pruning methods share: a small network, and what leaves it."""

import torch
from torch import nn

from pliant.budget import Budget
from pliant.edits import Prune
from pliant.method import Method
from pliant.run import Run, start
from pliant.testing import toys

NONE = "no channels that can be removed"
REFUSES = {"shared": NONE, "single": NONE}
TOYS = tuple(name for name in toys.TOYS if name != "bare") + ("bare",)  # the last one is exported


def pair(*norms: float) -> nn.Sequential:
    """Filters of these norms, then a layer that reads them."""
    model = nn.Sequential(nn.Linear(2, len(norms), bias=False), nn.ReLU(), nn.Linear(len(norms), 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(norms)[:, None] * torch.tensor([0.6, 0.8]))
    return model


def run_of(model: nn.Module, method: Method, budget: Budget | None = None, steps: int = 0) -> Run:
    return start(model, method, budget, example=(torch.zeros(2, 2),), steps=steps)


def kept(run: Run) -> dict[tuple[str, str], tuple[int, ...]]:
    return {(e.layer, e.side): e.keep for e in run.edits if isinstance(e, Prune)}
