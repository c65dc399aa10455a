"""CQNN: convolutions become quadratic forms of their patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pliant.edits import Swap
from pliant.errors import ModelError
from pliant.families.layers.choose import chosen, unless
from pliant.method import Method
from pliant.nn.quadratic import check_quadratic, numbers_of
from pliant.registry import In, Paper, register
from pliant.run import Run


@register(
    "cqnn",
    paper=Paper(
        "CQNN: Convolutional Quadratic Neural Networks",
        "P. Mantini, S. K. Shah",
        "ICPR",
        2020,
        "https://doi.org/10.1109/ICPR48806.2021.9413207",
    ),
)
@dataclass(frozen=True)
class CQNN(Method):
    """Gives every convolution a quadratic part: each output is a quadratic form of its patch.

    A network can do more with as many layers, at a price that grows with the square of the patch:
    it does not become smaller. It begins as the convolutions it has, whose quadratic part is
    zero, and learns the rest. At the end full matrices become symmetric, which is half of them
    and the same function. In low rank a form is a few squares of plain filters and their sum,
    which costs ``rank`` times the convolution; from two on it begins exactly as that.

    *Measured* (bench ``layers-family``: a small CNN on 1,500 digits, four epochs, three seeds):
    in low rank 94.9 ± 0.6 % beside 92.5 ± 1.0 % of convolutions of the same widths, and
    94.9 ± 0.7 % of wider ones with as many parameters. A layer of 32 channels takes 5.1 times as
    long as the convolution in PyTorch and 3.2 times in onnxruntime; in full over 1,000 times.

    *Departs from the paper*: it trains other networks than those made for it, which begin at
    random and have ELU in the place of ReLU; activations stay as they are. Matrices begin
    symmetric, since what is not never learns. The low rank is ours.

    >>> CQNN(form="lowrank", rank=8).most
    10000000
    """

    form: Literal["full", "symmetric", "lowrank"] = "full"  # in which it trains
    rank: Annotated[int, In(1, 1024)] = 4  # R, of "lowrank": squares of each output
    negative: bool = True  # turn the sign of the form, which activations see; not of "lowrank"
    # where it begins: at the convolution, or at random as the paper does
    begin: Literal["convolution", "random"] = "convolution"
    most: Annotated[int, In(1)] = 10_000_000  # weights of one layer; more are refused
    only: tuple[str, ...] = ()  # name patterns of the convolutions to take
    exclude: tuple[str, ...] = ()  # name patterns of the layers to leave alone

    def prepare(self, run: Run) -> None:
        """Put the forms in."""
        reason = "only 2-d convolutions without groups become quadratic"
        needs = "cqnn makes 2-d convolutions without groups quadratic"
        layers = chosen(run, self.only, self.exclude, unless(check_quadratic, reason), needs)
        for name, layer in layers.items():
            self._check(name, layer)
        run.apply(*(self._swap(name, layer, run.seed) for name, layer in layers.items()))
        run.state["layers"] = list(layers)

    def finalize(self, run: Run) -> None:
        """Keep the symmetric half of full matrices."""
        if self.form == "full":
            spec = {"form": "symmetric", "negative": self.negative, "random": False}
            run.apply(*(Swap(name, "quadratic", spec) for name in run.state["layers"]))

    def _swap(self, name: str, layer: Any, seed: int) -> Swap:
        random = self.begin == "random"
        if self.form == "lowrank":
            rank = min(self.rank, layer.weight[0].numel() + 1)
            return Swap(name, "quadratic_factors", {"rank": rank, "random": random}, seed)
        spec = {"form": self.form, "negative": self.negative, "random": random}
        return Swap(name, "quadratic", spec, seed)

    def _check(self, name: str, layer: Any) -> None:
        count = 0 if self.form == "lowrank" else numbers_of(layer, self.form)
        if count > self.most:
            raise ModelError(
                f"{name} would have {count:,} weights as a quadratic layer, and {self.most:,} are "
                f'allowed: use cqnn(form="lowrank", rank={self.rank}), exclude it, or raise most.'
            )
