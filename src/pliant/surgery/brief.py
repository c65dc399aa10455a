"""Spares passes with marks what they need not see: all before the first mark, and all that repeats.

Marks of one block of a deep network walk on in the sum of all blocks, and say at every later layer
what the marks of an earlier block have said there. So a pass may end when they say nothing new any
more, and may begin where the first of them is written. What it would have seen later, such as a
shortcut across the whole network, is missed: only what is proven counts, and where a proof fails,
the passes are made in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pliant.surgery.marks import Slot

QUIET = 12  # layers in a row that read marks and learn nothing new


class Enough(BaseException):
    """A pass has seen all that is new; no network catches this by chance."""


@dataclass
class Brief:
    """What of a network a pass leaves out.

    Args:
        on: whether it leaves out anything.
    """

    on: bool = False
    short: bool = False  # whether a pass ended early
    waiting: set[Slot] = field(default_factory=set)  # layers that are still to be marked
    clean: bool = True  # whether none has been marked yet
    quiet: int = 0  # layers in a row that learned nothing new
    samples: int = 0  # of the pass
    kept: dict[tuple[str, torch.Size], Tensor] = field(default_factory=dict)  # for one sample

    def begin(self, sources: Iterable[Slot], samples: int) -> None:
        """Begin a pass that marks the outputs of some layers."""
        self.waiting, self.clean, self.quiet, self.samples = set(sources), True, 0, samples

    def wrote(self, source: Slot) -> None:
        """Note that a layer's outputs are marked."""
        self.waiting.discard(source)
        self.clean, self.quiet = False, 0

    def read(self, *, new: bool) -> None:
        """Note that a layer has read marks, and whether they have tied anything that was not.

        Raises:
            Enough: nothing new comes any more.
        """
        self.quiet = 0 if new else self.quiet + 1
        if self.on and not self.waiting and self.quiet >= QUIET:
            self.short = True
            raise Enough

    def passing(self, name: str, module: nn.Module) -> Callable[..., Any]:
        """Return a forward of a block that gives again what it gave, as long as nothing is marked.

        Args:
            name: of the block.
            module: with layers in it.
        """
        compute, inside = module.forward, f"{name}."

        def forward(*args: Any, **kwargs: Any) -> Any:
            x: Any = args[0] if len(args) == 1 and not kwargs else None
            plain = isinstance(x, Tensor) and x.dim() > 0
            due = any(layer.startswith(inside) for layer, _ in self.waiting)
            if not plain or not self.clean or due:
                return compute(*args, **kwargs)
            with torch._C.DisableTorchFunction():
                place = name, x[: len(x) // self.samples].shape
                if place in self.kept:
                    one = self.kept[place]
                    return one.repeat(self.samples, *[1] * (one.dim() - 1))
            output = compute(x)
            if isinstance(output, Tensor) and output.dim() and not len(output) % self.samples:
                self.kept[place] = output[: len(output) // self.samples].clone()
            return output

        return forward
