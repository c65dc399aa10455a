"""What layers make of their tensors before they compute: kept in evaluation until these change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


class Keeps(nn.Module):
    """A layer that computes with something made of its tensors, once where nothing changes."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: tuple[list[tuple[Tensor, int]], object, Tensor] | None = None

    def kept(self, make: Callable[[], Tensor], *sources: Tensor, key: object = None) -> Tensor:
        """Return what is made; in evaluation without gradients anew only when a source changed.

        Not so while a graph of the network is made, which shall not hold it.

        Args:
            make: makes it.
            sources: the tensors that it is made of.
            key: what else it depends on.
        """
        graph = torch.compiler.is_compiling() or torch.compiler.is_exporting()
        graph = graph or torch.jit.is_tracing()
        odd = any(source.is_inference() for source in sources)  # count no changes
        if self.training or torch.is_grad_enabled() or graph or odd:
            return make()
        if self._kept is None or self._kept[1] != key or not _same(self._kept[0], sources):
            self._kept = [(source, source._version) for source in sources], key, make()
        return self._kept[2]

    def train(self, mode: bool = True) -> Self:
        """Forget it when the mode changes."""
        self._kept = None
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self._kept = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a file takes: the rest is made again."""
        return {**self.__dict__, "_kept": None}


def _same(kept: list[tuple[Tensor, int]], sources: tuple[Tensor, ...]) -> bool:
    pairs = zip(kept, sources, strict=True)
    return all(old is new and version == new._version for (old, version), new in pairs)
