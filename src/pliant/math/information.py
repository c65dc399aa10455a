"""How much two sets of numbers of the same samples say about each other."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Estimator = Literal["gaussian", "ksg", "probe", "dcor"]

CLIP = 1 - 1e-6  # largest canonical correlation: information diverges at 1
ROWS = 256  # samples whose distances to all others are held at once
STEPS = 100  # of the probe's optimizer


def components(rows: Tensor, most: int) -> Tensor:
    """Return the first principal components of standardized columns, (samples, <= most) float64.

    Columns that do not vary are left out; where none does, one column of zeros comes back.
    Components have unit variance.
    """
    rows = rows.double()
    spread = rows.std(0, correction=0)
    live = spread > 1e-8 * rows.abs().amax(0).clamp_min(1e-30)
    if not live.any():
        return rows.new_zeros(len(rows), 1)
    standard = (rows[:, live] - rows[:, live].mean(0)) / spread[live]
    left, sigma, _ = torch.linalg.svd(standard, full_matrices=False)
    rank = int((sigma > 1e-7 * sigma[0]).sum())
    return left[:, : min(most, rank)] * len(rows) ** 0.5


def shrunk(rows: Tensor) -> Tensor:
    """Return the covariance of rows, shrunk towards a multiple of the identity.

    Source: Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance
    matrices", Journal of Multivariate Analysis 88, 2004.
    """
    rows = rows - rows.mean(0)
    count, size = rows.shape
    sample = rows.T @ rows / count
    level = sample.trace() / size
    target = level * torch.eye(size, dtype=rows.dtype)
    far = (sample - target).square().sum()
    noise = ((rows.square().sum(1).square().sum() / count) - sample.square().sum()) / count
    share = float((noise.clamp_min(0) / far.clamp_min(1e-30)).clamp(max=1.0))
    return share * target + (1 - share) * sample


def gaussian(one: Tensor, other: Tensor) -> float:
    """Return the mutual information in nats if both were jointly normal.

    It is the sum of -log(1 - r^2) / 2 over the canonical correlations r, from a covariance that is
    shrunk.

    Args:
        one: (samples, p) of columns that vary; all others count for nothing.
        other: (samples, q).
    """
    one, other = (each[:, each.std(0, correction=0) > 0] for each in (one, other))
    if not one.shape[1] or not other.shape[1]:
        return 0.0
    joint, p = shrunk(torch.cat([one, other], 1).double()), one.shape[1]
    left, right = (torch.linalg.cholesky(part) for part in (joint[:p, :p], joint[p:, p:]))
    half = torch.linalg.solve_triangular(left, joint[:p, p:], upper=False)
    whole = torch.linalg.solve_triangular(right, half.T, upper=False)
    r = torch.linalg.svdvals(whole).clamp(max=CLIP)
    return float(-0.5 * torch.log1p(-r.square()).sum())


def ksg(one: Tensor, other: Tensor, neighbours: int = 3) -> float:
    """Return the mutual information in nats, from distances to the nearest samples.

    Source: Kraskov, Stoegbauer and Grassberger, "Estimating mutual information", Physical Review
    E 69, 2004, eq. (8).

    Args:
        one: (samples, p).
        other: (samples, q).
        neighbours: k.
    """
    count = len(one)
    near: list[Tensor] = []
    for start in range(0, count, ROWS):
        rows = slice(start, start + ROWS)
        apart = [torch.cdist(x[rows].double(), x.double(), p=torch.inf) for x in (one, other)]
        mine = torch.arange(start, min(start + ROWS, count))
        for each in apart:
            each[torch.arange(len(mine)), mine] = torch.inf
        radius = torch.maximum(*apart).kthvalue(neighbours, dim=1).values[:, None]
        near.append(torch.stack([(each < radius).sum(1) for each in apart], 1))
    mean = torch.digamma(torch.cat(near).double() + 1).sum(1).mean()
    ends = torch.digamma(torch.tensor([neighbours, count]).double()).sum()
    return float(ends - mean)


def probe(rows: Tensor, labels: Tensor) -> float:
    """Return a lower bound of what rows say about classes, in nats: H(c) - CE of a linear probe.

    The probe learns from every second sample and is judged on the others.

    Args:
        rows: (samples, features).
        labels: (samples,) whole numbers.
    """
    rows, classes = rows.double(), int(labels.max()) + 1
    weight = torch.zeros(classes, rows.shape[1] + 1, dtype=rows.dtype, requires_grad=True)
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    optimizer = torch.optim.LBFGS([weight], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(rows[::2] @ weight.T, labels[::2])
        loss = loss + weight.square().sum() / len(rows)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    shares = torch.bincount(labels[1::2]).double() / len(labels[1::2])
    entropy = -(shares * shares.clamp_min(1e-30).log()).sum()
    return max(0.0, float(entropy - F.cross_entropy(rows[1::2] @ weight.detach().T, labels[1::2])))


def distance_correlation(one: Tensor, other: Tensor) -> float:
    """Return the squared distance correlation of two sets of rows, in 0..1.

    Source: Szekely, Rizzo and Bakirov, "Measuring and testing dependence by correlation of
    distances", Annals of Statistics 35, 2007. Takes three matrices of samples by samples.
    """
    a, b = (_centred(torch.cdist(each.double(), each.double())) for each in (one, other))
    spread = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / spread) if spread > 0 else 0.0


def _centred(distances: Tensor) -> Tensor:
    rows, columns = distances.mean(1, keepdim=True), distances.mean(0, keepdim=True)
    return distances - rows - columns + distances.mean()
