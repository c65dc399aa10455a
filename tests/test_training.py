"""What a method may ask of a training: a second batch, data by epoch, losses one by one; and that
every optimizer, parameter group and copy follows the layers that are replaced meanwhile."""

import copy
import io
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, Adafactor, Adam, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset, IterableDataset

import pliant
from pliant.budget import Budget
from pliant.compose import Stage, chain, together
from pliant.data import Data, Epoch, Train, unpack
from pliant.data.criterion import weighted
from pliant.data.draws import Draws
from pliant.data.epochs import Epochs
from pliant.data.guess import task_loss
from pliant.drivers.devices import take_step
from pliant.drivers.loop import fit
from pliant.drivers.schedule import optimizers_of
from pliant.edits import Edit, Factor, Merge, Prune, Replaced
from pliant.errors import (
    BudgetError,
    ChainError,
    DataError,
    EditError,
    MethodError,
    PliantError,
    TrainingError,
)
from pliant.method import HOOKS, Method, uses
from pliant.registry import plain
from pliant.run import Run, start
from pliant.surgery.optim import cancel_decay, carry

PLAN = Train(epochs=3, batch=8, lr=0.05, warmup=0.1, device="cpu", checkpoint_every=1)


def net(*, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(rows, columns, bias) for rows, columns in ((12, 24), (24, 24), (24, 4))]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def samples(count: int = 40) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 12, generator=noise)
    inputs[:, 0] = torch.arange(count)  # tells which sample it is
    return inputs, torch.arange(count) % 4


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """A data set with length and index."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        inputs, labels = samples()
        return inputs[row], labels[row]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Samples without an index."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(*samples(), strict=True)


SOURCES: dict[str, Callable[[], Data]] = {
    "tensors": lambda: Data(samples()),
    "a data set": lambda: Data(Pairs()),
    "a loader": lambda: Data(DataLoader(Pairs(), 8, shuffle=True)),
}


def rows_of(batch: Any) -> list[int]:
    return [int(row) for row in unpack(batch)[0][0][:, 0]]


def stored(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class Killed(Exception):
    """Ends a training where it stands."""


def dying(at: int) -> Callable[[dict[str, Any]], None]:
    def watch(row: dict[str, Any]) -> None:
        if row["step"] == at:
            raise Killed

    return watch


def assert_resumes(begin: Callable[[], Run], data: Data, at: int, folder: Path) -> Run:
    """Kill a training after a step; resumed, it ends as an undisturbed one."""
    whole, resumed = begin(), begin()
    fit(whole, data, PLAN)
    with pytest.raises(Killed):
        fit(begin(), data, PLAN, folder=folder, watch=dying(at))
    fit(resumed, data, PLAN, folder=folder, resume=True)
    first, second = whole.model.state_dict(), resumed.model.state_dict()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert str(whole.state) == str(resumed.state) and whole.step == resumed.step
    return whole


# ------------------------------------------------------------------ two batches per step


@dataclass(frozen=True)
class Second(Method):
    """Notes the rows of both batches, and learns from the second by the step of the first."""

    alpha: float = 0.1
    beta: float = 1.0

    def loss(self, run: Run, loss: Tensor, output: Any, batch: Any) -> Tensor:
        mine = rows_of(batch)
        inputs, labels = run.draw(len(mine))
        run.note(first=mine, second=rows_of((*inputs, labels)))
        names, weights = zip(*run.model.named_parameters(), strict=True)
        grads = torch.autograd.grad(loss, weights, create_graph=True)
        moved = {n: w - self.alpha * g for n, w, g in zip(names, weights, grads, strict=True)}
        return loss + self.beta * run.criterion(functional_call(run.model, moved, inputs), labels)


@pytest.mark.parametrize("source", ["tensors", "a data set"])
def test_a_second_batch_never_overlaps_the_first_and_uses_every_sample_once(source: str) -> None:
    data = SOURCES[source]()
    run = start(net(), Second(), data=data, steps=15, seed=3)
    fit(run, data, PLAN)
    found = [(row["first"], row["second"]) for row in run.log if "second" in row]
    assert len(found) == 15
    assert all(len(first) == len(second) == 8 for first, second in found)
    assert not any(set(first) & set(second) for first, second in found)
    for epoch in range(3):
        drawn = [row for _, second in found[5 * epoch : 5 * epoch + 5] for row in second]
        assert sorted(drawn) == list(range(40))
    assert found[0] != found[5] != found[10]


def test_a_last_batch_that_is_smaller_is_followed() -> None:
    data = Data(samples(37))
    run = start(net(), Second(), data=data, steps=15, seed=3)
    fit(run, data, PLAN)
    found = [(row["first"], row["second"]) for row in run.log if "second" in row]
    assert [len(second) for _, second in found] == [8, 8, 8, 8, 5] * 3
    assert not any(set(first) & set(second) for first, second in found)
    assert sorted(row for _, second in found[:5] for row in second) == list(range(37))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("at", [4, 7])
def test_draws_resume(source: str, at: int, tmp_path: Path) -> None:
    data = SOURCES[source]()
    begin = lambda: start(net(), Second(), data=data, steps=15, seed=3)  # noqa: E731
    assert_resumes(begin, data, at, tmp_path)


def test_draws_from_a_stream_go_on_and_begin_again() -> None:
    stream = Data(DataLoader(Stream(), 16))
    draws, place, rows = Draws(stream, 0), list[int](), list[list[int]]()
    for _ in range(5):
        batch, place = draws.take(place, 99, epoch=0)
        rows.append(rows_of(batch))
    assert [len(each) for each in rows] == [16, 16, 8, 16, 16] and rows[3] == rows[0]
    batch, after = Draws(stream, 0).take([0, 1, 1], 99, epoch=0)  # resumed: a fresh stream
    assert rows_of(batch) == rows[4] and after == place
    with pytest.raises(DataError, match="gives none"):
        Draws(Data([]), 0).take([], 4, epoch=0)


def test_processes_draw_different_samples() -> None:
    taken = [Draws(Data(samples()), 0, rank, 2).take([], 10, epoch=0)[0] for rank in (0, 1)]
    assert not set(rows_of(taken[0])) & set(rows_of(taken[1]))


def test_draws_stay_within_the_samples_of_an_epoch() -> None:
    run = start(net(), together(Half(), Second()), data=Data(samples()), epochs=2, batch=5)
    run.optimizer = SGD(run.model.parameters(), 0.01)
    for _ in range(2):
        assert run.epochs is not None
        rows = run.epochs.rows(run.epoch)
        allowed = set(range(40) if rows is None else rows.tolist())
        assert len(allowed) == (20, 40)[run.epoch]
        for inputs, labels in run.batches():
            output = run.model(inputs)
            run.loss(F.cross_entropy(output, labels), output, (inputs, labels))
            assert {*run.log[-1]["first"], *run.log[-1]["second"]} <= allowed
            assert not set(run.log[-1]["first"]) & set(run.log[-1]["second"])
        run.after_epoch()


def test_a_draw_without_data_is_refused() -> None:
    run = start(net(), Second(), example=(torch.zeros(1, 12),))
    output = run.model(samples()[0])
    with pytest.raises(DataError, match=r"Second draws .*start\(\.\.\., data=data\)"):
        run.loss(F.cross_entropy(output, samples()[1]), output, samples())


def test_the_gradient_of_two_batches_is_that_of_the_closed_form() -> None:
    """0.5 w^T A_i w has the gradient (A_1 + (I - a A_1) A_2 (I - a A_1)) w."""
    torch.manual_seed(0)
    roots = [torch.randn(3, 3, dtype=torch.float64) for _ in range(2)]
    first, second = (root @ root.T for root in roots)

    class Quadratic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(1, 3, dtype=torch.float64))

        def forward(self, root: Tensor) -> Tensor:
            return self.w @ root[0]

    def half_square(output: Tensor, labels: Any) -> Tensor:
        return 0.5 * output.square().sum()

    model, (one, other) = Quadratic(), [root[None] for root in roots]
    data = Data([(other, torch.zeros(1))])
    run = start(model, Quiet(0.2), data=data, criterion=half_square)
    loss = run.loss(half_square(model(one), None), None, (one, None))
    loss.backward()
    ahead = torch.eye(3, dtype=torch.float64) - 0.2 * first
    wanted = model.w.detach() @ (first + ahead @ second @ ahead)
    assert model.w.grad is not None and torch.allclose(model.w.grad, wanted, atol=1e-12)


@dataclass(frozen=True)
class Quiet(Method):
    """`Second`, without a look at the rows."""

    alpha: float

    def loss(self, run: Run, loss: Tensor, output: Any, batch: Any) -> Tensor:
        inputs, labels = run.draw(1)
        (weight,) = run.model.parameters()
        (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
        ahead = functional_call(run.model, {"w": weight - self.alpha * grad}, inputs)
        return loss + run.criterion(ahead, labels)


# ------------------------------------------------------------------ data by epoch


@dataclass(frozen=True)
class Half(Method):
    """Half of the samples, then all; the rate falls as the data grows."""

    def epoch(self, epoch: Epoch, data: Data) -> Epoch:
        share = min(1.0, 0.5 * (epoch.number + 1))
        return replace(epoch, samples=share, rate=0.5 / share)


@dataclass(frozen=True)
class Given(Method):
    """What it is told, in every epoch."""

    change: Callable[[Epoch, Data], Any]

    def epoch(self, epoch: Epoch, data: Data) -> Epoch:
        return self.change(epoch, data)  # type: ignore[no-any-return]


def epochs(change: Any, data: Data | None = None, count: float = 3, **more: Any) -> Epochs:
    return Epochs(data or Data(samples()), count, 8, change=change, **more)


def test_an_epoch_is_proposed_and_counted() -> None:
    seen: list[Epoch] = []

    def look(epoch: Epoch, data: Data) -> Epoch:
        seen.append(epoch)
        return epoch

    plan = epochs(look, count=2.5, seed=7)
    assert plan.steps == 5 + 5 + 2 and plan.last == 2
    assert [(e.number, e.of, e.batch, e.samples, e.rate, e.seed) for e in seen] == [
        (number, 3, 8, 1.0, 1.0, 7) for number in range(3)
    ]
    assert epochs(None, count=2.5).steps == 12 and epochs(None, count=0.01).steps == 1
    growing = epochs(Half().epoch, count=2.5)
    assert growing.steps == 3 + 5 + 2 and growing.began(2) == 8


def test_a_part_of_an_epoch_ends_where_the_steps_do() -> None:
    model = net()
    optimizer = SGD(model.parameters(), 0.01)
    run = start(model, Nothing(), data=Data(samples()), optimizer=optimizer, epochs=1.4, batch=8)
    assert run.steps == 7
    for _ in range(2):
        for _ in run.batches():
            run.after_step()
        run.after_epoch()
    assert run.step == 7


@pytest.mark.parametrize("source", SOURCES)
def test_shares_are_nested_and_every_sample_comes_once(source: str) -> None:
    shares = (0.25, 0.5, 1.0)
    plan = epochs(lambda e, _: replace(e, samples=shares[e.number], batch=6), SOURCES[source]())
    found = [[row for b in plan.batches(number) for row in rows_of(b)] for number in range(3)]
    assert [len(rows) for rows in found] == [10, 20, 40]
    assert all(len(set(rows)) == len(rows) for rows in found)
    assert set(found[0]) < set(found[1]) < set(found[2])
    assert [len(rows_of(batch)) for batch in plan.batches(0)] == [6, 4]
    again = epochs(lambda e, _: replace(e, samples=shares[e.number], batch=6), SOURCES[source]())
    assert [row for b in again.batches(2) for row in rows_of(b)] == found[2]


def test_rows_are_chosen_by_number_and_may_repeat() -> None:
    plan = epochs(lambda e, _: replace(e, samples=torch.tensor([3, 3, 9])))
    (batch,) = plan.batches(0)
    assert sorted(rows_of(batch)) == [3, 3, 9]
    with_all = epochs(lambda e, _: e)
    without = list(Data(samples()).batches("train", 8, epoch=1, shuffle=True))
    assert [rows_of(b) for b in with_all.batches(1)] == [rows_of(b) for b in without]


def test_processes_share_an_epoch_out() -> None:
    plans = [epochs(Half().epoch, rank=rank, world=2) for rank in (0, 1)]
    mine = [{row for b in plan.batches(0) for row in rows_of(b)} for plan in plans]
    assert not mine[0] & mine[1] and len(mine[0] | mine[1]) == 20
    assert plans[0].length(0) == 2


ODD: dict[str, tuple[Any, str]] = {
    "nothing": (lambda e, _: None, "must give an Epoch"),
    "no share": (lambda e, _: replace(e, samples=0.0), "share in 0..1 above 0, not 0.0"),
    "too much": (lambda e, _: replace(e, samples=1.5), "share in 0..1 above 0, not 1.5"),
    "no rows": (lambda e, _: replace(e, samples=torch.tensor([], dtype=torch.int64)), "at least"),
    "a mask": (lambda e, _: replace(e, samples=torch.ones(40, dtype=torch.bool)), "whole numbers"),
    "far rows": (lambda e, _: replace(e, samples=torch.tensor([2, 40])), "0 to 39, but epoch 0"),
    "no batch": (lambda e, _: replace(e, batch=0), "at least 1 sample, not 0"),
    "half a batch": (lambda e, _: replace(e, batch=2.5), "at least 1 sample, not 2.5"),
    "no rate": (lambda e, _: replace(e, rate=math.nan), "learning rate above 0, not nan"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_epoch_is_refused_before_any_work(name: str) -> None:
    change, sentence = ODD[name]
    with pytest.raises(MethodError, match=sentence):
        start(net(), Given(change), data=Data(samples()), epochs=2, batch=8)
    before = net()
    with pytest.raises(MethodError, match=sentence):
        pliant.compress(before, Data(samples()), Given(change), train=PLAN)


def test_a_stream_has_no_samples_to_choose() -> None:
    stream = Data(DataLoader(Stream(), 8))
    with pytest.raises(DataError, match="stream of batches"):
        start(net(), Half(), data=stream, epochs=2, batch=8)
    with pytest.raises(DataError, match="epochs and batch together"):
        start(net(), Half(), data=Data(samples()), epochs=2)
    with pytest.raises(DataError, match="epochs and batch together"):
        start(net(), Half(), example=(torch.zeros(1, 12),), epochs=2, batch=8)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("at", [2, 3, 5, 8])
def test_the_loop_honours_epochs_and_resumes_in_them(source: str, at: int, tmp_path: Path) -> None:
    data = SOURCES[source]()

    def begin() -> Run:
        return start(net(), Half(), data=data, epochs=3, batch=8, seed=3)

    run = assert_resumes(begin, data, at, tmp_path)
    assert run.step == run.steps == 3 + 5 + 5
    assert [row["step"] for row in run.log if "loss" in row] == [3, 8, 13]


@pytest.mark.parametrize("at", [0, 1, 3, 4, 12])
def test_batches_of_a_resumed_run_begin_where_it_stands(at: int) -> None:
    def begun() -> Run:
        return start(net(), Half(), data=Data(samples()), epochs=3, batch=8, seed=3)

    def go(run: Run, seen: list[list[int]], stop: int = 99) -> Any:
        while run.step < run.steps:
            for batch in run.batches():
                if run.step == stop:
                    return stored(run.state_dict())
                seen.append(rows_of(batch))
                run.after_step()
            run.after_epoch()

    whole, parts = list[list[int]](), list[list[int]]()
    go(begun(), whole)
    saved, resumed = go(begun(), parts, at), begun()
    resumed.load_state_dict(saved)
    go(resumed, parts)
    assert len(whole) == 13 and parts == whole


def test_the_rate_of_an_epoch_multiplies_what_the_schedule_says() -> None:
    """The schedule sees its own rates; the step, and methods before it, those of the epoch."""
    model = net()
    optimizer = AdamW(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    asked = Given(lambda e, _: replace(e, rate=(1.0, 0.25, 3.0)[e.number]))
    run = start(model, asked, data=Data(samples()), optimizer=optimizer, epochs=3, batch=20)
    stepped: list[float] = []
    optimizer.register_step_pre_hook(lambda o, *_: stepped.append(o.param_groups[0]["lr"]))
    rates, seen = [], []
    for _ in range(3):
        for inputs, labels in run.batches():
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            run.before_step()
            seen.append(run.lr)
            optimizer.step()
            run.after_step()
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
        run.after_epoch()
    plainly = [0.1 * 0.5**step for step in range(6)]
    factors = [1, 1, 0.25, 0.25, 3, 3]
    assert rates == plainly
    assert seen == pytest.approx([r * f for r, f in zip(plainly, factors, strict=True)])
    assert stepped == pytest.approx(seen)
    run.finish()
    optimizer.step()
    assert stepped[-1] == optimizer.param_groups[0]["lr"]


def test_within_a_step_the_rate_is_that_of_the_step() -> None:
    """Lightning computes gradients, and calls its hooks, inside of the optimizer's step."""
    model = net()
    optimizer, seen = SGD(model.parameters(), 0.1), []
    asked = Given(lambda e, _: replace(e, rate=0.5))
    run = start(model, asked, data=Data(samples()), optimizer=optimizer, epochs=1, batch=40)
    ((inputs, labels),) = run.batches()

    def closure() -> Tensor:
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        run.before_step()
        seen.extend([run.lr, optimizer.param_groups[0]["lr"]])
        return loss

    assert run.lr == 0.05
    optimizer.step(closure)  # type: ignore[arg-type]
    run.after_step()
    assert seen == [0.05, 0.05] and optimizer.param_groups[0]["lr"] == 0.1


def test_decay_is_spared_at_the_rate_of_the_epoch() -> None:
    """AdamW shrinks by rate x decay, so that is what must be divided out beforehand."""
    model = nn.Linear(2, 2)
    optimizer = AdamW(model.parameters(), 0.1, weight_decay=0.5)

    @dataclass(frozen=True)
    class Spares(Given):
        def before_step(self, run: Run) -> None:
            run.spare([model.weight])

    method = Spares(lambda e, _: replace(e, rate=2.0))
    run = start(
        model, method, data=Data((torch.ones(4, 2), torch.zeros(4, 2))), optimizer=optimizer,
        epochs=1, batch=4,
    )  # fmt: skip
    for _ in run.batches():
        before = model.weight.detach().clone()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        run.before_step()
        optimizer.step()
        run.after_step()
    assert torch.allclose(model.weight, before, atol=1e-6)
    run.finish()


def test_a_loop_that_takes_other_batches_is_refused() -> None:
    data = Data(samples())
    model = net()
    run = start(model, Half(), data=data, optimizer=SGD(model.parameters(), 0.1), steps=8)
    with pytest.raises(MethodError, match=r"Half chooses .* run\.batches\(\)"):
        run.before_step()
    with pytest.raises(DataError, match="epochs=..., batch=..."):
        run.batches()
    run = start(net(), Half(), data=data, epochs=2, batch=8)
    list(run.batches())
    run.before_step()  # all of it at the plain rate: no optimizer is needed
    run.after_epoch()
    with pytest.raises(MethodError, match="epoch 1 trains on other batches"):
        run.before_step()
    list(run.batches())
    with pytest.raises(MethodError, match="multiplies the learning rate, but the run has no opt"):
        run.before_step()


def test_parts_change_an_epoch_in_turn() -> None:
    both = together(Half(), Given(lambda e, _: replace(e, batch=2 * e.batch, rate=2 * e.rate)))
    epoch = both.epoch(Epoch(0, 3, 8), Data(samples()))
    assert (epoch.samples, epoch.batch, epoch.rate) == (0.5, 16, 2.0)
    alone = chain(Stage(Half()), Stage(Nothing(), share=0))
    assert alone.epoch(Epoch(0, 3, 8), Data(samples())).samples == 0.5
    run = start(net(), alone, data=Data(samples()), epochs=3, batch=8)
    assert run.steps == 13
    with pytest.raises(ChainError, match=r"half chooses .*share=0"):
        pliant.compress(net(), Data(samples()), [Half(), Nothing()], train=PLAN)


@dataclass(frozen=True)
class Nothing(Method):
    """Does nothing."""


# ------------------------------------------------------------------ losses one by one


@dataclass(frozen=True)
class Weighs(Method):
    """Weighs every sample by a number of its own."""

    weights: tuple[float, ...] | None = None

    def weigh(self, run: Run, losses: Tensor, output: Any, batch: Any) -> Tensor | None:
        run.note(shape=list(losses.shape), graph=losses.requires_grad)
        if self.weights is None:
            return None
        return torch.tensor((self.weights * len(losses))[: len(losses)], dtype=losses.dtype)


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))


@pytest.mark.parametrize("method", [Weighs(), Weighs((1.0,))], ids=["none", "ones"])
def test_weights_of_one_train_bit_for_bit_as_the_mean(method: Method) -> None:
    images, labels = samples()
    images = images / 40
    labels[5] = -100
    found = []
    for one in (Nothing(), method):
        run = start(net(), one, data=Data((images, labels)), steps=15, seed=3)
        fit(run, Data((images, labels)), PLAN)
        found.append(run)
    first, second = (run.model.state_dict() for run in found)
    assert all(torch.equal(first[name], second[name]) for name in first)
    losses = [[row["loss"] for row in run.log if "loss" in row] for run in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_weights_multiply_the_gradients_of_samples() -> None:
    """(1/n) sum w_i grad l_i, by hand."""
    model, (inputs, labels) = net(), samples(6)
    run = start(model, Weighs((0.0, 2.0, 1.0)), example=(inputs,))
    assert run.reduction == "none"
    output = model(inputs)
    loss = run.loss(F.cross_entropy(output, labels, reduction=run.reduction), output, samples(6))
    each = [F.cross_entropy(output[i : i + 1], labels[i : i + 1]) for i in range(6)]
    wanted = sum(w * one for w, one in zip((0, 2, 1, 0, 2, 1), each, strict=True)) / 6
    assert loss.detach() == pytest.approx(float(wanted.detach()), rel=1e-6)
    pairs = zip(gradients(loss, model), gradients(wanted, model), strict=True)
    assert all(torch.allclose(one, other, atol=1e-7) for one, other in pairs)
    assert run.log[-1]["shape"] == [6] and not run.log[-1]["graph"]


VOID: dict[str, tuple[Callable[[], tuple[Tensor, Tensor]], dict[str, Any]]] = {
    "classes, -100": (lambda: (torch.randn(6, 5), torch.tensor([0, -100, 2, 3, -100, 4])), {}),
    "pixels, 255": (
        lambda: (torch.randn(2, 3, 4, 4), torch.tensor([0, 1, 2, 255]).repeat(2, 4, 1)),
        {"ignore_index": 255},
    ),
    "tokens, last axis": (
        lambda: (torch.randn(2, 4, 7), torch.tensor([[1, 2, 6, -100], [0, -100, -100, -100]])),
        {},
    ),
}


@pytest.mark.parametrize("case", VOID)
def test_labels_without_a_class_never_count(case: str) -> None:
    make, more = VOID[case]
    torch.manual_seed(0)
    scores, labels = make()
    scores.requires_grad_()
    seen = scores.movedim(-1, 1) if case.startswith("tokens") else scores
    losses = F.cross_entropy(seen, labels, reduction="none", **more)
    wanted = F.cross_entropy(seen, labels, **more)
    assert torch.allclose(weighted(losses, None, scores, labels), wanted, atol=1e-7)
    weights = torch.linspace(0.5, 2, len(labels))
    known = (labels >= 0) & (labels < 255)
    beside = weights.view(-1, *[1] * (labels.dim() - 1)).expand_as(labels)
    by_hand = (losses * beside)[known].sum() / known.sum()
    assert torch.allclose(weighted(losses, weights, scores, labels), by_hand, atol=1e-7)
    bad = torch.where(known, beside, math.nan)  # whatever a method says of them
    loss = weighted(losses, bad, scores, labels)
    assert torch.allclose(loss, by_hand, atol=1e-7)
    assert torch.isfinite(torch.autograd.grad(loss, scores)[0]).all()


def test_a_batch_without_any_label_trains_nothing() -> None:
    scores, labels = torch.randn(3, 4, requires_grad=True), torch.full((3,), -100)
    losses = F.cross_entropy(scores, labels, reduction="none")
    loss = weighted(losses, torch.ones(3), scores, labels)
    assert float(loss.detach()) == 0
    assert not torch.autograd.grad(loss, scores)[0].any()


def test_shifted_labels_and_losses_in_a_row_are_known_too() -> None:
    """A language model's losses are those of its labels from the second on."""
    torch.manual_seed(0)
    scores, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    labels[0, 3:] = -100
    shifted = scores[:, :-1].movedim(-1, 1), labels[:, 1:]
    wanted = F.cross_entropy(*shifted)
    losses = F.cross_entropy(*shifted, reduction="none")
    assert torch.allclose(weighted(losses, None, scores, labels), wanted, atol=1e-7)
    assert torch.allclose(weighted(losses.flatten(), None, scores, labels), wanted, atol=1e-7)


def test_losses_of_numbers_and_of_one_score_all_count() -> None:
    output, wanted = torch.randn(5, 2), torch.randn(5, 2)
    losses = task_loss(output, wanted, "none")
    assert torch.allclose(weighted(losses, None, output, wanted), F.mse_loss(output, wanted))
    scores, labels = torch.randn(6, 1), torch.tensor([0, 1, 1, 0, 1, 1])
    binary = F.binary_cross_entropy_with_logits(scores[:, 0], labels.float(), reduction="none")
    assert torch.allclose(weighted(binary, None, scores, labels), binary.mean())
    codes, numbers = torch.randn(4, 2), torch.tensor([0, 3, 1, 2])  # two bits for four numbers
    apart = (codes.sum(1) - numbers).square() + 0.1
    assert torch.allclose(weighted(apart, None, codes, numbers), apart.mean())
    means, labels = torch.rand(4), torch.ones(4, 8).long()  # a sample has many labels
    assert torch.allclose(weighted(means, None, torch.randn(4, 3, 8), labels), means.mean())


def test_losses_that_are_no_losses_are_refused() -> None:
    inputs, labels = samples()
    run = start(net(), Weighs(), example=(inputs,))
    output = run.model(inputs)
    with pytest.raises(MethodError, match=r"reduction=run\.reduction"):
        run.loss(F.cross_entropy(output, labels), output, (inputs, labels))
    losses = F.cross_entropy(output, labels, reduction="none")
    with pytest.raises(MethodError, match=r"must be \(40,\).*\(3,\) came"):
        weighted(losses, torch.ones(3), output, labels)


def test_parts_multiply_their_weights_and_the_running_stage_weighs() -> None:
    inputs, labels = samples(6)
    both = together(Weighs((1.0, 2.0)), Nothing(), Weighs((3.0, 0.0, 1.0)))
    losses = torch.arange(6.0)
    run = start(net(), both, example=(inputs,))
    weights = both.weigh(run, losses, None, (inputs, labels))
    assert weights is not None and weights.tolist() == [3, 0, 1, 6, 0, 2]
    run = start(net(), chain(Weighs((2.0,)), Nothing()), example=(inputs,), steps=2)
    output = run.model(inputs)
    losses = F.cross_entropy(output, labels, reduction=run.reduction)
    whole = run.loss(losses, output, (inputs, labels))
    run.after_step()
    plainly = run.loss(losses, output, (inputs, labels))
    assert torch.allclose(whole, 2 * plainly) and torch.allclose(plainly, losses.mean())
    assert together(Nothing(), Nothing()).weigh(run, losses, None, None) is None


def test_a_method_may_weigh_and_change_the_loss() -> None:
    @dataclass(frozen=True)
    class Both(Weighs):
        def loss(self, run: Run, loss: Tensor, output: Any, batch: Any) -> Tensor:
            assert loss.dim() == 0
            return loss + 1

    inputs, labels = samples(6)
    run = start(net(), Both((0.0,)), example=(inputs,))
    output = run.model(inputs)
    losses = F.cross_entropy(output, labels, reduction="none")
    assert float(run.loss(losses, output, (inputs, labels)).detach()) == 1


def test_distillation_is_not_weighed() -> None:
    data, teacher = Data(samples()), net()
    plan = replace(PLAN, epochs=1, distill=1.0)
    run = start(net(), Weighs((0.0,)), data=data, steps=5)
    before = copy.deepcopy(run.model.state_dict())
    with torch.no_grad():
        teacher[4].bias.add_(1.0 * torch.arange(4))
    fit(run, data, plan, teacher=teacher)
    assert any(not torch.equal(before[n], v) for n, v in run.model.state_dict().items())


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("method", [Weighs((1.0, 0.5)), Nothing()], ids=["weighs", "not"])
def test_a_scaler_of_gradients_changes_nothing(method: Method, scale: float | None) -> None:
    """Powers of two scale without rounding: an edit, weights and a penalty come out the same."""

    @dataclass(frozen=True)
    class Edits(Method):
        def penalty(self, run: Run) -> Tensor:
            return 0.01 * run.model.get_parameter("4.weight").square().sum()

        def after_step(self, run: Run) -> None:
            if run.step == 3:
                run.apply(Factor("2", "svd", (6,)))

    ends = []
    for used in (None, scale):
        model, (inputs, labels) = net(), samples()
        optimizer = SGD(model.parameters(), 0.01, momentum=0.9)
        run = start(
            model, together(method, Edits()), example=(inputs,), optimizer=optimizer, steps=6
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=used or 1.0, enabled=used is not None)
        for _ in range(6):
            optimizer.zero_grad()
            output = model(inputs / 40)
            loss = F.cross_entropy(output, labels, reduction=run.reduction)
            scaler.scale(run.loss(loss, output, (inputs, labels))).backward()
            scaler.unscale_(optimizer)
            run.before_step()
            scaler.step(optimizer)
            scaler.update()
            run.after_step()
        run.finish()
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


# ------------------------------------------------------------------ optimizers


@dataclass(frozen=True)
class Replaces(Method):
    """Makes edits after a step, or in ``prepare`` if that is step 0."""

    at: int = 2
    edits: tuple[Edit, ...] = (Factor("2", "svd", (6,)),)

    def prepare(self, run: Run) -> None:
        if self.at == 0:
            run.apply(*self.edits)

    def after_step(self, run: Run) -> None:
        if run.step == self.at:
            run.apply(*self.edits)


Make = Callable[[nn.Module], Optimizer]
MAKES: dict[str, Make] = {
    "sgd": lambda m: SGD(m.parameters(), 0.05, momentum=0.9),
    "sgd, fused": lambda m: SGD(m.parameters(), 0.05, momentum=0.9, fused=True),
    "sgd, foreach": lambda m: SGD(m.parameters(), 0.05, momentum=0.9, foreach=True),
    "adam, fused": lambda m: Adam(m.parameters(), 0.01, fused=True),
    "adam, foreach, amsgrad": lambda m: Adam(m.parameters(), 0.01, foreach=True, amsgrad=True),
    "adamw, tensor rate": lambda m: AdamW(m.parameters(), torch.tensor(0.01), fused=True),
    "adafactor": lambda m: Adafactor(m.parameters(), 0.01),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), 0.001, momentum=0.5, centered=True),
    "named": lambda m: SGD(m.named_parameters(), 0.05, momentum=0.9),
}


def begin(
    method: Method, hand: Any = None, *, steps: int = 6, model: nn.Module | None = None, **more: Any
) -> Run:
    model = model or net()
    return start(model, method, example=(samples()[0],), optimizer=hand, steps=steps, **more)


def steps(run: Run, optimizers: list[Optimizer], count: int = 4) -> None:
    inputs, labels = samples()
    for _ in range(count):
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.cross_entropy(run.model(inputs / 40), labels).backward()
        run.before_step()
        for optimizer in optimizers:
            optimizer.step()
        run.after_step()


def held(*optimizers: Optimizer) -> set[int]:
    return {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}


EVEN = tuple(range(0, 24, 2))
FACTOR = (Factor("2", "svd", (6,)),)
PRUNE = (Prune("2", "out", EVEN, 24), Prune("4", "in", EVEN, 24))
BOTH = (*FACTOR, Prune("2.expand", "out", EVEN, 24), Prune("4", "in", EVEN, 24))


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("edits", [FACTOR, PRUNE, BOTH], ids=["factor", "prune", "both"])
def test_every_optimizer_steps_on_after_an_edit(name: str, edits: tuple[Edit, ...]) -> None:
    model = net()
    optimizer = MAKES[name](model)
    run = begin(Replaces(edits=edits), optimizer, model=model)
    steps(run, [optimizer])
    assert {id(p) for p in model.parameters()} == held(optimizer)
    before = copy.deepcopy(model.state_dict())
    steps(run, [optimizer], 1)
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters())
    again = MAKES[name](model)  # as a resumed process makes it
    again.load_state_dict(stored(optimizer.state_dict()))


def test_names_of_parameters_follow() -> None:
    model = net()
    optimizer = MAKES["named"](model)
    run = begin(Replaces(), optimizer, model=model)
    steps(run, [optimizer])
    names = optimizer.param_groups[0]["param_names"]
    wanted = [n for n, _ in model.named_parameters()]
    wanted[wanted.index("2.expand.bias")] = "2.bias"  # the same parameter as ever
    assert names == wanted
    assert len(names) == len(optimizer.param_groups[0]["params"])


def test_groups_keep_their_rates_and_biases_their_group() -> None:
    model = net()
    weights = [p for p in model.parameters() if p.dim() > 1]
    biases = [p for p in model.parameters() if p.dim() == 1]
    optimizer = SGD(
        [
            {"params": weights[:1], "lr": 0.1, "weight_decay": 0.1},
            {"params": biases, "lr": 0.02, "weight_decay": 0.0},
            {"params": weights[1:], "lr": 0.3},
        ],
        0.05,
    )
    run = begin(Nothing(), optimizer, model=model)
    run.apply(Factor("2", "svd", (6,)))
    run.apply(Merge("2.reduce", "2.expand", 24, True))
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    found = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert found == {
        "0.weight": 0.1, "0.bias": 0.02, "2.reduce.weight": 0.3, "2.reduce.bias": 0.02,
        "4.weight": 0.3, "4.bias": 0.02,
    }  # fmt: skip
    assert held(optimizer) == {id(p) for p in model.parameters()}


def test_several_optimizers_follow_each_its_own_layers() -> None:
    model = net()
    first, second = SGD(model[2].parameters(), 0.05, momentum=0.9), Adam(model[4].parameters())
    third = AdamW(model[0].parameters(), 0.01)
    edits = (Factor("2", "svd", (6,)), Factor("4", "svd", (2,)))
    run = begin(Replaces(edits=edits), [first, second, third], model=model)
    steps(run, [first, second, third])
    assert held(first) == {id(p) for p in model[2].parameters()}
    assert held(second) == {id(p) for p in model[4].parameters()}
    assert held(third) == {id(p) for p in model[0].parameters()}
    momenta = [first.state[p]["momentum_buffer"] for p in model[2].parameters()]
    assert all(torch.isfinite(m).all() for m in momenta)


def test_decay_is_cancelled_in_several_optimizers() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizers = [SGD(m.parameters(), 0.1, weight_decay=0.5) for m in (one, two)]
    for parameter in (*one.parameters(), *two.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    cancel_decay(optimizers, [one.weight, two.weight])
    before = one.weight.detach().clone(), two.weight.detach().clone(), two.bias.detach().clone()
    for optimizer in optimizers:
        optimizer.step()
    assert torch.allclose(one.weight, before[0]) and torch.allclose(two.weight, before[1])
    assert not torch.allclose(two.bias, before[2])


def test_a_parameter_in_two_optimizers_is_replaced_in_both() -> None:
    model = net()
    optimizers = [SGD(model.parameters(), 0.01), Adam(model.parameters(), 0.01)]
    carry(optimizers, Factor("2", "svd", (6,)).apply(model))
    assert all(held(each) == {id(p) for p in model.parameters()} for each in optimizers)


# Each of them trains on with optimizers that do not know the new layer.
def _none(model: nn.Module) -> tuple[Any, list[Optimizer]]:
    return None, [SGD(model.parameters(), 0.05)]


def _one_of_two(model: nn.Module) -> tuple[Any, list[Optimizer]]:
    first, second = SGD(model[4].parameters(), 0.05), SGD(model[:4].parameters(), 0.05)
    return first, [first, second]


def _another(model: nn.Module) -> tuple[Any, list[Optimizer]]:
    return SGD(model.parameters(), 0.05), [SGD(model.parameters(), 0.05)]


def _fused(model: nn.Module) -> tuple[Any, list[Optimizer]]:
    return None, [Adam(model.parameters(), 0.01, fused=True)]


class ByData(Optimizer):
    """A user's own, which writes past autograd's bookkeeping."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data -= group["lr"] * parameter.grad


def _own(model: nn.Module) -> tuple[Any, list[Optimizer]]:
    return None, [ByData(model.parameters())]


@pytest.mark.parametrize("make", [_none, _one_of_two, _another, _fused, _own])
@pytest.mark.parametrize("at", [0, 2])
def test_a_layer_that_no_optimizer_knows_is_an_error(make: Any, at: int) -> None:
    model = net()
    given, stepping = make(model)
    run = begin(Replaces(at), given, model=model)
    with pytest.raises(TrainingError, match=r"^2 was replaced .* optimizer=\[\.\.\.\]"):
        steps(run, stepping)
    assert run.step == at
    run.close()
    assert run.followers.stale.handle is None


def test_a_network_of_which_every_weight_is_replaced_is_seen_too() -> None:
    model = nn.Sequential(nn.Linear(12, 8, bias=False), nn.Linear(8, 4, bias=False))
    edits = (Factor("0", "svd", (2,)), Factor("1", "svd", (2,)))
    run = begin(Replaces(edits=edits), None, model=model)
    with pytest.raises(TrainingError, match="0 was replaced"):
        steps(run, [SGD(model.parameters(), 0.05)])


@pytest.mark.parametrize("at", [0, 2])
def test_a_chain_of_edits_is_followed_to_its_end(at: int) -> None:
    """Weights that came and went between are of no matter."""
    model = net(bias=False)
    optimizer = SGD(model.parameters(), 0.05)
    run = begin(Replaces(at, BOTH), None, model=model)
    with pytest.raises(TrainingError, match="2 was replaced"):
        steps(run, [optimizer])
    model = net(bias=False)
    optimizer = SGD(model.parameters(), 0.05)
    run = begin(Replaces(at, BOTH), None, model=model)
    steps(run, [optimizer] if at else [], at)
    run.optimizer = optimizer  # late
    steps(run, [optimizer])
    assert held(optimizer) == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("at", [0, 2])
def test_an_optimizer_that_is_made_anew_or_handed_over_late_serves(at: int) -> None:
    for late in (True, False):
        model = net()
        optimizer = SGD(model.parameters(), 0.05, momentum=0.9)
        run = begin(Replaces(at), None, model=model)
        steps(run, [optimizer] if at else [], at)
        if late:
            run.optimizer = [optimizer]
        else:
            optimizer = SGD(model.parameters(), 0.05)
        steps(run, [optimizer])
        assert held(optimizer) == {id(p) for p in model.parameters()}
        before = copy.deepcopy(model[2].state_dict())
        steps(run, [optimizer], 1)
        assert not torch.equal(before["reduce.weight"], model[2].reduce.weight)


def test_a_group_that_was_added_by_hand_serves() -> None:
    """The old weights are still in the optimizer, and of no matter."""
    model = net()
    optimizer = SGD(model.parameters(), 0.05)
    run = begin(Replaces(2), None, model=model)
    steps(run, [optimizer], 2)
    optimizer.add_param_group({"params": [model[2].reduce.weight, model[2].expand.weight]})
    steps(run, [optimizer], 2)
    run.optimizer = optimizer
    assert [len(group["params"]) for group in optimizer.param_groups] == [5, 2]
    steps(run, [optimizer], 2)


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("hand", [True, False])
def test_an_optimizer_may_hold_some_parameters_on_purpose(at: int, hand: bool) -> None:
    model = net()
    optimizer = SGD(model[4].parameters(), 0.05)
    run = begin(Replaces(at), optimizer if hand else None, model=model)
    steps(run, [optimizer])
    assert held(optimizer) == {id(p) for p in model[4].parameters()}
    run.finish()


def test_frozen_layers_are_nobodys_business() -> None:
    model = net()
    model[2].requires_grad_(False)
    optimizer = SGD(model.parameters(), 0.05)
    run = begin(Replaces(), None, model=model)
    steps(run, [optimizer])
    assert not any(p.requires_grad for p in model[2].parameters())


def test_optimizers_that_step_in_turn_are_not_taken_for_stale() -> None:
    model, (inputs, labels) = net(), samples()
    optimizers = [SGD(model[2].parameters(), 0.05), SGD(model[4].parameters(), 0.05)]
    run = begin(Replaces(1), optimizers, model=model)
    for number in range(6):
        model.zero_grad()
        F.cross_entropy(model(inputs / 40), labels).backward()
        run.before_step()
        optimizers[number % 2].step()
        run.after_step()
    assert run.step == 6


def test_a_step_that_a_scaler_skips_says_nothing() -> None:
    model = net()
    run = begin(Replaces(1), None, model=model)
    optimizer = SGD(model.parameters(), 0.05)
    steps(run, [optimizer], 1)
    run.before_step()
    run.after_step()  # nobody stepped
    with pytest.raises(TrainingError, match="2 was replaced"):
        steps(run, [optimizer], 1)


def test_nothing_listens_where_nothing_was_replaced() -> None:
    model = net()
    run = begin(Nothing(), None, model=model)
    run.before_step()
    assert run.followers.stale.handle is None
    other = SGD(nn.Linear(2, 2).parameters(), 0.1)
    run.after_step()
    other.step()


def test_an_optimizer_of_another_network_is_refused() -> None:
    with pytest.raises(TrainingError, match="The Adam holds no parameter of the network"):
        begin(Nothing(), Adam(net().parameters(), 0.1))


# ------------------------------------------------------------------ optimizers of the loop


def _two(model: nn.Module, low: float = 0.01) -> list[Optimizer]:
    head = [p for name, p in model.named_parameters() if name.startswith("4")]
    body = [p for name, p in model.named_parameters() if not name.startswith("4")]
    groups = [{"params": head[:-1]}, {"params": head[-1:], "lr": low}]
    return [SGD(body, 0.1, momentum=0.9), Adam(groups, 0.02)]


def test_the_loop_takes_a_users_optimizers_with_rates_of_their_own(tmp_path: Path) -> None:
    data, seen = Data(samples()), []

    @dataclass(frozen=True)
    class Looks(Replaces):
        def before_step(self, run: Run) -> None:
            seen.append([g["lr"] for o in run.optimizers for g in o.param_groups])

    edits = (Factor("2", "svd", (6,)), Factor("4", "svd", (2,)))
    plan = replace(PLAN, optimizer=partial(_two, low=0.001), lr=1.0, finetune=1)
    run = start(net(), Looks(7, edits), data=data, steps=15, seed=3)
    fit(run, data, plan)
    shares = [rates[0] / 0.1 for rates in seen]
    assert shares[:3] == pytest.approx([0.5, 1.0, 1.0]) and shares[-1] < 0.05
    for rates, share in zip(seen, shares, strict=True):
        assert rates == pytest.approx([0.1 * share, 0.02 * share, 0.001 * share])
    assert held(*run.optimizers) == {id(p) for p in run.model.parameters()}

    def begun() -> Run:
        return start(net(), Looks(7, edits), data=data, steps=15, seed=3)

    with pytest.raises(Killed):
        fit(begun(), data, plan, folder=tmp_path, watch=dying(9))
    resumed = begun()
    fit(resumed, data, plan, folder=tmp_path, resume=True)
    first, second = run.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = replace(plan, optimizer=partial(_two, low=0.002))
    with pytest.raises(TrainingError, match="its train is .*low=0.001.*low=0.002"):
        fit(begun(), data, other, folder=tmp_path, resume=True)


def test_compress_takes_a_function_and_the_report_names_it() -> None:
    plan = replace(PLAN, optimizer=_two, epochs=1)
    result = pliant.compress(net(), Data(samples()), Replaces(2), train=plan)
    assert result.report.train["optimizer"].endswith("test_training._two")
    assert pliant.Report.from_json(result.report.to_json()).train == result.report.train


def test_what_makes_no_optimizer_is_refused() -> None:
    for make, error, sentence in (
        (lambda m: None, TrainingError, "it gave NoneType"),
        (lambda m: [], TrainingError, "it gave list"),
        (lambda m: SGD(m.head.parameters()), TrainingError, r"AttributeError.*named_parameters"),
        (lambda m: SGD(net().parameters(), 0.1), TrainingError, "holds no parameter"),
    ):
        with pytest.raises(error, match=sentence):
            optimizers_of(net(), Train(optimizer=make))  # type: ignore[arg-type]
    for wrong in ("lion", 3):
        with pytest.raises(DataError, match="or a function that takes the network"):
            Train(optimizer=wrong)  # type: ignore[arg-type]


def test_several_optimizers_share_one_scaler() -> None:
    """Unscaled once, stepped each, updated once: the second is not unscaled again."""
    plugins = pytest.importorskip("lightning_fabric.plugins")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    plugin = plugins.MixedPrecision("16-mixed", "cpu", scaler)
    fabric: Any = SimpleNamespace(strategy=SimpleNamespace(precision=plugin))
    layers = [nn.Linear(3, 1, bias=False) for _ in range(2)]
    optimizers = [SGD(layer.parameters(), 1.0) for layer in layers]
    before = [layer.weight.detach().clone() for layer in layers]
    plugin.backward(sum(layer(torch.ones(1, 3)).sum() for layer in layers), None)
    for optimizer in optimizers:
        plugin.unscale_gradients(optimizer)
    take_step(fabric, optimizers)
    for layer, old in zip(layers, before, strict=True):
        assert torch.allclose(layer.weight, old - 1)
    assert scaler.get_scale() == 2048.0


# ------------------------------------------------------------------ copies


def test_an_average_of_the_weights_follows() -> None:
    model = net()
    optimizer = SGD(model.parameters(), 0.05)
    average = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    other = copy.deepcopy(model).requires_grad_(False)
    run = begin(Nothing(), optimizer, model=model, copies=[average, other])
    with torch.no_grad():
        model[0].weight.add_(1)
    average.update_parameters(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    average.update_parameters(model)
    kept = average.module[0].weight.detach().clone()
    run.apply(Factor("2", "svd", (6,)))
    for twin in (average.module, other):
        assert [n for n, _ in twin.named_parameters()] == [n for n, _ in model.named_parameters()]
        assert torch.equal(twin[2].reduce.weight, model[2].reduce.weight)  # one basis
    assert torch.equal(average.module[0].weight, kept) and not torch.equal(kept, model[0].weight)
    columns = average.module[4].weight.detach()[:, EVEN]
    with torch.no_grad():
        model[4].weight.add_(1)
    run.apply(*BOTH[1:])
    assert torch.equal(average.module[4].weight, columns)  # its own, not the network's
    average.update_parameters(model)
    inputs = samples()[0]
    assert average(inputs).shape == model(inputs).shape
    assert not any(p.requires_grad for p in other.parameters())


def test_a_copy_of_another_network_is_named() -> None:
    run = begin(Nothing(), None, copies=[nn.Linear(2, 2)])
    with pytest.raises(EditError, match="A copy that follows the network must have its layers"):
        run.apply(Factor("2", "svd", (6,)))


# ------------------------------------------------------------------ a training that ends early


@dataclass(frozen=True)
class AtTheEnd(Method):
    """Searches as long as the network trains."""

    def finalize(self, run: Run) -> None:
        run.apply(Factor("2", "svd", (6,)))


def taken(run: Run, count: int) -> Run:
    for _ in range(count):
        run.after_step()
    return run


@pytest.mark.parametrize("count", [1, 5])
def test_a_search_that_has_not_ended_is_an_error(count: int) -> None:
    run = taken(begin(AtTheEnd()), count)
    with pytest.raises(TrainingError, match=f"for 6 steps .* after {count}: 2 was changed"):
        run.finish()
    assert run.finished and run.finish().params < run.cost.params  # it is whole, and said so once
    run = taken(begin(AtTheEnd()), count)
    with pytest.warns(UserWarning, match=f"ended after {count}: 2 was changed"):
        run.finish(strict=False)


def test_steps_that_were_never_told_are_missed() -> None:
    model = net()
    run, optimizer = begin(AtTheEnd(), model=model), SGD(model.parameters(), 0.05)
    for _ in range(6):
        run.before_step()
        optimizer.step()  # and no after_step
    with pytest.raises(TrainingError, match="ended after 0: 2 was changed"):
        run.finish()


def test_a_training_that_is_long_enough_or_needs_no_more_ends_quietly() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        taken(begin(AtTheEnd()), 6).finish()
        taken(begin(AtTheEnd()), 7).finish()
        begin(AtTheEnd(), steps=0).finish()
        begin(AtTheEnd(), steps=6).finish()  # nobody trains it
        taken(begin(Replaces(2)), 3).finish()  # its search is over
        taken(begin(Nothing()), 3).finish()


def test_a_stage_that_was_never_trained_is_named() -> None:
    for method in (chain(Replaces(1), Nothing()), together(chain(Nothing(), Nothing()))):
        with pytest.raises(TrainingError, match="after 2: nothing was not trained at all"):
            taken(begin(method), 2).finish()
        taken(begin(method), 6).finish()
    for count in (2, 6):  # nobody was to train the second
        taken(begin(chain(Stage(Nothing()), Stage(Nothing(), share=0))), count).finish()


def test_a_missed_budget_is_said_after_the_end() -> None:
    run = start(net(), AtTheEnd(), Budget(params=0.1), example=(samples()[0],), steps=6)
    run.after_step()
    with pytest.raises(TrainingError):
        run.finish()
    with pytest.raises(BudgetError):
        run.finish()


# ------------------------------------------------------------------ members


@dataclass(frozen=True)
class Refuses(Method):
    """Wants what is not there."""

    def refuse(self, run: Run) -> None:
        if not run.has_inputs:
            raise DataError("Refuses needs data: pass it.")

    def prepare(self, run: Run) -> None:
        raise AssertionError("never reached")


@pytest.mark.parametrize(
    "method",
    [Refuses(), together(Nothing(), Refuses()), chain(Nothing(), Refuses()), chain([Refuses()])],
)
def test_refusals_come_before_any_work_in_every_part(method: Method) -> None:
    model = net()
    with pytest.raises(DataError, match="Refuses needs data"):
        start(model, chain(Replaces(0), method), example=(samples()[0],))
    assert isinstance(model[2], nn.Linear)
    assert uses(method, "refuse") and "refuse" in HOOKS


@pytest.mark.parametrize("spec", ["nrmf", "trp", "energy", "evbmf", "elastic"])
def test_low_rank_methods_refuse_what_rank_one_cannot_reach(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **more: Any) -> Any:
        raise AssertionError("looked at data before it refused")

    monkeypatch.setattr(Data, "calibration", never)
    method, data = pliant.method(spec), Data(samples(), classes=4)
    with pytest.raises(BudgetError):
        start(net(), method, Budget(params=0.01), data=data)
    with pytest.raises(BudgetError):
        pliant.compress(net(), data, method, "params=0.01", train=PLAN)


def test_a_later_stage_does_not_see_its_budget_beforehand() -> None:
    """What it can reach depends on what is left of the network by then."""
    stages = chain(Stage(Nothing()), Stage(pliant.method("nrmf(samples=0)"), Budget(params=0.01)))
    run = start(net(), stages, data=Data(samples()), steps=4)
    assert run.state["stage"] == 0 and "stage1" not in run.state


def test_a_method_says_what_it_is_made_of() -> None:
    one = pliant.method("energy(p=0.9)")
    assert one.parts == () and one.plain() == plain(one)
    assert one.plain()["options"]["p"] == 0.9
    both = together(one, chain(Nothing()))
    assert both.parts == (one, chain(Nothing()))
    assert plain(both) == both.plain() == {
        "name": "together",
        "methods": [one.plain(), {"name": "chain", "stages": [
            {"method": {"name": "Nothing", "options": {}}, "budget": None, "share": 1.0}]}],
    }  # fmt: skip
    assert Nothing().resume(begin(Nothing()), {}, []) is None
    assert not Nothing().uses("loss") and both.uses("prepare")


# ------------------------------------------------------------------ generators


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    inputs, labels = samples()
    yield from zip(inputs.split(8), labels.split(8), strict=True)


def test_a_generator_is_read_once_and_kept() -> None:
    data, listed = Data(batches()), Data(list(batches()))
    for _ in range(2):
        pairs = zip(data.calibration(30, batch=8), listed.calibration(30, batch=8), strict=True)
        assert all(torch.equal(one[0], other[0]) for one, other in pairs)
    assert torch.equal(data.example()[0], listed.example()[0])  # type: ignore[index]
    looks = [data.batches("train", 8) for _ in range(2)]  # side by side
    together_read = [[rows_of(next(look)) for look in looks] for _ in range(5)]
    assert all(one == other for one, other in together_read)

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from batches()

    assert len(Data.of(endless()).calibration(20, batch=8)) == 3
    assert len(replace(data, name="other").calibration(30, batch=8)) == 4


def test_edits_without_parameters_leave_optimizers_alone() -> None:
    model = net()
    optimizer = SGD(model.parameters(), 0.1)
    carry(optimizer, Replaced())
    assert held(optimizer) == {id(p) for p in model.parameters()}
    with pytest.raises(PliantError):
        begin(Nothing(), optimizer)
