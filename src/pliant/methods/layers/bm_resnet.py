"""BM-ResNet: convolutions become additions and maxima, one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pliant.edits import Swap
from pliant.families.layers.choose import behind_rectifiers, chosen, unless
from pliant.families.layers.operations import operations
from pliant.method import Method
from pliant.nn.morphological import BMConv2d, check_morphological
from pliant.observe.order import order
from pliant.registry import In, Paper, register
from pliant.run import Run


@register(
    "bm_resnet",
    paper=Paper(
        "ResNet-like Architecture with Low Hardware Requirements",
        "E. Limonova, D. Alfonso, D. Nikolaev, V. V. Arlazarov",
        "ICPR",
        2020,
        "https://arxiv.org/abs/2009.07190",
    ),
)
@dataclass(frozen=True)
class BMResNet(Method):
    """Turns convolutions into layers without products, from the input on, and trains them in.

    A bipolar morphological layer adds logarithms and takes maxima, for the positive and the
    negative parts of inputs and kernel each; logarithms and exponentials are taken once for each
    number. It serves hardware on which multipliers are dear: it holds two kernels instead of one,
    and PyTorch does not compute it faster. After each conversion all weights train on. Behind a
    rectifier the terms of negative inputs are constant, and end in the bias. What the layers do
    for one sample is noted at the end, by kinds of operations.

    *Measured* (bench ``layers-family``: a small CNN on 1,500 digits, four epochs from random
    weights, three seeds): 63.4 ± 1.0 % beside 92.5 ± 1.0 % of convolutions, and 49.8 ± 4.5 %
    where all are converted at once. Of a trained network, as in the paper, six more epochs leave
    70.0 ± 1.3 %, or 90.9 ± 0.2 % where the first half is converted, beside 94.9 ± 0.1 % (bench
    ``layers-family-longer``). A layer of 32 channels takes 15 times as long as the convolution in
    PyTorch and 69 times in onnxruntime.

    *Departs from the paper*: conversions share out the training evenly, and no best checkpoint is
    kept between them. The optimizer's weight decay is kept off the logarithms, which it would
    pull towards weights of one; ``decay`` lets it.

    >>> BMResNet(convert=0.75).shift
    0.1
    """

    convert: Annotated[float, In(0, 1)] = 1.0  # share of the convolutions, from the input on
    # share of the training in which they are converted one by one; 0: all before it
    span: Annotated[float, In(0, 1)] = 0.8
    shift: Annotated[float, In(0, 1, "low")] = 0.1  # eps_x, under the activations
    floor: Annotated[float, In(0, 1, "low")] = 1e-6  # eps_w, under the weights when converted
    decay: bool = False  # let the optimizer's weight decay act on the logarithms
    only: tuple[str, ...] = ()  # name patterns of the convolutions to convert
    exclude: tuple[str, ...] = ()  # name patterns of the layers to leave alone

    def prepare(self, run: Run) -> None:
        """Choose the convolutions, and convert those that come before the training."""
        reason = "only 2-d convolutions without groups become morphological"
        needs = "bm_resnet converts 2-d convolutions without groups"
        layers = chosen(run, self.only, self.exclude, unless(check_morphological, reason), needs)
        names = list(order(run.model, run.example, list(layers)).called)
        count = round(self.convert * len(names))
        for name in names[count:]:
            run.keep(name, "comes behind those to convert")
        run.state.update(layers=names[:count], done=0)
        self._convert(run)

    def before_step(self, run: Run) -> None:
        """Keep the optimizer's weight decay off the logarithms."""
        if not self.decay:
            layers = [run.model.get_submodule(name) for name in run.state["layers"]]
            mine = [layer for layer in layers if isinstance(layer, BMConv2d)]
            run.spare(kernel for layer in mine for kernel in (layer.positive, layer.negative))

    def after_step(self, run: Run) -> None:
        """Convert the next convolution where its time has come."""
        self._convert(run)

    def finalize(self, run: Run) -> None:
        """Convert what is left, and take the constant terms into biases."""
        self._convert(run, all_of_them=True)
        run.apply(*(Swap(name, "rectified") for name in behind_rectifiers(run, BMConv2d)))
        run.note(operations=operations(run.model, run.example))

    def _convert(self, run: Run, *, all_of_them: bool = False) -> None:
        layers, done = run.state["layers"], run.state["done"]
        past = run.step / (self.span * run.steps) if self.span and run.steps else 1.0
        due = len(layers) if all_of_them else min(len(layers), 1 + int(past * len(layers)))
        spec = {"shift": float(self.shift), "floor": float(self.floor)}
        for name in layers[done:due]:
            run.apply(Swap(name, "morphological", spec))
        run.state["done"] = max(done, due)
