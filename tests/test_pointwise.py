"""Tiles, positions, kernels and heads: what the point-wise evidence rests on."""

import math

import pytest
import torch
from torch import Tensor, nn

import pliant
from pliant import zoo
from pliant.data import load
from pliant.edits import Factor
from pliant.families.analyze import arrange, kernels
from pliant.families.analyze.decisions import better
from pliant.families.analyze.evidence import area, chances, minimal_points, saliency
from pliant.families.analyze.heads import find_head, maps
from pliant.testing import TOYS
from tests.conftest import needs_data


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- tiles


def tiles_of(image: Tensor, parts: int) -> list[Tensor]:
    rows = [part for strip in image.chunk(parts, 1) for part in strip.chunk(parts, 2)]
    return sorted(rows, key=lambda tile: float(tile.flatten()[0]))


def test_tiles_are_whole_and_lie_elsewhere():
    images = torch.arange(2 * 3 * 64.0).view(2, 3, 8, 8)
    mixed = arrange.shuffle_tiles(images, 4, random())
    assert not torch.equal(mixed, images) and mixed.shape == images.shape
    for before, after in zip(images, mixed, strict=True):
        pairs = zip(tiles_of(before, 4), tiles_of(after, 4), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    same = arrange.shuffle_tiles(images, 4, random())
    assert torch.equal(mixed, same)
    other = arrange.shuffle_tiles(images, 4, random(1))
    assert not torch.equal(mixed, other)
    orders = mixed - images[:, :1, :1, :1]
    assert not torch.equal(orders[0], orders[1])  # each image has an order of its own


def test_every_order_of_tiles_comes_up():
    images = torch.arange(4.0).view(1, 1, 2, 2).expand(2000, -1, -1, -1)
    mixed = arrange.shuffle_tiles(images, 2, random()).flatten(1)
    shares = torch.stack([(mixed == value).float().mean(0) for value in range(4)])
    assert (shares - 0.25).abs().max() < 0.05


@pytest.mark.parametrize(("shape", "parts"), [((2, 3, 12), 4), ((2, 2, 3, 4, 6), 2)])
def test_tiles_of_signals_and_volumes(shape, parts):
    inputs = torch.arange(float(math.prod(shape))).view(shape)
    mixed = arrange.shuffle_tiles(inputs, parts, random())
    assert torch.equal(mixed.flatten().sort().values, inputs.flatten())
    assert not torch.equal(mixed, inputs)
    if len(shape) == 5:  # the axis of 3 cannot be cut: its planes keep their order
        assert torch.equal(mixed.diff(dim=2), torch.full_like(mixed[:, :, 1:], 24.0))


def test_positions_move_with_all_their_channels():
    seen = (
        torch.stack([torch.arange(16.0), -torch.arange(16.0)]).view(1, 2, 4, 4).repeat(3, 1, 1, 1)
    )
    mixed = arrange.permute_positions(seen, random())
    assert torch.equal(mixed[:, 0], -mixed[:, 1]) and not torch.equal(mixed[0], mixed[1])
    assert torch.equal(mixed[0, 0].flatten().sort().values, torch.arange(16.0))
    moved = arrange.shift_positions(seen)
    assert float(moved[0, 0, 0, 0]) == 10 and torch.equal(arrange.shift_positions(moved), seen)


def test_seams_alone_are_blurred():
    image = torch.zeros(1, 1, 8, 8)
    image[..., 4:] = 4
    soft = arrange.blur_seams(image, 2)
    assert soft[0, 0, 0].tolist() == [0, 0, 0, 1, 3, 4, 4, 4]
    assert torch.equal(arrange.blur_seams(image, 3), image)  # nothing is cut, so there is no seam
    flat = torch.ones(1, 1, 8, 8)
    assert torch.allclose(arrange.blur_seams(flat, 4), flat)


def test_hooks_that_rearrange_come_off_after_exceptions():
    layer = nn.Sequential(nn.Conv2d(1, 1, 1))

    def fails(seen: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), arrange.rearranged(layer, "0", fails):
        layer(torch.ones(1, 1, 2, 2))
    assert not layer[0]._forward_hooks


def test_intervals_cover_and_chance_is_that_of_the_classes():
    """Of 400 decisions in three classes 70 % stay; by chance it would be the sum of p squared."""
    before = torch.arange(400) % 4 % 3  # one half in class 0
    after = torch.where(torch.rand(400, generator=random()) < 0.6, before, (before + 1) % 3)
    found = arrange.agreement(before, [after, after], random())
    assert found.share == float((before == after).double().mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * (0.24 / 400) ** 0.5, rel=0.15)
    expected = sum(
        float((before == k).double().mean() * (after == k).double().mean()) for k in range(3)
    )
    assert found.chance == pytest.approx(expected, abs=0.005) and found.p == 1 / 1001
    dealt = arrange.agreement(before, [before[torch.randperm(400, generator=random())]], random())
    assert dealt.p > 0.05


# ---------------------------------------------------------------- curves


def test_areas_and_least_numbers_by_hand():
    curve = torch.tensor([[1.0, 0.5, 0.0], [1.0, 1.0, 1.0]])
    assert area(curve).tolist() == [0.5, 1.0]
    scores = torch.zeros(1, 2, 5)
    scores[0, 0] = torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0])  # class 0, lost with one position
    assert minimal_points(scores, torch.tensor([0])).tolist() == [2]
    assert minimal_points(scores.abs(), torch.tensor([0])).tolist() == [0]
    taken = chances(scores, torch.tensor([0]), 2)
    assert torch.allclose(taken, torch.tensor([1.0, 1.0, 1.0])[None].sigmoid())
    assert chances(scores, torch.tensor([0]), 99).shape == (1, 5)


def test_smaller_areas_are_told_from_equal_ones():
    areas = torch.rand(40, generator=random(), dtype=torch.float64)
    assert better(areas - 0.1, areas) < 1e-6 and better(areas + 0.1, areas) > 0.99
    assert better(areas, areas) > 0.4


def test_saliency_is_the_pooled_gradient():
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 3))
    inputs, classes = noise(2, 2, 4, 4), torch.tensor([2, 0])
    found = saliency(model, inputs, classes, (2, 2))
    slopes = model[1].weight.detach()[classes].view(2, 2, 4, 4).abs().sum(1)
    assert torch.allclose(found, slopes.view(2, 2, 2, 2, 2).mean((2, 4)))
    assert all(parameter.grad is None for parameter in model.parameters())


# ---------------------------------------------------------------- heads


def test_heads_of_several_forms_are_found():
    x = noise(4, 3, 8, 8)
    body = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True)]
    linear = nn.Linear(6, 3)
    factored = nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 3))
    for head, layer in (
        ([nn.AvgPool2d(8), nn.Flatten(), nn.Dropout(0.5), linear], "5"),
        ([nn.AdaptiveAvgPool2d(1), nn.Flatten(), factored], "4"),
        ([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Sequential(linear, nn.BatchNorm1d(3))], "4"),
        ([nn.Conv2d(6, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()], ""),
    ):
        found = find_head(nn.Sequential(*body, *head), x)
        assert (found.layer, found.pooled) == (layer, True)
        assert found.shape == ((3 if layer == "" else 6), 8, 8) and found.positions == 64
    signal = TOYS["signal"]
    assert find_head(signal.model(), signal.inputs(4)[0]).shape == (12, 8)
    halves = nn.Sequential(*body, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(24, 3))
    found = find_head(halves, x)
    assert not found.pooled and found.shape == (6, 2, 2)
    assert found.weight.shape == (3, 6, 2, 2)


def test_a_compressed_head_is_still_one_affine_map():
    toy = TOYS["plain"]
    model = toy.model()
    Factor("12", "svd", (2,)).apply(model)
    head = find_head(model, toy.inputs(4)[0])
    seen, scores = maps(model, head, toy.inputs(8)[0])
    assert head.layer == "12" and head.pooled
    assert torch.allclose(head.scores(seen).float(), scores, atol=1e-5)


# ---------------------------------------------------------------- kernels


def test_shapes_of_kernels_by_hand():
    point, flat, edge = torch.zeros(3, 3), torch.full((3, 3), 0.5), torch.zeros(3, 3)
    point[1, 1], edge[0, :], edge[1, 1] = -3, 1, 1
    found = kernels.shape_of(torch.stack([point, flat, edge])[:, None])
    assert torch.allclose(found.concentration[:, 0], torch.tensor([1, 1 / 9, 1 / 4]).double())
    assert torch.allclose(found.centre[:, 0], torch.tensor([1, 1 / 9, 1 / 4]).double())
    assert found.smoothness[1, 0] == pytest.approx(1)
    # G * point has taps (1, 2, 4)/16: |w - G * w| = |w| sqrt((12/16)^2 + 4 (2/16)^2 + 4 (1/16)^2)
    rough = math.sqrt(144 + 16 + 4) / 16
    assert found.smoothness[0, 0] == pytest.approx(1 - rough)
    assert found.concentration.shape == (3, 1)


def test_every_wide_convolution_is_measured():
    model = TOYS["grouped"].model()
    stats = kernels.kernel_stats(model)
    assert list(stats) == ["0", "3", "7", "9"]  # the 1x1 one would be a point whatever it learns
    assert stats["3"].concentration.shape == (8, 1) and stats["7"].concentration.shape == (12, 4)
    lines = kernels.kernel_stats(TOYS["signal"].model())["0"].concentration
    assert ((lines >= 1 / 5) & (lines <= 1)).all()
    assert kernels.suggest_pointwise(model, 1.0) == []
    with torch.no_grad():
        model[9].weight[..., [0, 2], :] = 0
        model[9].weight[..., [0, 2]] = 0
    assert kernels.suggest_pointwise(model) == ["9"]


def test_designed_kernels_are_what_they_are_called():
    for size in (3, 5, 7):
        found = kernels.classical(size)
        assert found["Gaussian"].min() > 0 and abs(float(found["Laplacian"].sum())) < 1e-12
        assert torch.allclose(found["edge"], -found["edge"].flip(3))
        assert all(kernel.shape == (1, 1, size, size) for kernel in found.values())
        smooth = [float(kernels.shape_of(kernel).smoothness) for kernel in found.values()]
        assert smooth[0] > smooth[2]  # a Gaussian is smoother than its Laplacian


def test_taps_that_take_part():
    """One tap of nine, all alike, two halves; and a unit that sees nothing."""
    layer = nn.Conv2d(1, 4, 3, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0, 0, 1, 1], layer.weight[1], layer.weight[2, 0, 0, :2] = 1, 1, 1
    model = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

    def effective(row: int) -> float:
        alone = nn.Sequential(nn.Conv2d(1, 1, 3, bias=False), nn.Flatten(), nn.Linear(16, 2))
        alone[0].weight.data = layer.weight.data[row : row + 1]
        return kernels.taps(alone, [torch.ones(2, 1, 6, 6)], random())["0"].effective

    assert effective(0) == pytest.approx(1 / 9) and effective(1) == pytest.approx(1)
    assert effective(2) == pytest.approx(2 / 9)
    found = kernels.taps(model, [torch.ones(2, 1, 6, 6)], random())["0"]
    assert found.dead == pytest.approx(1 / 4) and found.effective == pytest.approx(2 / 9)
    layer.weight.data[1:3] = -1  # what is not active does not count
    found = kernels.taps(model, [torch.ones(2, 1, 6, 6)], random())["0"]
    assert found.effective == pytest.approx(1 / 9)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_taps_add_up_to_the_response(groups):
    layer, x = nn.Conv2d(4, 8, (3, 2), groups=groups, bias=False), noise(2, 4, 6, 5)
    parts = kernels._contributions(layer, x, random())
    wanted = layer(x).detach().movedim(1, -1).flatten(0, -2)
    found = parts.sum(-1).flatten(1).float()
    assert torch.allclose(found.sort(0).values, wanted.sort(0).values, atol=1e-5)


def test_kernels_with_one_tap_left():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 1))
    weight = model[0].weight.detach()
    kept = kernels.ablated(model, "dominant", random())[0].weight.detach()
    assert ((kept != 0).flatten(2).sum(2) == 1).all()
    assert torch.equal(kept.abs().flatten(2).amax(2), weight.abs().flatten(2).amax(2))
    drawn = kernels.ablated(model, "random", random())[0].weight.detach()
    assert ((drawn != 0).flatten(2).sum(2) == 1).all() and not torch.equal(drawn, kept)
    assert torch.equal(drawn[drawn != 0], weight[drawn != 0])
    flat = kernels.ablated(model, "mean", random())
    assert torch.allclose(flat[0].weight.mean((2, 3)), weight.mean((2, 3)))
    assert (flat[0].weight.flatten(2).std(2) < 1e-6).all()
    assert torch.equal(flat[1].weight, model[1].weight) and torch.equal(model[0].weight, weight)


# ---------------------------------------------------------------- a trained network


@pytest.mark.data
@pytest.mark.slow  # a few forward passes of ResNet-20 over 200 images
def test_evidence_of_a_trained_network_is_faithful():
    """Deletion by evidence is faster than in random order, and than by input gradients."""
    weights = needs_data("pretrained") / "resnet20-cifar10.safetensors"
    from safetensors.torch import load_file

    model = zoo.build("resnet20")
    model.load_state_dict(load_file(weights))
    data = load(str(needs_data("cifar10-jpeg")))
    spec = "pointwise_activation(grids=[4], permutations=1, layers=1)"
    values = pliant.analyze(model, data, spec).values
    assert len(values["decisions"]) == 200 and values["exactness"] < 1e-5
    assert values["permuted"] < 1e-5
    assert values["deletion"] < values["deletion_random"] and values["p_random"] < 0.05
    assert values["deletion"] <= values["deletion_saliency"] and values["p_saliency"] < 0.05
