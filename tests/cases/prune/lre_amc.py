"""LRE-AMC: regressions against scikit-learn, and removals that cost nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from torch.optim import SGD, Adam

from pliant.budget import Budget
from pliant.data import Data, load
from pliant.errors import DataError
from pliant.families.prune.judge import accuracy, validation
from pliant.families.prune.redundancy import coefficients, elimination, fold, grams
from pliant.families.prune.scores import importance, weakest
from pliant.methods.prune.lre_amc import LREAMC
from pliant.run import start
from pliant.surgery.prove import cuttable
from pliant.testing import Case
from tests.cases.prune import REFUSES, TOYS, kept, pair, run_of
from tests.cases.witness import on_many


def gram_of(rows: Tensor) -> Tensor:
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    return rows.T @ rows / len(rows)


def redundant(seed: int = 0) -> Tensor:
    """Eight units of which the last three are combinations of the first five, (samples, 8)."""
    draws = torch.Generator().manual_seed(seed)
    free = torch.randn(200, 5, generator=draws).double().relu()
    return torch.cat([free, free @ torch.rand(5, 3, generator=draws).double() + 0.5], 1)


def predictions_are_those_of_ridge_regression() -> None:
    rows = redundant() + 0.1 * torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    gram, ridge = gram_of(rows), 0.01
    strength = ridge * float(gram.diagonal()[:-1].mean()) * len(rows)
    with_ones = torch.cat([rows, torch.ones(len(rows), 1).double()], 1)
    for unit in range(8):
        others = [i for i in range(9) if i != unit]
        wanted = Ridge(strength, fit_intercept=False).fit(with_ones[:, others], rows[:, unit])
        found = coefficients(gram, [unit], ridge)[:, 0]
        assert torch.allclose(found, torch.from_numpy(wanted.coef_), atol=1e-6)


def self_prediction(gram: Tensor, ridge: float) -> Tensor:
    precision = torch.linalg.inv(gram + ridge * torch.eye(len(gram)).double())
    matrix = -precision / precision.diagonal()
    matrix.fill_diagonal_(0)
    return matrix


def one_by_one(weight: Tensor, matrix: Tensor, gone: list[int], *, naive: bool) -> Tensor:
    """Fold units away one after the other; the prediction of the others does without them then."""
    weight, matrix = weight.clone(), matrix.clone()
    for j in gone:
        weight = weight + torch.outer(weight[:, j], matrix[:, j])
        weight[:, j] = 0
        through = torch.outer(matrix[:, j], matrix[j])
        share = 1 - matrix[j] * matrix[:, j]
        matrix = matrix + through / share if naive else (matrix + through) / share
        matrix.fill_diagonal_(0)
        matrix[j], matrix[:, j] = 0, 0
    return weight


def exact_combinations_leave_for_nothing() -> None:
    """What reads them computes the same from those that stay."""
    rows, draws = redundant(), torch.Generator().manual_seed(2)
    with_ones = torch.cat([rows, torch.ones(len(rows), 1).double()], 1)
    weight, gone = torch.randn(4, 9, generator=draws).double(), [5, 6, 7]
    wanted = with_ones @ weight.T
    stay = [0, 1, 2, 3, 4, 8]
    folded = weight[:, stay] + weight[:, gone] @ coefficients(gram_of(rows), gone, 0.0).T
    assert torch.allclose(with_ones[:, stay] @ folded.T, wanted, atol=1e-10)


def removals_one_by_one_are_one_regression() -> None:
    """With the exact update; one that divides the new term alone fails at the second unit."""
    draws = torch.Generator().manual_seed(3)
    gram = gram_of(redundant() + 0.3 * torch.randn(200, 8, generator=draws))
    weight, gone = torch.randn(4, 9, generator=draws).double(), [2, 5, 7]
    stay = [i for i in range(9) if i not in gone]
    block = weight[:, stay] + weight[:, gone] @ coefficients(gram, gone, 0.0).T
    exact = one_by_one(weight, self_prediction(gram, 0.0), gone, naive=False)
    naive = one_by_one(weight, self_prediction(gram, 0.0), gone, naive=True)
    once = [
        one_by_one(weight, self_prediction(gram, 0.0), gone[:1], naive=n) for n in (True, False)
    ]
    assert torch.equal(*once)
    assert torch.allclose(exact[:, stay], block, atol=1e-8)
    assert not torch.allclose(naive[:, stay], block, atol=1e-3)


def a_copy_counts_once() -> None:
    """Of two equal units one is redundant, and no longer when the other has left."""
    rows = torch.randn(300, 3, generator=torch.Generator().manual_seed(0)).double()
    errors = elimination(gram_of(torch.cat([rows, rows[:, 1:2]], 1)), 1e-8)
    first, *others = errors.sort().values.tolist()
    assert errors.argmin() in (1, 3) and first < 1e-3 and min(others) > 0.5
    dead = elimination(gram_of(torch.cat([rows, torch.zeros(300, 1).double()], 1)), 1e-8)
    assert dead.argmin() == 3


class Doubled(nn.Module):
    """A convolution with two equal filters, batch norm, rectifier, pooling, and who reads them."""

    def __init__(self, padding: int, constant: float = 0.0) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(2, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.pool, self.two = nn.MaxPool2d(2), nn.Conv2d(5, 4, 3, padding=padding)
        self.head = nn.Linear(4, 3)
        with torch.no_grad():
            self.one.weight[4] = self.one.weight[1] if not constant else 0
            self.norm.running_mean[:4].uniform_(-0.5, 0.5)  # type: ignore[index]
            self.norm.running_mean[4] = self.norm.running_mean[1]  # type: ignore[index]
            if constant:
                self.norm.running_mean[4], self.norm.bias[4] = 0, constant  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.two(self.pool(self.norm(self.one(x)).relu())).mean((2, 3)))
        return out


def removed_exactly(model: Doubled, unit: int) -> bool:
    torch.manual_seed(5)
    images = torch.randn(32, 2, 12, 12).double()
    groups, _ = cuttable(model, (images[:1],))
    group = groups[0]
    wanted = model(images)
    gram = grams(model, groups, [(images,)])[group.name]
    assert elimination(gram, 0.0).argmin() in (unit, 1)
    fold(model, group, [unit], coefficients(gram, [unit], 0.0))
    assert not model.two.weight[:, unit].any()
    return torch.allclose(model(images), wanted, atol=1e-8)


def a_double_filter_leaves_exactly() -> None:
    """Behind norm, rectifier and pooling; also next to zero padding, where nothing is constant."""
    torch.manual_seed(0)
    for padding in (0, 1):
        assert removed_exactly(Doubled(padding).eval().double(), 4)
    assert removed_exactly(Doubled(0, constant=0.7).eval().double(), 4)
    assert not removed_exactly(Doubled(1, constant=0.7).eval().double(), 4)  # the border differs


def folds_reach_flattened_and_grouped_readers() -> None:
    torch.manual_seed(0)
    for model in (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)),
        nn.Sequential(
            *(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2)),
            *(nn.Flatten(), nn.Linear(24, 5)),
        ),
    ):
        with torch.no_grad():
            for tensor in model[0].parameters():
                for part in tensor.split(4):
                    part[3] = part[0].clone()
        model.eval().double()
        images = torch.randn(16, 2, 6, 6).double()
        groups, _ = cuttable(model, (images[:1],))
        wanted, gram = model(images), grams(model, groups, [(images,)])["0"]
        assert len(gram) == 5
        fold(model, groups[0], [3], coefficients(gram, [3], 0.0))
        assert torch.allclose(model(images), wanted, atol=1e-8)


def digits_net(seed: int, data: Data) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(48, 10))
    optimizer = Adam(model.parameters(), 3e-3)
    for epoch in range(8):
        for images, labels in data.batches("train", 64, seed=seed, epoch=epoch, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()


def left_over(model: nn.Module, data: Data, share: float, order: str, *, folded: bool) -> float:
    """The accuracy without a share of the units of each layer, and without training."""
    groups, _ = cuttable(model, data.example())
    found, model = grams(model, groups, data.calibration(1024)), copy.deepcopy(model)
    draws = torch.Generator().manual_seed(0)
    for group in groups:
        gram, count = found[group.name], len(group.units)
        errors = {
            "ours": elimination(gram, 1e-4),
            "magnitude": importance(model, group),
            "random": torch.rand(count, generator=draws),
        }[order]
        gone = weakest(errors, int(share * count)).tolist()
        fold(model, group, gone, folded * coefficients(gram, gone, 1e-4))
    return accuracy(model, data.batches("val", 256)) or 0.0


def folding_beats_magnitude_and_chance() -> None:
    """An MLP on digits, mean of three seeds: at a half any fold is enough, later only ours."""
    data, found = load("digits"), dict[tuple[float, str, bool], float]()
    for model in [digits_net(seed, data) for seed in range(3)]:
        for key in (
            *((0.5, "ours", True), (0.5, "ours", False), (0.5, "magnitude", False)),
            *((0.85, "ours", True), (0.85, "random", True)),
        ):
            found[key] = found.get(key, 0) + left_over(model, data, *key[:2], folded=key[2]) / 3
    half = found[0.5, "ours", True]
    assert half > found[0.5, "ours", False] + 0.1 and half > found[0.5, "magnitude", False] + 0.1
    assert found[0.85, "ours", True] > found[0.85, "random", True] + 0.1


def told() -> Data:
    """Labels that the inputs decide."""
    inputs = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
    labels = inputs[:, :3].argmax(1)
    return Data((inputs[:64], labels[:64]), (inputs[64:], labels[64:]), classes=3)


def accuracy_stays_within_the_tolerance() -> None:
    """Whatever the ratio; a training that spoils the result afterwards is undone."""
    data = told()
    ((inputs, labels),) = data.batches("train", 64)
    for tolerance in (0.0, 0.1):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))
        optimizer = SGD(model.parameters(), 0.5)
        for _ in range(100):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        method = LREAMC(ratio=0.9, rounds=2, tolerance=tolerance, least=0.0)
        run = start(model, method, data=data, optimizer=optimizer, steps=4)
        base = run.state["base"]
        assert base is not None and base > 0.8
        for _ in range(4):
            optimizer.zero_grad()
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter) * 3
            run.before_step()
            optimizer.step()
            run.after_step()
        assert (validation(run, model) or 0.0) < base - tolerance
        run.finish()
        assert run.edits and (validation(run, model) or 0.0) >= base - tolerance
        assert len(kept(run)["0", "out"]) < 24


def inputs_are_needed() -> None:
    with pytest.raises(DataError, match="predicts activations of training inputs from each other"):
        run_of(pair(1.0, 2.0), LREAMC())


CASES = (
    Case(
        "lre_amc",
        toys=TOYS,
        refuses=REFUSES,
        variants=(
            "lre_amc(start=0.5, rounds=1, tolerance=1.0)",
            'lre_amc(scope="global", rounds=2, labels=0.5, temperature=4.0)',
        ),
        witnesses={
            "samples": on_many("lre_amc", "samples", Budget(macs=0.7)),
        },
        own=(
            predictions_are_those_of_ridge_regression,
            exact_combinations_leave_for_nothing,
            removals_one_by_one_are_one_regression,
            a_copy_counts_once,
            a_double_filter_leaves_exactly,
            folds_reach_flattened_and_grouped_readers,
            folding_beats_magnitude_and_chance,
            accuracy_stays_within_the_tolerance,
            inputs_are_needed,
        ),
    ),
)
