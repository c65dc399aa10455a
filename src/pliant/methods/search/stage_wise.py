"""Stage-wise search: stages grow deeper as long as that makes their features say more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pliant.errors import MethodError
from pliant.families.search.stages import deepen, rising, shorten, stages, weighed
from pliant.method import Method
from pliant.registry import In, Paper, register
from pliant.run import Run
from pliant.surgery.redraw import redraw


@register(
    "stage_wise",
    paper=Paper(
        "Stage-Wise Neural Architecture Search",
        "A. Jordao, F. Akio, M. Lie, W. R. Schwartz",
        "ICPR",
        2020,
        "https://arxiv.org/abs/2004.11178",
    ),
)
@dataclass(frozen=True)
class StageWise(Method):
    """Grows a shallow network: of deeper stages those stay that become more important.

    The network has stages, rows of equal blocks, such as ``zoo.build("staged-resnet")``. The
    training is divided into 1 + 2 I equal ones, each from weights that are drawn anew: the
    network itself; then in turn the network with all stages deeper, and that with those stages
    deeper whose importance rose. The importance of a stage is the mean importance of its features
    in a projection by partial least squares onto the classes. Where no stage rises the search is
    over, and the rest of the training goes to the network that was found. The result is larger
    than what came.

    *Measured* (bench ``search-family``: CIFAR-10 of 16 x 16 pixels, networks trained from
    scratch for six epochs, three seeds): 34.8 ± 1.7 % beside 31.8 ± 1.8 % of random depths of equal
    cost, 3.1 ± 0.7 more seed by seed, and 34.1 ± 1.5 % of equal depths with more parameters. Where
    stages were chosen by chance, as many of them (``search-items``, four epochs, three seeds), the
    networks were 2.0 ± 1.3 points worse, one of three the same: a lead that is not beyond doubt.

    *Departs from the paper*: weights are drawn as PyTorch's layers draw them. All trainings are
    parts of one, so rates are alike only where they are constant, ``Train(schedule="constant")``.
    The search stops where it has converged; the released program goes on.
    """

    growth: Annotated[int, In(1, 4)] = 2  # g, blocks by which a stage grows
    iterations: Annotated[int, In(1)] = 5  # I, each trains two networks
    components: Annotated[int, In(1)] = 2  # h, components of the projection
    samples: Annotated[int, In(2)] = 5000  # training samples that are looked at
    gain: Annotated[float, In(0)] = 0.0  # by which the importance must rise, and more
    stages: tuple[str, ...] = ()  # names of rows of blocks; found in the network if none
    choice: Literal["importance", "random"] = "importance"  # random grows as many, for comparison

    def prepare(self, run: Run) -> None:
        names = stages(run, self.stages)
        trained = 1 + 2 * self.iterations
        if run.steps and run.steps < trained:
            raise MethodError(
                f"stage_wise trains {trained} networks one after the other, but the training has "
                f"{run.steps} steps: give it more, or fewer iterations."
            )
        if run.steps and not run.has_inputs:
            raise MethodError("stage_wise looks at features on training data: pass some.")
        run.state["search"] = {"stages": names, "known": [], "trained": 0, "over": False}
        for layer in run.layers:
            run.keep(layer, "stages grow by blocks of their own")
        if run.steps:
            redraw(run.model, run.generator, run.optimizers)

    def after_step(self, run: Run) -> None:
        state = run.state["search"]
        length = run.steps // (1 + 2 * self.iterations)
        if not run.steps or state["over"] or run.step != (state["trained"] + 1) * length:
            return
        if state["trained"] == 2 * self.iterations:  # the last one trains to the end
            return
        state["trained"] += 1
        found = self._weighed(run)
        if state["trained"] % 2:
            state["known"] = found
            deepen(run, state["stages"], self.growth)
        else:
            self._keep(run, found)
        redraw(run.model, run.generator, run.optimizers)

    def finalize(self, run: Run) -> None:
        state = run.state["search"]
        if run.steps and state["trained"] % 2 and not state["over"]:
            shorten(run, state["stages"], self.growth)  # it ended while all were deeper
        if run.steps:
            self._weighed(run)

    def _weighed(self, run: Run) -> list[float]:
        names = run.state["search"]["stages"]
        return weighed(run, names, parts=self.components, samples=self.samples)

    def _keep(self, run: Run, found: list[float]) -> None:
        """Leave deeper only the stages that became more important."""
        state = run.state["search"]
        rose = rising(run, found, state["known"], self.gain, any_of_them=self.choice == "random")
        others = [n for n, kept in zip(state["stages"], rose, strict=True) if not kept]
        shorten(run, others, self.growth)
        state["over"] = not any(rose)
