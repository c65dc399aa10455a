"""How the peers make a network smaller, each by its own public call, with one number to turn."""

import copy
from collections.abc import Callable
from importlib.metadata import version

import torch_pruning
from torch import nn

from pliant.budget import Budget
from pliant.data import Data
from pliant.errors import BudgetError
from pliant.method import Method
from pliant.registry import build
from pliant.run import start

Peer = Callable[[nn.Module, Data, float], nn.Module]


def tensorly_torch(model: nn.Module, data: Data, share: float) -> nn.Module:
    """Tucker factorization of every convolution but the first, with a share of its parameters."""
    from tltorch.factorized_layers import FactorizedConv  # sets TensorLy's backend for all

    smaller = copy.deepcopy(model).eval()
    convolutions = [(n, m) for n, m in smaller.named_modules() if isinstance(m, nn.Conv2d)]
    for name, module in convolutions[1:]:
        factorized = FactorizedConv.from_conv(
            module,
            rank=share,
            decompose_weights=True,
            factorization="tucker",
            implementation="factorized",
        )
        owner, _, last = name.rpartition(".")
        setattr(smaller.get_submodule(owner), last, factorized)
    return smaller


def torch_pruning_groups(model: nn.Module, data: Data, share: float) -> nn.Module:
    """Group-norm pruning of channels, ranked over the whole network, with a share kept."""
    smaller = copy.deepcopy(model).eval()
    last = [module for module in smaller.modules() if isinstance(module, nn.Linear)][-1:]
    pruner = torch_pruning.pruner.GroupNormPruner(
        smaller,
        data.example()[0],
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=1 - share,
        max_pruning_ratio=0.95,  # of one layer: without it whole layers vanish
        global_pruning=True,
        ignored_layers=last,
    )
    pruner.step()
    return smaller


def kim(model: nn.Module, data: Data, share: float) -> nn.Module:
    """EVBMF ranks and Tucker-2 (Kim et al. 2015), weakened to a share of the parameters."""
    smaller = copy.deepcopy(model)
    method: Method = build("evbmf")
    run = start(smaller, method, Budget(params=share), data=data)
    run.finish(strict=False)
    return smaller


PEERS: dict[str, Peer] = {
    "tensorly-torch": tensorly_torch,
    "torch-pruning": torch_pruning_groups,
    "kim": kim,
}
LEFT_OUT = {
    "fasterai": "needs fastai, which needs torchvision, which does not import beside this torch"
}
VERSIONS = {name: version(name) for name in ("tensorly-torch", "torch-pruning")}


def widest(
    shrink: Callable[[float], nn.Module], fits: Callable[[nn.Module], bool], tries: int
) -> tuple[float, nn.Module]:
    """Find the largest share of a network that fits, by bisection on a logarithmic scale.

    Raises:
        BudgetError: not even the smallest share tried fits.
    """
    low, high, best = 0.01, 1.0, None
    for _ in range(tries):
        share = (low * high) ** 0.5
        try:
            candidate = shrink(share)
        except BudgetError:
            low = share
            continue
        if fits(candidate):
            low, best = share, (share, candidate)
        else:
            high = share
    if best is None:
        raise BudgetError(f"No share from {low:.1%} on fits the time: allow more milliseconds.")
    return best
