"""The clustering methods as a scikit-learn estimator; needs the extra ``cluster``."""

from __future__ import annotations

from typing import Any

import numpy as np

from pliant.api.solve import cluster
from pliant.errors import require

require("sklearn", "cluster")  # says what to install

from sklearn.base import BaseEstimator, ClusterMixin  # noqa: E402
from sklearn.utils import check_random_state  # noqa: E402
from sklearn.utils.validation import validate_data  # noqa: E402


class Clusterer(ClusterMixin, BaseEstimator):
    """Clusters by any method of Pliant, for pipelines and searches of scikit-learn.

    >>> from sklearn.base import clone
    >>> clone(Clusterer(3, method="product_grassmann_lrr(size=2)")).n_clusters
    3
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        method: Any = "product_grassmann_lrr",
        random_state: Any = None,
    ) -> None:
        """Keep the options as they are.

        Args:
            n_clusters: how many groups.
            method: a name, a spec such as ``"product_grassmann_lrr(rank=5)"``, or an instance.
            random_state: a seed, a numpy RandomState, or None for a seed that varies.
        """
        self.n_clusters = n_clusters
        self.method = method
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> Clusterer:
        """Divide samples into groups.

        Args:
            X: (samples, features) as in scikit-learn, or anything that `pliant.cluster` takes:
                sets of vectors, views of them.
            y: ignored.

        Returns:
            Itself, with labels_, solution_, and n_iter_.
        """
        if _axes(X) < 3:
            X = validate_data(self, X, dtype=[np.float64, np.float32])
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self.solution_ = cluster(X, self.n_clusters, self.method, seed=seed)
        self.labels_ = np.asarray(self.solution_.value)
        self.n_iter_ = self.solution_.iterations
        return self


def _axes(x: Any) -> int:
    """Count the axes of nested lists of arrays, by their first members."""
    axes = 0
    while isinstance(x, list | tuple) and x:
        axes, x = axes + 1, x[0]
    return axes + getattr(x, "ndim", 0)
