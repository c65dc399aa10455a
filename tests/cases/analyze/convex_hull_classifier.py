"""Hulls of features where they can be drawn by hand, and a network that has lost its way."""

import torch
from torch import Tensor, nn

import pliant
from pliant.data import Data
from pliant.errors import PliantError
from pliant.families.analyze.features import _most, chance, features, layers_of
from pliant.testing import TOYS, Case


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Plain(nn.Module):
    """Passes its input to a layer, whose weights say the class."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.first = nn.Linear(weight.shape[1], weight.shape[1], bias=False)
        self.head = nn.Linear(weight.shape[1], len(weight), bias=False)
        self.first.weight.data = torch.eye(weight.shape[1])
        self.head.weight.data = weight.clone()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.first(x))
        return out


SQUARES = torch.tensor([[0.0, 0], [2, 0], [0, 2], [2, 2]])
TRAINED = torch.cat([SQUARES, SQUARES + 1]), torch.tensor([0] * 4 + [1] * 4)


def hulls_say_what_the_drawing_says() -> None:
    """Two squares that share a corner region: left of it is 0, right of it 1, and in it both.

    Inside of both the network decides: its second output is the larger everywhere.
    """
    asked = torch.tensor([[-1.0, 1.0], [4.0, 2.0], [0.5, 0.5], [1.2, 1.2], [2.9, 2.0], [1.9, 0.0]])
    labels = torch.tensor([0, 1, 0, 0, 1, 0])
    model = Plain(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    with torch.no_grad():
        model.head.bias = nn.Parameter(torch.tensor([0.0, 5.0]))
    data = Data(train=TRAINED, test=(asked, labels))
    found = pliant.analyze(model, data, "convex_hull_classifier")
    wanted = dict(zip(map(tuple, asked.tolist()), [0, 1, 0, 1, 1, 0], strict=True))
    order = features(model, data, "test", ["head"], seed=0)  # rows are shuffled, all layers alike
    assert sorted(map(tuple, order.layers["head"].tolist())) == sorted(wanted)
    assert int(found.values["labels"].sum()) == sum(wanted.values())
    row = found.rows[-1]
    assert row["layer"] == "head" and abs(row["hull"] - 5 / 6) < 1e-9
    assert abs(row["several"] - 1 / 6) < 1e-9
    assert found.values["network"] == 2 / 6 and found.values["trained"] == 4 / 8
    assert abs(found.value - 3 / 6) < 1e-9 and abs(row["gain"] - 3 / 6) < 1e-9


def scattered(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Three classes around the corners of a triangle, far apart."""
    labels = torch.arange(count) % 3
    corners = 6 * torch.tensor([[0.0, 0, 1, 0], [1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    return corners[labels] + noise(count, 4, seed=seed), labels


def a_head_that_has_lost_its_way_is_found_out() -> None:
    """Features tell the classes apart, the last layer does not: it is overfitted from there on.

    The same network with a head that goes by the corners gains nothing by hulls.
    """
    data = Data(train=scattered(90, 1), test=scattered(120, 2))
    corners = torch.tensor([[0.0, 0, 1, 0], [1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    good = pliant.analyze(Plain(corners), data, "convex_hull_classifier")
    assert abs(good.value) < 0.02 and "no sign of overfitting" in good.text
    lost = pliant.analyze(Plain(corners[[0, 0, 2]] + 1e-3), data, "convex_hull_classifier")
    assert lost.value > 0.25 and "overfitted from head on" in lost.text
    assert lost.rows[-1]["p"] < 1e-6 < 0.5 < good.rows[-1]["p"]
    few = Data(train=data.train, test=scattered(6, 2))
    unsure = pliant.analyze(Plain(corners[[0, 0, 2]] + 1e-3), few, "convex_hull_classifier")
    assert unsure.value > 0.1 and "no sign of overfitting beyond chance" in unsure.text


def one_local_point_is_the_nearest_sample() -> None:
    toy = TOYS["plain"]
    inputs, labels = noise(300, 3, 6, 6), torch.arange(300) % 4
    data = Data(train=(inputs[:200], labels[:200]), test=(inputs[200:], labels[200:]))
    found = pliant.analyze(toy.model(), data, "convex_hull_classifier(rows=1)")
    assert all(row["hull"] == row["nearest"] for row in found.rows)
    whole = pliant.analyze(toy.model(), data, "convex_hull_classifier")
    assert any(row["hull"] != row["nearest"] for row in whole.rows)
    gains = [row["gain"] for row in whole.rows]
    assert whole.value == max(gains) > min(gains)


def neighbours_vote_as_in_scikit_learn() -> None:
    from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

    from pliant.families.analyze.features import answers
    from pliant.families.analyze.hulls import fit

    training, labels = scattered(90, 1)
    queries = 3 * noise(60, 4, seed=3)
    hulls = fit(training, labels, normalize="standardize")
    said = answers(hulls, training, labels, queries, noise(60, 3))
    entered, asked = (hulls.space.enter(one).numpy() for one in (training, queries))
    known = KNeighborsClassifier(1).fit(entered, labels).predict(asked)
    assert said.nearest.tolist() == known.tolist()
    assert said.centroid.tolist() == NearestCentroid().fit(entered, labels).predict(asked).tolist()
    five = KNeighborsClassifier(5).fit(entered, labels)
    shares = five.predict_proba(asked)
    clear = (shares == shares.max(1, keepdims=True)).sum(1) == 1
    assert (said.five.numpy() == five.predict(asked))[clear].all() and clear.sum() > 50


def features_of_all_layers_are_of_the_same_samples() -> None:
    toy = TOYS["plain"]
    model, data = toy.model().train(), toy.data()
    found = features(model, data, "train", ["3", "6", "12"], seed=5)
    assert model.training and found.layers["6"].shape == (32, 12)
    model.eval()
    assert torch.allclose(found.scores, model[12](found.layers["12"]).detach(), atol=1e-6)
    again = features(model, data, "train", ["3"], seed=5)
    assert torch.equal(again.layers["3"], found.layers["3"]) and torch.equal(
        again.labels, found.labels
    )
    other = features(model, data, "train", ["3"], seed=6)
    assert not torch.equal(other.labels, found.labels)
    flat = features(model, data, "train", ["3"], seed=5, pool="flat").layers["3"]
    assert flat.shape == (32, 8 * 36)
    assert torch.allclose(flat.view(32, 8, 36).mean(2), found.layers["3"], atol=1e-6)


def layers_are_spread_over_the_network() -> None:
    toy = TOYS["plain"]
    example = (toy.inputs(2)[0],)
    assert layers_of(toy.model(), example, ()) == ["3", "7", "9", "12"]
    assert layers_of(toy.model(), example, ("12", "3")) == ["12", "3"]
    assert layers_of(TOYS["single"].model(), (TOYS["single"].inputs(2)[0],), ()) == ["outer.0.0"]


def classifiers_and_chances_by_hand() -> None:
    votes = torch.tensor([[1, 2, 2, 3, 4], [3, 1, 1, 3, 2], [5, 1, 2, 3, 4]])
    assert _most(votes).tolist() == [2, 3, 5]
    right = torch.tensor([True] * 5 + [False] * 5)
    assert chance(right, torch.zeros(10, dtype=torch.bool)) == 1 / 32
    assert chance(right, right) == 1 and chance(~right & False, right) == 1


def options_do_what_they_say() -> None:
    """Every option changes what it names: no two of these agree in all they find."""
    inputs, labels = noise(240, 3, 6, 6), torch.arange(240) % 4
    data = Data(train=(inputs[:180], labels[:180]), test=(inputs[180:], labels[180:]))
    model = TOYS["plain"].model().eval()
    with torch.no_grad():  # let it decide on every class
        model[12].bias -= model(inputs).mean(0)  # type: ignore[index, operator]

    def analyzed(options: str) -> tuple[object, ...]:
        found = pliant.analyze(model, data, f"convex_hull_classifier({options})")
        rows = tuple(tuple(row.values()) for row in found.rows)
        return rows, tuple(found.values["labels"].tolist()), found.values["trained"]

    asked = (
        "", 'layers=["12"]', 'pool="flat"', "rows=4", 'rows=4, sampling="random"',
        'rows=4, sampling="kmeans"', 'rows=4, sampling="extreme"', 'normalize="l2"',
        'normalize="standardize"', "components=2", "correct_only=True", "samples=100", "queries=30",
    )  # fmt: skip
    found = [analyzed(options) for options in asked]
    assert len(set(found)) == len(asked)
    assert len(found[1][0]) == 1 and len(found[-1][1]) == 30  # type: ignore[arg-type]
    assert analyzed('rows=4, sampling="none"') == found[0]
    seen = pliant.analyze(model, data, "convex_hull_classifier(components=2)")
    assert seen.rows[0]["features"] == 8  # those of the layer, before they are reduced
    wide = pliant.analyze(model, data, 'convex_hull_classifier(pool="flat")')
    assert wide.rows[0]["features"] == 8 * 36


def what_cannot_be_done_is_refused() -> None:
    toy = TOYS["plain"]
    model, data = toy.model(), toy.data()
    pair = toy.inputs(8)[0], torch.arange(8) % 4
    for given, options, words in (
        (pair, "", "training split"),
        (Data(train=pair), "", "asked about another"),
        (Data(train=[(pair[0],)], test=pair), "", "class of every input"),
        (Data(train=(pair[0], pair[1] * 2), test=pair), "", "from 0 to 3, the classes"),
        (Data(train=(pair[0], pair[1] * 0), test=pair), "", "but class 1 has none"),
        (data, 'layers=["nothing"]', "'nothing' is none"),
        (data, "rows=0", "rows must be int of at least 1"),
        (data, "components=0", "components must be"),
    ):
        try:
            pliant.analyze(model, given, f"convex_hull_classifier({options})")
        except PliantError as refusal:
            assert words in str(refusal), refusal
        else:
            raise AssertionError(words)


CASES = [
    Case(
        "convex_hull_classifier",
        variants=(
            'convex_hull_classifier(sampling="extreme", rows=2, normalize="l2")',
            'convex_hull_classifier(pool="flat", components=3, queries=5)',
        ),
        witnesses={
            "layers": options_do_what_they_say,
            "sampling": options_do_what_they_say,
            "correct_only": options_do_what_they_say,
            "samples": options_do_what_they_say,
        },
        own=(
            hulls_say_what_the_drawing_says,
            a_head_that_has_lost_its_way_is_found_out,
            one_local_point_is_the_nearest_sample,
            neighbours_vote_as_in_scikit_learn,
            features_of_all_layers_are_of_the_same_samples,
            layers_are_spread_over_the_network,
            classifiers_and_chances_by_hand,
            options_do_what_they_say,
            what_cannot_be_done_is_refused,
        ),
    )
]
