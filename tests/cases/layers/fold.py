"""Fold: what two layers in a row become, what it costs, and what stays apart."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from pliant.api import compress
from pliant.budget import Budget
from pliant.compose import Stage, chain, resolve
from pliant.cost import layer_costs
from pliant.edits import Fold, Merge, from_json, to_json
from pliant.errors import EditError, ModelError
from pliant.registry import build
from pliant.run import start
from pliant.surgery.fold import mergeable
from pliant.surgery.optim import carry
from pliant.testing import Case


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


def given(layer: Any, weight: list[float], bias: list[float] | None = None) -> Any:
    """Put these numbers into a layer, row by row."""
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight).reshape(layer.weight.shape))
        if bias is not None:
            layer.bias.copy_(torch.tensor(bias))
    return layer


# ---------------------------------------------------------------- by hand


def a_batch_norm_is_folded_by_hand() -> None:
    """2x + 1, then 6 (y - 3) / root(4) + 5, is 6x - 1: eq. (14)."""
    norm = given(nn.BatchNorm2d(1, eps=0.0), [6.0], [5.0])
    norm.running_mean.fill_(3)
    norm.running_var.fill_(4)
    model = nn.Sequential(given(nn.Conv2d(1, 1, 1), [2.0], [1.0]), norm, nn.ReLU())
    images = noise(2, 1, 3, 3)
    found: Any = compress(model, None, "fold", example=images).model
    assert found[0].weight.item() == 6 and found[0].bias.item() == -1
    assert close(found(images), model.eval()(images))
    assert compress(model, None, "fold(norms=False)", example=images).edits == ()


def two_pointwise_layers_with_a_norm_are_one_by_hand() -> None:
    """(1, 1, 1) times diag(2, 1, 3) times the rows (1, 0), (0, 1), (1, 1) is (5, 4)."""
    model = nn.Sequential(
        given(nn.Conv2d(2, 3, 1, bias=False), [1.0, 0.0, 0.0, 1.0, 1.0, 1.0]),
        given(nn.BatchNorm2d(3, eps=0.0), [2.0, 1.0, 3.0], [1.0, 2.0, 3.0]),
        given(nn.Conv2d(3, 1, 1), [1.0, 1.0, 1.0], [1.0]),
    )
    images = noise(2, 2, 3, 3)
    result = compress(model, None, "fold", example=images)
    assert result.edits == (Fold("1", "0"), Merge("0", "2", 1, True))
    one, *others = result.model.children()
    assert one.weight.flatten().tolist() == [5, 4] and one.bias.tolist() == [7]
    assert [type(other) for other in others] == [nn.Identity, nn.Identity]
    assert close(result.model(images), model.eval()(images))
    assert {row.layer: (row.form, row.reason) for row in result.report.layers} == {
        "0": ("merged", ""),
        "1": ("folded", ""),
        "2": ("dense", "it is a part of 0 now"),
    }


# ---------------------------------------------------------------- what is merged


class Branches(nn.Module):
    """Two layers in a row, and a sum that may read what passes between them."""

    def __init__(self, *, between: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 1)
        self.between = between

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.first(images)
        return self.second(hidden) + (hidden if self.between else images)


def what_else_is_read_stays() -> None:
    """A sum that no hook sees prevents the merge; one that reads the input does not."""
    example = (noise(2, 4, 5, 5),)
    assert mergeable(Branches(between=True), example) == []
    assert mergeable(Branches(between=False), example) == [Merge("first", "second", 4, True)]
    both = nn.Sequential(Branches(between=True), *pointwise(4, 6, 2))
    assert mergeable(both, example) == [Merge("1", "2", 2, True)]


class Answer:
    """What a network may give: an object that only it knows."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores


class Answering(nn.Module):
    """Gives what another network does in an object, or only which of its numbers is largest."""

    def __init__(self, inner: nn.Module, *, largest: bool = False) -> None:
        super().__init__()
        self.inner, self.largest = inner, largest

    def forward(self, images: Tensor) -> Answer:
        scores = self.inner(images)
        return Answer(scores.argmax(1) if self.largest else scores)


def outputs_of_any_kind_are_compared() -> None:
    """A wrong merge is seen through an object; where there are no numbers, nothing is proven."""
    example = (noise(2, 4, 5, 5),)
    assert mergeable(Answering(Branches(between=True)), example) == []
    merge = Merge("inner.first", "inner.second", 4, True)
    assert mergeable(Answering(Branches(between=False)), example) == [merge]
    with pytest.raises(ModelError, match="its Answer holds none: wrap the network"):
        mergeable(Answering(Branches(between=True), largest=True), example)


def pointwise(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Conv2d(n, m, 1) for n, m in zip(widths, widths[1:], strict=False)))


def only_what_gets_cheaper_is_merged() -> None:
    """8 to 2 to 8 has 32 products where one layer had 64; a row is merged as far as it pays."""
    for widths, readers in (
        ((8, 2, 8), []),
        ((8, 12, 8), ["1"]),
        ((8, 16, 12, 6), ["1", "2"]),
        ((8, 2, 16, 6), ["2"]),
        ((8, 4, 2, 4, 8), ["1", "3"]),
    ):
        model, example = pointwise(*widths), (noise(1, 8, 4, 4),)
        assert sorted(edit.reader for edit in mergeable(model, example)) == readers, widths


def nothing_is_merged_if_not_asked_for() -> None:
    for spec, layers in (("fold", 1), ("fold(merge=False)", 2)):
        run = start(pointwise(8, 12, 8), build(spec), example=(noise(1, 8, 4, 4),))
        run.finish()
        assert sum(isinstance(one, nn.Conv2d) for one in run.model.modules()) == layers


def what_is_not_one_product_stays() -> None:
    first, example = nn.Conv2d(8, 8, 3), (noise(1, 8, 6, 6),)
    for model in (
        nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 2, 1)),
        nn.Sequential(first, nn.Conv2d(8, 2, 1, groups=2)),
        nn.Sequential(first, nn.Conv2d(8, 2, 1, stride=2)),
        nn.Sequential(first, nn.Conv2d(8, 2, 1, padding=1)),
        nn.Sequential(first, nn.Conv2d(8, 2, 2)),
        nn.Sequential(first, nn.ReLU(inplace=True), nn.Conv2d(8, 2, 1)),
        nn.Sequential(first, nn.Linear(4, 2)),
        nn.Sequential(first, layer := nn.Conv2d(8, 8, 1), layer),
    ):
        assert mergeable(model, example) == []


# ---------------------------------------------------------------- the edit


# Two layers in a row, and an input: padding of every kind, stride, axes, biases.
PAIRS: tuple[tuple[nn.Module, nn.Module, tuple[int, ...]], ...] = (
    (nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 2, 1), (2, 4, 7, 6)),
    (nn.Conv2d(4, 6, 3, padding=2, stride=2), nn.Conv2d(6, 2, 1, bias=False), (2, 4, 7, 6)),
    (nn.Conv2d(4, 6, 3, padding="same", bias=False), nn.Conv2d(6, 2, 1), (2, 4, 7, 6)),
    (
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(6, 2, 1, padding="same", padding_mode="reflect"),
        (2, 4, 7, 6),
    ),
    (
        nn.Conv1d(4, 6, 3, dilation=2, bias=False),
        nn.Conv1d(6, 2, 1, bias=False, dilation=3),
        (2, 4, 9),
    ),
    (nn.Conv3d(2, 6, 3, padding=1), nn.Conv3d(6, 2, 1), (2, 2, 3, 4, 5)),
    (nn.Linear(4, 6), nn.Linear(6, 2), (2, 5, 4)),
    (nn.Linear(4, 6, bias=False), nn.Linear(6, 2), (2, 4)),
)


def merged_layers_compute_and_cost_what_they_should() -> None:
    """In double precision to the last digits; the edit survives JSON and rebuilds the shape."""
    for first, second, shape in PAIRS:
        dense: Any = nn.Sequential(first, second).double()
        x = noise(*shape).double()
        row = layer_costs(dense, (x,))["0"]
        (edit,) = from_json(json.loads(json.dumps(to_json(mergeable(dense, (x,))))))
        merged, fresh = copy.deepcopy(dense), copy.deepcopy(dense)
        edit.apply(merged)
        assert (merged(x) - dense(x)).abs().max() < 1e-14
        assert layer_costs(merged, (x,)) == {"0": edit.predict(row)}
        edit.apply(fresh, weights=False)
        fresh.load_state_dict(merged.state_dict())
        assert torch.equal(fresh(x), merged(x)) and str(fresh) == str(merged)


def what_is_kept_of_a_layer() -> None:
    """Its place in memory, its type of numbers, the mode of training, that it is frozen."""
    model: Any = pointwise(4, 6, 2).bfloat16().to(memory_format=torch.channels_last)
    model[0] = nn.Conv2d(4, 6, 3).bfloat16().to(memory_format=torch.channels_last)
    model.requires_grad_(False)
    Merge("0", "1", 2, True).apply(model)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[0].weight.dtype == model[0].bias.dtype == torch.bfloat16
    assert model[1].training and not any(p.requires_grad for p in model.parameters())


def a_fold_learns_and_trains_as_what_it_was() -> None:
    """The bias of a frozen layer is frozen; the identity has the mode of the batch norm."""
    for frozen, mode in ((True, False), (False, True)):
        model: Any = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3)).train(mode)
        model.requires_grad_(not frozen)
        Fold("1", "0").apply(model)
        assert [p.requires_grad for p in model.parameters()] == [not frozen] * 2
        assert [part.training for part in model.modules()] == [mode] * 3


def merges_are_refused_in_words() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 2, 1), nn.Conv2d(2, 2, 1, padding=1)),
        *(nn.Flatten(), nn.Linear(2, 2)),
    )
    for edit, says in (
        (Merge("0", "2", 2, True), "2 cannot be merged into 0: two convolutions"),
        (Merge("1", "2", 2, True), "cannot be merged"),
        (Merge("1", "4", 2, True), "cannot be merged"),
        (Merge("0", "3", 2, True), "cannot be merged"),
        (Merge("0", "1", 10**12, True), "other outputs or biases than the edit says"),
        (Merge("0", "1", 2, False), "other outputs or biases than the edit says"),
        (Merge("0", "9", 2, True), "has no layer '9'"),
    ):
        with pytest.raises(EditError, match=says):
            edit.apply(model)


def merged_parameters_are_trained_once() -> None:
    """Of two layers with groups of their own the new weight and bias join the first one's."""
    model, x = pointwise(4, 6, 2), noise(1, 4, 2, 2)
    optimizer = SGD([{"params": [*layer.parameters()]} for layer in model], 0.1, momentum=0.9)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
    carry(optimizer, Merge("0", "1", 2, True).apply(model))
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    assert groups == [[id(p) for p in model.parameters()], []] and len(groups[0]) == 2
    model(x).square().sum().backward()
    optimizer.step()


# ---------------------------------------------------------------- behind a factorization


def bottleneck() -> Any:
    """A projection without an activation, and the expansion of the next block behind it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU6()),
        *(nn.Conv2d(24, 16, 1, bias=False), nn.BatchNorm2d(16)),
        *(nn.Conv2d(16, 48, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU6()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 4)),
    )
    for norm in (part for part in model if isinstance(part, nn.BatchNorm2d)):
        for seed, name in enumerate(("weight", "bias", "running_mean", "running_var")):
            getattr(norm, name).data.copy_(noise(norm.num_features, seed=seed).abs() + 0.1)
    return model


def a_factorized_bottleneck_shrinks_further() -> None:
    """Of 24 to 16 to r to 48 channels 24 to r to 48 is left; as it was, nothing was to gain."""
    images, model = noise(2, 3, 8, 8), bottleneck()
    whole = compress(model, None, "fold", example=images)
    assert whole.edits == (Fold("1", "0"), Fold("4", "3"), Fold("6", "5"))
    svd = resolve("energy(only=('5',), recalibrate=False)")
    small, both = (
        compress(model, None, chain(Stage(svd, Budget(params=0.8)), *more), example=images)
        for more in ((), ("fold",))
    )
    (rank,) = both.report.layers[4].ranks
    assert Merge("3", "5.reduce", rank, True) in both.edits
    saved = small.report.after.macs - both.report.after.macs
    assert saved == 8 * 8 * (24 * 16 + 16 * rank - 24 * rank)
    assert both.report.after.params < small.report.after.params
    assert close(both.model(images), small.model(images))
    found: Any = both.model
    assert found[5].weight is found[5].expand.weight  # what a model asks of its layer


CASES = [
    Case(
        "fold",
        variants=("fold(norms=False)", "fold(merge=False)"),
        witnesses={
            "merge": nothing_is_merged_if_not_asked_for,
        },
        own=(
            a_batch_norm_is_folded_by_hand,
            two_pointwise_layers_with_a_norm_are_one_by_hand,
            what_else_is_read_stays,
            outputs_of_any_kind_are_compared,
            only_what_gets_cheaper_is_merged,
            what_is_not_one_product_stays,
            merged_layers_compute_and_cost_what_they_should,
            what_is_kept_of_a_layer,
            a_fold_learns_and_trains_as_what_it_was,
            merges_are_refused_in_words,
            merged_parameters_are_trained_once,
            a_factorized_bottleneck_shrinks_further,
        ),
    ),
]
