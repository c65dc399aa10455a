"""Networks that cannot be looked into, or hold no numbers: each refused in a sentence."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn

from pliant.cost.call import A_MODEL
from pliant.errors import ModelError, must_be


def check_open(model: nn.Module) -> None:
    """Refuse a network whose layers cannot be seen, or have no shape yet.

    Raises:
        ModelError: it is compiled by TorchScript, in part or whole, a parameter is lazy, or it is
            no network.
    """
    must_be(nn.Module, "The model", model, ModelError, A_MODEL)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"Layers must be Python modules, but {name or type(model).__name__} is a "
                "ScriptModule, whose layers cannot be replaced: compress the network before "
                "torch.jit.script or torch.jit.trace."
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ModelError(
                f"Parameters must have a shape, but {name!r} is still lazy; "
                "run the model once on real data before measuring it."
            )


def check_model(model: nn.Module) -> None:
    """Refuse a network that cannot be compressed: it cannot be looked into, or has no numbers.

    Raises:
        ModelError: as for `check_open`, or a parameter or buffer lies on the device "meta".
    """
    check_open(model)
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise ModelError(
                f"Weights must hold numbers, but {name!r} is a meta tensor, which has a shape "
                "only: load the weights, or call model.to_empty and initialize them."
            )
        if tensor.layout != torch.strided:
            raise ModelError(
                f"Weights must be dense tensors, but {name!r} is a sparse one "
                f"({str(tensor.layout).removeprefix('torch.')}): give its to_dense()."
            )
