"""A head without weights of its own: one fixed direction for every class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pliant.cost import LayerCost
from pliant.errors import EditError

Basis = Literal["blocks", "identity", "random", "hadamard"]
STORED = ("random", "hadamard")  # bases that are matrices; the others are known by their size


class OrthogonalBasis(nn.Module):
    """Projects features onto one direction for each class, which are orthonormal and never learn.

    The answer is the class with the largest projection. Source: B. Cancela, V. Bolon-Canedo,
    A. Alonso-Betanzos, ICPR 2020.

    Args:
        features: D, length of a feature vector.
        classes: K of them, at most D.
        kind: "blocks" gives every class as many features as there are for each, and its direction
            is their normed mean; "identity" gives it one; "random" draws directions, by the global
            random state; "hadamard" takes columns of a Hadamard matrix, where D is a power of two.

    Raises:
        EditError: there are fewer features than classes, or no such basis.

    >>> OrthogonalBasis(4, 2, "blocks").directions
    tensor([[0.7071, 0.0000],
            [0.7071, 0.0000],
            [0.0000, 0.7071],
            [0.0000, 0.7071]])
    """

    spec: ClassVar[Mapping[str, type]] = {"basis": str}

    def __init__(self, features: int, classes: int, kind: str = "blocks") -> None:
        super().__init__()
        check_basis(features, classes, kind)
        self.features, self.classes, self.kind = features, classes, kind
        self.width = 1 if kind == "identity" else features // classes
        self.matrix: Tensor | None
        self.register_buffer("matrix", _matrix(features, classes, kind))

    def forward(self, features: Tensor) -> Tensor:
        """Map features (..., D) to projections (..., K)."""
        if self.matrix is not None:
            return features @ self.matrix.to(features.dtype)
        taken = features[..., : self.classes * self.width]
        return taken.unflatten(-1, (self.classes, self.width)).sum(-1) * self.width**-0.5

    @property
    def directions(self) -> Tensor:
        """Q, the directions as columns: (D, K)."""
        like = self.matrix.device if self.matrix is not None else None
        return self(torch.eye(self.features, device=like))

    def predict_class(self, features: Tensor) -> Tensor:
        """Return the class of each feature vector, (...,)."""
        return self(features).argmax(-1)

    @property
    def numbers(self) -> int:
        """How many numbers it keeps."""
        return 0 if self.matrix is None else self.matrix.numel()

    def macs(self, inputs: list[Tensor], outputs: list[Tensor]) -> int:
        """Count the products of one call: none, where sums do."""
        return 0 if self.matrix is None else outputs[0].numel() * self.features

    @classmethod
    def build(cls, layer: Any, spec: Mapping[str, Any]) -> OrthogonalBasis:
        """Make it in the place of a linear head."""
        if type(layer) is not nn.Linear:
            kind = type(layer).__name__
            raise EditError(f"must be a Linear to become an orthogonal basis, not {kind}.")
        return cls(layer.in_features, layer.out_features, spec["basis"])

    @classmethod
    def predict(cls, before: LayerCost, spec: Mapping[str, Any]) -> LayerCost:
        """Return its cost: nothing, or that of a matrix without a bias."""
        kept = before.weight[0] * before.weight[1] if spec["basis"] in STORED else 0
        macs = before.macs if kept else 0
        size = before.bytes // before.params
        return replace(before, kind=cls.__name__, params=kept, macs=macs, bytes=kept * size)

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"{self.features}, {self.classes}, {self.kind}"


def check_basis(features: int, classes: int, kind: str) -> None:
    """Refuse a basis that cannot be, by a sentence that begins with the name of the layer."""
    known = ("blocks", "identity", "random", "hadamard")
    if kind not in known:
        raise EditError(f"takes a basis of {', '.join(known)}, not {kind[:80]!r}.")
    if features < classes:
        raise EditError(
            f"has {features} features for {classes} classes, but orthogonal directions need at "
            "least as many: make the features wider."
        )
    if kind == "hadamard" and features & (features - 1):
        raise EditError(f"has {features} features, but a Hadamard basis needs a power of two.")


def _matrix(features: int, classes: int, kind: str) -> Tensor | None:
    """Return Q as columns, (D, K); None where the basis follows from its size."""
    if kind == "random":
        basis, upper = torch.linalg.qr(torch.randn(features, classes))
        return basis * upper.diagonal().sign()  # so that it is uniform over all bases
    if kind != "hadamard":
        return None
    square = torch.ones(1, 1)
    while len(square) < features:
        square = torch.cat([torch.cat([square, square], 1), torch.cat([square, -square], 1)])
    return square[:, :classes] * features**-0.5
