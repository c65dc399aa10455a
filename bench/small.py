"""What small studies share: a network that is trained many times, seeds, steps taken in turn."""

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD

from pliant.compose import resolve
from pliant.data.guess import task_loss
from pliant.method import Method
from pliant.run import Run, start

Norm = Literal["batch", "group", "none"]
NORMS: dict[Norm, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(8, channels),
    "none": lambda channels: nn.Identity(),
}


def cnn(
    inputs: int, widths: Sequence[int], *, norm: Norm = "batch", classes: int = 10
) -> nn.Sequential:
    """Build two 3x3 convolutions per width, halving the image behind each pair, and a Linear."""
    layers: list[nn.Module] = []
    for width in widths:
        for _ in range(2):
            conv = nn.Conv2d(inputs, width, 3, padding=1, bias=norm == "none")
            nn.init.kaiming_normal_(conv.weight)
            layers += [conv, NORMS[norm](width), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network from a seed; the random state stays as it is."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return build()


def method_of(spec: str) -> Method:
    """Build a method; none at all of an empty spec."""
    return resolve(spec) if spec else Method()


def step_ratio(
    model: nn.Module, method: Method, *, batch: int, steps: int, decay: float
) -> dict[str, float]:
    """Take steps with a method and plain ones in turn, and compare their medians.

    Images are noise; all happens in one process, so that whatever else the machine does falls on
    both alike.

    Args:
        model: for 3x32x32 images; it stays as it is.
        method: what is timed.
        batch: images per step.
        steps: of each, after one that warms up.
        decay: weight decay of the optimizer.
    """
    random = torch.Generator().manual_seed(0)
    images, labels = torch.randn(batch, 3, 32, 32, generator=random), torch.arange(batch) % 10
    runs: Mapping[str, Run] = {
        name: _begun(model, what, images[:1], decay)
        for name, what in (("with", method), ("plain", Method()))
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(steps + 1):
        for name, run in runs.items():
            took = _step(run, images, labels)
            seconds[name] += [took] if number else []
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    ratio = medians["with"] / medians["plain"]
    return {"ratio": round(ratio, 4), "ms_plain": round(1000 * medians["plain"], 1)}


def _begun(model: nn.Module, method: Method, image: Tensor, decay: float) -> Run:
    copied = copy.deepcopy(model).train()
    optimizer = SGD(copied.parameters(), 0.01, momentum=0.9, weight_decay=decay)
    return start(copied, method, example=(image,), optimizer=optimizer)


def _step(run: Run, images: Tensor, labels: Tensor) -> float:
    assert run.optimizer is not None
    began = time.perf_counter()
    run.optimizer.zero_grad()
    output = run.model(images)
    run.loss(task_loss(output, labels), output, (images, labels)).backward()
    run.before_step()
    run.optimizer.step()
    run.after_step()
    return time.perf_counter() - began
