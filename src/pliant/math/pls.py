"""How much each feature says about classes, by partial least squares."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from pliant.errors import DataError, require

ROUNDS, CLOSE = 2000, 1e-16  # of the power method, and the squared change at which it stops


def projection_importance(features: Tensor, labels: Tensor, classes: int, parts: int) -> Tensor:
    """Return the importance of features in the projection that partial least squares finds.

    VIP_j = sqrt(p sum_a q_a (w_ja / |w_a|)^2 / sum_a q_a) for p features, where q_a is the energy
    of component a in scores and loadings of the classes. The squares sum to p, so a mean near 1
    says that all features carry alike. Features and classes are standardised.

    Source: Wold, Johansson and Cocchi, "PLS: partial least squares projections to latent
    structures", 1993; the regression is scikit-learn's.

    Args:
        features: (samples, p).
        labels: (samples,), of 0 to classes - 1.
        classes: how many there are, also where some have no sample here.
        parts: components; no more are taken than samples, features or classes allow.

    Returns:
        (p,) of float64.

    Raises:
        DataError: features are not finite, or say nothing about the classes.
        MissingExtraError: scikit-learn is not installed.
    """
    pls = require("sklearn.cross_decomposition", "search")
    if not torch.isfinite(features).all():
        raise DataError("Features of a network must be finite to be weighed, but some are not.")
    x = features.detach().double().cpu().numpy()
    y = torch.eye(classes, dtype=torch.float64)[labels.cpu()].numpy()
    parts = min(parts, len(x), x.shape[1], classes)
    with warnings.catch_warnings():  # components that have nothing left to explain weigh nothing
        warnings.filterwarnings("ignore", "y residual is constant")
        found = pls.PLSRegression(n_components=parts, max_iter=ROUNDS, tol=CLOSE).fit(x, y)
    scores, weights, loadings = (
        torch.from_numpy(part.copy())
        for part in (found.x_scores_, found.x_weights_, found.y_loadings_)
    )
    energy = scores.square().sum(0) * loadings.square().sum(0)
    shares = weights.square() / weights.square().sum(0).clamp_min(1e-300)
    importance: Tensor = (len(weights) * (shares @ energy) / energy.sum()).sqrt()
    if not torch.isfinite(importance).all():
        raise DataError("Features must tell classes apart to be weighed, but these do not at all.")
    return importance
