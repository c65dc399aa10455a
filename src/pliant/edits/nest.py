"""One layer becomes a row of smaller ones whose components are in order: it can be cut shorter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor, nn

from pliant.cost import LayerCost
from pliant.edits.edit import Replaced
from pliant.edits.factor import Factor
from pliant.errors import EditError


@dataclass(frozen=True)
class Nest:
    """Replaces one layer as `Factor` does, and says at which ranks its row may be cut.

    Args:
        layer: name of a Conv1d/2d/3d (groups=1) or Linear.
        form: of `Factor`.
        sizes: the ranks of every size one after the other, from the largest size, which is the
            one that is built, to the smallest.
        kernels: weights of the new layers, components in order; not part of the plan.

    Raises:
        EditError: the layer cannot be read, or form or ranks do not fit it.
    """

    layer: str
    form: str
    sizes: tuple[int, ...]
    kernels: tuple[Tensor, ...] | None = field(default=None, compare=False, repr=False)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of the largest size."""
        return self.at(0)

    @property
    def count(self) -> int:
        """How many sizes there are."""
        return len(self.sizes) // self._width

    @property
    def _width(self) -> int:
        return 2 if self.form == "tucker2" else 1

    def at(self, size: int) -> tuple[int, ...]:
        """Return the ranks of a size."""
        return self.sizes[size * self._width : (size + 1) * self._width]

    def factor(self, size: int = 0) -> Factor:
        """Return the edit that makes the row of one size alone."""
        return Factor(self.layer, self.form, self.at(size), None if size else self.kernels)

    def apply(self, model: nn.Module, *, weights: bool = True) -> Replaced:
        """Put the row of the largest size in the place of the dense layer."""
        self._check()
        return self.factor().apply(model, weights=weights)

    def predict(self, before: LayerCost) -> LayerCost:
        """Return the cost of the largest size."""
        self._check()
        return self.factor().predict(before)

    def _check(self) -> None:
        rows = [self.at(size) for size in range(self.count)]
        falling = all(
            high >= low >= 1
            for more, less in pairwise(rows)
            for high, low in zip(more, less, strict=True)
        )
        if not rows or len(self.sizes) % self._width or not falling:
            raise EditError(
                f"The sizes of {self.layer} must be ranks of {self.form}, {self._width} for each "
                f"size and none above those of the size before, not {str(self.sizes)[:80]}."
            )


def cut(kernels: Sequence[Tensor], ranks: Sequence[int]) -> tuple[Tensor, ...]:
    """Take the first components of each kernel: views, through which gradients flow.

    Args:
        kernels: in the order of their layers, (r, S, ...) to (T, r, ...).
        ranks: how many components stay between each kernel and the next.

    Raises:
        EditError: ranks do not fit the kernels.

    >>> first, last = cut((torch.zeros(4, 3), torch.zeros(5, 4)), (2,))
    >>> tuple(first.shape), tuple(last.shape)
    ((2, 3), (5, 2))
    """
    inner = [len(kernel) for kernel in kernels[:-1]]
    fit = len(ranks) == len(inner) and all(
        1 <= rank <= most for rank, most in zip(ranks, inner, strict=True)
    )
    if not fit:
        raise EditError(
            f"Ranks from 1 to {tuple(inner)} were expected, not {tuple(ranks)}: cut to fewer "
            "components than there are."
        )
    ends = [kernels[0].shape[1], *ranks, len(kernels[-1])]
    return tuple(
        kernel[:rows, :columns]
        for kernel, (columns, rows) in zip(kernels, pairwise(ends), strict=True)
    )
