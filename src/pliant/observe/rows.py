"""Activations of several layers as matrices whose rows belong to the same samples.

Row i of every matrix comes from the same sample, and of sampled positions from the same place in
it. The network is in eval mode and records no gradients; hooks are there during a forward call
only, never between two of them, so that none is left behind by whoever stops early or fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pliant.cost import Example, call
from pliant.errors import DataError, ModelError
from pliant.observe.outputs import logits
from pliant.observe.watch import capture, samples

Side = Literal["input", "output"]
Form = Literal["mean", "flat", "pixels"] | Callable[[Tensor], Tensor]

LAST = ("out_features", "normalized_shape", "embedding_dim")  # who has these has channels last


@dataclass(frozen=True)
class Rows:
    """Reads layers of a network as matrices, each row of all of them from the same sample.

    Args:
        model: any module; it stays as it is.
        layers: names of submodules that read and give one tensor; "" stands for the class scores
            of the network, whatever the side and the form.
        side: whether what the layers give or what they read is wanted.
        form: how the tensor of one sample, channels by positions, becomes rows of float numbers:
            "mean" over the positions, one row (channels,); "flat", one row (channels *
            positions,); "pixels", a row (channels,) for each of `pixels` positions, one below
            the other; or a function of a tensor (samples, channels, *positions) that returns
            (samples, features).
        pixels: how many positions of a sample "pixels" draws. They are drawn anew for each
            sample, with replacement, as shares of the axes: layers of one size are read at the
            same positions, larger and smaller ones at those that correspond. A layer without
            positions repeats its row.
        generator: draws the positions.

    A layer called several times in one forward call counts with its last call, and one that is
    not called is left out.

    >>> net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(12, 2))
    >>> rows = Rows(net, ("0", "")).of((torch.ones(5, 1, 4, 4),))
    >>> rows["0"].shape, rows[""].shape
    (torch.Size([5, 3]), torch.Size([5, 2]))
    """

    model: nn.Module
    layers: Sequence[str]
    side: Side = "output"
    form: Form = "mean"
    pixels: int = 8
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __post_init__(self) -> None:
        known = dict(self.model.named_modules())
        missing = [name for name in self.layers if name not in known]
        if missing or not self.layers:
            raise ModelError(
                f"Layers to look at must be submodules of {type(self.model).__name__}, but "
                f"{missing[0] if missing else 'none'!r} came: take names from named_modules()."
            )
        if self.pixels < 1:
            raise ModelError(f"At least 1 pixel of a sample must be read, not {self.pixels}.")

    def of(self, example: Example) -> dict[str, Tensor]:
        """Run the network on one batch of inputs and return the rows of every layer.

        Only rows outlive the hook that sees an activation, not the activation.

        Raises:
            ModelError: a layer gives no tensor of a batch, or numbers that are not finite.
        """
        found: dict[str, Tensor] = {}
        count = samples(example)
        spots = self._spots(count)

        def see(name: str, given: Tensor, output: Tensor) -> None:
            seen: Any = given if self.side == "input" else output
            found[name] = self._rows(name, seen if name else logits(output), count, spots)

        with capture(self.model, self.layers, see):
            call(self.model, example)
        return {name: found[name] for name in self.layers if name in found}

    def stream(self, batches: Iterable[Example]) -> Iterator[dict[str, Tensor]]:
        """Yield the rows of one batch after the other; nothing is kept."""
        return map(self.of, batches)

    def all(self, batches: Iterable[Example], most: int | None = None) -> dict[str, Tensor]:
        """Return the rows of all batches, (rows, features) for each layer, on the CPU.

        Takes 4 bytes for every number of the result, and as much again while it is put together.

        Args:
            batches: inputs of forward calls.
            most: samples after which to stop, rounded up to whole batches; None for all.

        Raises:
            DataError: there is no batch.
            ModelError: as for `of`, or a layer is called in some batches only.
        """
        parts: dict[str, list[Tensor]] | None = None
        for rows in self.stream(_first(batches, most)):
            parts = {name: [] for name in rows} if parts is None else parts
            if rows.keys() != parts.keys():
                raise _unlike(parts.keys() ^ rows.keys())
            for name, matrix in rows.items():
                parts[name].append(matrix.cpu())
        if parts is None:
            raise _nothing()
        return {name: torch.cat(parts.pop(name)) for name in list(parts)}

    def grams(
        self,
        batches: Iterable[Example],
        pairs: Sequence[tuple[str, str]] | None = None,
        most: int | None = None,
    ) -> Grams:
        """Sum products of rows over all batches in float64, without keeping a row.

        Beside the activations of one forward call this holds the rows of one batch, once more
        in float64, and 8 d e bytes for two layers of d and e features, times two while a batch
        is added: nothing that grows with the number of batches.

        Args:
            batches: inputs of forward calls.
            pairs: which layers to multiply; None for each with itself.
            most: samples after which to stop, rounded up to whole batches; None for all.

        Raises:
            DataError: there is no batch.
            ModelError: as for `of`, or a layer is called in some batches only.
        """
        pairs = [(name, name) for name in self.layers] if pairs is None else pairs
        found: Grams | None = None
        for rows in self.stream(_first(batches, most)):
            found = found or Grams()
            found.add(rows, [pair for pair in pairs if rows.keys() >= set(pair)])
        if found is None:
            raise _nothing()
        return found

    def _spots(self, count: int) -> Tensor:
        """Draw positions as shares of at most three axes, (samples, pixels, 3)."""
        if self.form != "pixels":
            return torch.empty(0)
        return torch.rand(count, self.pixels, 3, generator=self.generator)

    def _rows(self, name: str, seen: Any, count: int, spots: Tensor) -> Tensor:
        if not isinstance(seen, Tensor) or not seen.dim() or len(seen) != count:
            shape = tuple(seen.shape) if isinstance(seen, Tensor) else type(seen).__name__
            raise ModelError(
                f"The {self.side} of {name or 'the network'} must be one tensor with a row for "
                f"each of {count} samples, not {shape}: look at another layer."
            )
        layer = self.model.get_submodule(name)
        last = seen.dim() > 2 and any(hasattr(layer, mark) for mark in LAST)
        map_ = seen.movedim(-1, 1) if last else seen
        map_ = map_.unsqueeze(1) if map_.dim() == 1 else map_
        rows = self._formed(map_, spots) if name or self.form == "pixels" else map_.flatten(1)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if not torch.isfinite(rows).all():
            raise ModelError(
                f"What passes {name or 'the network'} must be finite, but some of it is NaN or "
                "infinity: its weights or inputs are broken."
            )
        return rows.clone()  # a later layer may work in place

    def _formed(self, map_: Tensor, spots: Tensor) -> Tensor:
        if callable(self.form):
            return self.form(map_)
        if self.form == "flat":
            return map_.flatten(1)
        if self.form == "mean":
            return map_.flatten(2).float().mean(2) if map_.dim() > 2 else map_
        places = map_.flatten(2) if map_.dim() > 2 else map_.unsqueeze(2)
        at = _index(spots, map_.shape[2:]).to(map_.device)
        picked = places.gather(2, at.unsqueeze(1).expand(-1, places.shape[1], -1))
        return picked.movedim(1, -1).flatten(0, 1)


@dataclass
class Grams:
    """Sums over rows of one or more layers, in float64.

    Args:
        count: rows that were added.
        sums: for each layer its rows added up, (features,).
        products: for pairs of layers X^T Y, (features of the first, features of the second).
    """

    count: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    products: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def add(self, rows: dict[str, Tensor], pairs: Sequence[tuple[str, str]]) -> None:
        """Add the rows of one batch.

        Raises:
            ModelError: they are of other layers than those of the batches before.
        """
        if self.count and rows.keys() != self.sums.keys():
            raise _unlike(self.sums.keys() ^ rows.keys())
        precise = {name: _precise(matrix) for name, matrix in rows.items()}
        self.count += len(next(iter(precise.values()), ()))
        for name, matrix in precise.items():
            self.sums[name] = self.sums.get(name, 0) + matrix.sum(0)
        for one, other in pairs:
            product = precise[one].T @ precise[other]
            known = self.products.get((one, other))
            self.products[one, other] = product if known is None else known.add_(product)

    def gram(self, layer: str, other: str | None = None) -> Tensor:
        """Return X^T X of a layer, or X^T Y of two that were added as a pair."""
        return self.products[layer, other or layer]

    def mean(self, layer: str) -> Tensor:
        """Return the mean row of a layer."""
        return self.sums[layer] / self.count

    def covariance(self, layer: str, other: str | None = None) -> Tensor:
        """Return the covariance of a layer, or of two, with the number of rows as divisor."""
        means = self.mean(layer), self.mean(other or layer)
        return self.gram(layer, other) / self.count - torch.outer(*means)


def _precise(matrix: Tensor) -> Tensor:
    """Rows in float64, on the CPU where their device has none."""
    return (matrix.cpu() if matrix.device.type == "mps" else matrix).double()


def _index(spots: Tensor, sizes: Sequence[int]) -> Tensor:
    """Turn shares of the axes into positions of a flattened map, (samples, pixels)."""
    found = torch.zeros(spots.shape[:2], dtype=torch.long)
    for axis, size in enumerate(sizes):
        found = found * size + (spots[..., axis] * size).long().clamp_(max=size - 1)
    return found


def _first(batches: Iterable[Example], most: int | None) -> Iterator[Example]:
    seen = 0
    for batch in batches:
        if most is not None and seen >= most:
            return
        seen += samples(batch)
        yield batch


def _unlike(names: Iterable[str]) -> ModelError:
    return ModelError(
        f"Rows of one layer must belong to those of another, but the network calls "
        f"{', '.join(sorted(names))} for some batches only: look at other layers."
    )


def _nothing() -> DataError:
    return DataError("Layers are looked at on inputs, but no batch came: give at least one.")
