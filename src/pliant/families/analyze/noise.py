"""What small noise on the inputs of a network changes in its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from pliant.cost import Example
from pliant.data import Data, unpack
from pliant.errors import DataError
from pliant.families.analyze.inputs import check_logits, logits, shown

BATCH = 256


def moved(
    model: nn.Module, data: Data, noise: float, draws: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield the changes of all outputs (inputs of a batch, outputs), in float64.

    Args:
        model: in eval mode, without gradients.
        data: whose shown split is looked at.
        noise: standard deviation of what is added.
        draws: of noise for each batch; each yields changes of its own.
        generator: of the noise.

    Raises:
        DataError: inputs are no real numbers.
    """
    for batch in data.batches(shown(data), BATCH):
        inputs = unpack(batch)[0]
        clean = logits(model, inputs)
        check_logits(clean)
        for _ in range(draws):
            other = logits(model, _over(inputs, lambda x: _noisy(x, noise, generator)))
            yield (other - clean).double()


def _noisy(inputs: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    if not inputs.is_floating_point():
        raise DataError(
            f"Noise needs inputs of real numbers, but {inputs.dtype} came: convert and "
            "normalise them as in training."
        )
    drawn = torch.randn(inputs.shape, generator=generator, dtype=torch.float32)
    return inputs + noise * drawn.to(inputs)


def _over(inputs: Example, change: Callable[[Tensor], Tensor]) -> Example:
    """Change every tensor of a forward call's inputs."""
    if isinstance(inputs, Mapping):
        return {k: change(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    return tuple(change(value) if isinstance(value, Tensor) else value for value in inputs)
