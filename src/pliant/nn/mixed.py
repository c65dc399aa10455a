"""Layers that are several at once while a search chooses: each candidate has a share of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.nn.operations import SKIP


class Mixed(nn.Module):
    """A layer whose candidates share one place, each as much as its logits say.

    The logits do not ask for gradients: no optimizer of weights moves them, only a search does.
    What a search adds for a while is kept in buffers, so that it is resumed with the weights:
    ``prior`` is added to the logits, and they are divided by ``temperature``.

    Args:
        names: of the candidates, in order.
    """

    prior: Tensor
    temperature: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.logits = nn.Parameter(1e-3 * torch.randn(len(names)), requires_grad=False)
        self.register_buffer("prior", torch.zeros(len(names)))
        self.register_buffer("temperature", torch.ones(()))

    def probabilities(self) -> Tensor:
        """Return the shares of the candidates, a tensor (candidates,) that sums to one."""
        return ((self.logits + self.prior) / self.temperature).softmax(0)

    def best(self) -> str:
        """Return the name of the candidate with the largest logit."""
        return self.names[int(self.logits.argmax())]

    def candidates(self) -> Mapping[str, nn.Module]:
        """Return every candidate as the plain layer that it would become."""
        raise NotImplementedError


class Partial(nn.Module):
    """Shows an operation some of the channels only; the others go round it, and all are shuffled.

    Source: Xu et al., "PC-DARTS: Partial channel connections for memory-efficient architecture
    search", ICLR 2020; weights of edges, which its dense wiring needs, are left out.

    Args:
        op: maps a share of the channels.
        share: K, one of so many channels is seen, counted from the first.
        stride: of the operation; what goes round it is pooled by as much.
    """

    def __init__(self, op: nn.Module, share: int, stride: int) -> None:
        super().__init__()
        self.op, self.share, self.stride = op, share, stride

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H / stride, W / stride), rounded up."""
        seen = x.shape[1] // self.share
        rest = x[:, seen:]
        if self.stride > 1:
            rest = F.max_pool2d(rest, self.stride, self.stride, ceil_mode=True)
        out = torch.cat((self.op(x[:, :seen]), rest), dim=1)
        return out.unflatten(1, (self.share, seen)).transpose(1, 2).flatten(1, 2)


class MixedOp(Mixed):
    """Runs several operations, and adds up what they give or takes one of them.

    Besides what every `Mixed` keeps, ``drop`` is the share of a skip connection's outputs that is
    zeroed in training, and ``noise`` is added to the logits in training: with noise of Gumbel's
    distribution the largest logit is a sample of the probabilities.

    Args:
        ops: the candidates by name, all with the same shape of output.
        single: run one candidate only, the one with the largest noisy logit; in evaluation that
            with the largest logit.
    """

    drop: Tensor
    noise: Tensor

    def __init__(self, ops: Mapping[str, nn.Module], *, single: bool = False) -> None:
        super().__init__(tuple(ops))
        self.ops = nn.ModuleDict(ops)
        self.register_buffer("drop", torch.zeros(()))
        self.register_buffer("noise", torch.zeros(len(ops)))
        self.single = single
        self.gates: tuple[int, ...] = ()  # candidates whose gates learn, in an architecture step

    def probabilities(self) -> Tensor:
        """Return the shares of the candidates; noise is part of them in a mixture that trains."""
        noise = self.noise if self.training and not self.single else torch.zeros_like(self.noise)
        return ((self.logits + self.prior + noise) / self.temperature).softmax(0)

    def place(self) -> int:
        """Return the number of the one candidate that runs alone."""
        return int((self.logits + self.noise if self.training else self.logits).argmax())

    def candidates(self) -> Mapping[str, nn.Module]:
        """Return the operations."""
        return dict(self.ops.items())

    def forward(self, x: Tensor) -> Tensor:
        """Map the input by every candidate and mix the outputs, or by one."""
        if self.single:
            return self._gated(x) if self.gates else self._path(self.names[self.place()], x)
        shares = self.probabilities().unbind()
        paths = (self._path(name, x) for name in self.names)
        return reduce(add, (share * path for share, path in zip(shares, paths, strict=True)))

    def _path(self, name: str, x: Tensor) -> Tensor:
        out: Tensor = self.ops[name](x)
        if name == SKIP and self.training and self.drop > 0:
            out = F.dropout(out, float(self.drop))
        return out

    def _gated(self, x: Tensor) -> Tensor:
        """Run one candidate; the gates of those that learn get gradients, and give nothing.

        The gradient of a gate is the product of what its candidate gives with the gradient of
        the output (Cai et al., "ProxylessNAS", ICLR 2019, section 3.2). It reaches the logits
        through the probabilities among those that learn.
        """
        place = self.place()
        out = self._path(self.names[place], x)
        shares = self.logits[list(self.gates)].softmax(0)
        total = out
        for share, gate in zip(shares, self.gates, strict=True):
            with torch.no_grad():
                given = out.detach() if gate == place else self._path(self.names[gate], x)
            total = total + (share - share.detach()) * given
        return total
