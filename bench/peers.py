"""How the peers make a network smaller, each by its own public call, with one number to turn."""

import copy
from collections.abc import Callable, Sequence
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
LEAST = 0.01  # of the setting


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


def around(
    dense: nn.Module,
    data: Data,
    times: Callable[[Sequence[nn.Module]], list[float]],
    rungs: Sequence[int],
) -> dict[str, tuple[float | None, float | None]]:
    """Find for every peer the largest setting whose network is fast enough, and the next above it.

    The candidates of all peers are measured together, so that whatever the machine does falls on
    all of them: first far apart on a logarithmic scale, then between the largest that fits and
    the next.

    Args:
        dense: the network as it came.
        data: what it sees.
        times: measures networks together; what gives at most 1 is fast enough.
        rungs: candidates of each peer, a number for every pass.

    Returns:
        both settings by peer; None where no candidate is fast enough, or none is too slow.
    """
    found: dict[str, tuple[float | None, float | None]] = dict.fromkeys(PEERS, (None, None))
    for count in rungs:
        tried = [
            (name, knob, network)
            for name, (below, above) in found.items()
            for knob in _ladder(below or LEAST, above or 1.0, count)
            if (network := _made(name, dense, data, knob)) is not None
        ]
        taken = times([network for *_, network in tried])
        for name, (below, above) in found.items():
            rows = [(knob, t) for (n, knob, _), t in zip(tried, taken, strict=True) if n == name]
            below = max((knob for knob, t in rows if t <= 1), default=below)
            slower = [knob for knob, t in rows if t > 1 and knob > (below or 0)]
            found[name] = below, min(slower, default=above)
    return found


def _ladder(low: float, high: float, count: int) -> list[float]:
    return [low * (high / low) ** (rung / count) for rung in range(count)]


def _made(name: str, dense: nn.Module, data: Data, knob: float) -> nn.Module | None:
    try:
        return PEERS[name](dense, data, knob)
    except BudgetError:
        return None
