"""How a network is called where its layers are watched: on one sample, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pliant.cost import Example, fitted, repeated, samples_of, twin
from pliant.edits.sides import sides
from pliant.observe.order import called_by
from pliant.observe.watch import one_sample, samples


def first_sample(example: Example, model: nn.Module, count: int = 1) -> Example:
    """Return the first sample, as often as asked; where the example is one sample, the example."""
    given = fitted(model, example)
    return repeated(given, samples_of(model, given), count)


@contextmanager
def slow_attention() -> Iterator[None]:
    """Turn off the fused path of transformer blocks: it calls no layers."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def reaching(model: nn.Module, example: Example, batches: Iterable[Example]) -> list[Example]:
    """Return samples that call the layers which a first one does not call: experts, for example.

    Args:
        model: not touched.
        example: the first sample.
        batches: inputs among which more are looked for, as far as needed.
    """
    names = [name for name, module in model.named_modules() if "in" in sides(module)]
    seen, found = called_by(model, names, [first_sample(example, model)]), []
    for batch in batches if len(seen) < len(names) else ():
        ahead = called_by(model, names, [batch]) - seen
        for row in range(samples(batch)):
            if not ahead:
                break
            sample = one_sample(batch, row)
            new = ahead & called_by(model, names, [sample])
            if new:
                found.append(sample)
                seen, ahead = seen | new, ahead - new
    return found


def randomized(model: nn.Module) -> nn.Module:
    """Copy a model with other weights, none of which is special as zeros and ones are."""
    model = twin(model).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                noise *= (2 / max(1, parameter[0].numel())) ** 0.5
            else:
                noise = 0.5 + noise.abs() / 2
            parameter.copy_(noise)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.reset_running_stats()
    return model
