"""One network of the architectures bench, and how its inputs are made."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

SETTLING = 8  # samples that batch norms see

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Network:
    """A network to be tried.

    Attributes:
        package: where it comes from.
        make: makes it, with whatever weights.
        inputs: makes a batch of so many samples, as keyword arguments of its forward.
    """

    package: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]

    def build(self) -> nn.Module:
        """Make the network in evaluation, with the same weights every time.

        Batch norms have seen some noise, so that signals get through.
        """
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model = self.make().eval()
            norms = [part for part in model.modules() if isinstance(part, _BatchNorm)]
            with torch.no_grad():
                for norm in norms:
                    norm.reset_running_stats()
                    norm.train().momentum = 0.9
                model(**self.inputs(SETTLING)) if norms else None
        for norm in norms:
            norm.eval().momentum = 0.1
        return model


def named(path: str, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    """Return what calls a class or function of a package, which is imported then."""
    package, _, name = path.rpartition(".")
    return lambda: getattr(importlib.import_module(package), name)(*args, **options)


def noise(shape: tuple[int, ...], batch: int, *, name: str = "x") -> Inputs:
    """Return random numbers of one shape for each sample."""
    return {name: torch.randn(batch, *shape, generator=_generator())}


def image(pixels: int, name: str = "x") -> Callable[[int], Inputs]:
    """Return what makes random images in colour."""
    return partial(noise, (3, pixels, pixels), name=name)


def tokens(
    length: int = 16, words: int = 300, names: str = "input_ids", more: Mapping[str, Any] = {}
) -> Callable[[int], Inputs]:
    """Return what makes random tokens, under each of the names, and attention to all of them."""

    def make(batch: int) -> Inputs:
        made: dict[str, Tensor] = {}
        for name in names.split():
            made[name] = torch.randint(3, words, (batch, length), generator=_generator())
        made["attention_mask"] = torch.ones(batch, length, dtype=torch.long)
        return {**made, **more}

    return make


def joined(*parts: Callable[[int], Inputs]) -> Callable[[int], Inputs]:
    """Return what makes inputs of several kinds, for one call."""
    return lambda batch: {name: value for part in parts for name, value in part(batch).items()}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)
