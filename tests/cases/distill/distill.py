"""Distillation: targets and gradients by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from pliant.compose import chain, together
from pliant.errors import DataError, MethodError
from pliant.math.divergence import divergence, mean_where, neighbour_means
from pliant.method import Method
from pliant.methods.distill.kd import KD
from pliant.methods.distill.oskd import OSKD
from pliant.observe.aside import Teacher
from pliant.run import Run, start
from pliant.testing import Case


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ROWS, LABELS = noise(12, 4), torch.tensor([0] * 5 + [1] * 4 + [2] * 2 + [3])


def subclass_loss(rows: Tensor, labels: Tensor, neighbours: int | None = 2) -> Tensor:
    target, known = neighbour_means(rows, labels, neighbours)
    return mean_where((rows - target).square().mean(1), known)


def equal_outputs_cost_nothing() -> None:
    rows = noise(4, 4)[LABELS]
    assert subclass_loss(rows, LABELS) == 0


def order_and_offsets_of_classes_do_not_matter() -> None:
    whole = subclass_loss(ROWS, LABELS)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert torch.isclose(subclass_loss(ROWS[order], LABELS[order]), whole)
    moved = ROWS + torch.where((LABELS == 1)[:, None], noise(4, seed=3), 0.0)
    assert torch.isclose(subclass_loss(moved, LABELS), whole)


def lonely_samples_count_for_nothing() -> None:
    """The one of class 3 has no partner, nor have samples whose label is to be ignored."""
    rows = ROWS.clone().requires_grad_()
    target, known = neighbour_means(rows, LABELS, 3)
    assert known.tolist() == [True] * 11 + [False] and torch.equal(target[11], torch.zeros(4))
    subclass_loss(rows, LABELS).backward()
    assert rows.grad is not None and torch.equal(rows.grad[11], torch.zeros(4))
    alone = ROWS[-2:].clone().requires_grad_()
    loss = subclass_loss(alone, torch.tensor([0, 1]))
    loss.backward()
    assert loss == 0 and alone.grad is not None and torch.equal(alone.grad, torch.zeros(2, 4))
    assert not neighbour_means(ROWS, torch.full((12,), -100), 3)[1].any()


def all_of_a_class_is_the_mean_without_oneself() -> None:
    for neighbours in (None, 4, 99):
        target, _ = neighbour_means(ROWS, LABELS, neighbours)
        assert torch.allclose(target[2], ROWS[[0, 1, 3, 4]].mean(0))
        assert torch.allclose(target[9], ROWS[10])


def duplicates_are_neighbours() -> None:
    """Oneself is left out by its place in the batch, not by its distance."""
    rows = torch.tensor([[1.0], [1.0], [2.0]])
    target, _ = neighbour_means(rows, torch.zeros(3, dtype=torch.long), 1)
    assert target.flatten().tolist() == [1.0, 1.0, 1.0]


def the_gradient_stays_with_the_sample() -> None:
    """2 (y - t) / (D |V|): nothing flows through the target."""
    rows = ROWS.clone().requires_grad_()
    subclass_loss(rows, LABELS).backward()
    target, known = neighbour_means(ROWS, LABELS, 2)
    expected = 2 * (ROWS - target) / (4 * known.sum()) * known[:, None]
    assert rows.grad is not None and torch.allclose(rows.grad, expected, atol=1e-6)


def samples_seen_before_may_be_neighbours() -> None:
    rows, labels = torch.tensor([[0.0], [9.0]]), torch.tensor([0, 1])
    others = torch.tensor([[1.0], [2.0], [9.0]]), torch.tensor([0, 0, 0])
    target, known = neighbour_means(rows, labels, 2, others=others)
    assert target.flatten().tolist() == [1.5, 0.0] and known.tolist() == [True, False]


def directions_are_compared_where_asked() -> None:
    """(1, 0) is near (0.9, 0.2) by distance, and lies in the direction of (9, 1)."""
    rows = torch.tensor([[1.0, 0.0], [0.9, 0.2], [9.0, 1.0]])
    same = torch.zeros(3, dtype=torch.long)
    assert torch.equal(neighbour_means(rows, same, 1)[0][0], rows[1])
    assert torch.equal(neighbour_means(rows, same, 1, cosine=True)[0][0], rows[2])


def near_neighbours_weigh_more() -> None:
    """At distances 1 and 3, whose squares are 5 in the mean: exp(-1/5) and exp(-9/5)."""
    rows, same = torch.tensor([[0.0], [1.0], [3.0]]), torch.zeros(3, dtype=torch.long)
    one, two = math.exp(-1 / 5), math.exp(-9 / 5)
    target = neighbour_means(rows, same, None, weighted=True)[0][0]
    assert torch.isclose(target, torch.tensor((one * 1 + two * 3) / (one + two)))


def the_furthest_are_kept_apart() -> None:
    """Of 0, 1 and 3 the furthest of each; those that have no more than k others are left out."""
    rows, labels = torch.tensor([[0.0], [1.0], [3.0], [7.0], [8.0]]), torch.tensor([0, 0, 0, 1, 1])
    target, known = neighbour_means(rows, labels, 1, furthest=True)
    assert target.flatten().tolist() == [3.0, 3.0, 0.0, 0.0, 0.0]
    assert known.tolist() == [True, True, True, False, False]
    method = OSKD(weight=0.0, repel=0.5, margin=5.0, neighbours=1, warmup=0.0, ramp=0.0)
    run = start(net(), method, example=(INPUTS,), steps=10)
    loss = run.loss(torch.zeros(()), rows, (rows, labels))  # squares 9, 4, 9: one is too near
    assert torch.isclose(loss, torch.tensor(0.5 * (5 - 4) / 3))
    method = OSKD(weight=0.0, repel=0.5, margin=5.0, neighbours=1, warmup=0.0, ramp=0.5)
    run = start(net(), method, example=(INPUTS,), steps=10)
    run.step = 1
    loss = run.loss(torch.zeros(()), rows, (rows, labels))
    assert torch.isclose(loss, torch.tensor(0.2 * 0.5 * (5 - 4) / 3))


def divergences_are_those_of_the_targets() -> None:
    """measure="kl": T^2 KL(target || sample), in the mean over those that have neighbours."""
    method = OSKD(weight=0.5, measure="kl", temperature=2.0, warmup=0.0, ramp=0.0, neighbours=2)
    run = start(net(), method, example=(INPUTS,), steps=10)
    loss = run.loss(torch.zeros((), dtype=torch.float64), ROWS, (ROWS, LABELS))
    target, known = neighbour_means(ROWS, LABELS, 2)
    aim, own = (target / 2).softmax(1), (ROWS / 2).softmax(1)
    each = 4 * (aim * (aim / own).log()).sum(1)
    assert torch.isclose(loss, 0.5 * each[known].mean())


def an_epoch_is_remembered_and_forgotten() -> None:
    """The second batch finds its neighbours in the first; a new epoch begins with none."""
    method = OSKD(weight=1.0, memory=4, warmup=0.0, ramp=0.0)
    run = start(net(), method, example=(INPUTS,), steps=10)
    labels = torch.arange(4)
    one, two = noise(4, 4, seed=1), noise(4, 4, seed=2)
    zero = torch.zeros((), dtype=torch.float64)
    assert run.loss(zero, one, (one, labels)) == 0
    assert torch.isclose(run.loss(zero, two, (two, labels)), (one - two).square().mean())
    assert torch.equal(run.state["seen"][0], two)  # four of them
    run.after_epoch()
    assert run.loss(zero, one, (one, labels)) == 0


# ------------------------------------------------------------------ runs


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


INPUTS = noise(24, 6, seed=5).float()
CLASSES = torch.arange(24) % 4


def trained(method: Method, steps: int = 10, labels: Tensor = CLASSES) -> Run:
    """Take a few steps of plain training, with the method."""
    model = net()
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    run = start(model, method, example=(INPUTS[:2],), optimizer=optimizer, steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(INPUTS)
        run.loss(F.cross_entropy(output, CLASSES), output, (INPUTS, labels)).backward()
        run.before_step()
        optimizer.step()
        run.after_step()
    return run


def same(one: Run, other: Run) -> bool:
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def no_weight_is_plain_training() -> None:
    """To the last bit, after ten steps; in the warm-up too."""
    plain = trained(Method())
    assert same(trained(OSKD(weight=0.0)), plain)
    assert same(trained(KD(weight=0.0)), plain)
    assert same(trained(OSKD(warmup=1.0)), plain)
    assert not same(trained(OSKD(warmup=0.0)), plain)


def the_weight_rises_after_the_warmup() -> None:
    """Of 10 steps 2 without it, then 4 in which it rises to 0.5."""
    run = start(net(), OSKD(weight=0.5, warmup=0.2, ramp=0.4), example=(INPUTS,), steps=10)
    output, found = noise(24, 4), []
    target, known = neighbour_means(output, CLASSES, 5)
    gap = mean_where((output - target).square().mean(1), known)
    for run.step in range(10):
        loss = run.loss(torch.zeros(()), output, (INPUTS, CLASSES))
        found.append(round(float(loss / gap), 4))
    assert found == [0.0, 0.0, 0.0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5]


def features_are_what_the_last_layer_reads() -> None:
    """The loss pulls unit vectors of the hidden layer together; the last layer feels nothing."""
    model = net()
    run = start(model, OSKD(look_at="features", warmup=0.0), example=(INPUTS,))
    output = model(INPUTS)
    loss = run.loss(0.0 * output.sum(), output, (INPUTS, CLASSES))
    hidden = F.normalize(model[:2](INPUTS), dim=1)
    assert torch.isclose(loss, 0.1 * subclass_loss(hidden, CLASSES, 5))
    loss.backward()
    assert model[0].weight.grad.abs().sum() > 0 and model[2].weight.grad.abs().sum() == 0
    run.finish()
    assert not model[2]._forward_pre_hooks


def a_batch_without_pairs_is_said() -> None:
    run = trained(OSKD(warmup=0.0, ramp=0.0), steps=2, labels=torch.arange(24))
    with pytest.warns(UserWarning, match="only 0 of 48 samples"):
        run.after_epoch()
    assert run.log[-1]["paired"] == 0.0


def fractions_are_no_classes() -> None:
    for method in (OSKD(), KD()):
        with pytest.raises(DataError, match="class"):
            trained(method, labels=noise(24, 4))
    for wrong in (OSKD(neighbours=0), OSKD(measure="kl", look_at="features"), KD(weight=2.0)):
        with pytest.raises(MethodError, match="must|needs"):
            trained(wrong)


def the_divergence_by_hand() -> None:
    """Of (1/2, 1/2) from (3/4, 1/4) at T = 2: log 3 is halved by T, and comes back as T^2."""
    scores, target = torch.zeros(1, 2), torch.tensor([[2 * 3.0, 2 * 1.0]]).log() * 2
    expected = 0.75 * torch.tensor(0.75 / 0.5).log() + 0.25 * torch.tensor(0.25 / 0.5).log()
    assert torch.isclose(divergence(scores, target, 2.0), 4 * expected)


def the_teacher_is_the_network_as_it_was() -> None:
    """Frozen at the start; the loss is the mixture, and moves with the student only."""
    run = trained(KD(weight=0.25), steps=3)
    teacher = run.aside.get(Teacher)
    first = net()
    scores = teacher.scores((INPUTS,), torch.device("cpu"))
    assert torch.equal(scores, first(INPUTS))
    output = run.model(INPUTS)
    loss = run.loss(torch.tensor(2.0), output, (INPUTS, CLASSES))
    assert torch.isclose(loss, 0.75 * 2 + 0.25 * divergence(output, scores, 4.0))
    run.finish()
    assert teacher.network is None


def a_stage_is_taught_by_what_it_found() -> None:
    """In a chain the copy is made when the stage begins; in one loop it is the dense network."""
    run = trained(chain(Method(), "kd"), steps=4)
    ((path, teacher),) = run.aside.kept
    assert path == "stage1/" and isinstance(teacher, Teacher)
    halfway = trained(Method(), steps=2)
    scores = teacher.scores((INPUTS,), torch.device("cpu"))
    assert torch.equal(scores, halfway.model(INPUTS))
    run = trained(together("kd", "energy(p=0.5)"), steps=1)
    dense = run.aside.scope("part0").get(Teacher)
    assert torch.equal(dense.scores((INPUTS,), torch.device("cpu")), net()(INPUTS))
    assert run.edits and type(run.model[0]) is not nn.Linear  # type: ignore[index]


CASES = [
    Case(
        "oskd",
        variants=(
            'oskd(look_at="features", warmup=0.0, ramp=0.0)',
            'oskd(measure="kl", neighbours=None, warmup=0.0)',
            'oskd(nearest_by="cosine", weighted=True, memory=16, repel=0.1, warmup=0)',
        ),
        witnesses={
            "margin": the_furthest_are_kept_apart,
        },
        own=(
            equal_outputs_cost_nothing,
            order_and_offsets_of_classes_do_not_matter,
            lonely_samples_count_for_nothing,
            all_of_a_class_is_the_mean_without_oneself,
            duplicates_are_neighbours,
            the_gradient_stays_with_the_sample,
            no_weight_is_plain_training,
            the_weight_rises_after_the_warmup,
            features_are_what_the_last_layer_reads,
            a_batch_without_pairs_is_said,
            fractions_are_no_classes,
            samples_seen_before_may_be_neighbours,
            directions_are_compared_where_asked,
            near_neighbours_weigh_more,
            the_furthest_are_kept_apart,
            divergences_are_those_of_the_targets,
            an_epoch_is_remembered_and_forgotten,
        ),
    ),
    Case(
        "kd",
        own=(
            the_divergence_by_hand,
            the_teacher_is_the_network_as_it_was,
            a_stage_is_taught_by_what_it_found,
        ),
    ),
]
