"""Discriminant information: three forms of one number, what it is blind to, and the searches."""

import copy
import itertools

import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from pliant.budget import Budget
from pliant.data import Data
from pliant.errors import DataError
from pliant.families.prune.allocate import Goal
from pliant.families.prune.channels import remove
from pliant.families.prune.discriminant import Discriminant, Scorer, labelled, one_hot
from pliant.families.prune.search import Greedy, Policy, Trials, direction, held_out
from pliant.methods.prune.discriminant_information import DiscriminantInformation
from pliant.run import Run, start
from pliant.surgery.prove import Leaving, cuttable, edits_of
from pliant.testing import Case, toys
from tests.cases.prune import REFUSES, TOYS, kept, pair, run_of
from tests.cases.witness import on_many

RIDGE = 0.3
QUICK = "samples=16, batch=16, held=8, updates=1, draws=2, steps=2"


def batch(samples: int = 12, channels: int = 5, places: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    features = torch.randn(samples, channels, places, dtype=torch.float64) + 2
    return features, torch.arange(samples) % 3


def three_forms_of_one_number() -> None:
    """The trace of scatters, the kernel form, and what ridge regression leaves over."""
    features, labels = batch()
    targets = one_hot(labels)
    x = features.flatten(1) - features.flatten(1).mean(0)
    total = x.T @ x + RIDGE * torch.eye(x.shape[1], dtype=torch.float64)
    direct = (torch.linalg.inv(total) @ x.T @ targets @ targets.T @ x).trace()
    found = Discriminant(features, targets, RIDGE)
    assert found.value == pytest.approx(float(direct), abs=1e-8)
    raw = features.flatten(1).numpy()
    classes = nn.functional.one_hot(labels).double().numpy()
    fit = Ridge(alpha=RIDGE, fit_intercept=True, solver="svd").fit(raw, classes)
    least = ((classes - fit.predict(raw)) ** 2).sum() + RIDGE * (fit.coef_**2).sum()
    assert found.value == pytest.approx(float(targets.square().sum()) - least, abs=1e-8)
    assert found.share == pytest.approx(found.value / float(targets.square().sum()))


def slopes_are_those_of_autograd() -> None:
    features, labels = batch()
    targets = one_hot(labels)
    x = features - features.mean(0)
    mask = torch.ones(5, dtype=torch.float64, requires_grad=True)
    masked = (mask[:, None] * x).flatten(1)
    gram = masked @ masked.T + RIDGE * torch.eye(len(x), dtype=torch.float64)
    (targets * torch.linalg.solve(gram, targets)).sum().backward()
    found = Discriminant(features, targets, RIDGE).slopes()
    assert mask.grad is not None and torch.allclose(found, -mask.grad, rtol=0, atol=1e-8)


def losses_are_those_of_leaving_out() -> None:
    features, labels = batch()
    targets = one_hot(labels)
    whole = Discriminant(features, targets, RIDGE)
    for channel, loss in enumerate(whole.losses().tolist()):
        rest = features[:, [c for c in range(5) if c != channel]]
        assert loss == pytest.approx(whole.value - Discriminant(rest, targets, RIDGE).value)


def no_channel_lowers_it_and_a_constant_adds_nothing() -> None:
    for seed in range(100):
        torch.manual_seed(seed)
        features = torch.randn(10, 6, 2)
        targets = one_hot(torch.arange(10) % 3)
        values = [Discriminant(features[:, :c], targets, RIDGE).value for c in range(1, 7)]
        assert all(b >= a - 1e-10 for a, b in itertools.pairwise(values))
    features[:, 2] = 7.0
    features[:, 4] = features[:, 3]
    found = Discriminant(features, targets, RIDGE)
    assert found.losses()[2] == 0 and found.slopes()[2] == 0
    assert found.losses()[3] == pytest.approx(float(found.losses()[4]), abs=1e-12)
    without = Discriminant(features[:, :4], targets, RIDGE).value
    assert found.value > without - 1e-10


def chunks_do_not_count() -> None:
    features, labels = batch(channels=7)
    targets = one_hot(labels)
    whole = Discriminant(features, targets, RIDGE, relative=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pliant.families.prune.discriminant.NUMBERS", 40)
        parts = Discriminant(features, targets, RIDGE, relative=True)
        assert torch.allclose(whole.slopes(), parts.slopes(), rtol=1e-9)
    assert whole.rho == pytest.approx(RIDGE * float(whole.gram.trace() - 12 * whole.rho) / 12)


def separated() -> tuple[nn.Sequential, Data]:
    """Of four units the first and the last tell the two classes apart, each by a half."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
    labels = torch.arange(64) % 2
    inputs = torch.randn(64, 4)
    inputs[:, 0] += 3.0 * labels
    inputs[:, 3] -= 3.0 * labels
    return model, Data((inputs, labels), (inputs, labels), classes=2)


def channels_that_separate_stay() -> None:
    for exact in (False, True):
        model, data = separated()
        method = DiscriminantInformation(ratio=0.5, search="none", exact=exact)
        assert kept(start(model, method, data=data))["0", "out"] == (0, 3)


def shuffled_labels_lower_it_clearly() -> None:
    """By more than five standard deviations over shuffles."""
    model, data = separated()
    inputs, labels = data.train
    features = (inputs @ model.get_parameter("0.weight").detach().T)[:, :, None]
    told = Discriminant(features, one_hot(labels), 1e-3, relative=True).value
    lots = [
        Discriminant(features, one_hot(labels[torch.randperm(64)]), 1e-3, relative=True).value
        for _ in range(20)
    ]
    spread = torch.tensor(lots)
    assert told > spread.mean() + 5 * spread.std()


def positions_are_averaged_where_all_samples_are_told_apart() -> None:
    toy = toys.TOYS["plain"]
    model, data = toy.model(), toy.data()
    groups, _ = cuttable(model, data.example())
    batches = labelled(data, 32, 32, 0)
    shares = {
        pool: Scorer(1e-6, pool=pool).scores(model, groups, batches)[1]  # type: ignore[arg-type]
        for pool in ("never", "always", "auto")
    }
    assert shares["never"]["0"] > 0.99 and shares["auto"]["0"] == shares["always"]["0"] < 0.99


def norms_that_meet_add_their_shares() -> None:
    """In the residual toy each score of a pair sums to two for a mean unit."""
    toy = toys.TOYS["residual"]
    model, data = toy.model(), toy.data()
    groups, _ = cuttable(model, data.example())
    scores, _ = Scorer().scores(model, groups, labelled(data, 16, 16, 0))
    for group in groups:
        assert float(scores[group.name].mean()) == pytest.approx(len(group.makers))


# ---------------------------------------------------------------- searches


def trials_of(goal: Goal) -> tuple[Run, Trials]:
    toy = toys.TOYS["plain"]
    method = DiscriminantInformation(search="none", ratio=0.0)
    run = start(toy.model(), method, data=toy.data(), steps=4)
    assert run.data is not None
    groups = method.groups(run)
    scores = {g.name: torch.arange(len(g.units)).double() for g in groups}
    return run, Trials(run, groups, scores, goal, held_out(run.data, 16, 16))


def weights_divide_a_ratio_in_proportion() -> None:
    """8, 12, 12 and 16 units: with weights 1, 1, 1, 2 half of all leave, the last keeps most."""
    _, trials = trials_of(Goal(0.5))
    even = trials.leaving(dict.fromkeys(trials.scores, 1.0))
    assert sorted(map(len, even.values())) == [4, 6, 6, 8]
    last = list(trials.scores)[-1]
    weights = {name: 2.0 if name == last else 1.0 for name in trials.scores}
    leaving = trials.leaving(weights)
    shares = {n: 1 - len(leaving.get(n, ())) / len(v) for n, v in trials.scores.items()}
    assert sum(map(len, leaving.values())) == 24
    for name in list(trials.scores)[:-1]:
        assert shares[last] == pytest.approx(2 * shares[name], abs=0.2)
    assert list(leaving[next(iter(leaving))])[:2] == [0, 1]  # the least leave first


def a_searched_budget_is_no_worse_on_what_it_was_searched_with() -> None:
    for search in ("policy", "greedy"):
        run, trials = trials_of(Goal(0.0, {"macs": 0.5 * toy_macs()}))
        even = trials.reward(trials.leaving(dict.fromkeys(trials.scores, 1.0)))
        if search == "policy":
            Policy(2, 3).search(trials, run.generator)
            assert run.log[-1]["reward"] >= even == run.log[-1]["reward_of_equal_shares"]
        else:
            ranked = Greedy(4).search(trials)
            assert len({(unit.group, unit.index) for unit in ranked}) == len(ranked)
            assert [u.level for u in ranked] == sorted(u.level for u in ranked)


def toy_macs() -> int:
    toy = toys.TOYS["plain"]
    return start(toy.model(), DiscriminantInformation(), data=toy.data(), steps=1).cost.macs


def a_policy_moves_towards_what_is_rewarded() -> None:
    """Draws of 1 and -1 with rewards 3 and 1: scaled 1 and -1 about 2, the mean moves up."""
    noise = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    found = direction(torch.tensor([3.0, 1.0]), noise, 2.0, 0.5)
    assert found.tolist() == [2.0]


def the_best_of_what_was_tried_is_taken() -> None:
    """With a reward that falls with the first group only, the fewest of it leave."""
    run, trials = trials_of(Goal(0.5))
    first, seen = next(iter(trials.scores)), list[int]()

    class Told(Trials):
        def reward(self, leaving: Leaving) -> float:
            seen.append(len(leaving.get(first, ())))
            return -float(seen[-1])

    told = Told(run, trials.groups, trials.scores, trials.goal, trials.held)
    ranked = Policy(4, 4, spread=1.0).search(told, run.generator)
    total = sum(map(len, trials.scores.values()))
    assert sum(unit.group == first for unit in ranked[: total // 2]) == min(seen) < seen[0]
    assert run.log[-1]["reward"] == -min(seen)


def greedy_takes_the_group_that_matters_least() -> None:
    """With a reward that falls with the first group only, all others go first."""
    run, trials = trials_of(Goal(0.25))
    first = next(iter(trials.scores))

    class Told(Trials):
        def reward(self, leaving: Leaving) -> float:
            return -float(len(leaving.get(first, ())))

    told = Told(run, trials.groups, trials.scores, trials.goal, trials.held)
    ranked = Greedy(4).search(told)
    total = sum(map(len, trials.scores.values()))
    assert all(unit.group != first for unit in ranked[: total // 4])


def a_trial_is_what_the_cut_computes() -> None:
    """The accuracy of a trial is that of the network without the units."""
    run, trials = trials_of(Goal(0.5))
    leaving = trials.leaving(dict.fromkeys(trials.scores, 1.0))
    before = copy.deepcopy(run.model.state_dict())
    told = trials.reward(leaving)
    assert all(torch.equal(v, before[k]) for k, v in run.model.state_dict().items())
    remove(run, edits_of(run.model, trials.groups, leaving))
    ((images,), labels) = trials.held[0]
    run.model.eval()
    with torch.no_grad():
        right = (run.model(images).argmax(1) == labels).double().mean()
    assert told == pytest.approx(float(right), abs=1 / 16)


def what_has_no_classes_is_refused() -> None:
    with pytest.raises(DataError, match="looks at labelled training inputs"):
        run_of(pair(1.0, 2.0), DiscriminantInformation())
    points = torch.randn(8, 2)
    alone = Data((points, torch.arange(8) % 2), classes=2)
    with pytest.raises(DataError, match="search=.none."):
        start(pair(1.0, 2.0), DiscriminantInformation(), data=alone)
    for labels, said in ((torch.randn(8, 2), "one class for each"), (torch.zeros(8).long(), "sin")):
        given = Data((points, labels), classes=2)
        with pytest.raises(DataError, match=said):
            start(pair(1.0, 2.0), DiscriminantInformation(search="none"), data=given)


CASES = (
    Case(
        "discriminant_information",
        spec=f"discriminant_information({QUICK})",
        budget=Budget(macs=0.7),
        toys=TOYS,
        refuses=REFUSES,
        variants=(
            f'discriminant_information(search="greedy", {QUICK})',
            f"discriminant_information(exact=True, rounds=2, {QUICK})",
        ),
        witnesses={
            "held": on_many(
                "discriminant_information(samples=16, batch=16, updates=1, draws=2)",
                "held",
                Budget(macs=0.7),
                samples=600,
            ),
        },
        own=(
            three_forms_of_one_number,
            slopes_are_those_of_autograd,
            losses_are_those_of_leaving_out,
            no_channel_lowers_it_and_a_constant_adds_nothing,
            chunks_do_not_count,
            channels_that_separate_stay,
            shuffled_labels_lower_it_clearly,
            positions_are_averaged_where_all_samples_are_told_apart,
            norms_that_meet_add_their_shares,
            weights_divide_a_ratio_in_proportion,
            a_searched_budget_is_no_worse_on_what_it_was_searched_with,
            a_policy_moves_towards_what_is_rewarded,
            the_best_of_what_was_tried_is_taken,
            greedy_takes_the_group_that_matters_least,
            a_trial_is_what_the_cut_computes,
            what_has_no_classes_is_refused,
        ),
    ),
)
