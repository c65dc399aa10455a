"""SSAL: groups of classes, joint prediction, and heads that the network does not need."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from pliant.compose import together
from pliant.data import Data
from pliant.errors import DataError, MethodError
from pliant.families.distill import branches
from pliant.families.distill.grouping import confusion_groups, joint
from pliant.method import Method
from pliant.methods.distill.ssal import SSAL
from pliant.observe.heads import Reading, answer
from pliant.run import Run, start
from pliant.testing import Case
from tests.cases.witness import on_many

# ------------------------------------------------------------------ groups


def blocks(seed: int) -> tuple[Tensor, Tensor]:
    """Twenty classes in four blocks within which they are confused, in any order."""
    g = torch.Generator().manual_seed(seed)
    block = torch.arange(20)[torch.randperm(20, generator=g)] % 4
    within = (block[:, None] == block).long()
    noise = torch.randint(0, 3, (20, 20), generator=g)
    found = noise + within * torch.randint(10, 20, (20, 20), generator=g)
    return found.fill_diagonal_(100), block


def blocks_of_mistakes_are_found() -> None:
    """In 50 of 50 orders; classes apart where they are asked to be."""
    for seed in range(50):
        mistakes, block = blocks(seed)
        before = mistakes.clone()
        found = confusion_groups(mistakes, 4, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(mistakes, before)
        pairs = set(zip(found, block.tolist(), strict=True))
        assert len(found) == 20 and len(pairs) == 4
        g = torch.Generator().manual_seed(seed)
        apart = torch.tensor(confusion_groups(mistakes, 4, "different", generator=g))
        assert all(len(apart[block == n].unique()) > 1 for n in range(4))


def no_group_is_too_large() -> None:
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        for count, groups in ((10, 3), (17, 5), (7, 7), (9, 2), (12, 1)):
            for kind in ("similar", "different", "random"):
                mistakes = torch.randint(0, 9, (count, count), generator=g)
                found = confusion_groups(mistakes, groups, kind, generator=g)  # type: ignore[arg-type]
                sizes = torch.tensor(found).bincount(minlength=groups)
                assert len(found) == count and int(sizes.min()) >= 1
                assert int(sizes.max()) <= math.ceil(1.1 * count / groups)
    with pytest.raises(ValueError, match="1 to 4"):
        confusion_groups(torch.zeros(4, 4), 5, generator=torch.Generator())


def ties_fall_by_the_generator() -> None:
    """Mistakes that are all alike say nothing: seeds part the classes in many ways."""
    same = [
        tuple(confusion_groups(torch.ones(8, 8), 2, generator=torch.Generator().manual_seed(n)))
        for n in range(20)
    ]
    assert len(set(same)) > 10 and same[0] == tuple(
        confusion_groups(torch.ones(8, 8), 2, generator=torch.Generator().manual_seed(0))
    )


# ------------------------------------------------------------------ joint prediction

GROUPS = ((0, 0, 1, 1, 2, 2), (0, 1, 0, 1, 0, 1))


def spoken(seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(40, 6, generator=g, dtype=torch.float64)
    return scores, [torch.randn(40, n, generator=g, dtype=torch.float64) for n in (3, 2)]


def joint_probabilities_by_hand() -> None:
    scores, heads = spoken()
    found = joint(scores, heads, GROUPS, 0.4).exp()
    chances = scores.softmax(1)
    for head, known in zip(heads, GROUPS, strict=True):
        chances = chances * head.softmax(1)[:, list(known)] ** 0.4
    assert torch.allclose(found, chances / chances.sum(1, keepdim=True), atol=1e-6)
    assert torch.allclose(found.sum(1), torch.ones(40, dtype=torch.float64))


def heads_that_say_nothing_change_nothing() -> None:
    scores, heads = spoken()
    alone = scores.log_softmax(1)
    assert torch.allclose(joint(scores, heads, GROUPS, 0.0), alone)
    even = [torch.zeros_like(head) for head in heads]
    assert torch.allclose(joint(scores, even, GROUPS, 0.7), alone)


def a_head_that_knows_the_group_leaves_the_choice_within() -> None:
    scores, _ = spoken()
    labels = torch.arange(40) % 6
    known = torch.tensor(GROUPS[0])
    head = 1e4 * F.one_hot(known[labels], 3).double()
    found = joint(scores, [head], GROUPS[:1], 1.0).argmax(1)
    within = scores.masked_fill(known != known[labels][:, None], -torch.inf).argmax(1)
    assert torch.equal(found, within)


def one_class_a_group_is_a_product_of_experts() -> None:
    scores, heads = spoken()
    other = torch.cat([heads[0], heads[0].flip(1)], 1)
    found = joint(scores, [other], [range(6)], 1.0)
    assert torch.allclose(found, (scores + other).log_softmax(1))


# ------------------------------------------------------------------ runs

INPUTS = torch.randn(24, 3, 6, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(24) % 4
DATA = Data((INPUTS, LABELS), (INPUTS, LABELS), classes=4)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)),
    )


def trained(method: Method, steps: int = 8, parts: int = 1) -> Run:
    """Take a few steps, each of the gradients of several batches."""
    model = net()
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    run = start(model, method, data=DATA, optimizer=optimizer, steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(parts):
            output = model(INPUTS)
            loss = run.loss(F.cross_entropy(output, LABELS), output, (INPUTS, LABELS))
            (loss / parts).backward()
        run.before_step()
        optimizer.step()
        run.after_step()
    return run


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def heads_of_no_weight_are_not_felt() -> None:
    """The network trains to the last bit as without them, and they learn all the same."""
    plain, run = trained(Method()), trained(SSAL(weights=(0.0, 0.0)))
    assert same(plain.model, run.model)
    first = trained(SSAL(weights=(0.0, 0.0)), steps=1).state["heads"]["0"]
    assert not torch.equal(first["last"], run.state["heads"]["0"]["last"])
    assert not same(plain.model, trained(SSAL(weights=(0.5, 0.5))).model)


def the_loss_is_that_of_the_groups() -> None:
    """Each head's cross-entropy on the groups of the labels, weighted."""
    run = trained(SSAL(weights=(0.25, 0.5), groups=(2, 3)), steps=2)
    output = run.model(INPUTS)
    features = dict(run.aside.get(Reading).values)
    loss = run.loss(torch.tensor(2.0), output, (INPUTS, LABELS))
    wanted = torch.tensor(2.0)
    for number, weight in enumerate((0.25, 0.5)):
        name, groups = run.state["names"][number], torch.tensor(run.state["groups"][number])
        said = answer(run.state["heads"][str(number)], features[name])
        assert said.shape[1] == (2, 3)[number]
        wanted = wanted + weight * F.cross_entropy(said, groups[LABELS])
    assert torch.isclose(loss, wanted)
    assert run.state["names"] == ["2", "6"]


def heads_step_by_hand() -> None:
    """SGD: momentum, decay, the mean gradient of the batches of a step."""
    one, two = (trained(SSAL(weights=(0.5,), decay=0.1), 3, parts) for parts in (1, 2))
    for key, value in one.state["heads"]["0"].items():
        assert torch.allclose(value, two.state["heads"]["0"][key], atol=1e-5)
    run = trained(SSAL(weights=(0.5,), decay=0.1), 1)
    head = {k: v.clone() for k, v in run.state["heads"]["0"].items()}
    past = {k: v.clone() for k, v in run.state["momentum"]["0"].items()}
    run.model(INPUTS)
    features = run.aside.get(Reading).values[run.state["names"][0]].detach()
    target = torch.tensor(run.state["groups"][0])[LABELS]
    leaves = {k: v.clone().requires_grad_() for k, v in head.items()}
    F.cross_entropy(answer(leaves, features), target).backward()
    run.loss(torch.zeros(()), run.model(INPUTS), (INPUTS, LABELS))
    run.after_step()
    for key, leaf in leaves.items():
        assert leaf.grad is not None
        wanted = head[key] - 0.1 * (0.9 * past[key] + leaf.grad + 0.1 * head[key])
        assert torch.allclose(run.state["heads"]["0"][key], wanted, atol=1e-6), key


def what_ships_is_the_network_alone() -> None:
    run = trained(SSAL())
    model = copy.deepcopy(run.model).eval()
    before = model(INPUTS)
    names = [name for name, _ in run.model.named_modules()]
    run.finish()
    assert torch.equal(run.model.eval()(INPUTS), before)
    assert names == [name for name, _ in net().named_modules()]
    assert not any(m._forward_hooks for m in run.model.modules())
    row = run.log[-1]
    assert row["alone"] == float((before.argmax(1) == LABELS).float().mean())
    assert set(row) >= {"joint", "agreeing", "right_agreeing"} and 0 < row["joint"] <= 1


def what_heads_agree_with_by_hand() -> None:
    run = trained(SSAL(weights=(0.5, 0.5), groups=(2, 3)))
    run.model.eval()
    for number in range(2):
        run.state["heads"][str(number)]["last"] *= -1
        run.state["heads"][str(number)]["bias"] *= 0
    with run.aside.get(Reading).always():
        scores = run.model(INPUTS)
    best = scores.argmax(1)
    features, agree, heads = run.aside.get(Reading).take(), torch.ones(24).bool(), []
    for number in range(2):
        given = features[run.state["names"][number]]
        heads.append(answer(run.state["heads"][str(number)], given))
        agree &= heads[-1].argmax(1) == torch.tensor(run.state["groups"][number])[best]
    found = branches.read(run, 0.4, 99)
    right = best == LABELS
    together_ = joint(scores, heads, run.state["groups"], 0.4).argmax(1) == LABELS
    wanted = (right.float().mean(), together_.float().mean(), agree.float().mean())
    said = (found["alone"], found["joint"], found["agreeing"])
    assert torch.allclose(torch.tensor(said), torch.stack(wanted))
    assert not agree.all()  # heads that learned the contrary
    both = float((right & agree).sum() / agree.sum().clamp(min=1))
    assert abs(found["right_agreeing"] - both) < 1e-6


def groups_come_from_mistakes() -> None:
    """A network that says 0 for 1 and 2 for 3; and one that is always right, by its doubts."""
    scores = torch.eye(4)[[0, 0, 2, 2]] * 4
    for bonus in (0.0, 9.0):
        table = scores + bonus * torch.eye(4) + 2 * torch.eye(4)[[1, 0, 3, 2]]
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Identity(), nn.Linear(4, 4))
        with torch.no_grad():
            model[0].weight.copy_(torch.eye(4))
            model[2].weight.copy_(table.T)
            model[2].bias.zero_()
        x = torch.eye(4)
        data = Data((x, torch.arange(4)), (x, torch.arange(4)), classes=4)
        run = start(model, SSAL(weights=(1.0,)), data=data, steps=4)
        a, b, c, d = run.state["groups"][0]
        assert a == b != c == d


def groups_wait_for_the_start() -> None:
    run = trained(SSAL(start=0.5), steps=3)
    assert run.state["groups"]
    run = trained(SSAL(start=0.5), steps=8)
    rows = [row for row in run.log if "groups" in row]
    assert len(rows) == 1 and rows[0]["step"] == 4
    assert same(trained(Method(), 4).model, _stopped(SSAL(start=0.75), 8, 4).model)


def _stopped(method: Method, steps: int, stop: int) -> Run:
    model = net()
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    run = start(model, method, data=DATA, optimizer=optimizer, steps=steps)
    for _ in range(stop):
        optimizer.zero_grad()
        output = model(INPUTS)
        run.loss(F.cross_entropy(output, LABELS), output, (INPUTS, LABELS)).backward()
        run.before_step()
        optimizer.step()
        run.after_step()
    return run


def heads_follow_layers_that_become_narrower() -> None:
    run = trained(together("ssal", "magnitude(start=0.5, end=0.5)"), steps=8)
    state = run.state["part0"]
    widths = [state["heads"][str(n)]["first"].shape[1] for n in range(3)]
    layers: Any = [run.model.get_submodule(name) for name in state["names"]]
    assert widths == [getattr(m, "out_channels", getattr(m, "out_features", 0)) for m in layers]
    assert len(run.edits) > 0
    run.finish(strict=False)


def what_has_no_groups_is_refused() -> None:
    for options, sentence in (
        ({"groups": (2, 3)}, "one number in weights"),
        ({"groups": (2, 3, 5)}, "at most 4 groups"),
        ({"weights": (1.0,), "at": ("nowhere",)}, "no layer 'nowhere'"),
        ({"weights": (-1.0,)}, "0 or more"),
    ):
        with pytest.raises(MethodError, match=sentence):
            start(net(), SSAL(**options), data=DATA)  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="mistakes on data"):
        start(net(), SSAL(), example=(INPUTS,))
    with pytest.raises(DataError, match="one class number"):
        start(net(), SSAL(), data=Data((INPUTS, INPUTS[:, 0, 0, 0]), (INPUTS, INPUTS[:, 0, 0, 0])))


CASES = [
    Case(
        "ssal",
        spec="ssal(width=8)",
        variants=(
            'ssal(kind="different", start=0.5, weights=(1.0, 1.0))',
            'ssal(kind="random", groups=(2,), weights=(0.3,), width=4)',
        ),
        refuses={"single": "before its last one"},
        witnesses={
            "samples": on_many("ssal(width=8)", "samples", samples=600),
        },
        own=(
            blocks_of_mistakes_are_found,
            no_group_is_too_large,
            ties_fall_by_the_generator,
            joint_probabilities_by_hand,
            heads_that_say_nothing_change_nothing,
            a_head_that_knows_the_group_leaves_the_choice_within,
            one_class_a_group_is_a_product_of_experts,
            heads_of_no_weight_are_not_felt,
            the_loss_is_that_of_the_groups,
            heads_step_by_hand,
            what_ships_is_the_network_alone,
            what_heads_agree_with_by_hand,
            groups_come_from_mistakes,
            groups_wait_for_the_start,
            heads_follow_layers_that_become_narrower,
            what_has_no_groups_is_refused,
        ),
    ),
]
