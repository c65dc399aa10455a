"""Progressive stepwise training: nested parts, coupled rates, and how many samples are seen."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from pliant.compose import together
from pliant.data import Data, Epoch, Train
from pliant.drivers.loop import fit
from pliant.errors import DataError, MethodError
from pliant.families.train.subsets import class_numbers, nested
from pliant.method import Method
from pliant.methods.train.progressive_stepwise import ProgressiveStepwise as Stepwise
from pliant.run import start
from pliant.testing import Case

SIZES = (50, 30, 17, 3)  # of the classes
LABELS = torch.repeat_interleave(torch.arange(4), torch.tensor(SIZES))
INPUTS = torch.arange(100.0)[:, None]


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """A data set that keeps its labels nowhere."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return INPUTS[row], LABELS[row]


class Kept(Pairs):
    """One that keeps them where torchvision does."""

    targets = LABELS.tolist()


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """One without an index."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(INPUTS, LABELS, strict=True)


def parts_are_nested_and_balanced() -> None:
    shares = (0.1, 0.25, 0.5, 0.75, 1.0)
    for seed in range(3):
        parts = [nested(LABELS, 100, share, seed) for share in shares]
        for share, part, after in zip(shares, parts, [*parts[1:], parts[-1]], strict=True):
            assert set(part.tolist()) <= set(after.tolist()) and len(part.unique()) == len(part)
            found = torch.bincount(LABELS[part], minlength=4)
            assert (found - share * torch.tensor(SIZES)).abs().max() <= 1 and found.min() >= 1
        assert parts[-1].tolist() == list(range(100))
        assert torch.equal(parts[1], nested(LABELS, 100, 0.25, seed))
    assert not torch.equal(nested(LABELS, 100, 0.5, 0), nested(LABELS, 100, 0.5, 1))
    assert len(nested(None, 100, 0.25, 0)) == 25


def labels_are_found_where_they_are_kept() -> None:
    turned = Subset(Kept(), list(range(99, -1, -1)))
    for data, wanted in (
        (Data((INPUTS, LABELS)), LABELS),
        (Data(Pairs()), LABELS),
        (Data(Kept()), LABELS),
        (Data(turned), LABELS.flip(0)),
        (Data(DataLoader(TensorDataset(INPUTS, LABELS), 8)), LABELS),
        (Data((INPUTS, INPUTS)), None),
        (Data((INPUTS, LABELS.view(50, 2).repeat(2, 1))), None),
    ):
        found = class_numbers(data)
        assert found is None if wanted is None else torch.equal(found, wanted)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="stream of batches"):
        class_numbers(Data(DataLoader(Stream(), 8)))


def the_noise_is_what_the_rule_says() -> None:
    """g = rate N / B, of every epoch, relative to the first."""
    data = Data((INPUTS, LABELS))
    for method, noise in (
        (Stepwise(), (1, 1, 1, 1)),
        (Stepwise(rule="batch"), (1, 1, 1, 1)),
        (Stepwise(rule="batch", most=18), (1, 1, 1, 1)),
        (Stepwise(rule="anneal", kappa=0.3), (1, 0.3, 0.09, 0.027)),
    ):
        found = [method.epoch(Epoch(number, 4, 10), data) for number in range(4)]
        sizes = [len(method.part(data, step, 0)) for step in range(4)]
        assert sizes[3] == 100 and found[3].samples == 1.0
        each = [e.rate * size / e.batch for e, size in zip(found, sizes, strict=True)]
        assert each == pytest.approx([g * sizes[0] / 10 for g in noise], rel=1e-9)
        if method.rule == "batch":
            grown = [min(round(10 * size / sizes[0]), method.most) for size in sizes]
            assert [e.batch for e in found] == grown
            if method.most > 100:  # whatever is rounded, the rate stays as it was
                assert [e.rate for e in found] == pytest.approx([1] * 4, rel=0.05)
            else:
                assert found[3].rate == pytest.approx(18 / 10 * sizes[0] / 100)
        else:
            assert [e.batch for e in found] == [10] * 4
    root = Stepwise(scaling="root").epoch(Epoch(3, 4, 10), data)
    assert root.rate == pytest.approx((sizes[0] / 100) ** 0.5)


def steps_end_with_all_of_the_data() -> None:
    def steps(method: Stepwise, of: int) -> list[int]:
        return [method.step_of(Epoch(number, of, 8)) for number in range(of)]

    assert steps(Stepwise(), 8) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert steps(Stepwise(), 1) == [3] and steps(Stepwise(), 2) == [1, 3]
    assert steps(Stepwise(), 10)[-1] == 3
    assert steps(Stepwise(epochs=(5, 1, 1, 1)), 8) == [0, 0, 0, 0, 0, 1, 2, 3]
    given = Stepwise(fractions=(0.5, 1.0), rule="given", batches=(4, 9), rates=(2.0, 0.25))
    found = [given.epoch(Epoch(n, 2, 8), Data((INPUTS, LABELS))) for n in range(2)]
    assert [(e.batch, e.rate) for e in found] == [(4, 2.0), (9, 0.25)]


class Counting(Method):
    """Counts the samples that the network is shown."""

    def prepare(self, run):  # type: ignore[no-untyped-def]
        run.state["seen"] = 0

    def loss(self, run, loss, output, batch):  # type: ignore[no-untyped-def]
        run.state["seen"] += len(output)
        return loss


def five_eighths_of_the_samples_are_seen() -> None:
    """Counted as they go through the network: sum of E_s N_s, which the history says too."""
    method, data = Stepwise(), Data((INPUTS / 100, LABELS))
    train = Train(epochs=8, batch=16, lr=0.01, schedule="constant", device="cpu")
    torch.manual_seed(0)
    run = start(nn.Linear(1, 4), together(method, Counting()), data=data, epochs=8, batch=16)
    fit(run, data, train)
    sizes = [len(method.part(data, step, run.seed)) for step in range(4)]
    seen = run.state["part1"]["seen"]
    assert seen == run.state["part0"]["samples"] == 2 * sum(sizes)
    assert seen / 800 == pytest.approx(0.625, abs=0.02)
    rows = [row for row in run.log if "samples" in row]
    assert [row["samples"] for row in rows][-1] == seen and len(rows) == 8
    lrs = [row["lr"] for row in run.log if "lr" in row]
    assert lrs == pytest.approx([0.01 * sizes[0] / sizes[n // 2] for n in range(8)])


def what_does_not_rise_is_refused() -> None:
    for method, words in (
        (Stepwise(fractions=(0.5, 0.8)), "end in 1"),
        (Stepwise(fractions=(0.5, 0.5, 1.0)), "rise"),
        (Stepwise(fractions=()), "rise"),
        (Stepwise(epochs=(1.0,)), "for each of 4 fractions"),
        (Stepwise(rule="given", rates=(1.0,)), "batches and in rates"),
    ):
        for told in ({}, {"epochs": 4, "batch": 8}):
            with pytest.raises(MethodError, match=words):
                start(nn.Linear(1, 4), method, data=Data((INPUTS, LABELS)), **told)  # type: ignore[arg-type]
    with pytest.raises(MethodError, match=r"fractions must be a list of float above 0 and at most"):
        start(nn.Linear(1, 4), Stepwise(fractions=(0.0, 1.0)), data=Data((INPUTS, LABELS)))


CASES = [
    Case(
        "progressive_stepwise",
        spec="progressive_stepwise(fractions=(0.5, 1.0))",
        variants=("progressive_stepwise(rule='batch', most=10)",),
        witnesses={
            "fractions": steps_end_with_all_of_the_data,
            "epochs": steps_end_with_all_of_the_data,
            "batches": steps_end_with_all_of_the_data,
            "rates": steps_end_with_all_of_the_data,
            "kappa": the_noise_is_what_the_rule_says,
        },
        own=(
            parts_are_nested_and_balanced,
            labels_are_found_where_they_are_kept,
            the_noise_is_what_the_rule_says,
            steps_end_with_all_of_the_data,
            five_eighths_of_the_samples_are_seen,
            what_does_not_rise_is_refused,
        ),
    )
]
