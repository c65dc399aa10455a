"""Quadratic convolutions: every output is a quadratic form of the patch that it reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.cost import LayerCost
from pliant.errors import EditError
from pliant.nn.patches import Around, Patches

AT_ONCE = 1 << 22  # numbers held at a time, of all outputs of the products of a patch
FORMS = ("full", "symmetric")
MOST = 1 << 30  # weights of one layer, whoever asks for more


class QuadraticConv2d(Patches):
    """Gives -z^T Q z for every patch, with z = (patch, 1): quadratic, linear and constant at once.

    Only the symmetric part of Q counts. The form "symmetric" holds no more than that, each pair
    of numbers once: half of the weights, the same function. Source: P. Mantini, S. K. Shah, ICPR
    2020.

    Args:
        inputs: channels that it reads.
        outputs: channels that it gives.
        kernel_size: height and width.
        stride: of the patches.
        padding: zeros around, or "same"; the 1 stays 1 there.
        dilation: of the patches.
        form: "full" has a matrix (n + 1, n + 1) for each output, n = inputs x kernel; "symmetric"
            its upper triangle, row by row.
        negative: whether the sign is turned, as in the paper.

    >>> layer = QuadraticConv2d(1, 1, (1, 1), negative=False)
    >>> with torch.no_grad():
    ...     _ = layer.weight.copy_(torch.tensor([[[1.0, 2.0], [2.0, 5.0]]]))  # t^2 + 4 t + 5
    >>> layer(torch.tensor([[[[3.0]]]])).item()
    26.0
    """

    spec: ClassVar[Mapping[str, type]] = {"form": str, "negative": bool, "random": bool}

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] | str = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        *,
        padding_mode: Around = "zeros",
        form: str = "full",
        negative: bool = True,
    ) -> None:
        geometry = kernel_size, stride, padding, dilation
        like = nn.Conv2d(inputs, 1, *geometry, padding_mode=padding_mode)
        super().__init__(like, outputs, padding)
        self.form, self.negative, self.random = form, negative, True
        self.taps = like.weight.numel() + 1
        shape = (self.taps, self.taps) if form == "full" else (_pairs(self.taps),)
        self.weight = nn.Parameter(torch.zeros(outputs, *shape))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Draw Q as Glorot's rule has it for the whole array, and keep what is symmetric of it."""
        most = math.sqrt(3 / (self.taps * self.outputs))
        drawn = torch.empty(self.outputs, self.taps, self.taps).uniform_(-most, most)
        self.set_matrices((drawn + drawn.mT) / 2)

    @torch.no_grad()
    def set_matrices(self, matrices: Tensor) -> None:
        """Take matrices (outputs, n + 1, n + 1), of which only the symmetric part counts."""
        if self.form == "full":
            self.weight.copy_(matrices)
            return
        doubled = matrices + matrices.mT - torch.diag_embed(matrices.diagonal(dim1=1, dim2=2))
        rows, columns = _upper(self.taps)
        self.weight.copy_(doubled[:, rows, columns])

    def matrices(self) -> Tensor:
        """Return Q, symmetric: (outputs, n + 1, n + 1)."""
        if self.form == "full":
            return (self.weight + self.weight.mT) / 2
        rows, columns = _upper(self.taps)
        found = self.weight.new_zeros(self.outputs, self.taps, self.taps)
        found[:, rows, columns] = self.weight / 2
        return found + found.mT

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H', W')."""
        mixed = torch.is_autocast_enabled(x.device.type)  # squares overflow in half precision
        with torch.autocast(x.device.type, enabled=False) if mixed else nullcontext():
            return self._quadratic(x.to(self.weight.dtype))

    def _quadratic(self, x: Tensor) -> Tensor:
        x = self.padded(x)
        z = F.pad(self.patches(x), (0, 0, 0, 1), value=1.0)
        found = self._full(z) if self.form == "full" else self._symmetric(z)
        found = found.unflatten(2, self.size(x))
        return -found if self.negative else found

    def _full(self, z: Tensor) -> Tensor:
        rows = 1 if torch.compiler.is_exporting() else max(1, len(z))
        some = max(1, AT_ONCE // max(1, rows * z.shape[1] * z.shape[2]))
        parts = []
        for part in self.weight.split(some):
            bent = (part.flatten(0, 1) @ z).unflatten(1, part.shape[:2])
            parts.append((bent * z[:, None]).sum(2))
        return torch.cat(parts, 1)

    def _symmetric(self, z: Tensor) -> Tensor:
        rows, columns = (place.to(z.device) for place in _upper(self.taps))
        return self.weight @ (z[:, rows] * z[:, columns])

    @property
    def numbers(self) -> int:
        """How many parameters it stands for besides its own: none."""
        return 0

    def macs(self, inputs: list[Tensor], outputs: list[Tensor]) -> int:
        """Count the products of one call."""
        places = outputs[0].numel() // self.outputs
        return places * _products(self.outputs, self.taps, self.form)

    @classmethod
    def build(cls, layer: Any, spec: Mapping[str, Any]) -> QuadraticConv2d:
        """Make it in the place of a convolution, or of a full one that becomes symmetric."""
        if spec["form"] not in FORMS:
            raise EditError(f"takes a form of {', '.join(FORMS)}, not {spec['form'][:80]!r}.")
        known = isinstance(layer, QuadraticConv2d) and layer.form == "full"
        if not known:
            check_quadratic(layer)
        sizes = (layer.inputs, layer.outputs) if known else (layer.in_channels, layer.out_channels)
        _check_size(sizes[1], math.prod(layer.kernel_size) * sizes[0] + 1)
        geometry = layer.kernel_size, layer.stride, layer.padding, layer.dilation
        mode, how = layer.padding_mode, {"form": spec["form"], "negative": spec["negative"]}
        new = cls(*sizes, *geometry, padding_mode=mode, **how)
        new.random = spec["random"]
        return new

    def fill(self, layer: Any) -> None:
        """Begin as the layer did: a convolution is a form without a quadratic part."""
        if isinstance(layer, QuadraticConv2d):
            self.set_matrices(layer.matrices())
        elif not self.random:
            self.set_matrices(matrices_of(layer, negative=self.negative))

    @classmethod
    def predict(cls, before: LayerCost, spec: Mapping[str, Any]) -> LayerCost:
        """Return its cost."""
        outputs, places, size = _counted(before)
        shape = (size, size) if spec["form"] == "full" else (_pairs(size),)
        params = outputs * math.prod(shape)
        return replace(
            before,
            kind=cls.__name__,
            params=params,
            macs=places * _products(outputs, size, spec["form"]),
            bytes=params * (before.bytes // before.params),
            weight=(outputs, *shape),
        )

    def extra_repr(self) -> str:
        """Return the settings."""
        rest = f"stride={self.stride}, form={self.form}, negative={self.negative}"
        return f"{self.inputs}, {self.outputs}, {self.kernel_size}, {rest}"


class QuadraticFactors(nn.Module):
    """A quadratic convolution of low rank: filters, their squares, and a signed sum of these.

    Each form is sum_r lambda_r (v_r^T z)^2, made of plain convolutions. With as many terms as
    there are numbers in z, or two for what was a convolution, nothing is lost. What is left out
    is at most the sum of the |lambda| that are missing times |z|^2.

    Args:
        layer: the convolution or quadratic convolution to stand for.
        rank: R, terms of each output.
    """

    spec: ClassVar[Mapping[str, type]] = {"rank": int, "random": bool}

    def __init__(self, layer: Any, rank: int) -> None:
        super().__init__()
        known = isinstance(layer, QuadraticConv2d)
        inputs, outputs = (
            (layer.inputs, layer.outputs) if known else (layer.in_channels, layer.out_channels)
        )
        self.project = nn.Conv2d(
            *(inputs, rank * outputs, layer.kernel_size, layer.stride, layer.padding),
            dilation=layer.dilation,
            padding_mode=layer.padding_mode,
        )
        self.mix = nn.Conv2d(rank * outputs, outputs, 1, groups=outputs, bias=False)
        self.rank, self.random = rank, True

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H', W')."""
        found: Tensor = self.mix(self.project(x).square())
        return found

    @classmethod
    def build(cls, layer: Any, spec: Mapping[str, Any]) -> QuadraticFactors:
        """Make it in the place of a convolution or a quadratic one."""
        if not isinstance(layer, QuadraticConv2d):
            check_quadratic(layer)
        taps = layer.taps if isinstance(layer, QuadraticConv2d) else layer.weight[0].numel() + 1
        if not 1 <= spec["rank"] <= taps:
            raise EditError(f"takes a rank of 1 to {taps}, not {spec['rank']}.")
        new = cls(layer, spec["rank"])
        new.random = spec["random"]
        return new

    def fill(self, layer: Any) -> None:
        """Take the terms that count most."""
        if isinstance(layer, QuadraticConv2d):
            found = -layer.matrices() if layer.negative else layer.matrices()
            values, vectors = torch.linalg.eigh(found.double())
        elif self.random:
            return
        else:
            values, vectors = _two_terms(layer)
        order = values.abs().argsort(1, descending=True)[:, : self.rank]
        taken = vectors.gather(2, order[:, None].expand(-1, vectors.shape[1], -1)).mT
        self._set(taken, values.gather(1, order))

    def _set(self, vectors: Tensor, values: Tensor) -> None:
        """Set the first terms of each output; the others keep their filters, and count nothing."""
        outputs, terms = values.shape
        filters = self.project.weight.reshape(outputs, self.rank, -1).clone()
        filters[:, :terms] = vectors[:, :, :-1].to(filters)
        self.project.weight.copy_(filters.reshape(self.project.weight.shape))
        assert self.project.bias is not None
        self.project.bias.view(outputs, -1)[:, :terms] = vectors[:, :, -1].to(filters)
        self.mix.weight.zero_()
        self.mix.weight.view(outputs, -1)[:, :terms] = values.to(filters)

    @classmethod
    def predict(cls, before: LayerCost, spec: Mapping[str, Any]) -> LayerCost:
        """Return its cost."""
        outputs, places, size = _counted(before)
        terms, each = outputs * spec["rank"], before.bytes // before.params
        params = terms * (size + 1)
        return replace(
            before,
            kind=cls.__name__,
            params=params,
            macs=places * terms * size,  # n products for each term, and one of its square
            bytes=params * each,
            weight=(),
        )


def matrices_of(layer: Any, *, negative: bool) -> Tensor:
    """Return Q of a convolution: half of its kernel in the last row and column, its bias between.

    Args:
        layer: the Conv2d.
        negative: whether the form is turned afterwards.
    """
    rows = layer.weight.detach().flatten(1)
    found = rows.new_zeros(len(rows), rows.shape[1] + 1, rows.shape[1] + 1)
    found[:, -1, :-1] = found[:, :-1, -1] = rows / 2
    if layer.bias is not None:
        found[:, -1, -1] = layer.bias.detach()
    return -found if negative else found


def _two_terms(layer: Any) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues that are not 0 of a convolution's Q, (outputs, 2), and the vectors.

    They are (b +- root(b^2 + |w|^2)) / 2, with the vectors (w / (2 lambda), 1).
    """
    rows = layer.weight.detach().flatten(1).double()
    bias = rows.new_zeros(len(rows)) if layer.bias is None else layer.bias.detach().double()
    root = (bias.square() + rows.square().sum(1)).sqrt()
    values = torch.stack([bias + root, bias - root], 1) / 2
    safe = values.where(values.abs() > 1e-30, torch.inf)
    vectors = torch.cat(
        [rows[:, :, None] / (2 * safe[:, None]), torch.ones_like(values)[:, None]], 1
    )
    return values, vectors / vectors.norm(dim=1, keepdim=True)


def numbers_of(layer: Any, form: str) -> int:
    """Count the weights that a convolution would have as a quadratic one of a form."""
    size = layer.weight[0].numel() + 1
    return int(layer.out_channels * (size**2 if form == "full" else _pairs(size)))


def check_quadratic(layer: Any) -> None:
    """Refuse what is no Conv2d without groups, by a sentence that begins with its name."""
    if type(layer) is not nn.Conv2d or layer.groups != 1:
        raise EditError("must be a Conv2d without groups to become quadratic.")


def _check_size(matrices: int, size: int) -> None:
    if matrices * size**2 > MOST:
        raise EditError(f"would have {matrices * size**2:,} weights: take a lower rank.")


def _pairs(size: int) -> int:
    return size * (size + 1) // 2


def _upper(size: int) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(size, size)
    return rows, columns


def _products(outputs: int, size: int, form: str) -> int:
    """Count the products at one position: with Q and with z again, or of pairs and with U."""
    return outputs * (size**2 + size) if form == "full" else _pairs(size) * (outputs + 1)


def _counted(before: LayerCost) -> tuple[int, int, int]:
    """Return outputs, positions of all calls, and n + 1, of a convolution or a full form."""
    outputs, *rest = before.weight
    if before.kind != QuadraticConv2d.__name__:
        size = math.prod(rest) + 1
        return outputs, before.macs // (outputs * (size - 1)), size
    return outputs, before.macs // _products(outputs, rest[0], "full"), rest[0]
