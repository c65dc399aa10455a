"""Networks that stand beside another one, such as averages of its weights, follow its edits."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pliant.edits import Edit, Replaced, apply
from pliant.errors import EditError

State = dict[str, tuple[Tensor, int]]


def plain_copy(network: nn.Module) -> nn.Module:
    """Return the network itself, which `AveragedModel` keeps inside."""
    inner = network.module if isinstance(network, AveragedModel) else network
    assert isinstance(inner, nn.Module)
    return inner


def marks(model: nn.Module) -> State:
    """Note which tensors a network has, and how often each was written to."""
    return {name: (tensor, tensor._version) for name, tensor in _tensors(model).items()}


@torch.no_grad()
def follow(
    copies: Iterable[nn.Module], model: nn.Module, edit: Edit, before: State, replaced: Replaced
) -> None:
    """Edit copies as the network was edited, and give them the numbers that are new in it.

    A factorization has many bases: an average of weights goes on only in that of the network. So
    tensors that the edit wrote are taken from the network, and all others stay as they are. Of
    channels that leave or are doubled, the copy's own are.

    Args:
        copies: of the same layers as the network.
        model: the network, edited.
        edit: what was done.
        before: `marks` of the network before it.
        replaced: what the edit did to its parameters.

    Raises:
        EditError: a copy has other layers.
    """
    known = {id(tensor): version for tensor, version in before.values()}  # whatever their names
    new = [name for name, (tensor, at) in marks(model).items() if known.get(id(tensor)) != at]
    for copy in map(plain_copy, copies):
        try:
            apply(copy, edit, weights=bool(replaced.cuts))
        except EditError as error:
            raise EditError(
                f"A copy that follows the network must have its layers, but {error} Hand over "
                "copies of this network only, made before it was edited or since the last edit."
            ) from error
        if replaced.cuts:
            continue
        source, target = _tensors(model), _tensors(copy)
        for name in new:
            target[name].copy_(source[name])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
