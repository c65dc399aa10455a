"""FASSD-Net: kernels become a column and a row, and maps are refined by dilated ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pliant.edits import Edit, Insert, Swap
from pliant.families.layers.choose import channels_behind, chosen, refused
from pliant.method import Method
from pliant.nn.asymmetric import check_asymmetric, pair_weights
from pliant.registry import In, Paper, register
from pliant.run import Run
from pliant.surgery.fold import foldable


@register(
    "fassd_net",
    paper=Paper(
        "Fast and Accurate Real-Time Semantic Segmentation with Dilated Asymmetric Convolutions",
        "L. Rosas-Arias, G. Benitez-Garcia, J. Portillo-Portillo, G. Sanchez-Perez, K. Yanai",
        "ICPR",
        2020,
        "https://doi.org/10.1109/ICPR48806.2021.9413176",
    ),
)
@dataclass(frozen=True)
class FASSDNet(Method):
    """Turns k x k convolutions into k x 1 and 1 x k ones, dilated as they were, and trains them in.

    Two halves see what the whole kernel sees, for 2 k weights instead of k^2 where channels stay
    as many. They begin as the pair nearest to the kernel. What would not become smaller is left
    alone. ``refine`` and ``pyramid`` put the paper's two modules for dense prediction behind
    layers: a residual refinement, which begins as the identity, and a pyramid of dilations, which
    begins at random. At the end batch norms become part of the layers before them; those at the
    beginning of a refinement stay. The whole network is ``pliant.zoo.build("fassd-net")``, its
    loss ``pliant.data.bootstrapped.Bootstrapped``.

    *Departs from the paper*: it is a network there, and no way to change one. Halves begin from a
    kernel, and layers keep the activation that follows them.

    >>> FASSDNet(between="nothing").width
    1.0
    """

    width: Annotated[float, In(0, 1, "low")] = 1.0  # channels between halves, as share of outputs
    # what stands between them: a batch norm and a rectifier, as the paper has it, or nothing
    between: Literal["norm", "nothing"] = "norm"
    refine: tuple[str, ...] = ()  # names of layers behind which a refinement (MDA) comes
    dilation: Annotated[int, In(1, 64)] = 2  # d, of refinements
    pyramid: tuple[str, ...] = ()  # names of layers behind which a pyramid (DAPF) comes
    reach: Annotated[int, In(1, 64)] = 12  # r, the least dilation of a pyramid; also 2 r and 3 r
    alpha: Annotated[int, In(1, 64)] = 2  # by how much branches of a pyramid are narrower
    only: tuple[str, ...] = ()  # name patterns of the convolutions to divide
    exclude: tuple[str, ...] = ()  # name patterns of the layers to leave alone

    def prepare(self, run: Run) -> None:
        """Divide convolutions, and put the modules in."""
        inserts = self._inserts(run)
        needs = "fassd_net divides 2-d convolutions without groups that become smaller by it"
        see = "width, only, exclude, refine and pyramid"
        needs = "" if inserts else needs
        layers = chosen(run, self.only, self.exclude, self._obstacle, needs, see)
        specs = {
            name: {"width": self._between(layer), "between": self.between}
            for name, layer in layers.items()
        }
        run.apply(*(Swap(name, "asymmetric", spec) for name, spec in specs.items()), *inserts)

    def finalize(self, run: Run) -> None:
        """Make batch norms a part of the convolutions before them."""
        run.apply(*foldable(run.model, run.example))

    def _inserts(self, run: Run) -> list[Edit]:
        found: list[Edit] = []
        for name in self.pyramid:
            far = (self.reach, 2 * self.reach, 3 * self.reach)
            channels = channels_behind(run, name)
            spec = {"channels": channels, "alpha": min(self.alpha, channels), "dilations": far}
            found.append(Insert(name, "dapf", spec, seed=run.seed))
        for name in self.refine:
            channels = channels_behind(run, name)
            spec = {"channels": channels, "dilation": self.dilation, "identity": True}
            found.append(Insert(name, "mda", spec, seed=run.seed))
        return found

    def _between(self, layer: Any) -> int:
        """Count the channels between the halves of a kernel."""
        return max(1, round(self.width * len(layer.weight)))

    def _obstacle(self, name: str, layer: Any) -> str:
        """Say why a layer is left alone; nothing if it is not."""
        if refused(check_asymmetric, layer):
            return "no 2-d convolution of more than one tap in both directions, without groups"
        if pair_weights(layer, self._between(layer)) >= layer.weight.numel():
            return "a column and a row would have as many weights"
        return ""
