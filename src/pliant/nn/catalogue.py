"""The kinds of layers that an edit may put in, by the name under which files know them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pliant.cost import LayerCost
from pliant.errors import EditError
from pliant.nn.asymmetric import DAPF, MDA, AsymmetricConv2d
from pliant.nn.basis import OrthogonalBasis
from pliant.nn.dynamic import DynamicRow, FixedTrunk
from pliant.nn.filters import WEIGHTED, filter_count
from pliant.nn.gates import (
    BlockAttention,
    DepthwiseResidual,
    EfficientAttention,
    SqueezeExcite,
)
from pliant.nn.inserted import Conv, Copy, Linear, Residual
from pliant.nn.meta_kernel import Cropped, MetaKernel
from pliant.nn.morphological import BMConv2d, Rectified
from pliant.nn.multipath import MultiPath, Routed
from pliant.nn.quadratic import QuadraticConv2d, QuadraticFactors
from pliant.nn.scatter import Gather, Scatter
from pliant.nn.separable import Separable
from pliant.nn.shifted import ShiftAttentionConv2d, ShiftConv2d
from pliant.nn.tensors import CPLinear, MultipliedOut

Spec = Mapping[str, Any]
"""What is set of a new layer: names, and plain values of the types that its kind declares."""


class Kind(Protocol):
    """What a file may put in: see `pliant.edits.swap` for how to write one."""

    spec: ClassVar[Mapping[str, type]]

    @classmethod
    def build(cls, layer: Any, spec: Spec, /) -> nn.Module:
        """Make the new layer, from the shapes of the old one alone."""

    @classmethod
    def predict(cls, before: LayerCost, spec: Spec, /) -> LayerCost:
        """Return what it costs, from what the old one did."""


@runtime_checkable
class Filled(Protocol):
    """A new layer that begins with what the old one has learned."""

    def fill(self, layer: Any, /) -> None:
        """Take over the weights of the old layer."""


class Identity:
    """Nothing in the place of a batch norm."""

    spec: ClassVar[Mapping[str, type]] = {}

    @classmethod
    def build(cls, layer: Any, spec: Spec) -> nn.Module:
        """Make what gives back what it gets."""
        if not isinstance(layer, _BatchNorm):
            kind = type(layer).__name__
            raise EditError(f"must be a batch norm to become an identity, not {kind}.")
        return nn.Identity()

    @classmethod
    def predict(cls, before: LayerCost, spec: Spec) -> LayerCost:
        """Nothing is left to pay for."""
        return replace(before, kind="Identity", params=0, macs=0, bytes=0, weight=())


class Biased:
    """A convolution or Linear gets a bias of zeros; it stays the same object."""

    spec: ClassVar[Mapping[str, type]] = {}

    @classmethod
    def build(cls, layer: Any, spec: Spec) -> nn.Module:
        """Add the bias."""
        if not isinstance(layer, WEIGHTED):
            kind = type(layer).__name__
            raise EditError(f"must be a convolution or Linear to be biased, not {kind}.")
        if layer.bias is not None:
            raise EditError("has a bias already.")
        zeros = layer.weight.new_zeros(filter_count(layer))
        layer.bias = nn.Parameter(zeros, requires_grad=layer.weight.requires_grad)
        return layer

    @classmethod
    def predict(cls, before: LayerCost, spec: Spec) -> LayerCost:
        """A number more for every output channel."""
        outputs = before.output[-1 if before.kind == "Linear" else 0]
        size = before.bytes // max(1, before.params)
        return replace(before, params=before.params + outputs, bytes=before.bytes + size * outputs)


SWAPS: dict[str, type[Kind]] = {
    "asymmetric": AsymmetricConv2d,
    "biased": Biased,
    "cropped": Cropped,
    "cp": CPLinear,
    "cp_dense": MultipliedOut,
    "dynamic_residual": DynamicRow,
    "fixed_residual": FixedTrunk,
    "identity": Identity,
    "morphological": BMConv2d,
    "multi_path": MultiPath,
    "multi_path_routed": Routed,
    "orthogonal_basis": OrthogonalBasis,
    "quadratic": QuadraticConv2d,
    "quadratic_factors": QuadraticFactors,
    "rectified": Rectified,
    "meta_kernel": MetaKernel,
    "separable": Separable,
    "shift": ShiftConv2d,
    "shift_attention": ShiftAttentionConv2d,
}
"""The closed set of layers that a file may put in the place of another; a line for each."""

INSERTS: dict[str, type[Kind]] = {
    "cbam": BlockAttention,
    "conv": Conv,
    "copy": Copy,
    "dapf": DAPF,
    "eca": EfficientAttention,
    "gather": Gather,
    "linear": Linear,
    "mda": MDA,
    "res3": DepthwiseResidual,
    "residual": Residual,
    "scatter": Scatter,
    "se": SqueezeExcite,
}
"""The closed set of what a file may put before, behind or between layers; a line for each."""
