"""Shift attention: kernels learn to keep one of their taps, and become shifts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from pliant.edits import Swap
from pliant.errors import MethodError
from pliant.families.layers.choose import chosen
from pliant.families.layers.shifts import attending, shiftable
from pliant.method import Method
from pliant.registry import In, Paper, register
from pliant.run import Run


@register(
    "shift_attention",
    paper=Paper(
        "Attention Based Pruning for Shift Networks",
        "G. B. Hacene, C. Lassance, V. Gripon, M. Courbariaux, Y. Bengio",
        "ICPR",
        2020,
        "https://arxiv.org/abs/1905.12300",
    ),
)
@dataclass(frozen=True)
class ShiftAttention(Method):
    """Leaves one weight of each k x k kernel: where it stands is learned by attention.

    Convolutions train with a softmax over their taps whose temperature grows with every step,
    until each pair of channels attends to a single tap. Then they are shifts and 1 x 1 products:
    k^2 times fewer weights and multiply-accumulates, and four bits for each tap of nine. With
    ``shared`` all outputs share the taps, and PyTorch computes it so; without, it computes by
    convolutions with zeros, and only another runtime is faster. The first convolution stays as
    it is, and those of kernel 1, even kernels, groups or dilation. It is a way to train a network
    from the start, with batch norms: the kernels begin much weaker than they were.

    *Measured* (bench ``layers-family``: a small CNN on 1,500 digits, four epochs from random
    weights, three seeds): 85.9 ± 1.1 % with 45,632 MACs, beside 92.5 ± 1.0 % of
    convolutions with 296,512; 84.1 ± 1.4 % with ``shared``. Shared taps that were fixed
    beforehand have 85.7 ± 1.0 %: it gained nothing by learning them. A layer of 32 channels takes
    1.11 times as long as the convolution in PyTorch and 1.00 times in onnxruntime, with
    ``shared`` 0.50 and 0.64 times (bench ``layers-family-longer``).

    After eight epochs (``layers-items``, the same digits and seeds) every pair of channels attends
    to a single tap, and no accuracy is lost where that alone is left.

    *Departs from the paper*: the tap attended to most is kept, also where none has half of the
    attention, in validation during the training too.

    >>> ShiftAttention(shared=True).end
    70.0
    """

    start: Annotated[float, In(0, 1000, "low")] = 20.0  # T at the beginning
    end: Annotated[float, In(0, 1000, "low")] = 70.0  # T after the last step
    shared: bool = False  # the same taps for all outputs of an input channel
    # scores at the beginning: random, as the paper has them, or the strength of the weights
    scores: Literal["uniform", "magnitude"] = "uniform"
    stem: bool = False  # take the first convolution too
    only: tuple[str, ...] = ()  # name patterns of the convolutions to take
    exclude: tuple[str, ...] = ()  # name patterns of the layers to leave alone

    def refuse(self, run: Run) -> None:
        """Refuse temperatures that fall."""
        if self.end < self.start:
            raise MethodError(
                f"shift_attention grows sharper from start to end, not from {self.start:g} to "
                f"{self.end:g}: let end be the larger."
            )

    def prepare(self, run: Run) -> None:
        """Let convolutions attend to their taps."""
        needs = (
            "shift_attention needs a Conv2d of an odd kernel larger than 1 x 1 behind the first "
            "layer, without groups or dilation"
        )
        layers = list(chosen(run, self.only, self.exclude, shiftable(run, stem=self.stem), needs))
        how = {"temperature": float(self.start), "magnitude": self.scores == "magnitude"}
        spec = {"shared": self.shared, **how}
        run.apply(*(Swap(name, "shift_attention", spec, run.seed) for name in layers))
        run.state["layers"] = layers

    def after_step(self, run: Run) -> None:
        """Raise the temperature."""
        past = min(1.0, run.step / run.steps) if run.steps else 1.0
        for layer in attending(run):
            layer.temperature.fill_(self.start * (self.end / self.start) ** past)

    @torch.no_grad()
    def after_epoch(self, run: Run) -> None:
        """Note how sharp the attention is: its mean largest share, and how many are above 0.99."""
        tops = torch.cat([layer.shares().amax(2).flatten() for layer in attending(run)])
        run.note(sharpness=float(tops.mean()), settled=float((tops > 0.99).double().mean()))

    def finalize(self, run: Run) -> None:
        """Keep one tap of each kernel."""
        run.apply(*(Swap(name, "shift", {"shared": self.shared}) for name in run.state["layers"]))
