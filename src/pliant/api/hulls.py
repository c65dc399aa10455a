"""Nearest convex hulls as classifiers of scikit-learn, also behind a network; extra ``cluster``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pliant.errors import DataError, ModelError, require
from pliant.families.analyze.hulls import STEPS, Hulls, Normalize, Sampling, Solver, fit
from pliant.observe.rows import Form, Rows

require("sklearn", "cluster")  # says what to install

from sklearn.base import BaseEstimator, ClassifierMixin, clone  # noqa: E402
from sklearn.utils import check_random_state  # noqa: E402
from sklearn.utils.multiclass import check_classification_targets  # noqa: E402
from sklearn.utils.validation import check_is_fitted, validate_data  # noqa: E402

BATCH = 128  # inputs of one forward call
FLOATS = [np.float64, np.float32]


class _Hulls(ClassifierMixin, BaseEstimator):
    """What both classifiers share: labels in, scores out."""

    temperature: float

    def fit(self, X: Any, y: Any) -> Any:
        """Learn from features and their classes.

        Args:
            X: (samples, features).
            y: (samples,), of any kind.

        Returns:
            Itself, with classes_.
        """
        X, y = validate_data(self, X, y, dtype=FLOATS)
        check_classification_targets(y)
        self.classes_, index = np.unique(y, return_inverse=True)
        self._learn(torch.as_tensor(X), torch.as_tensor(index))
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Return the class of each sample, (samples,)."""
        index = self._index(self._checked(X)).numpy()
        return self.classes_[index]

    def decision_function(self, X: Any) -> np.ndarray:
        """Return the scores of all classes, minus their distances outside of a hull.

        Returns:
            (samples, classes), or for two classes the second minus the first, (samples,).
        """
        scores = self._scores(self._checked(X)).numpy()
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the softmax of the scores over the temperature, (samples, classes)."""
        return (self._scores(self._checked(X)) / self.temperature).softmax(1).numpy()

    def _checked(self, X: Any) -> Tensor:
        check_is_fitted(self)
        return torch.as_tensor(validate_data(self, X, reset=False, dtype=FLOATS))

    def _learn(self, features: Tensor, labels: Tensor) -> None:
        raise NotImplementedError

    def _scores(self, features: Tensor) -> Tensor:
        raise NotImplementedError

    def _index(self, features: Tensor) -> Tensor:
        return self._scores(features).argmax(1)


class NearestConvexHullClassifier(_Hulls):
    """Gives every sample the class whose convex hull is nearest (Ju et al., ICPR 2020).

    >>> X = np.array([[0.0, 0], [2, 0], [0, 2], [5, 5], [7, 5], [5, 7]])
    >>> model = NearestConvexHullClassifier().fit(X, [0, 0, 0, 1, 1, 1])
    >>> model.predict([[1.5, 1.5], [4, 4]])
    array([0, 1])
    """

    def __init__(
        self,
        *,
        sampling: Sampling = "query-local",
        rows: int = 500,
        solver: Solver = "frank-wolfe",
        tol: float = 1e-6,
        max_steps: int = STEPS,
        normalize: Normalize = "none",
        components: int | None = None,
        temperature: float = 1.0,
        random_state: Any = None,
    ) -> None:
        """Keep the options as they are.

        Args:
            sampling: which samples of a class with more than `rows` its hull is made of: "none"
                for all, "random", "kmeans", "extreme", or "query-local" for the nearest ones.
            rows: most samples of one class.
            solver: "frank-wolfe" for many samples at once, or "nnls".
            tol: relative duality gap at which Frank-Wolfe stops.
            max_steps: its steps after which a sample is solved by non-negative least squares.
            normalize: "none", "l2" for samples of length one, or "standardize" for features.
            components: principal ones to keep; 256 of more than 512 features if None.
            temperature: of `predict_proba`.
            random_state: a seed, a numpy RandomState, or None for a seed that varies.
        """
        self.sampling = sampling
        self.rows = rows
        self.solver = solver
        self.tol = tol
        self.max_steps = max_steps
        self.normalize = normalize
        self.components = components
        self.temperature = temperature
        self.random_state = random_state

    def _learn(self, features: Tensor, labels: Tensor) -> None:
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self.hulls_: Hulls = fit(
            features,
            labels,
            sampling=self.sampling,
            rows=self.rows,
            normalize=self.normalize,
            components=self.components,
            solver=self.solver,
            tolerance=self.tol,
            most=self.max_steps,
            generator=torch.Generator().manual_seed(seed),
        )

    def _scores(self, features: Tensor) -> Tensor:
        return self.hulls_.scores(features)

    def _index(self, features: Tensor) -> Tensor:
        return self.hulls_.predict(features)[0]


class HullCentroidClassifier(_Hulls):
    """Gives every sample the class whose mean is nearest: the hull in one point."""

    def __init__(
        self,
        *,
        extreme: int | None = None,
        normalize: Normalize = "none",
        components: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        """Keep the options as they are.

        Args:
            extreme: how many extreme samples of each class the mean is made of; None for all.
            normalize: as for `NearestConvexHullClassifier`.
            components: as for `NearestConvexHullClassifier`.
            temperature: of `predict_proba`.
        """
        self.extreme = extreme
        self.normalize = normalize
        self.components = components
        self.temperature = temperature

    def _learn(self, features: Tensor, labels: Tensor) -> None:
        how: Sampling = "none" if self.extreme is None else "extreme"
        hulls = fit(
            features,
            labels,
            sampling=how,
            rows=self.extreme or 1,
            normalize=self.normalize,
            components=self.components,
        )
        self.space_ = hulls.space
        self.centroids_ = torch.stack([points.mean(0) for points in hulls.points])

    def _scores(self, features: Tensor) -> Tensor:
        return -torch.cdist(self.space_.enter(features), self.centroids_)


class ActivationSpaceClassifier(ClassifierMixin, BaseEstimator):
    """Puts a classifier behind a layer of a network, which is not trained again.

    So a compressed network may be corrected by what it still knows: `fit` needs a few labelled
    samples and one pass over them. The network is in eval mode meanwhile and stays as it is.
    """

    def __init__(
        self, model: nn.Module, layer: str, estimator: Any = None, *, form: Form = "mean"
    ) -> None:
        """Keep the options as they are.

        Args:
            model: any network.
            layer: whose input is what the classifier sees: the last linear layer for penultimate
                features.
            estimator: any classifier of scikit-learn; nearest hulls if None.
            form: how maps become rows, as for `pliant.observe.rows.Rows`.
        """
        self.model = model
        self.layer = layer
        self.estimator = estimator
        self.form = form

    def fit(self, X: Any, y: Any) -> ActivationSpaceClassifier:
        """Fit the classifier on what the layer reads.

        Args:
            X: inputs of the network, a tensor or array with samples first.
            y: their classes.

        Returns:
            Itself, with classes_ and estimator_.
        """
        default = NearestConvexHullClassifier(random_state=0)
        chosen = default if self.estimator is None else clone(self.estimator)
        self.estimator_ = chosen.fit(self.features(X), np.asarray(y))
        self.classes_ = self.estimator_.classes_
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Return the class of each input, (samples,)."""
        check_is_fitted(self)
        return np.asarray(self.estimator_.predict(self.features(X)))

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probabilities that the classifier gives, (samples, classes)."""
        check_is_fitted(self)
        return np.asarray(self.estimator_.predict_proba(self.features(X)))

    def features(self, X: Any) -> np.ndarray:
        """Return what the layer reads, (samples, features).

        Raises:
            DataError: there are no samples.
            ModelError: the layer is none, is not called, or reads no tensor of a batch.
        """
        inputs = X if isinstance(X, Tensor) else torch.as_tensor(np.asarray(X))
        if not inputs.dim() or not len(inputs):
            raise DataError(
                f"Inputs must be a tensor with samples first, but its shape is "
                f"{tuple(inputs.shape)}."
            )
        if inputs.dtype == torch.float64:
            inputs = inputs.float()
        rows = Rows(self.model, (self.layer,), side="input", form=self.form)
        found = rows.all((part,) for part in inputs.split(BATCH))
        if self.layer not in found:
            raise ModelError(f"The network does not call {self.layer}: name another layer.")
        return found[self.layer].numpy()
