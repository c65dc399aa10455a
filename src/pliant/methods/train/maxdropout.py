"""MaxDropout: the most active units are set to zero while a network trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from pliant.errors import ModelError
from pliant.method import Method
from pliant.nn.maxdropout import largest
from pliant.registry import In, Paper, register
from pliant.run import Run
from pliant.surgery.select import check_names, matches

RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish)


@register(
    "maxdropout",
    paper=Paper(
        "MaxDropout: Deep Neural Network Regularization Based on Maximum Output Values",
        "C. F. G. dos Santos, D. Colombo, M. Roder, J. P. Papa",
        "ICPR",
        2020,
        "https://arxiv.org/abs/2007.13723",
    ),
)
@dataclass(frozen=True)
class MaxDropout(Method):
    """Sets the most active units to zero while training, in the place of dropout.

    Units that are less prominent must become informative too. It stands where the network has
    dropouts, which rest meanwhile; a network without any gets it behind its rectifiers, or behind
    the modules that ``after`` names, such as the stages of a ResNet. Nothing of it is left in the
    result. The rate is a share of the range of activations, not of the units: of rectified normal
    ones some 0.04 % are dropped at 0.3, the fewer the more there are. The share is noted after
    every epoch. The layer itself is `pliant.nn.maxdropout.MaxDropout`.

    *Measured* (bench ``train-family``: a small CNN on 3,500 digits, three seeds): 96.0 ± 0.6 %
    beside 96.0 ± 0.2 % of plain training and 94.8 ± 0.4 % of dropout in the same places.

    *Departs from the paper*: the released layer works at test time too; this one does not.

    >>> MaxDropout(after=("layer1", "layer2")).drop
    0.3
    """

    drop: Annotated[float, In(0, 1)] = 0.3  # r, share of the range that is cut off at its top
    # l2-random: a rate from 0..drop at every call, and a share of the largest number
    mode: Literal["minmax", "l2-random"] = "minmax"
    # over what the range is taken; paper: tensor, the whole batch
    scope: Literal["tensor", "sample", "channel"] = "tensor"
    # name patterns of the modules behind which units are dropped; dropouts of the network rest
    after: tuple[str, ...] = ()

    def prepare(self, run: Run) -> None:
        """Put the hooks in, and let dropouts rest."""
        places = self._places(run.model)
        for module in run.model.modules():
            if isinstance(module, _DropoutNd):
                run.hook(_Rest(module))
        for name in places:
            masking = _Masking(self, run.generator)
            run.hook(masking)
            run.hook(run.model.get_submodule(name).register_forward_hook(masking))
        run.state.update(dropped=0, units=0)

    def after_step(self, run: Run) -> None:
        """Count what was dropped."""
        for masking in run.aside.all(_Masking):
            run.state["dropped"] += int(masking.dropped)
            run.state["units"] += masking.units
            masking.remove()

    def after_epoch(self, run: Run) -> None:
        """Note the share of the units that was dropped."""
        if run.state["units"]:
            run.note(dropped=run.state["dropped"] / run.state["units"])
        run.state.update(dropped=0, units=0)

    def _places(self, model: nn.Module) -> list[str]:
        """Name the modules behind which units are dropped."""
        named = {name: module for name, module in model.named_modules() if name}
        if self.after:
            check_names(named, self.after)
            return [name for name in named if matches(name, self.after)]
        for kinds in ((_DropoutNd,), RECTIFIERS):
            if found := [name for name, module in named.items() if isinstance(module, kinds)]:
                return found
        raise ModelError(
            "maxdropout stands in the place of dropouts or behind rectifiers, but the model has "
            'no module of either kind: name others, maxdropout(after=("layer1", "layer2")).'
        )


class _Masking:
    """A forward hook that drops units in training, and counts them since the last step."""

    def __init__(self, method: MaxDropout, generator: torch.Generator) -> None:
        self.method, self.generator = method, generator
        self.dropped, self.units = torch.zeros((), dtype=torch.int64), 0

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not module.training:
            return None
        rate = self.method.drop
        if self.method.mode == "l2-random":
            rate *= float(torch.rand((), generator=self.generator))
        mask = largest(output, rate, self.method.mode, self.method.scope)
        self.dropped, self.units = self.dropped + mask.sum(), self.units + mask.numel()
        return output.masked_fill(mask, 0.0)

    def remove(self) -> None:
        """Forget what was counted."""
        self.dropped, self.units = torch.zeros((), dtype=torch.int64), 0


class _Rest:
    """A dropout that drops nothing, until it is asked to go on."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.p = layer, layer.p
        layer.p = 0.0

    def remove(self) -> None:
        """Give the dropout its rate again."""
        self.layer.p = self.p
