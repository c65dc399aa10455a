"""Nearest hulls under the conventions of scikit-learn, and behind a network."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pliant.errors import DataError, ModelError
from pliant.families.analyze.hulls import fit
from pliant.testing import TOYS

sklearn = pytest.importorskip("sklearn")
from sklearn.base import clone  # noqa: E402
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid  # noqa: E402

from pliant.api.hulls import (  # noqa: E402
    ActivationSpaceClassifier,
    HullCentroidClassifier,
    NearestConvexHullClassifier,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def samples() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    labels = np.array(["ant", "bee", "cow"])[np.arange(90) % 3]
    centres = 2 * noise(3, 5, seed=5)
    training = centres[torch.arange(90) % 3] + noise(90, 5, seed=6)
    return training.numpy(), labels, 3 * noise(60, 5, seed=7).numpy()


@pytest.mark.slow  # some fifty checks of scikit-learn for each
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [NearestConvexHullClassifier, HullCentroidClassifier])
def test_the_classifiers_keep_the_conventions_of_scikit_learn(kind):
    from sklearn.utils.estimator_checks import check_estimator

    options = {"random_state": 0} if kind is NearestConvexHullClassifier else {}
    rows = check_estimator(kind(**options), on_fail=None)
    wrong = [
        f"{row['check_name']}: {row['exception']}" for row in rows if row["status"] == "failed"
    ]
    assert len(rows) > 40 and not wrong, wrong


def test_labels_of_any_kind_come_back(samples):
    X, y, queries = samples
    model = NearestConvexHullClassifier(random_state=0).fit(X, y)
    index, _ = fit(torch.as_tensor(X), torch.arange(90) % 3).predict(torch.as_tensor(queries))
    assert model.predict(queries).tolist() == model.classes_[index.numpy()].tolist()
    scores = model.decision_function(queries)
    assert scores.shape == (60, 3) and (scores.argmax(1) == index.numpy()).all()
    two = NearestConvexHullClassifier().fit(X[y != "cow"], y[y != "cow"])
    assert ((two.decision_function(queries) > 0) == (two.predict(queries) == "bee")).all()


def test_every_option_reaches_the_hulls(samples):
    X, y, queries = samples

    def scores(**options) -> bytes:
        model = NearestConvexHullClassifier(**{"random_state": 0, **options}).fit(X, y)
        return model.decision_function(queries).tobytes()

    options = (
        {}, {"rows": 5}, {"rows": 5, "sampling": "random"}, {"rows": 5, "sampling": "kmeans"},
        {"rows": 5, "sampling": "extreme"}, {"normalize": "l2"}, {"normalize": "standardize"},
        {"components": 2}, {"solver": "nnls"}, {"tol": 1e-2}, {"max_steps": 16},
        {"rows": 5, "sampling": "random", "random_state": 1},
    )  # fmt: skip
    assert len({scores(**one) for one in options}) == len(options)
    assert scores(rows=5, sampling="none") == scores()
    model = NearestConvexHullClassifier(random_state=0).fit(X, y)
    cold = NearestConvexHullClassifier(random_state=0, temperature=0.01).fit(X, y)
    warm, sharp = model.predict_proba(queries), cold.predict_proba(queries)
    assert np.allclose(warm.sum(1), 1) and sharp.max(1).mean() > warm.max(1).mean() + 0.1
    assert clone(cold).get_params()["temperature"] == 0.01


def test_one_local_row_is_one_neighbour(samples):
    X, y, queries = samples
    model = NearestConvexHullClassifier(rows=1).fit(X, y)
    assert (model.predict(queries) == KNeighborsClassifier(1).fit(X, y).predict(queries)).all()


def test_centroids_are_those_of_scikit_learn(samples):
    X, y, queries = samples
    model = HullCentroidClassifier().fit(X, y)
    assert (model.predict(queries) == NearestCentroid().fit(X, y).predict(queries)).all()
    options = ({}, {"extreme": 4}, {"normalize": "l2"}, {"components": 2})
    found = {
        HullCentroidClassifier(**one).fit(X, y).decision_function(queries).tobytes()
        for one in options
    }
    assert len(found) == 4
    cold = HullCentroidClassifier(temperature=0.01).fit(X, y)
    assert cold.predict_proba(queries).max(1).mean() > model.predict_proba(queries).max(1).mean()


def test_a_classifier_behind_a_network_corrects_it():
    """A head that was spoiled is mended by hulls of what it reads, without training."""
    labels = torch.arange(150) % 3
    corners = 4 * torch.eye(3, 6)
    inputs = corners[labels] + noise(150, 6, seed=1)
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 3)).train()
    nn.init.eye_(model[0].weight)
    before = copy.deepcopy(model.state_dict())
    behind = ActivationSpaceClassifier(model, "2").fit(inputs[:90], labels[:90])
    assert (behind.predict(inputs[90:].numpy()) == labels[90:].numpy()).mean() > 0.9
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    wanted = model[0](inputs).detach().numpy()
    assert np.allclose(behind.features(inputs), wanted, atol=1e-5)
    neighbours = ActivationSpaceClassifier(model, "2", KNeighborsClassifier(5))
    neighbours.fit(inputs[:90], labels[:90])
    assert isinstance(neighbours.estimator_, KNeighborsClassifier)
    assert neighbours.predict_proba(inputs[90:]).shape == (60, 3)
    assert neighbours.score(inputs[90:], labels[90:].numpy()) > 0.9


def test_maps_are_pooled_as_asked_and_odd_layers_refused():
    toy = TOYS["plain"]
    model, inputs = toy.model(), toy.inputs(6)[0]
    assert ActivationSpaceClassifier(model, "3").features(inputs).shape == (6, 8)
    flat = ActivationSpaceClassifier(model, "3", form="flat").features(inputs)
    assert flat.shape == (6, 8 * 36)
    with pytest.raises(ModelError, match="'none'"):
        ActivationSpaceClassifier(model, "none").features(inputs)
    with pytest.raises(DataError, match="samples first"):
        ActivationSpaceClassifier(model, "3").features(inputs[:0])
    idle = nn.ModuleDict({"used": model, "idle": nn.Linear(1, 1)})
    idle.forward = model.forward
    with pytest.raises(ModelError, match="does not call idle"):
        ActivationSpaceClassifier(idle, "idle").features(inputs)
