"""Fits a rounded network to the one it was made from, without labels: block by block, then whole.

Block reconstruction with learnable scales: LSQ (Esser et al., ICLR 2020) for the gradients, the
order of the two stages from Yuan et al., ICPR 2020.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils._pytree import tree_leaves, tree_map

from pliant.cost import Example, call
from pliant.math.quantize import FLOOR, column, learnable, levels
from pliant.nn.layers import Factorizable, replace
from pliant.nn.quantized import Bits, Values, applied

Outputs = Literal["classes", "values"]


@dataclass(frozen=True)
class Rates:
    """Learning rates of one stage.

    Args:
        weights: of weights and biases.
        scales: of all scales.
    """

    weights: float
    scales: float


class Tunable(nn.Module):
    """A layer that rounds in every forward pass, with weight, bias and scales to be trained.

    Args:
        layer: its weight and bias are trained in place.
        bits: how its numbers will be written.
        values: where scales, groups and ranges begin.

    Attributes:
        scales: logarithms of the scales: they stay positive, and a step changes large and small
            ones by the same share.
    """

    def __init__(self, layer: Factorizable, bits: Bits, values: Values) -> None:
        super().__init__()
        self.layer, self.bits, self.index = layer, bits, values.index
        self.zero = {"input": 0, "output": 0}
        self.scales = nn.ParameterDict({"weight": values.scales.log()})
        for side, found in (("input", values.input), ("output", values.output)):
            if found is not None:
                self.zero[side] = found[1]
                self.scales[side] = torch.tensor(found[0], device=layer.weight.device).log()

    def forward(self, x: Tensor) -> Tensor:
        """Map the rounded input by the rounded weight."""
        x = self._activation(x, "input", self.bits.input)
        scale = column(self.scales["weight"].exp()[self.index], self.layer.weight)
        count = self.layer.weight.numel() // self.bits.scales
        weight = learnable(self.layer.weight, scale, *levels(self.bits.weight), count)
        x = applied(self.layer, type(self.layer), x, weight, self.layer.bias)
        return self._activation(x, "output", self.bits.output)

    def values(self) -> Values:
        """Return the numbers as they are now."""
        ranges = {
            side: (self.scales[side].exp().item(), self.zero[side]) if side in self.scales else None
            for side in ("input", "output")
        }
        bias = None if self.layer.bias is None else self.layer.bias.detach()
        weight, scales = self.layer.weight.detach(), self.scales["weight"].detach().exp()
        return Values(weight, scales, self.index, bias, **ranges)

    def _activation(self, x: Tensor, side: str, bits: int) -> Tensor:
        if not bits:
            return x
        low = -self.zero[side]
        return learnable(x, self.scales[side].exp(), low, low + 2**bits - 1, x[0].numel())


def tunable(model: nn.Module, plans: Mapping[str, tuple[Bits, Values]]) -> None:
    """Put tunable layers in the place of the named ones, and freeze everything else."""
    model.requires_grad_(False)
    for name, (bits, values) in plans.items():
        layer = model.get_submodule(name).requires_grad_(True)
        replace(model, name, Tunable(layer, bits, values))  # type: ignore[arg-type]


# ---------------------------------------------------------------- bias correction


@torch.no_grad()
def correct(teacher: nn.Module, student: nn.Module, batches: Iterable[Example]) -> None:
    """Add to every bias by how much rounding changes the mean output of its channel.

    Every layer reads what it reads in the teacher. Layers without a bias stay as they are.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    layers = {name: layer for name, layer in _tunables(student) if layer.layer.bias is not None}

    def see(name: str, args: Any, kwargs: Any, output: Tensor) -> None:
        gap = output - layers[name](*args, **kwargs)
        axis = -1 if isinstance(layers[name].layer, nn.Linear) else 1
        rows = gap.movedim(axis, -1).flatten(0, -2).double()
        sums[name] = sums.get(name, torch.zeros((), device=gap.device)) + rows.sum(0)
        counts[name] = counts.get(name, 0) + len(rows)

    with beside(teacher, layers, see):
        for batch in batches:
            call(teacher, batch)
    for name, total in sums.items():
        layers[name].layer.bias.add_(total / counts[name])


# ---------------------------------------------------------------- the two stages


def independent(
    teacher: nn.Module,
    student: nn.Module,
    blocks: Sequence[str],
    batches: Iterator[Example],
    *,
    steps: int,
    rates: Rates,
    check: Sequence[Example],
) -> dict[str, tuple[float, float]]:
    """Fit every block on its own: it reads what it reads in the teacher, and shall say the same.

    All blocks take a step at the same time. Their losses share no parameter, so this is the same
    as one block after the other, and no features have to be kept.

    Args:
        teacher: the network before; in eval mode, unchanged.
        student: a copy of it with tunable layers.
        blocks: names of modules in both.
        batches: inputs of forward calls, without end.
        steps: how many.
        rates: learning rates; Adam.
        check: inputs on which each block is compared with itself before; one that has become
            worse is taken back.

    Returns:
        The mean squared error of every block on ``check``, before and after.
    """
    if not steps:
        return {}
    found = {name: student.get_submodule(name) for name in blocks}
    before, began = block_errors(teacher, student, blocks, check), copy.deepcopy(found)

    def see(name: str, args: Any, kwargs: Any, output: Tensor) -> None:
        with torch.enable_grad():
            (found[name](*args, **kwargs) - output).square().mean().backward()

    def step(batch: Example) -> None:
        with torch.no_grad(), beside(teacher, blocks, see):
            call(teacher, batch)

    _train(student, step, batches, steps, rates)
    after = block_errors(teacher, student, blocks, check)
    for name in blocks:
        if not after[name] <= before[name]:
            found[name].load_state_dict(began[name].state_dict())
    return {name: (before[name], min(before[name], after[name])) for name in blocks}


@torch.no_grad()
def block_errors(
    teacher: nn.Module, student: nn.Module, blocks: Sequence[str], batches: Sequence[Example]
) -> dict[str, float]:
    """Return the mean squared error of every block of the student on the teacher's features."""
    found: dict[str, list[float]] = {name: [] for name in blocks}

    def see(name: str, args: Any, kwargs: Any, output: Tensor) -> None:
        gap = student.get_submodule(name)(*args, **kwargs) - output
        found[name].append(gap.square().mean().item())

    with beside(teacher, blocks, see):
        for batch in batches:
            call(teacher, batch)
    return {name: sum(row) / max(1, len(row)) for name, row in found.items()}


def joint(
    teacher: nn.Module,
    student: nn.Module,
    blocks: Sequence[str],
    batches: Iterator[Example],
    *,
    steps: int,
    rates: Rates,
    features: float = 1.0,
    answers: float = 1.0,
    temperature: float = 4.0,
    outputs: Outputs = "classes",
) -> list[float]:
    """Fit the whole network on its own features, so that it also mends errors that add up.

    The loss is the squared error of every block's output in units of its variance, and the
    divergence from the teacher's answer.

    Args:
        teacher: as for `independent`.
        student: as for `independent`.
        blocks: as for `independent`.
        batches: as for `independent`.
        steps: how many.
        rates: learning rates; Adam.
        features: mu, weight of each block's error.
        answers: nu, weight of the divergence.
        temperature: T, softens the answers.
        outputs: ``classes`` compares answers by KL divergence, ``values`` by squared error.

    Returns:
        The loss at each step.
    """
    losses: list[float] = []

    def step(batch: Example) -> None:
        targets: list[Tensor] = []
        with torch.no_grad(), beside(teacher, blocks, lambda n, a, k, y: targets.append(y.clone())):
            wanted = call(teacher, batch)
        queue, errors = iter(targets), []

        def see(name: str, args: Any, kwargs: Any, output: Tensor) -> None:
            errors.append(_relative(output, next(queue)))

        with torch.enable_grad(), beside(student, blocks, see, copies=False):
            given = call(student, batch)
            loss = features * sum(errors)
            loss = loss + answers * _divergence(given, wanted, temperature, outputs)
            loss.backward()
        losses.append(loss.item())

    _train(student, step, batches, steps, rates)
    return losses


def _train(
    student: nn.Module,
    step: Callable[[Example], None],
    batches: Iterator[Example],
    steps: int,
    rates: Rates,
) -> None:
    """Take steps of Adam, their size falling to zero along a cosine."""
    scales = [scale for _, layer in _tunables(student) for scale in layer.scales.values()]
    others = [p for _, layer in _tunables(student) for p in layer.layer.parameters()]
    groups = [{"params": others, "lr": rates.weights}, {"params": scales, "lr": rates.scales}]
    optimizer = Adam(groups)
    schedule = CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(steps):
        optimizer.zero_grad()
        step(next(batches))
        optimizer.step()
        schedule.step()


def _relative(found: Tensor, wanted: Tensor) -> Tensor:
    return (found - wanted).square().mean() / wanted.var(correction=0).clamp(min=FLOOR)


def _divergence(given: Any, wanted: Any, temperature: float, outputs: Outputs) -> Tensor:
    """Compare answers; where they hold several tensors, all of them."""
    pairs = [
        (mine, other)
        for mine, other in zip(tree_leaves(given), tree_leaves(wanted), strict=True)
        if isinstance(mine, Tensor) and mine.is_floating_point()
    ]
    if outputs == "values":
        return torch.stack([_relative(mine, other) for mine, other in pairs]).sum()
    gaps = [_kl(mine / temperature, other / temperature) for mine, other in pairs]
    return torch.stack(gaps).sum() * temperature**2


def _kl(scores: Tensor, target: Tensor) -> Tensor:
    classes = 1 if scores.dim() > 3 else -1  # of images: (N, C, H, W)
    gap = F.kl_div(
        scores.log_softmax(classes), target.log_softmax(classes), reduction="sum", log_target=True
    )
    return gap / (scores.numel() / scores.shape[classes])


# ---------------------------------------------------------------- hooks


@contextmanager
def beside(
    model: nn.Module,
    names: Iterable[str],
    see: Callable[[str, Any, Any, Tensor], None],
    *,
    copies: bool = True,
) -> Iterator[None]:
    """Call ``see(name, args, kwargs, output)`` at every forward of the named modules.

    The hooks are removed at the end, also after an exception.

    Args:
        model: any module.
        names: of its submodules.
        see: gets the arguments as they were before the module could change them in place.
        copies: whether the arguments are copied for that; else they are None.
    """
    given: dict[str, Any] = {}

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            given[name] = tree_map(_copied, (args, kwargs)) if copies else (None, None)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            before_args, before_kwargs = given.pop(name)
            see(name, before_args, before_kwargs, output)

        return hook

    handles: list[Any] = []
    try:
        for name in names:
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after(name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _tunables(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, m) for name, m in model.named_modules() if isinstance(m, Tunable))
