"""What the benches of training methods and of layers build, label and measure."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sklearn.metrics import jaccard_score
from torch import nn

from bench.data import pooled_digits
from bench.experiments import search_items, train_family
from bench.experiments.layers_family import FixedShifts
from bench.merged import deep, merged, mixture, step_seconds
from bench.scenes import mean_iou, scenes
from bench.small import cnn
from pliant.cost import cost
from pliant.data import Data
from pliant.nn.mobile import MBConv, MobileNetwork, Space
from pliant.run import start


def test_fixed_shifts_have_the_taps_in_turn_and_leave_the_first_convolution() -> None:
    model = cnn(1, [4, 12])
    start(model, FixedShifts(), example=(torch.randn(2, 1, 8, 8),)).finish()
    kinds = [type(layer).__name__ for layer in model if hasattr(layer, "kernel_size")]
    assert kinds[0] == "Conv2d" and kinds.count("ShiftConv2d") == 3
    last: Any = [layer for layer in model if type(layer).__name__ == "ShiftConv2d"][-1]
    assert last.taps().tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2]]


def test_the_noise_is_in_the_training_labels_alone() -> None:
    data = pooled_digits({"train": 1000, "test": 50})
    assert data.train[0].shape == (1000, 1, 14, 14) and data.train[0].dtype == torch.uint8
    wrong = train_family.noisy(data, {"rate": 0.4, "kind": "symmetric"}, seed=0)
    assert float((wrong.train[1] != data.train[1]).float().mean()) == pytest.approx(0.4, abs=0.05)
    assert torch.equal(wrong.test[1], data.test[1])


def test_dropouts_stand_behind_both_poolings() -> None:
    kinds = [type(layer) for layer in train_family.network([4, 8], 0.3)]
    assert [kinds[n - 1] for n, kind in enumerate(kinds) if kind is nn.Dropout] == [
        nn.MaxPool2d,
        nn.MaxPool2d,
    ]
    assert nn.Dropout not in [type(layer) for layer in train_family.network([4, 8], 0.0)]


def test_likeness_is_the_mean_cosine_between_classes() -> None:
    rows = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [-1.0, 1.0]])
    labels = torch.tensor([0, 0, 1, 2])
    data = Data(train=(rows, labels), test=(rows, labels))
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 3))
    assert train_family.likeness(model, data) == pytest.approx(2 * 0.5**0.5 / 3)


def test_channels_out_are_those_of_the_smallest_norms() -> None:
    """Three of four filters give nothing: without them nothing changes, by chance it does."""
    torch.manual_seed(0)
    model = train_family.network([4], 0.0)
    conv = model[3]
    with torch.no_grad():
        conv.weight[:3] *= 1e-3
        model[4].weight[:3] = 0.0
        model[0].weight[:3] = 0.0
        model[1].weight[:3] = 0.0
    images = torch.randn(64, 1, 8, 8)
    labels = model.eval()(images).argmax(1)
    data = Data(train=(images, labels), test=(images, labels))
    found = train_family.pruned(model, data, 0.75)
    assert found["by_norm"] == 1.0 > found["by_chance"]


def test_small_losses_are_kept() -> None:
    losses = torch.tensor([3.0, 1.0, 2.0, 4.0])
    method = train_family._method("small losses, 0.5")
    run = SimpleNamespace(step=50, steps=100)
    assert method.weigh(run, losses, None, None).tolist() == [0, 1, 1, 0]  # type: ignore[arg-type,union-attr]
    run.step = 5  # half of the ramp
    assert method.weigh(run, losses, None, None).tolist() == [1, 1, 1, 0]  # type: ignore[arg-type,union-attr]


def test_right_labels_are_counted_among_the_surest() -> None:
    model = nn.Identity()
    scores = torch.tensor([[4.0, 0.0], [0.0, 3.0], [2.0, 0.0], [0.0, 1.0]])
    data = Data(train=(scores, torch.tensor([0, 1, 1, 0])))
    assert train_family.right(model, data, torch.tensor([0, 0, 1, 0]), 0.5) == 0.5


def test_scenes_have_the_class_that_the_far_patch_says_and_are_scored_as_scikit_learn_does() -> (
    None
):
    images, masks = scenes(6, 32, 64, seed=0)
    for image, mask, kind in zip(images, masks, [0, 1, 2, 0, 1, 2], strict=True):
        assert mask.unique().tolist() == [0, 1 + kind] and not mask[:, :32].any()
        assert int((image[:, :, :12] > 1).sum((1, 2)).argmax()) == kind
    found = torch.randint(4, masks.shape, generator=torch.Generator().manual_seed(0))
    wanted = jaccard_score(masks.flatten(), found.flatten(), average="macro")
    assert mean_iou(found, masks, 4) == pytest.approx(wanted)


def test_filters_of_all_sizes_merge_into_one_or_stand_side_by_side() -> None:
    stage = {"channels": 4, "blocks": 2, "stride": 1, "ops": ["mbconv_k7_e2"]}
    row = {"inputs": 1, "stem": 4, "kernel": [3, 3], "stride": [1, 1], "stages": [stage]}
    space, x = Space.from_plain({**row, "head": 4, "eps": 1e-5}), torch.zeros(1, 1, 8, 8)
    plain, one, many = (MobileNetwork(space) for _ in range(3))
    assert deep(plain) == ["blocks.0.layers.3", "blocks.1.layers.3"]
    costs = [cost(m, (x,)).macs for m in (plain, merged(one, (3, 5, 7)), mixture(many, (3, 5, 7)))]
    filters = 2 * 8 * 8 * 8
    assert costs[0] == costs[1] and costs[2] - costs[0] == filters * (9 + 25)
    assert step_seconds(one, torch.randn(2, 1, 8, 8), torch.tensor([0, 1])) > 0
    assert one.blocks[0].layers[3].logits.grad.any()  # type: ignore[index, union-attr]


def test_the_fastest_of_those_as_accurate_counts() -> None:
    rows = [{"accuracy": a, "predicted_ms": t} for a, t in ((0.5, 1.0), (0.6, 3.0), (0.7, 2.0))]
    assert [search_items.reached(a, rows) for a in (0.4, 0.55, 0.8)] == [1.0, 2.0, 3.0]
    deep_filter = nn.Sequential(MBConv(4, 4, 5, 3, 1, 1e-5))
    assert search_items.made_up(2.0, 0.5)(deep_filter, ()) == pytest.approx(0.0115)
