"""Space-time tensors: linear layers become sums of outer products over the modes of their input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import nn

from pliant.edits import Swap
from pliant.families.layers.choose import chosen
from pliant.families.layers.modes import modes_of
from pliant.method import Method
from pliant.nn.tensors import CPLinear
from pliant.registry import In, Paper, register
from pliant.run import Run


@register(
    "space_time_tensor",
    paper=Paper(
        "Space-Time Domain Tensor Neural Networks: An Application on Human Pose Classification",
        "K. Makantasis, A. Voulodimos, A. Doulamis, N. Doulamis, N. Bakalos",
        "ICPR",
        2020,
        "https://arxiv.org/abs/2004.08153",
    ),
)
@dataclass(frozen=True)
class SpaceTimeTensor(Method):
    """Makes the weights of linear layers sums of a few outer products, one factor for each mode.

    What a flattened map or sequence goes into keeps its modes, such as channels, height and width;
    other inputs are divided in two as evenly as can be. Factors begin near to the weight, at the
    nearest where there are two modes. That saves parameters and not multiply-accumulates; with
    ``fold="macs"`` a layer is multiplied out at the end where it takes fewer so. What would not
    become smaller is left alone. The whole network for sequences is ``pliant.zoo.build("stdtnn")``.

    *Measured* (bench ``layers-items``: that network on BasicMotions, forty sequences of a smart
    watch to learn from and forty to score, five seeds): 97.5 % with 246 parameters beside
    99.0 ± 1.4 % of a dense layer on the same products, 486, and 72.5 % of logistic regression on
    raw numbers. From five sequences of each class: 98.0 ± 2.1, 99.0 ± 2.2 and 62 ± 5 %.

    *Departs from the paper*: it is a network there, and no way to change one. All weights train
    together; the released code of a sister method trains one factor after the other.

    >>> SpaceTimeTensor(rank=4).fold
    'params'
    """

    rank: Annotated[int, In(1, 4096)] = 1  # R, outer products of each output
    # what is kept at the end: factors, which have fewer weights, or what takes fewer products
    fold: Literal["params", "macs"] = "params"
    only: tuple[str, ...] = ()  # name patterns of the layers to take
    exclude: tuple[str, ...] = ()  # name patterns of the layers to leave alone

    def prepare(self, run: Run) -> None:
        """Put the factors in."""
        modes = modes_of(run)

        def obstacle(name: str, layer: Any) -> str:
            if type(layer) is not nn.Linear:
                return "not a Linear"
            fewer = self.rank * sum(modes[name]) < layer.in_features
            return "" if fewer else "outer products would have as many weights"

        needs = "space_time_tensor needs linear layers that become smaller as outer products"
        layers = chosen(run, self.only, self.exclude, obstacle, needs, "rank, only and exclude")
        specs = {name: {"shape": modes[name], "rank": self.rank} for name in layers}
        run.apply(*(Swap(name, "cp", spec, run.seed) for name, spec in specs.items()))
        run.state["layers"] = list(layers)

    def finalize(self, run: Run) -> None:
        """Multiply out what takes fewer products so."""
        for name in run.state["layers"] if self.fold == "macs" else ():
            layer = run.model.get_submodule(name)
            if isinstance(layer, CPLinear):
                spec = {"bias": layer.bias is not None}
                row = run.planner.rows()[name]
                edit = Swap(name, "cp_dense", spec)
                if edit.predict(row).macs < row.macs:
                    run.apply(edit)
