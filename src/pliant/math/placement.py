"""Losses that say where features shall lie: each class along a direction of its own."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["angle", "energy", "placement", "softmax"]
EPS = 1e-8  # under the norm of a feature vector


def cosines(features: Tensor, projections: Tensor) -> Tensor:
    """Return projections over the norm of the features: cosines to the directions, (N, K)."""
    return projections / features.norm(dim=1, keepdim=True).clamp_min(EPS)


def placement(
    kind: Kind,
    features: Tensor,
    projections: Tensor,
    labels: Tensor,
    *,
    gamma: float = 1.0,
    radius: float = 1.0,
    temperature: float = 16.0,
    margin: float = 0.0,
) -> Tensor:
    """Return how far each feature vector is from where its class lies.

    With c the cosines to the directions q, and y the class:

    - angle: 1 - c_y.
    - energy: 1 - relu(c_y)^2 + gamma relu(-c_y), the share of the energy off the axis.
    - placement: |h - radius q_y|^2 / D.
    - softmax: cross-entropy of temperature (c - margin onehot_y). Its least value is not on the
      direction itself, but leans away from those of the other classes: c_y^2 = 1 - 1/K.

    Args:
        kind: of the loss.
        features: h, (N, D).
        projections: onto orthonormal directions, (N, K).
        labels: whole numbers below K, (N,).
        gamma: weight of the wrong side, of "energy".
        radius: of "placement".
        temperature: of "softmax".
        margin: of "softmax".

    Returns:
        (N,), not negative.
    """
    if kind == "placement":
        own = projections.gather(1, labels[:, None])[:, 0]
        gap = features.square().sum(1) - 2 * radius * own + radius**2
        return gap / features.shape[1]
    cosine = cosines(features, projections)
    own = cosine.gather(1, labels[:, None])[:, 0]
    if kind == "angle":
        return 1 - own
    if kind == "energy":
        return 1 - own.relu().square() + gamma * (-own).relu()
    shifted = cosine - margin * F.one_hot(labels, cosine.shape[1])
    return F.cross_entropy(temperature * shifted, labels, reduction="none")


def off_span(features: Tensor, projections: Tensor) -> Tensor:
    """Return the share of each vector's energy outside of all directions, (N,), in 0..1.

    It is large for what belongs to no class.
    """
    energy = features.square().sum(1).clamp_min(EPS**2)
    return (1 - projections.square().sum(1) / energy).clamp(0, 1)


def norm_gap(features: Tensor, radius: float) -> Tensor:
    """Return the squared distance of each vector's norm from a radius, (N,)."""
    squares = features.square().sum(1).clamp_min(EPS**2)
    return (torch.sqrt(squares) - radius).square()
