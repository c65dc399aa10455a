"""Fits a rounded network to the one it was made from, without labels: block by block, then whole.

Block reconstruction with learnable scales: LSQ (Esser et al., ICLR 2020) for the gradients, the
order of the two stages from Yuan et al., ICPR 2020. Neither stage leaves a network worse than it
found it: states are compared on inputs that are held out, and the best one stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from pliant.cost import Example, call, call_alike
from pliant.data.sources import moved
from pliant.errors import ModelError
from pliant.families.quantize.samples import Shown
from pliant.families.quantize.tunable import tunables
from pliant.math.quantize import FLOOR, levels
from pliant.nn import kinds
from pliant.observe.gradients import differentiated
from pliant.observe.outputs import logits, wide_answers
from pliant.observe.watch import beside, recording

Outputs = Literal["classes", "values"]
CHECKS = 8  # how often a stage looks at the inputs held out, besides its beginning
USUAL = 7  # the largest level of 4 bits
TINY = 1e-12  # of Adam: gradients of layers with 8 bits are near the usual 1e-8
MASKED = -1e4  # stands for scores of minus infinity, which have no difference


@dataclass(frozen=True)
class Rates:
    """Learning rates of one stage.

    Args:
        weights: of weights and biases, in units of the distance between two levels.
        scales: of the logarithms of scales: of activations, and of weights with 4 bits.
    """

    weights: float
    scales: float


@dataclass(frozen=True)
class Goal:
    """What stage 2 minimises: L = sum_j mu |x^_j - x_j|^2 / var + nu D(answers).

    Where the user gave a loss, or the network returns its own, that stands in the place of D.

    Args:
        features: mu, weight of each block's error.
        answers: nu, weight of the divergence from the teacher's answer.
        temperature: T, softens class scores.
        outputs: ``classes`` compares class scores by KL divergence and all other answers by
            squared error, ``values`` everything by squared error.
        loss: of the task, in the place of D.
    """

    features: float = 1.0
    answers: float = 1.0
    temperature: float = 4.0
    outputs: Outputs = "classes"
    loss: Callable[[Any, Any], Tensor] | None = None


class Best:
    """Remembers the trained numbers of modules as they were at their lowest score."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.scores = dict.fromkeys(modules, math.inf)
        self.states: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def see(self, scores: Mapping[str, float]) -> None:
        """Keep the present numbers of every module whose score is lower than ever."""
        for name, module in self.modules.items():
            if name not in self.states or scores[name] < self.scores[name]:
                self.scores[name] = scores[name]
                self.states[name] = [p.clone() for p in trained(module)]

    @torch.no_grad()
    def restore(self) -> None:
        """Bring every module back to its best."""
        for name, module in self.modules.items():
            for parameter, value in zip(trained(module), self.states[name], strict=True):
                parameter.copy_(value)


def trained(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the tunable layers of a module."""
    return [p for _, layer in tunables(module) for p in layer.parameters()]


# ---------------------------------------------------------------- bias correction


@torch.no_grad()
def correct(teacher: nn.Module, student: nn.Module, batches: Iterable[Example]) -> None:
    """Add to every bias by how much rounding changes the mean output of its channel.

    Every layer reads what it reads in the teacher. Layers without a bias stay as they are, and so
    do those whose output a hook changes: it is not what a bias is added to.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    found = {
        n: m
        for n, m in tunables(student)
        if getattr(m.layer, "bias", None) is not None and not m._forward_hooks
    }

    def see(name: str, args: Any, kwargs: Any, output: Tensor) -> None:
        gap = output - found[name](*args, **kwargs)
        axis = -1 if kinds.channels_last(found[name].layer) else 1
        rows = gap.movedim(axis, -1).flatten(0, -2).double()
        sums[name] = sums.get(name, torch.zeros((), device=gap.device)) + rows.sum(0)
        counts[name] = counts.get(name, 0) + len(rows)

    with beside(teacher, found, see):
        for batch in batches:
            call(teacher, batch)
    for name, total in sums.items():
        if counts[name]:  # not an expert to which nothing was routed
            found[name].layer.bias.add_(total / counts[name])


# ---------------------------------------------------------------- the two stages


def independent(
    teacher: nn.Module,
    student: nn.Module,
    blocks: Sequence[str],
    batches: Iterator[Shown],
    *,
    steps: int,
    rates: Rates,
    held: Sequence[Shown],
) -> dict[str, tuple[float, float]]:
    """Fit every block on its own: it reads what it reads in the teacher, and shall say the same.

    All blocks take a step at the same time. Their losses share no parameter, so this is the same
    as one block after the other, and no features have to be kept. Every block ends where its
    error on the inputs held out was lowest, its beginning included.

    Args:
        teacher: the network before; in eval mode, unchanged.
        student: a copy of it with tunable layers.
        blocks: names of modules in both, with tunable layers.
        batches: inputs of forward calls, without end.
        steps: how many.
        rates: learning rates; Adam.
        held: inputs on which states are compared.

    Returns:
        The mean squared error of every block on ``held``, before and after.
    """
    if not steps:
        return {}
    found = {name: student.get_submodule(name) for name in blocks}
    best, before = Best(found), block_errors(teacher, student, blocks, held)
    best.see(before)

    def see(name: str, args: Any, kwargs: Any, output: Tensor) -> None:
        with torch.enable_grad():
            gap = found[name](*args, **kwargs).float() - output.float()
            if gap.numel():  # not an expert to which nothing was routed
                with differentiated(found[name]):
                    gap.square().mean().backward()

    def step(batch: Shown) -> None:
        with torch.no_grad(), beside(teacher, blocks, see):
            call(teacher, batch.inputs)

    def check() -> None:
        best.see(block_errors(teacher, student, blocks, held))

    _train(student, step, batches, steps, rates, check)
    best.restore()
    return {name: (before[name], best.scores[name]) for name in blocks}


@torch.no_grad()
def block_errors(
    teacher: nn.Module, student: nn.Module, blocks: Sequence[str], batches: Sequence[Shown]
) -> dict[str, float]:
    """Return the mean squared error of every block of the student on the teacher's features."""
    found: dict[str, list[float]] = {name: [] for name in blocks}

    def see(name: str, args: Any, kwargs: Any, output: Tensor) -> None:
        gap = student.get_submodule(name)(*args, **kwargs).float() - output.float()
        if gap.numel():
            found[name].append(gap.square().mean().item())

    with beside(teacher, blocks, see):
        for batch in batches:
            call(teacher, batch.inputs)
    return {name: sum(row) / max(1, len(row)) for name, row in found.items()}


class Judge:
    """Keeps the state of a whole student that is best on inputs held out.

    That is the one of the lowest loss of stage 2 among those whose answers are no farther from the
    teacher's than the first one's, in squared error: a divergence of scores can fall while boxes
    go astray, and a loss of labels on a few samples while all others do.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        blocks: Sequence[str],
        goal: Goal,
        held: Sequence[Shown],
    ) -> None:
        self.networks = teacher, student, blocks
        self.goal, self.held = goal, held
        self.best, self.first = Best({"": student}), math.inf
        self.losses: list[float] = []

    @torch.no_grad()
    def see(self) -> None:
        """Compare the student as it is now."""
        pairs = [_loss(*self.networks, self.goal, batch) for batch in self.held]
        loss, error = torch.tensor(pairs, dtype=torch.float64).mean(0).tolist()
        if not self.losses:
            self.first = error
        self.losses.append(loss)
        self.best.see({"": loss if error <= self.first else math.inf})


def joint(
    teacher: nn.Module,
    student: nn.Module,
    blocks: Sequence[str],
    batches: Iterator[Shown],
    *,
    steps: int,
    rates: Rates,
    goal: Goal,
    judge: Judge,
) -> None:
    """Fit the whole network on its own features, so that it also mends errors that add up.

    Weights begin nearer to their levels: after stage 1 many lie where rounding turns over.

    Args:
        teacher: as for `independent`.
        student: as for `independent`.
        blocks: as for `independent`.
        batches: as for `independent`.
        steps: how many.
        rates: learning rates; Adam.
        goal: what is minimised.
        judge: sees the student at times; what it found best is to be restored at the end.
    """

    def step(batch: Shown) -> None:
        with torch.enable_grad():
            loss, _ = _loss(teacher, student, blocks, goal, batch)
            with differentiated(student):
                loss.backward()

    for _, layer in tunables(student):
        layer.centre()
    _train(student, step, batches, steps, rates, judge.see)


def _loss(
    teacher: nn.Module, student: nn.Module, blocks: Sequence[str], goal: Goal, batch: Shown
) -> tuple[Tensor, Tensor]:
    """Return what stage 2 minimises, and the relative squared error of all answers.

    A block to which the student routes other tokens than the teacher is left to the answers.
    """
    targets: dict[str, list[Tensor]] = {name: [] for name in blocks}

    def keep(name: str, args: Any, kwargs: Any, output: Tensor) -> None:
        targets[name].append(output.clone())

    with torch.no_grad(), beside(teacher, blocks, keep):
        wanted = call_alike(teacher, batch.inputs)
    pairs: list[tuple[Tensor, Tensor]] = []  # compared afterwards: checkpoints recompute calls

    def see(name: str, args: Any, kwargs: Any, output: Tensor) -> None:
        target = targets[name].pop(0) if targets[name] else None
        if target is not None and target.shape == output.shape:
            pairs.append((output.clone(), target))

    layers = [layer for _, layer in tunables(student)]
    with beside(student, blocks, see, copies=False), recording(layers):
        given = call_alike(student, batch.inputs)
    apart, error = _divergence(given, wanted, goal)
    if goal.loss is not None:
        apart = goal.loss(given, moved(batch.batch, apart.device))
    errors = [_relative(*pair) for pair in pairs]
    features = torch.stack(errors).sum() if errors else apart.new_zeros(())
    return goal.features * features + goal.answers * apart, error


def _train(
    student: nn.Module,
    step: Callable[[Shown], None],
    batches: Iterator[Shown],
    steps: int,
    rates: Rates,
    check: Callable[[], None],
) -> None:
    """Take steps of Adam, their size falling to zero along a cosine; check at times.

    A step of a weight is counted in levels of its layer: what is small for 4 bits would be many
    levels for 8. Scales of weights with more levels take shorter steps, by the root that LSQ
    divides their gradient by and Adam undoes.
    """
    groups: list[dict[str, Any]] = []
    for _, layer in tunables(student):
        scales = dict(layer.scales)
        share = (USUAL / levels(layer.bits.weight)[1]) ** 0.5
        groups += [
            {"params": list(layer.layer.parameters()), "lr": rates.weights * layer.level()},
            {"params": [scales.pop("weight")], "lr": rates.scales * share},
            {"params": list(scales.values()), "lr": rates.scales},
        ]
    optimizer = Adam([group for group in groups if group["params"]], eps=TINY)
    schedule = CosineAnnealingLR(optimizer, max(steps, 1))
    pause = -(-steps // CHECKS)
    for done in range(1, steps + 1):
        optimizer.zero_grad()
        step(next(batches))
        optimizer.step()
        schedule.step()
        if done % pause == 0 or done == steps:
            check()


# ---------------------------------------------------------------- how far answers are apart


def _divergence(given: Any, wanted: Any, goal: Goal) -> tuple[Tensor, Tensor]:
    """Compare all answers: as the goal has it, and by relative squared error."""
    pairs = list(zip(wide_answers(given), wide_answers(wanted), strict=True))
    errors = [_relative(mine, other) for mine, other in pairs]
    scores = _scores(wanted) if goal.outputs == "classes" else None
    apart = [
        _kl(mine, other, goal.temperature) if other is scores else error
        for (mine, other), error in zip(pairs, errors, strict=True)
    ]
    return torch.stack(apart).sum(), torch.stack(errors).sum().detach()


def _scores(output: Any) -> Tensor | None:
    try:
        return logits(output)
    except ModelError:
        return None


def _relative(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared error in units of the variance, where there are finite numbers."""
    there = wanted.isfinite()
    if not there.all():
        found, wanted = found[there], wanted[there]
    if not wanted.numel():
        return wanted.new_zeros(())
    found, wanted = found.float(), wanted.float()
    return (found - wanted).square().mean() / wanted.var(correction=0).clamp(min=FLOOR)


def _kl(scores: Tensor, target: Tensor, temperature: float) -> Tensor:
    classes = 1 if scores.dim() > 3 else -1  # of images: (N, C, H, W)
    there = target.isfinite()
    mine, other = (
        (torch.where(there, value.float(), MASKED) / temperature).log_softmax(classes)
        for value in (scores, target)
    )
    gap = F.kl_div(mine, other, reduction="sum", log_target=True)
    return gap / (scores.numel() / scores.shape[classes]) * temperature**2
