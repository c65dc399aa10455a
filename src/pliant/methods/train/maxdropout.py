"""MaxDropout: the most active units are set to zero while a network trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from torch.nn.modules.dropout import _DropoutNd

from pliant.families.train.dropping import Masking, Resting, places
from pliant.method import Method
from pliant.registry import In, Paper, register
from pliant.run import Run


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

    *Measured* (bench ``train-family-cifar``: a small CNN, 20 epochs of 3,000 reduced photographs,
    three seeds): 53.1 ± 0.7 % beside 53.3 ± 0.9 % of plain training, so no gain, and 48.0 ± 1.8 %
    of dropout in the same places. On 3,500 digits (``train-family``, five seeds):
    95.9 ± 0.4 % beside 96.1 ± 0.1 % and 95.0 ± 0.4 %.

    The largest unit of an image stands out less behind the last rectifier (``layers-items``, 1,500
    digits, three seeds): 12.2 ± 0.6 times the mean beside 12.9 ± 0.5 of plain training, which was
    right in 94.5 ± 0.4 % beside 92.3 ± 0.9 %; with ``drop=0.5`` 9.8 ± 0.7 times, at 70.9 ± 1.1 %.

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
        names = places(run.model, self.after)
        for module in run.model.modules():
            if isinstance(module, _DropoutNd):
                run.hook(Resting(module))
        for name in names:
            masking = Masking(self.drop, self.mode, self.scope, run.generator)
            run.hook(masking)
            run.hook(run.model.get_submodule(name).register_forward_hook(masking))
        run.state.update(dropped=0, units=0)

    def after_step(self, run: Run) -> None:
        """Count what was dropped."""
        for masking in run.aside.all(Masking):
            run.state["dropped"] += int(masking.dropped)
            run.state["units"] += masking.units
            masking.remove()

    def after_epoch(self, run: Run) -> None:
        """Note the share of the units that was dropped."""
        if run.state["units"]:
            run.note(dropped=run.state["dropped"] / run.state["units"])
        run.state.update(dropped=0, units=0)
