"""Whether kernels look at single points or at patterns: their weights, and what they do to data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.cost import call, twin
from pliant.observe.moments import patches
from pliant.observe.watch import capture

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
DRAWN = 512  # positions of a batch at which the taps of a layer are looked at
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True, eq=False)
class Shape:
    """How concentrated the kernels of one layer are, each (outputs, inputs of a group).

    Args:
        concentration: kappa, the largest tap over the sum of all, in absolute values: 1 of a
            single point, 1 over their number of a flat kernel.
        smoothness: tau, 1 - |w - G * w| / |w| with a binomial G: 1 of a flat kernel.
        centre: share of the middle tap in the sum of absolute values.
    """

    concentration: Tensor
    smoothness: Tensor
    centre: Tensor


def shape_of(weight: Tensor) -> Shape:
    """Measure kernels; those of zeros are left out as NaN.

    Args:
        weight: (outputs, inputs of a group, *kernel).
    """
    flat = weight.detach().double().flatten(2)
    sums, norms = flat.abs().sum(2), flat.norm(dim=2)
    middle = flat[..., _middle(weight.shape[2:])].abs()
    rough = (flat - _smoothed(weight.detach().double()).flatten(2)).norm(dim=2)
    return Shape(flat.abs().amax(2) / sums, 1 - rough / norms, middle / sums)


def kernel_stats(model: nn.Module) -> dict[str, Shape]:
    """Measure the kernels of every convolution that has more than one tap."""
    return {name: shape_of(layer.weight) for name, layer in wide(model).items()}


def wide(model: nn.Module) -> dict[str, Conv]:
    """Return convolutions whose kernels have more than one tap, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, CONVS) and layer.weight[0, 0].numel() > 1
    }


def suggest_pointwise(model: nn.Module, threshold: float = 0.9) -> list[str]:
    """Name convolutions whose kernels are nearly single points: a 1x1 kernel may do as well.

    Args:
        model: any network.
        threshold: of the median concentration, 0 to 1.
    """
    stats = kernel_stats(model)
    return [name for name, shape in stats.items() if median(shape.concentration) >= threshold]


def classical(size: int = 3) -> dict[str, Tensor]:
    """Return kernels that people designed, (1, 1, size, size), to compare with.

    A Gaussian of a quarter of the size, its derivative (as Sobel's, for edges), its Laplacian, and
    a Gabor wave of one period.
    """
    place = torch.arange(size, dtype=torch.float64) - size // 2
    y, x = torch.meshgrid(place, place, indexing="ij")
    square = (x.square() + y.square()) / (size / 4) ** 2
    gauss = torch.exp(-square / 2)
    laplacian = (square - 2) * gauss
    kernels = {
        "Gaussian": gauss,
        "edge": x * gauss,
        "Laplacian": laplacian - laplacian.mean(),
        "Gabor": torch.cos(2 * torch.pi * x / size) * gauss,
    }
    return {name: kernel[None, None] for name, kernel in kernels.items()}


@dataclass(frozen=True)
class Taps:
    """How many taps of a kernel a response comes from.

    Args:
        effective: median of n_eff over the number of taps: (sum |q|)^2 / sum q^2 of the
            contributions q of the taps, 1 over their number if one does all, 1 if all do alike.
        dead: share of all responses to which no tap contributes; they are left out.
    """

    effective: float
    dead: float


def taps(model: nn.Module, inputs: Iterable[Tensor], generator: torch.Generator) -> dict[str, Taps]:
    """Measure, where units are active, how many taps of their kernels take part.

    Args:
        model: any network; its convolutions with more than one tap are looked at.
        inputs: batches of inputs.
        generator: draws positions.
    """
    layers = wide(model)
    found: dict[str, list[Tensor]] = {}
    dead: dict[str, list[Tensor]] = {}

    def see(name: str, given: Tensor, output: Tensor) -> None:
        parts = _contributions(layers[name], given, generator)
        bias = layers[name].bias
        response = parts.sum(-1) + (0 if bias is None else bias.detach().view(parts.shape[1:3]))
        squares = parts.square().sum(-1)
        dead.setdefault(name, []).append((squares == 0).double().mean().cpu())
        seen = (response > 0) & (squares > 0)
        ratio = parts.abs().sum(-1)[seen].square() / squares[seen] / parts.shape[-1]
        found.setdefault(name, []).append(ratio.cpu())

    with capture(model, layers, see):
        for batch in inputs:
            call(model, (batch,))
    return {
        name: Taps(median(torch.cat(rows)), float(torch.stack(dead[name]).mean()))
        for name, rows in found.items()
    }


def ablated(
    model: nn.Module, keep: Literal["dominant", "random", "mean"], generator: torch.Generator
) -> nn.Module:
    """Return a copy whose kernels have one tap left, or the same number in all of them.

    Batch norms are to be estimated anew.

    Args:
        model: any network.
        keep: the largest tap of each kernel, a random one, or their mean in all places.
        generator: draws the taps.
    """
    changed = twin(model)
    for layer in wide(changed).values():
        weight = layer.weight.data
        flat = weight.flatten(2)
        if keep == "mean":
            weight.copy_(flat.mean(2, keepdim=True).expand_as(flat).reshape(weight.shape))
            continue
        random = torch.randint(flat.shape[2], flat.shape[:2], generator=generator)
        at = (flat.abs().argmax(2) if keep == "dominant" else random.to(flat.device))[..., None]
        weight.copy_(torch.zeros_like(flat).scatter(2, at, flat.gather(2, at)).reshape_as(weight))
    return changed


def _contributions(layer: Conv, given: Tensor, generator: torch.Generator) -> Tensor:
    """Return what each tap adds at drawn positions, (positions, groups, outputs, taps)."""
    rows = patches(layer, given.detach().float())
    rows = rows.reshape(-1, layer.groups, rows.shape[1])
    drawn = torch.randperm(len(rows), generator=generator)[:DRAWN].to(rows.device)
    inputs = layer.in_channels // layer.groups
    read = rows[drawn].reshape(len(drawn), layer.groups, inputs, -1)
    weight = layer.weight.detach().float()
    kernels = weight.reshape(layer.groups, -1, inputs, read.shape[-1])
    return torch.einsum("ngik,goik->ngok", read.double(), kernels.double())


def _middle(sizes: Sequence[int]) -> int:
    """Where the middle tap of a kernel is, counted through all axes."""
    at = 0
    for size in sizes:
        at = at * size + size // 2
    return at


def _smoothed(weight: Tensor) -> Tensor:
    """Convolve kernels with a binomial of three taps along each axis, borders repeated."""
    axes = weight.dim() - 2
    view = weight.flatten(0, 1)[:, None]
    for axis in range(axes):
        sizes, pad = [1] * axes, [0] * (2 * axes)
        sizes[axis] = 3
        pad[2 * (axes - 1 - axis)] = pad[2 * (axes - 1 - axis) + 1] = 1
        binomial = torch.tensor([0.25, 0.5, 0.25], dtype=view.dtype, device=view.device)
        view = CONV[axes](F.pad(view, pad, "replicate"), binomial.view(1, 1, *sizes))
    return view.reshape(weight.shape)


def median(values: Tensor) -> float:
    """Median of the finite ones; 0 of none."""
    kept = values[values.isfinite()]
    return float(kept.median()) if kept.numel() else 0.0
