"""Dynamic channel propagation: utilities against autograd, who is masked, and the cut."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from pliant.budget import Budget
from pliant.errors import DataError
from pliant.families.prune.gates import Gates
from pliant.families.prune.utility import masks, utility
from pliant.methods.prune.dynamic_channel_propagation import DynamicChannelPropagation
from pliant.run import Run, start
from pliant.surgery.prove import cuttable
from pliant.testing import Case, toys
from tests.cases.prune import REFUSES, TOYS, pair, run_of
from tests.cases.witness import untrained


class Masked(nn.Module):
    """Two convolutions with masks on the channels of their batch norms, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
        self.two = nn.Conv2d(5, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, mu: Tensor | None = None, nu: Tensor | None = None) -> Tensor:
        x = self.norm(self.one(x))
        x = self.two((x if mu is None else x * mu.view(-1, 1, 1)).relu())
        x = (x if nu is None else x * nu.view(-1, 1, 1)).relu().amax((2, 3))
        out: Tensor = self.head(x)
        return out


def effects_are_gradients_of_masks() -> None:
    """For each sample alone, the effect of a unit is dL/dmu of a mask behind its batch norm."""
    torch.manual_seed(0)
    model, images = Masked().eval(), torch.randn(6, 3, 7, 7)
    groups, _ = cuttable(model, (images[:1],))
    gates = Gates(model, groups)
    labels = torch.arange(6) % 3
    F.cross_entropy(model(images), labels, reduction="sum").backward()
    (found,) = gates.take()
    gates.remove()
    for row in range(6):
        mu, nu = torch.ones(5, requires_grad=True), torch.ones(4, requires_grad=True)
        loss = F.cross_entropy(model(images[row : row + 1], mu, nu), labels[row : row + 1])
        wanted = torch.cat(torch.autograd.grad(loss, (mu, nu)))
        assert torch.allclose(found[row], wanted, atol=1e-6)
    assert not any(module._forward_pre_hooks for module in model.modules())


def masked_utilities_are_frozen() -> None:
    """The others become d u + v, with the largest v of each layer exactly 1."""
    old = torch.tensor([0.5, 0.25, 0.75, 0.3, 0.1]).double()
    effects = [torch.tensor([[1.0, -2.0, 8.0, 0.0, 3.0], [-1.0, 2.0, 8.0, 0.0, 3.0]])]
    mask = torch.tensor([True, True, False, True, True])
    new = utility(old, effects, mask, {"a": 3, "b": 2}, 0.6)
    v = torch.tensor([0.5, 1.0, 0.0, 0.0, 1.0]).double()
    assert torch.equal(new[mask], (0.6 * old + v)[mask]) and new[2] == old[2]
    # Nothing is known of a layer without gradients, or with broken ones.
    for broken in (0.0, torch.nan, torch.inf):
        assert torch.equal(
            utility(old, [torch.full((1, 5), broken)], mask, {"a": 3, "b": 2}, 0.6), old
        )


def the_least_useful_are_masked_but_for_the_floor() -> None:
    scores = {"a": torch.tensor([0.1, 0.2, 0.3]), "b": torch.tensor([0.9, 0.4])}
    found = masks(scores, {"a": 1, "b": 1}, 3)
    assert found.tolist() == [False, False, True, True, False]  # 0.3 stays, so 0.4 goes
    assert masks(scores, {"a": 1, "b": 1}, 99).sum() == 2
    assert masks(scores, {"a": 1, "b": 1}, 0).all()


def step(run: Run, inputs: Any) -> None:
    assert run.optimizer is not None
    run.optimizer.zero_grad()
    loss = F.cross_entropy(run.model.train()(inputs), torch.arange(len(inputs)) % 4)
    loss.backward()
    run.before_step()
    run.optimizer.step()
    run.after_step()


def begun(name: str, method: DynamicChannelPropagation, steps: int, **bounds: float) -> Run:
    toy = toys.TOYS[name]
    model = toy.model()
    optimizer = SGD(model.parameters(), 0.05, momentum=0.9)
    budget = Budget(**bounds) if bounds else None
    return start(model, method, budget, data=toy.data(), optimizer=optimizer, steps=steps)


def masks_begin_after_the_warmup() -> None:
    """Then exactly the ratio of all units is masked, by one threshold, and may come back."""
    run = begun("plain", DynamicChannelPropagation(ratio=0.42, warmup=0.3), 10)
    (images,) = toys.TOYS["plain"].inputs(8)
    for count in range(1, 10):
        before, mask = run.state["utility"], run.state["mask"]
        step(run, images)
        after = run.state["utility"]
        assert torch.equal(after[~mask], before[~mask]) and (after[mask] != before[mask]).any()
        zeros = int((~run.state["mask"]).sum())
        assert zeros == (int(0.42 * 48) if count >= 3 else 0)
        gone, stay = after[~run.state["mask"]], after[run.state["mask"]]
        assert not zeros or gone.max() <= stay.min()
    with torch.no_grad():  # in evaluation too
        masked = run.model.eval()(images)
    run.close()
    with torch.no_grad():
        assert not torch.allclose(masked, run.model(images), atol=1e-3)


def the_cut_network_computes_what_the_masked_one_did() -> None:
    """With statistics and shifts of batch norms, over sums, and with a budget."""
    for name, bounds in (
        ("plain", {}),
        ("residual", {}),
        ("grouped", {}),
        ("plain", {"macs": 0.5}),
    ):
        run = begun(name, DynamicChannelPropagation(warmup=0.0), 6, **bounds)
        (images,) = toys.TOYS[name].inputs(8)
        for module in run.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.bias, -1.0, 1.0)
        for _ in range(6):
            step(run, images)
        with torch.no_grad():
            wanted = copy.deepcopy(run.model.eval())(images)
            run.finish()
            assert run.edits and torch.allclose(run.model.eval()(images), wanted, atol=1e-5)


def a_copy_of_the_network_has_the_masks_of_now() -> None:
    """Also where the mask has changed since the last forward pass."""
    run = begun("bare", DynamicChannelPropagation(warmup=0.0), 4)
    (images,) = toys.TOYS["bare"].inputs(8)
    step(run, images)
    run.aside.get(Gates).values.zero_()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(run.model)(images), run.model(images))


def accumulated_gradients_make_one_step() -> None:
    """Two half batches give the utilities of the whole one."""
    whole, halves = (begun("bare", DynamicChannelPropagation(), 4) for _ in range(2))
    (images,), labels = toys.TOYS["bare"].inputs(8), torch.arange(8) % 4
    F.cross_entropy(whole.model(images), labels).backward()
    for part in (slice(0, 4), slice(4, 8)):
        (F.cross_entropy(halves.model(images[part]), labels[part]) / 2).backward()
    for run in (whole, halves):
        run.before_step()
    assert torch.allclose(whole.state["utility"], halves.state["utility"], atol=1e-5)


def neither_steps_nor_inputs_are_refused() -> None:
    with pytest.raises(DataError, match="learns from training steps or inputs"):
        run_of(pair(1.0, 2.0), DynamicChannelPropagation())


CASES = (
    Case(
        "dynamic_channel_propagation",
        toys=TOYS,
        refuses=REFUSES,
        variants=(
            "dynamic_channel_propagation(start=0.5, warmup=0.1)",
            "dynamic_channel_propagation(warmup=1.0)",
        ),
        witnesses={
            "samples": untrained(
                "dynamic_channel_propagation",
                "dynamic_channel_propagation(samples=1)",
                Budget(macs=0.7),
            ),
        },
        own=(
            effects_are_gradients_of_masks,
            masked_utilities_are_frozen,
            the_least_useful_are_masked_but_for_the_floor,
            masks_begin_after_the_warmup,
            the_cut_network_computes_what_the_masked_one_did,
            a_copy_of_the_network_has_the_masks_of_now,
            accumulated_gradients_make_one_step,
            neither_steps_nor_inputs_are_refused,
        ),
    ),
)
