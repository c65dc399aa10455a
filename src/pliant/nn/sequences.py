"""Features of sequences of several sensors, their products, and the network that is made of them.

Source: K. Makantasis, A. Voulodimos, A. Doulamis, N. Doulamis, N. Bakalos, "Space-time domain
tensor neural networks", ICPR 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pliant.errors import ModelError
from pliant.nn.tensors import CPLinear

AT_MOST = 10**6  # numbers of a fused tensor that is really built


class SpatioTemporalFeatures(nn.Module):
    """Filters the sensors of each modality, and takes the logarithms of how much each filter moves.

    With the mean over time taken off, f = log(power of a filter / power of all + eps): what common
    spatial patterns give, with filters that learn.

    Args:
        modalities: P, such as axes or kinds of sensors.
        channels: C, sensors of each.
        filters: q, of each modality.
        steps: T, needed where there are temporal filters.
        temporal: how many filters along time; none if 0.
        energy: add the logarithm of the power of all, which the division takes out.
        eps: under logarithms.

    Raises:
        ModelError: temporal filters without a number of steps, or sizes below 1.
    """

    def __init__(
        self,
        modalities: int,
        channels: int,
        filters: int,
        *,
        steps: int = 0,
        temporal: int = 0,
        energy: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if min(modalities, channels, filters) < 1 or (temporal and not steps):
            raise ModelError(
                "Features of sequences need modalities, channels and filters from 1 on, and the "
                f"number of steps for temporal filters, not {modalities}, {channels}, {filters}."
            )
        self.energy, self.eps = energy, eps
        self.spatial = nn.Parameter(torch.empty(modalities, channels, filters))
        for matrix in self.spatial:
            nn.init.orthogonal_(matrix)
        self.temporal: nn.Parameter | None = None
        if temporal:
            self.temporal = nn.Parameter(torch.empty(modalities, steps, temporal))
            for matrix in self.temporal:
                nn.init.orthogonal_(matrix)
        self.size = filters + energy

    def filtered(self, x: Tensor) -> Tensor:
        """Map (N, P, C, T) to (N, P, q, T), or to (N, P, q, temporal filters)."""
        x = x - x.mean(3, keepdim=True)
        found = self.spatial.mT @ x
        return found if self.temporal is None else found @ self.temporal

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, P, C, T) to (N, P, q), one more with the energy."""
        found = self.filtered(x)
        power = found.square().sum(3)
        total = power.sum(2, keepdim=True)
        features = (power / total.clamp_min(1e-30) + self.eps).log()
        more = (total / found.shape[3] + self.eps).log()
        return torch.cat([features, more], 2) if self.energy else features

    @torch.no_grad()
    def fit_init(self, x: Tensor, labels: Tensor) -> SpatioTemporalFeatures:
        """Begin with common spatial patterns of labelled sequences.

        Of each class against the others the directions are taken along which its variance is the
        largest and the smallest share, the most telling ones of all classes first.

        Args:
            x: (N, P, C, T).
            labels: (N,).

        Raises:
            ModelError: there is only one class, or there are more filters than channels.
        """
        kinds = labels.unique().tolist()
        modalities, channels, filters = self.spatial.shape
        if len(kinds) < 2 or filters > channels:
            raise ModelError(
                "Common spatial patterns need two classes and no more filters than channels, not "
                f"{len(kinds)} classes and {filters} filters for {channels} channels."
            )
        moved = (x - x.mean(3, keepdim=True)).double()
        spread = moved @ moved.mT / x.shape[3]
        spread = spread / spread.diagonal(dim1=2, dim2=3).sum(2)[:, :, None, None].clamp_min(1e-30)
        for modality in range(modalities):
            own = spread[:, modality]
            pairs = [(own[labels == k].mean(0), own[labels != k].mean(0)) for k in kinds]
            self.spatial[modality] = patterns(pairs[: 1 if len(kinds) == 2 else None], filters)
        return self


def patterns(pairs: Sequence[tuple[Tensor, Tensor]], count: int) -> Tensor:
    """Return directions that tell covariances apart: of the ends of each spectrum, in turn.

    They solve S_1 a = lambda S_2 a, with a^T (S_1 + S_2) a = 1; a share of 1e-3 of the mean
    variance is added to both.

    Args:
        pairs: of covariances (C, C).
        count: how many directions.

    Returns:
        (C, count).
    """
    ends = []
    for one, two in pairs:
        eye = torch.eye(len(one), dtype=one.dtype)
        one, two = (s + 1e-3 * s.diagonal().mean().clamp_min(1e-12) * eye for s in (one, two))
        root = torch.linalg.cholesky(one + two)
        half = torch.linalg.solve_triangular(root, one, upper=False)
        whitened = torch.linalg.solve_triangular(root, half.mT, upper=False)
        _, vectors = torch.linalg.eigh((whitened + whitened.mT) / 2)
        found = torch.linalg.solve_triangular(root.mT, vectors, upper=True)
        size = found.shape[1]
        order = [at for k in range((size + 1) // 2) for at in dict.fromkeys((size - 1 - k, k))]
        ends.append(found[:, order])
    turns = [end[:, at] for at in range(ends[0].shape[1]) for end in ends]
    return torch.stack(turns[:count], 1)


class OuterFusion(nn.Module):
    """The outer product of all modalities' features, each with a 1 behind it: all interactions.

    Args:
        append_one: put the 1, so that products of some modalities are there too.
    """

    def __init__(self, *, append_one: bool = True) -> None:
        super().__init__()
        self.append_one = append_one

    def parts(self, features: Tensor) -> list[Tensor]:
        """Return the vectors (N, q + 1), one for each modality, of features (N, P, q)."""
        if self.append_one:
            features = torch.cat([features, torch.ones_like(features[:, :, :1])], 2)
        return list(features.unbind(1))

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, P, q) to (N, (q + 1)^P), flat.

        Raises:
            ModelError: that would be more than a million numbers for a sample.
        """
        first, *rest = self.parts(features)
        if first.shape[1] ** (1 + len(rest)) > AT_MOST:
            raise ModelError(
                f"The outer product of {1 + len(rest)} modalities has more than {AT_MOST:,} "
                "numbers: hand the parts to CPLinear.of_outer, which never builds it."
            )
        for part in rest:
            first = (first[:, :, None] * part[:, None]).flatten(1)
        return first


class STDTNN(nn.Module):
    """Classifies sequences of several modalities by features, their products, and factors.

    Args:
        modalities: P.
        channels: C, sensors of each.
        classes: number of logits.
        filters: q; 4 of them, or as many as there are channels, if 0.
        hidden: H, units.
        rank: R, outer products of each unit.
        fusion: "outer" for products of features, "stack" for the covariances of the filters side
            by side.
        steps: T, needed for temporal filters.
        temporal: filters along time.
        energy: see `SpatioTemporalFeatures`.
    """

    def __init__(
        self,
        modalities: int,
        channels: int,
        classes: int,
        *,
        filters: int = 0,
        hidden: int = 16,
        rank: int = 1,
        fusion: Literal["outer", "stack"] = "outer",
        steps: int = 0,
        temporal: int = 0,
        energy: bool = True,
    ) -> None:
        super().__init__()
        filters = filters or min(channels, 4)
        self.features = SpatioTemporalFeatures(
            modalities, channels, filters, steps=steps, temporal=temporal, energy=energy
        )
        self.fusion = OuterFusion() if fusion == "outer" else None
        size = self.features.size + 1
        shape = (size,) * modalities if self.fusion else (modalities, filters, filters)
        self.hidden = CPLinear(shape, hidden, rank, bias=False)
        self.classify = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map sequences (N, P, C, T) to logits (N, classes)."""
        if self.fusion is not None:
            inner = self.hidden.of_outer(self.fusion.parts(self.features(x)))
        else:
            inner = self.hidden(self._covariances(x).flatten(1))
        found: Tensor = self.classify(inner.tanh())
        return found

    def _covariances(self, x: Tensor) -> Tensor:
        moved = self.features.filtered(x)
        spread = moved @ moved.mT
        trace = spread.diagonal(dim1=2, dim2=3).sum(2)
        return spread / trace[:, :, None, None].clamp_min(1e-30)
